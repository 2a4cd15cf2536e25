// Backward of CACR, blocks: with U, G and W = G S_ab of all rows,
//     dS_ab = W S_bb^T + G^T U,    dS_bb = S_ab^T W + dL/dS_bb through Y_b,
// both contributions of S_bb added in float32 before one rounding. Kind softmax: the products give gradients of the
// probabilities, and a last kernel applies dS = P (dP - rowsum(P dP)).
#pragma once

#include "backward_rows.cuh"

namespace cacr {

// One 64 x 64 tile of the gradient of block [row_side, col_side] of the product.
template <typename F, typename Tile>
CACR_DEVICE void factor_gradient(const Problem& problem, const Place& place, const Workspace& workspace, int row_side,
                                 int col_side, int row_start, int col_start, typename Tile::Slices& slices,
                                 typename Tile::Accumulator& acc) {
    const int side = row_side == col_side ? 1 - row_side : row_side;  // side a, whose projection the block is part of
    if (!wants_projection(problem, place, side)) return;
    const int n = length_of(place.extent, side);
    const int m = length_of(place.extent, 1 - side);
    const int leading = workspace.columns(1 - side);
    const int notes = (int)notes_of_rows(n);
    const auto w = Tile::scaled(dense_view(workspace.w(side), leading, n, m), workspace.notes(kNotedW, side), notes);
    if (row_side == col_side) {
        const View<F> f = factor_view<F>(problem, place, workspace, side, 1 - side);
        product<Layout::transposed, Layout::transposed>(f, w, row_start, col_start, n, slices, acc);
    } else {
        const View<F> c = factor_view<F>(problem, place, workspace, 1 - side, 1 - side);
        product<Layout::plain, Layout::plain>(w, c, row_start, col_start, m, slices, acc);
        const auto g = Tile::scaled(dense_view(workspace.g(side), workspace.columns(side), n, n),
                                    workspace.notes(kNotedG, side), notes);
        const auto u =
            Tile::scaled(dense_view(workspace.u(side), leading, n, m), workspace.notes(kNotedU, side), notes);
        product<Layout::transposed, Layout::transposed>(g, u, row_start, col_start, n, slices, acc);
    }
}

// Rounds columns col_start + 32 part + 0..31 of the tile, plus the target's gradient, into the gradient; F is its type, as
// the kind is not softmax.
template <int part, typename F, typename Accumulator>
CACR_DEVICE void write_chunk(const ScoresGrad& grad, const float* target, bool add_target, int rows, int cols,
                             int leading, int row_start, int col_start, Chunk& chunk, const Accumulator& acc) {
    const int start = col_start + part * kChunk;
    if (start >= cols) return;
    put_chunk<part>(chunk, acc);
    CACR_BARRIER();  // the chunk is written
    const int col = thread_index() % kChunk;
    if (start + col >= cols) return;
    const int end = rows - row_start < kTile ? rows - row_start : kTile;
    const int first = thread_index() / kChunk;
    F* to = grad.pointer<F>(row_start + first, start + col);
    const i64 to_step = kChunkStep * grad.where.row_stride;
    const float* own = target + (i64)(row_start + first) * leading + start + col;
    const i64 own_step = kChunkStep * leading;
    CACR_UNROLL_SOME
    for (int row = first; row < end; row += kChunkStep) {
        from_float(chunk.v[row][col] + (add_target ? *own : 0.0f), *to);
        to += to_step;
        own += own_step;
    }
}

// Grid: problems times tiles of the largest block x 1 x the four blocks; axis y ends at 65,535, and 256 x 256 tiles are more.
// Writes the gradients inside the spans; for kind softmax the gradients of the probabilities to the workspace.
template <typename F, typename Target = Machine>
CACR_KERNEL(kThreads, 4) cacr_backward_blocks_kernel(Problem problem, i64 first) {
    using Tile = typename Target::template Tile<F>;
    CACR_SHARED(BackwardShared<Tile>, shared);
    const int tiles = tiles_of_block(problem.spans);
    const int slot = (int)block_x() / tiles;
    const int tile = (int)block_x() % tiles;
    const Place place = place_of(problem, first + slot);
    const int row_side = block_z() / 2;
    const int col_side = block_z() % 2;
    if (!any_side_counts(problem, place)) return;
    const int rows = length_of(place.extent, row_side);
    const int cols = length_of(place.extent, col_side);
    const int tiles_across = (cols + kTile - 1) / kTile;
    const int row_start = tile / tiles_across * kTile;
    const int col_start = tile % tiles_across * kTile;
    if (row_start >= rows) return;

    const Workspace workspace = backward_workspace(problem, slot);
    typename Tile::Accumulator acc;
    clear(acc);
    factor_gradient<F, Tile>(problem, place, workspace, row_side, col_side, row_start, col_start, shared.slices, acc);
    if (problem.options.kind == Kind::softmax) {
        store_tile(workspace.grad_prob(row_side, col_side), workspace.columns(col_side), row_start, col_start, rows, cols,
                   acc);
        return;
    }
    const bool add_target = row_side == col_side && wants_target(problem, place, row_side);
    const float* target = workspace.target(row_side);
    const int leading = workspace.columns(col_side);
    const ScoresGrad grad(problem, place, row_side, col_side);
    write_chunk<0, F>(grad, target, add_target, rows, cols, leading, row_start, col_start, shared.chunk, acc);
    write_chunk<1, F>(grad, target, add_target, rows, cols, leading, row_start, col_start, shared.chunk, acc);
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
