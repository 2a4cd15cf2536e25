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
#define CACR_BARRIER() __syncthreads()
#define CACR_UNROLL _Pragma("unroll")
#define CACR_UNROLL_SOME _Pragma("unroll 4")

namespace cacr {

CACR_DEVICE int thread_index() { return (int)threadIdx.x; }
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
