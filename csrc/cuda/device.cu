// Questions to the CUDA runtime.
#include <cuda_runtime.h>

#include "cuda_api.h"

namespace cacr {

const char* cacr_error_cuda(int code) { return cudaGetErrorString((cudaError_t)code); }

int cacr_device_count_cuda(const char** reason) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        if (reason) *reason = cudaGetErrorString(error);
        cudaGetLastError();
        return 0;
    }
    if (count == 0 && reason) *reason = "no CUDA device";
    return count;
}

}  // namespace cacr
