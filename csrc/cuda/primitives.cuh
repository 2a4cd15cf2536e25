// Everything the kernels need from the machine: thread and block indices, barrier, shuffle, shared memory, bit casts.
// Compiled by nvcc or NVRTC these are CUDA; compiled by a host compiler they are host/emulation.h, which runs the same
// kernel source on fibers, so that indexing and barriers are tested without a card.
#pragma once

#include "problem.h"

#if defined(__CUDACC__)

#define CACR_DEVICE __device__ __forceinline__
// blocks_per_sm bounds the registers: as many resident blocks as fit without spilling on any architecture.
#define CACR_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define CACR_SHARED(type, name) __shared__ type name
#define CACR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define CACR_BARRIER() __syncthreads()
#define CACR_UNROLL _Pragma("unroll")
#define CACR_UNROLL_SOME _Pragma("unroll 4")
#define CACR_PRAGMA(text) _Pragma(#text)
#define CACR_UNROLL_BY(count) CACR_PRAGMA(unroll count)

namespace cacr {

CACR_DEVICE int thread_index() { return (int)threadIdx.x; }
CACR_DEVICE int thread_count() { return (int)blockDim.x; }
CACR_DEVICE i64 block_x() { return blockIdx.x; }
CACR_DEVICE int block_y() { return (int)blockIdx.y; }
CACR_DEVICE int block_z() { return (int)blockIdx.z; }

// Value of lane (own lane ^ mask); all 32 lanes of the warp take part.
CACR_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

CACR_DEVICE unsigned bits_of(float value) { return __float_as_uint(value); }
CACR_DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }

CACR_DEVICE float float_of_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

CACR_DEVICE unsigned short half_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// d += a b on the tensor cores (from sm_75), a warp together: a [16, 16] and b [16, 8] of halves, d [16, 8] of floats. With
// g = lane / 4 and p = lane % 4, a lane holds, two halves a word (PTX ISA, matrix fragments of mma.m16n8k16 and m16n8k8),
//     a: columns 2p, 2p + 1 of row g and of row g + 8, then columns 2p + 8, 2p + 9 of both;
//     b: rows 2p, 2p + 1 of column g, then rows 2p + 8, 2p + 9;
//     d: columns 2p, 2p + 1 of row g, then of row g + 8.
CACR_DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    CACR_UNROLL
    for (int half = 0; half < 2; ++half)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// The same of bfloat16 (from sm_80).
CACR_DEVICE void multiply_add_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same with 8 inner indices of tf32, floats whose last 13 bits are not looked at (from sm_80):
//     a: column p of row g and of row g + 8, then column p + 4 of both;   b: row p of column g, then row p + 4.
CACR_DEVICE void multiply_add_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
          "r"(bits_of(b[1])));
#endif
}

// Four 8 x 8 matrices of 16-bit elements in shared memory, a warp together (from sm_75): lanes 8 i + 0..7 give the addresses
// of the rows of matrix i, 16 bytes each. With g = lane / 4 and p = lane % 4, word i holds columns 2p, 2p + 1 of row g of
// matrix i; transposed, rows 2p, 2p + 1 of its column g.
CACR_DEVICE void load_matrices(unsigned (&words)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}
CACR_DEVICE void load_transposed(unsigned (&words)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// Begins to copy `bytes` bytes to shared memory, and zeros after them up to `width`: 4, 8 or 16, to which both addresses are
// aligned (from sm_80). The copies of a thread are there after finish_copies.
template <int width>
CACR_DEVICE void begin_copy(void* to, const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(width), "r"(bytes)
                 : "memory");
#endif
}
CACR_DEVICE void finish_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Two floats, rounded to nearest even, in a word: the first in its lower half (from sm_80).
CACR_DEVICE unsigned bfloat16_pair(float first, float second) {
    unsigned word = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}
CACR_DEVICE unsigned half_pair(float first, float second) {
    unsigned word = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}

// A product that no compiler fuses with a sum.
CACR_DEVICE float product_of(float a, float b) { return __fmul_rn(a, b); }

// 2^value, to two units in the last place.
CACR_DEVICE float exp2_of(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}

}  // namespace cacr

#else
#include "host/emulation.h"
#endif

namespace cacr {

constexpr int kWarp = 32;

CACR_DEVICE float infinity() { return float_of(0x7f800000u); }
CACR_DEVICE float not_a_number() { return float_of(0x7fc00000u); }

// Sum over the warp in a fixed order, the same value in every lane.
CACR_DEVICE float warp_sum(float value) {
    CACR_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Maximum over the warp, NaN ignored, the same value in every lane.
CACR_DEVICE float warp_max(float value) {
    CACR_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

}  // namespace cacr
