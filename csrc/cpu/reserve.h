// Memory of large gradients. The C library hands a block of more than 32 MB back to the system when it is freed, and every step
// would pay for the same pages again, each filled with zeros first: on a virtual machine a third of the kernels' own time.
#pragma once

#include <cstddef>

namespace cacr {

// Bytes that reserve_release may keep for later, in all; what is kept beyond it is freed.
void reserve_limit(std::size_t bytes);

// Bytes kept at the moment.
std::size_t reserve_kept();

// At least `bytes` of uninitialised memory, aligned to 64 bytes: a kept block of at most twice as many, or a new one, for which
// everything that is kept is freed first, so that keeping never raises the peak of what gradients take. Throws std::bad_alloc.
// `capacity` is what reserve_release must be told.
void* reserve_take(std::size_t bytes, std::size_t& capacity);
void reserve_release(void* data, std::size_t capacity);

}  // namespace cacr
