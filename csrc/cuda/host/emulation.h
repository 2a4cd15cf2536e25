// CUDA for a host compiler: the names of primitives.cuh and launch.cuh, so that the kernels' source runs without a card.
//
// The threads of a block are fibers that run one at a time, in a shuffled order, from one barrier or shuffle to the next;
// blocks run in a shuffled order too. Shared memory starts as NaN, and asynchronous copies are made when a thread waits for
// its own. A missing barrier or wait therefore reads NaN or old values, and threads that disagree about a barrier are
// reported. Slow, for tests only.
#pragma once

#include <math.h>
#include <string.h>

#include <functional>

#include "problem.h"

#define CACR_DEVICE inline
#define CACR_KERNEL(threads, blocks_per_sm) inline void
#define CACR_SHARED(type, name) type& name = *static_cast<type*>(emulation::shared_memory(sizeof(type)))
#define CACR_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(emulation::dynamic_shared_memory())
#define CACR_BARRIER() emulation::barrier(__FILE__, __LINE__)
#define CACR_UNROLL
#define CACR_UNROLL_SOME
#define CACR_UNROLL_BY(count)

namespace cacr {
namespace emulation {

int thread_index();
int thread_count();
i64 block_index(int axis);
void barrier(const char* file, int line);
float shuffle_xor(float value, int mask);
enum class Factors { half, bfloat16, tf32 };  // 16, 16 and 8 inner indices of an instruction
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Factors factors);
void load_matrices(unsigned (&words)[4], const void* row, bool transposed);
// The copies of a thread happen when it waits for them, and not before.
void begin_copy(void* to, const void* from, int bytes, int width);
void finish_copies();
// Whether kernels that can use tensor cores do.
bool tensor_cores();
// Dynamic shared memory of a block.
int shared_limit();
void* shared_memory(size_t bytes);
void* dynamic_shared_memory();
// Runs body once for every thread of every block; 0, or 1 with the reason kept for cacr_error_cuda.
int run_grid(i64 x, int y, int z, int threads, const std::function<void()>& body, size_t dynamic_bytes = 0);

}  // namespace emulation

inline int thread_index() { return emulation::thread_index(); }
inline int thread_count() { return emulation::thread_count(); }
inline i64 block_x() { return emulation::block_index(0); }
inline int block_y() { return (int)emulation::block_index(1); }
inline int block_z() { return (int)emulation::block_index(2); }
inline float shuffle_xor(float value, int mask) { return emulation::shuffle_xor(value, mask); }
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::multiply_add(d, a, b, emulation::Factors::half);
}
inline void multiply_add_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulation::multiply_add(d, a, b, emulation::Factors::bfloat16);
}
inline void load_matrices(unsigned (&words)[4], const void* row) { emulation::load_matrices(words, row, false); }
inline void load_transposed(unsigned (&words)[4], const void* row) { emulation::load_matrices(words, row, true); }

template <int width>
void begin_copy(void* to, const void* from, int bytes) {
    emulation::begin_copy(to, from, bytes, width);
}
inline void finish_copies() { emulation::finish_copies(); }

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

inline void multiply_add_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    emulation::multiply_add(d, {bits_of(a[0]), bits_of(a[1]), bits_of(a[2]), bits_of(a[3])}, {bits_of(b[0]), bits_of(b[1])},
                            emulation::Factors::tf32);
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

inline unsigned half_pair(float first, float second) { return half_of_float(first) | (unsigned)half_of_float(second) << 16; }

inline unsigned short bfloat16_bits(float value) {
    const unsigned bits = bits_of(value);
    return (unsigned short)(value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline unsigned bfloat16_pair(float first, float second) {
    return bfloat16_bits(first) | (unsigned)bfloat16_bits(second) << 16;
}

inline float product_of(float a, float b) {
    const volatile float product = a * b;
    return product;
}

inline float exp2_of(float value) { return exp2f(value); }

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

template <typename... Params, typename... Args>
int launch_shared(void (*kernel)(Params...), i64 blocks, int threads, int bytes, void*, const Args&... args) {
    return emulation::run_grid(blocks, 1, 1, threads, [&] { kernel(args...); }, (size_t)bytes);
}

template <typename... Params>
int shared_limit(void (*)(Params...), int) {
    return emulation::shared_limit();
}

}  // namespace cacr
