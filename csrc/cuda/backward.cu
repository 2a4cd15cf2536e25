// Launches of the backward: fill once, unless the spans cover everything; then per chunk rows and blocks, between row softmax
// and its Jacobian for kind softmax.
#include "backward_blocks.cuh"
#include "fill.cuh"
#include "fused_backward.cuh"

#include "launch.cuh"
#include "row_softmax.cuh"

namespace cacr {

// Whether the spans of every example cover all of the gradients, so that the other kernels write every element.
static bool spans_cover(const Problem& problem) {
    const SpanTable& spans = problem.spans;
    if (spans.table || spans.n_text == 0 || spans.n_vision == 0 || !extent_of(spans, 0).valid) return false;
    return problem.single ? spans.n_text + spans.n_vision == spans.limit_text
                          : spans.n_text == spans.limit_text && spans.n_vision == spans.limit_vision;
}

static int fill(const Problem& problem) {
    const i64 longest = larger(problem.spans.limit_text, problem.spans.limit_vision);
    return launch(cacr_fill_kernel, problem.batch * problem.heads, ceil_div(longest, kFillRows), problem.single ? 1 : 4,
                  kThreads, problem.stream, problem);
}

// F: type of the factors of the products.
template <typename F>
static int backward(const Problem& problem, i64 first, i64 count) {
    const i64 longest = larger(problem.spans.n_text, problem.spans.n_vision);
    const int tiles = ceil_div(longest, kTile);
    const int row_groups = ceil_div(longest, kWarpsPerBlock);
    const bool softmax = problem.options.kind == Kind::softmax;
    int error = 0;
    if (softmax)
        error = launch(cacr_row_softmax_kernel<false>, count, row_groups, 4, kThreads, problem.stream, problem, first);
    if (!error)
        error = launch(CACR_KERNEL_FOR(cacr_backward_rows_kernel, F), count, tiles, 2, kThreads, problem.stream, problem,
                       first);
    if (!error)
        error = launch(CACR_KERNEL_FOR(cacr_backward_blocks_kernel, F), count * tiles_of_block(problem.spans), 1, 4,
                       kThreads, problem.stream, problem, first);
    if (!error && softmax)
        error = launch(cacr_softmax_gradient_kernel, count, row_groups, 4, kThreads, problem.stream, problem, first);
    return error;
}

template <typename F>
static int backward_fused(const Problem& problem) {
    const auto kernel = CACR_FUSED_FOR(cacr_fused_backward_kernel, F, problem.spans);
    return launch_shared(kernel, problem.batch * problem.heads, kWarp * fused_warps(problem.spans),
                         fused_bytes(problem, true), problem.stream, problem);
}

static bool fused_backward(const Problem& problem) {
    return fused_takes(problem, [] { return shared_limit(cacr_fused_backward_kernel<Half, 2>, kFusedArchitecture); });
}

static i64 workspace_bytes(const Problem& problem) { return (i64)sizeof(float) * larger(1, backward_floats(problem)); }

i64 cacr_backward_workspace_cuda(const Problem& problem) {
    const DeviceScope scope(problem.device);
    return !scope.error() && fused_backward(problem) ? 0 : workspace_bytes(problem);
}

int cacr_backward_cuda(const Problem& problem) {
    if (!fits_a_grid(problem)) return kInvalidValue;
    const DeviceScope scope(problem.device);
    if (scope.error()) return scope.error();
    if (problem.batch * problem.heads == 0 || problem.spans.limit_text + problem.spans.limit_vision == 0) return 0;
    const int error = spans_cover(problem) ? 0 : fill(problem);
    if (error || problem.spans.n_text == 0 || problem.spans.n_vision == 0) return error;
    if (fused_backward(problem))
        return CACR_FOR_DTYPE(backward_fused, problem.dtype, problem);
    return for_chunks(problem, workspace_bytes(problem), [&](i64 first, i64 count) {
        return CACR_FOR_DTYPE(backward, problem.options.kind == Kind::softmax ? DType::f32 : problem.dtype, problem, first, count);
    });
}

}  // namespace cacr
