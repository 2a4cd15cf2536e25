// Host side of a launch: grid, stream, device, errors. The emulation provides the same names.
#pragma once

#include "cuda_api.h"
#include "primitives.cuh"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace cacr {

constexpr int kInvalidValue = cudaErrorInvalidValue;

// Makes the problem's device current for its lifetime.
class DeviceScope {
  public:
    explicit DeviceScope(int device) {
        error_ = cudaGetDevice(&previous_);
        changes_ = error_ == cudaSuccess && previous_ != device;
        if (changes_) error_ = cudaSetDevice(device);
        if (error_ != cudaSuccess) cudaGetLastError();  // told here, not of the next launch
    }
    ~DeviceScope() {
        if (changes_ && cudaSetDevice(previous_)) cudaGetLastError();
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;
    int error() const { return error_; }

  private:
    int previous_ = 0;
    bool changes_ = false;
    cudaError_t error_;
};

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), i64 x, int y, int z, int threads, void* stream, const Args&... args) {
    kernel<<<dim3((unsigned)x, (unsigned)y, (unsigned)z), threads, 0, (cudaStream_t)stream>>>(args...);
    return cudaGetLastError();
}

// Dynamic shared memory that a block of the kernel may have on the current device, 0 where its code is for cards before
// `architecture`.
template <typename... Params>
int shared_limit(void (*kernel)(Params...), int architecture) {
    cudaFuncAttributes attributes;
    int device = 0;
    int limit = 0;
    if (cudaFuncGetAttributes(&attributes, kernel) || cudaGetDevice(&device) ||
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
        cudaGetLastError();  // told here, not of the next launch
        return 0;
    }
    return attributes.ptxVersion < architecture ? 0 : limit - (int)attributes.sharedSizeBytes;
}

// Blocks of `threads` threads with `bytes` of dynamic shared memory.
template <typename... Params, typename... Args>
int launch_shared(void (*kernel)(Params...), i64 blocks, int threads, int bytes, void* stream, const Args&... args) {
    if (bytes > 48 << 10) {
        // always the most there is: the attribute is the function's, and another thread may be about to launch it
        const int most = shared_limit(kernel, 0);
        const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (error) {
            cudaGetLastError();  // told here, not of the next launch
            return error;
        }
    }
    kernel<<<(unsigned)blocks, threads, bytes, (cudaStream_t)stream>>>(args...);
    return cudaGetLastError();
}

}  // namespace cacr

#endif

// call<F>(...) for the type F of a dtype.
#define CACR_FOR_DTYPE(call, dtype, ...) \
    ((dtype) == DType::f16    ? call<Half>(__VA_ARGS__) \
     : (dtype) == DType::bf16 ? call<Bfloat16>(__VA_ARGS__) \
                              : call<float>(__VA_ARGS__))

namespace cacr {

inline int ceil_div(i64 a, i64 b) { return (int)((a + b - 1) / b); }

inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// Whether every problem has an index of its own on axis x of a grid.
inline bool fits_a_grid(const Problem& problem) {
    return problem.heads == 0 || problem.batch <= 0x7fffffff / problem.heads;
}

// Calls step(first, count) for the batch in chunks of as many problems as the workspace holds, up to the first error.
template <typename Step>
int for_chunks(const Problem& problem, i64 bytes_each, Step step) {
    const i64 total = problem.batch * problem.heads;
    const i64 chunk = bytes_each > 0 ? problem.workspace_bytes / bytes_each : total;
    if (chunk < 1 && total > 0) return kInvalidValue;
    for (i64 first = 0; first < total; first += chunk) {
        const int error = step(first, total - first < chunk ? total - first : chunk);
        if (error) return error;
    }
    return 0;
}

}  // namespace cacr
