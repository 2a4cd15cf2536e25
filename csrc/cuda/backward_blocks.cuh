// Backward of CACR, blocks: with U, G and W = G S_ab of all rows,
//     dS_ab = W S_bb^T + G^T U,    dS_bb = S_ab^T W + dL/dS_bb through Y_b,
// both contributions of S_bb added in float32 before one rounding. Kind softmax: the products give gradients of the
// probabilities, and a last kernel applies dS = P (dP - rowsum(P dP)).
#pragma once

#include "backward_rows.cuh"

namespace cacr {

// One 64 x 64 tile of the gradient of block [row_side, col_side] of the product.
template <typename F>
CACR_DEVICE void factor_gradient(const Problem& problem, const Place& place, const Workspace& workspace, int row_side,
                                 int col_side, int row_start, int col_start, ProductSlices& slices, Accumulator& acc) {
    const int side = row_side == col_side ? 1 - row_side : row_side;  // side a, whose projection the block is part of
    if (!wants_projection(problem, place, side)) return;
    const int n = length_of(place.extent, side);
    const int m = length_of(place.extent, 1 - side);
    const int leading = workspace.columns(1 - side);
    const View<float> w = dense_view(workspace.w(side), leading, n, m);
    if (row_side == col_side) {
        const View<F> f = factor_view<F>(problem, place, workspace, side, 1 - side);
        product<Layout::transposed, Layout::transposed>(f, w, row_start, col_start, n, slices, acc);
    } else {
        const View<F> c = factor_view<F>(problem, place, workspace, 1 - side, 1 - side);
        const View<float> g = dense_view(workspace.g(side), workspace.columns(side), n, n);
        const View<float> u = dense_view(workspace.u(side), leading, n, m);
        product<Layout::plain, Layout::plain>(w, c, row_start, col_start, m, slices, acc);
        product<Layout::transposed, Layout::transposed>(g, u, row_start, col_start, n, slices, acc);
    }
}

// Rounds columns col_start + 32 part + 0..31 of the tile, plus the target's gradient, into the gradient.
template <int part>
CACR_DEVICE void write_chunk(const ScoresGrad& grad, const float* target, int rows, int cols, int leading, int row_start,
                             int col_start, Chunk& chunk, const Accumulator& acc) {
    const int start = col_start + part * kChunk;
    if (start >= cols) return;
    put_chunk<part>(chunk, acc);
    CACR_BARRIER();  // the chunk is written
    CACR_UNROLL_SOME
    for (int e = thread_index(); e < kTile * kChunk; e += kThreads) {
        const int row = row_start + e / kChunk;
        const int col = start + e % kChunk;
        if (row >= rows || col >= cols) continue;
        const float own = target ? target[(i64)row * leading + col] : 0.0f;
        grad.set(row, col, chunk.v[e / kChunk][e % kChunk] + own);
    }
}

// Grid: problems x tiles of the largest block x the four blocks. Writes the gradients inside the spans; for kind softmax
// the gradients of the probabilities to the workspace.
template <typename F>
CACR_KERNEL(kThreads, 4) cacr_backward_blocks_kernel(Problem problem, i64 first) {
    CACR_SHARED(BackwardShared, shared);
    const Place place = place_of(problem, first + block_x());
    const int row_side = block_z() / 2;
    const int col_side = block_z() % 2;
    if (!any_side_counts(problem, place)) return;
    const int rows = length_of(place.extent, row_side);
    const int cols = length_of(place.extent, col_side);
    const int tiles_across = (cols + kTile - 1) / kTile;
    const int row_start = block_y() / tiles_across * kTile;
    const int col_start = block_y() % tiles_across * kTile;
    if (row_start >= rows) return;

    const Workspace workspace = backward_workspace(problem, block_x());
    const int leading = workspace.columns(col_side);
    Accumulator acc;
    clear(acc);
    factor_gradient<F>(problem, place, workspace, row_side, col_side, row_start, col_start, shared.slices, acc);
    if (problem.options.kind == Kind::softmax) {
        store_tile(workspace.grad_prob(row_side, col_side), leading, row_start, col_start, rows, cols, acc);
        return;
    }
    const bool add_target = row_side == col_side && wants_target(problem, place, row_side);
    const float* target = add_target ? workspace.target(row_side) : nullptr;
    const ScoresGrad grad(problem, place, row_side, col_side);
    write_chunk<0>(grad, target, rows, cols, leading, row_start, col_start, shared.chunk, acc);
    write_chunk<1>(grad, target, rows, cols, leading, row_start, col_start, shared.chunk, acc);
}

// Kind softmax. Grid: problems x ceil(max(T, R) / 4) x the four blocks; one warp a row.
// dS = P (dP - sum_k P_k dP_k), plus dL/dS_aa through Y_a on the two own blocks.
CACR_KERNEL(kThreads, 1) cacr_softmax_gradient_kernel(Problem problem, i64 first) {
    const Place place = place_of(problem, first + block_x());
    const int row_side = block_z() / 2;
    const int col_side = block_z() % 2;
    const int row = block_y() * kWarpsPerBlock + thread_index() / kWarp;
    if (!any_side_counts(problem, place) || row >= length_of(place.extent, row_side)) return;

    const Workspace workspace = backward_workspace(problem, block_x());
    const bool own = row_side == col_side;
    const bool through_probs = wants_projection(problem, place, own ? 1 - row_side : row_side);
    const bool add_target = own && wants_target(problem, place, row_side);
    const i64 row_offset = (i64)row * workspace.columns(col_side);
    const float* probs = workspace.prob(row_side, col_side) + row_offset;
    const float* grad_probs = workspace.grad_prob(row_side, col_side) + row_offset;
    const float* target = workspace.target(row_side) + row_offset;
    const ScoresGrad grad(problem, place, row_side, col_side);
    const int cols = length_of(place.extent, col_side);
    const int lane = thread_index() % kWarp;
    float dot = 0.0f;
    if (through_probs)
        for (int col = lane; col < cols; col += kWarp) dot += probs[col] * grad_probs[col];
    dot = warp_sum(dot);
    for (int col = lane; col < cols; col += kWarp) {
        float value = add_target ? target[col] : 0.0f;
        if (through_probs) value += softmax_grad(probs[col], grad_probs[col], dot);
        grad.set(row, col, value);
    }
}

}  // namespace cacr
