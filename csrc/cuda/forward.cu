// Launches of the forward. Short spans of 16 bits: one kernel. Otherwise at most three kernels a chunk: row softmax (kind
// softmax), projection and comparison, loss.
#include "forward.cuh"
#include "fused_forward.cuh"

#include "launch.cuh"

namespace cacr {

// F: type of the factors of the products.
template <typename F>
static int forward(const Problem& problem, i64 first, i64 count) {
    const i64 longest = larger(problem.spans.n_text, problem.spans.n_vision);
    int error = 0;
    if (problem.spans.n_text > 0 && problem.spans.n_vision > 0) {
        if (problem.options.kind == Kind::softmax)
            error = launch(cacr_row_softmax_kernel<true>, count, ceil_div(longest, kWarpsPerBlock), 4, kThreads,
                           problem.stream, problem, first);
        if (!error)
            error = launch(CACR_KERNEL_FOR(cacr_forward_kernel, F), count, ceil_div(longest, kTile), 2, kThreads,
                           problem.stream, problem, first);
    }
    return error ? error : launch(cacr_loss_kernel, count, 1, 1, kWarp, problem.stream, problem, first);
}

template <typename F>
static int forward_fused(const Problem& problem) {
    const auto kernel = CACR_FUSED_FOR(cacr_fused_forward_kernel, F, problem.spans);
    return launch_shared(kernel, problem.batch * problem.heads, kWarp * fused_warps(problem.spans),
                         fused_bytes(problem, false), problem.stream, problem);
}

static bool fused_forward(const Problem& problem) {
    return fused_takes(problem, [] { return shared_limit(cacr_fused_forward_kernel<Half, 2>, kFusedArchitecture); });
}

static i64 workspace_bytes(const Problem& problem) { return (i64)sizeof(float) * larger(1, forward_floats(problem)); }

i64 cacr_forward_workspace_cuda(const Problem& problem) {
    const DeviceScope scope(problem.device);
    return !scope.error() && fused_forward(problem) ? 0 : workspace_bytes(problem);
}

int cacr_forward_cuda(const Problem& problem) {
    if (!fits_a_grid(problem)) return kInvalidValue;
    const DeviceScope scope(problem.device);
    if (scope.error()) return scope.error();
    if (problem.batch * problem.heads == 0) return 0;
    if (fused_forward(problem))
        return CACR_FOR_DTYPE(forward_fused, problem.dtype, problem);
    return for_chunks(problem, workspace_bytes(problem), [&](i64 first, i64 count) {
        return CACR_FOR_DTYPE(forward, problem.options.kind == Kind::softmax ? DType::f32 : problem.dtype, problem, first, count);
    });
}

}  // namespace cacr
