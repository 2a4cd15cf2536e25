// Backward of CACR, rows: per row block of a side, U and X again, then G = factor dL/dX, dL/dY and W = G S_ab.
#pragma once

#include "tile.cuh"

namespace cacr {

union BackwardShared {
    ProductSlices slices;
    Chunk chunk;
};

// Whether a side's gradient goes into the projection (S_ab, S_bb), or into its target S_aa.
CACR_DEVICE bool wants_projection(const Problem& problem, const Place& place, int side) {
    return side_counts(problem, place, side) && problem.options.stop_gradient != StopGradient::projection;
}
CACR_DEVICE bool wants_target(const Problem& problem, const Place& place, int side) {
    return side_counts(problem, place, side) && problem.options.stop_gradient != StopGradient::target;
}

CACR_DEVICE RowNumbers<float> row_numbers(const RowStats& stats, int row) {
    RowNumbers<float> numbers;
    numbers.max_x = stats.at(kMaxX, row);
    numbers.sum_x = stats.at(kSumX, row);
    numbers.max_y = stats.at(kMaxY, row);
    numbers.sum_y = stats.at(kSumY, row);
    numbers.mean_p = stats.at(kMeanP, row);
    numbers.mean_q = stats.at(kMeanQ, row);
    return numbers;
}

// dL/d(row loss): grad_loss[b, h], times 1 / n_a for row means.
CACR_DEVICE float row_weight(const Problem& problem, const Place& place, int n) {
    const i64 where = place.b * problem.grad_loss_stride[0] + place.h * problem.grad_loss_stride[1];
    return ((const float*)problem.grad_loss)[where] * (float)row_factor(problem.options, n);
}

// What turns X into gradients: the rows of one side of one problem.
struct RowGradient {
    Scores y;
    RowStats stats;
    float* g;       // [n, leading]; null if the projection gets no gradient
    float* target;  // [n, leading]; null if S_aa gets none through Y
    int n;
    int leading;
    float factor;  // X = factor * U S_ab^T
    float weight;  // dL/d(row loss)
    bool probs;
};

// Turns columns col_start + 32 part + 0..31 of U S_ab^T into G and dL/dS_aa through Y (row_grad) in the workspace.
template <int part>
CACR_DEVICE void differentiate_chunk(const RowGradient& to, int row_start, int col_start, Chunk& chunk,
                                     const Accumulator& acc) {
    const int start = col_start + part * kChunk;
    if (start >= to.n) return;
    put_chunk<part>(chunk, acc);
    CACR_BARRIER();  // the chunk is written
    CACR_UNROLL_SOME
    for (int e = thread_index(); e < kTile * kChunk; e += kThreads) {
        const int row = row_start + e / kChunk;
        const int col = start + e % kChunk;
        if (row >= to.n || col >= to.n) continue;
        float y = to.y.at(row, col);
        float chain = 1.0f;
        if (to.probs) {
            chain = logit_of_prob_grad(y);
            y = logit_of_prob(y);
        }
        const float x = to.factor * chunk.v[e / kChunk][e % kChunk];
        const RowGrad<float> grad = row_grad(row_numbers(to.stats, row), x, y);
        const i64 where = (i64)row * to.leading + col;
        if (to.g) to.g[where] = to.weight * to.factor * grad.dx;
        if (to.target) to.target[where] = to.weight * chain * grad.dy;
    }
}

// Grid: problems x ceil(max(T, R) / 64) x sides. Fills U, G, dY and W of the workspace.
template <typename F>
CACR_KERNEL(kThreads, 3) cacr_backward_rows_kernel(Problem problem, i64 first) {
    CACR_SHARED(BackwardShared, shared);
    const Place place = place_of(problem, first + block_x());
    const int side = block_z();
    const int row_start = block_y() * kTile;
    const int n = length_of(place.extent, side);
    if (!side_counts(problem, place, side) || row_start >= n) return;

    const Workspace workspace = backward_workspace(problem, block_x());
    const int m = length_of(place.extent, 1 - side);
    const int leading = workspace.columns(1 - side);
    const View<F> f = factor_view<F>(problem, place, workspace, side, 1 - side);
    const View<F> c = factor_view<F>(problem, place, workspace, 1 - side, 1 - side);
    const View<float> u = dense_view(workspace.u(side), leading, n, m);
    const RowGradient to = {Scores(problem, place, side, side),
                            RowStats(problem, place, side),
                            wants_projection(problem, place, side) ? workspace.g(side) : nullptr,
                            wants_target(problem, place, side) ? workspace.target(side) : nullptr,
                            n,
                            workspace.columns(side),
                            (float)projection_factor(problem.options, m),
                            row_weight(problem, place, n),
                            problem.options.kind == Kind::probs};

    project_rows(f, c, row_start, workspace.u(side), leading, shared.slices);
    CACR_BARRIER();  // this block's rows of U are written
    for (int col_start = 0; col_start < n; col_start += kTile) {
        Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::plain, true>(u, f, row_start, col_start, m, shared.slices, acc);
        differentiate_chunk<0>(to, row_start, col_start, shared.chunk, acc);
        differentiate_chunk<1>(to, row_start, col_start, shared.chunk, acc);
    }
    if (!to.g) return;
    CACR_BARRIER();  // this block's rows of G are written
    const View<float> g = dense_view(to.g, to.leading, n, n);
    for (int col_start = 0; col_start < m; col_start += kTile) {
        Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::transposed>(g, f, row_start, col_start, n, shared.slices, acc);
        store_tile(workspace.w(side), leading, row_start, col_start, n, m, acc);
    }
}

}  // namespace cacr
