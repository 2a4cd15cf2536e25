// Host entry points of the CUDA scores kernels, for compilers that know nothing of CUDA.
#pragma once

#include "problem.h"

namespace cacr {

// Bytes of workspace that one problem (b, h) needs on problem.device; 0 where fused kernels take it. A call takes any multiple
// k >= 1 of it in Problem::workspace_bytes and works through the batch k problems at a time, so the workspace does not grow with
// the batch.
i64 cacr_forward_workspace_cuda(const Problem& problem);
i64 cacr_backward_workspace_cuda(const Problem& problem);

// Enqueue on problem.stream of problem.device; no allocation, no synchronisation, no atomics, the same bits every time.
// dtype f16, bf16 or f32; batch times heads below 2^31. Returns 0 or a cudaError_t (cacr_error_cuda says it in words).
//   forward:  reads blocks; writes loss, stats. kind softmax keeps the statistics of S_ab too.
//   backward: reads blocks, stats, grad_loss; writes every element of grads.
int cacr_forward_cuda(const Problem& problem);
int cacr_backward_cuda(const Problem& problem);

const char* cacr_error_cuda(int code);

// Number of usable devices; 0 without driver or card, then `*reason` (if not null) says why.
int cacr_device_count_cuda(const char** reason);

}  // namespace cacr
