// CUDA for a host compiler: the names of primitives.cuh and launch.cuh, so that the kernels' source runs without a card.
//
// The threads of a block are fibers that run one at a time, in a shuffled order, from one barrier or shuffle to the next;
// blocks run in a shuffled order too. Shared memory starts as NaN. A missing barrier therefore reads NaN or old values,
// and threads that disagree about a barrier are reported. Slow, for tests only.
#pragma once

#include <math.h>
#include <string.h>

#include <functional>

#include "problem.h"

#define CACR_DEVICE inline
#define CACR_KERNEL(threads, blocks_per_sm) inline void
#define CACR_SHARED(type, name) type& name = *static_cast<type*>(emulation::shared_memory(sizeof(type)))
#define CACR_BARRIER() emulation::barrier(__FILE__, __LINE__)
#define CACR_UNROLL
#define CACR_UNROLL_SOME

namespace cacr {
namespace emulation {

int thread_index();
i64 block_index(int axis);
void barrier(const char* file, int line);
float shuffle_xor(float value, int mask);
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
// Whether kernels that can use tensor cores do.
bool tensor_cores();
void* shared_memory(size_t bytes);
// Runs body once for every thread of every block; 0, or 1 with the reason kept for cacr_error_cuda.
int run_grid(i64 x, int y, int z, int threads, const std::function<void()>& body);

}  // namespace emulation

inline int thread_index() { return emulation::thread_index(); }
inline i64 block_x() { return emulation::block_index(0); }
inline int block_y() { return (int)emulation::block_index(1); }
inline int block_z() { return (int)emulation::block_index(2); }
inline float shuffle_xor(float value, int mask) { return emulation::shuffle_xor(value, mask); }
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::multiply_add(d, a, b);
}

inline unsigned bits_of(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float float_of(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float float_of_half(unsigned short bits) {
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    float value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        value = ldexpf((float)fraction, -24);
    else
        value = ldexpf((float)(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

// Round to nearest even.
inline unsigned short half_of_float(float value) {
    const unsigned sign = bits_of(value) >> 16 & 0x8000u;
    const float size = fabsf(value);
    if (value != value) return 0x7fff;
    if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00u);
    if (size < ldexpf(1.0f, -14)) return (unsigned short)(sign | (unsigned)nearbyintf(ldexpf(size, 24)));
    const int exponent = ilogbf(size);
    const unsigned fraction = (unsigned)nearbyintf(ldexpf(size, 10 - exponent));  // 1024..2048, may carry
    return (unsigned short)(sign | (((unsigned)(exponent + 15) << 10) + fraction - 1024u));
}

constexpr int kInvalidValue = 1;

class DeviceScope {
  public:
    explicit DeviceScope(int) {}
    int error() const { return 0; }
};

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), i64 x, int y, int z, int threads, void*, const Args&... args) {
    return emulation::run_grid(x, y, z, threads, [&] { kernel(args...); });
}

}  // namespace cacr
