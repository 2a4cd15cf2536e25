// Backward of CACR, rows: per row block of a side, U and X again, then G = factor dL/dX, dL/dY and W = G S_ab.
#pragma once

#include "products.cuh"

namespace cacr {

template <typename Tile>
union BackwardShared {
    typename Tile::Slices slices;
    Chunk chunk;
};

// What an element's gradient takes from its row, in two 16-byte loads.
struct alignas(16) SharedRow {
    RowScales<float> scales;
    float weight;    // dL/d(row loss); the same for all rows, and no register here
    float weight_g;  // times the factor of X
};

template <typename Tile>
struct BackwardRowsShared {
    BackwardShared<Tile> tiles;
    SharedRow rows[kTile];
    typename Tile::RowScales scales;
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
    float* g;       // [n, leading]
    float* target;  // [n, leading]
    bool wants_g;
    bool wants_target;
    int n;
    int leading;
    float factor;  // X = factor * U S_ab^T
    bool probs;
};

// Turns columns col_start + 32 part + 0..31 of U S_ab^T into G and dL/dS_aa through Y (row_grad) in the workspace. rows: the
// numbers of rows row_start + 0..63; largest: magnitude of G so far.
template <int part, typename F, typename Tile>
CACR_DEVICE void differentiate_chunk(const RowGradient& to, const SharedRow* rows, int row_start, int col_start,
                                     Chunk& chunk, const typename Tile::Accumulator& acc, float& largest) {
    const int start = col_start + part * kChunk;
    if (start >= to.n) return;
    put_chunk<part>(chunk, acc);
    CACR_BARRIER();  // the chunk is written
    const int col = thread_index() % kChunk;
    if (start + col >= to.n) return;
    const int end = to.n - row_start < kTile ? to.n - row_start : kTile;
    const int first = thread_index() / kChunk;
    const char* from = to.y.address(row_start + first, start + col);
    const i64 from_step = kChunkStep * to.y.row_bytes();
    const i64 where = (i64)(row_start + first) * to.leading + start + col;
    float* g = to.g + where;
    float* target = to.target + where;
    const i64 step = kChunkStep * to.leading;
    CACR_UNROLL_SOME
    for (int row = first; row < end; row += kChunkStep) {
        float y = load_score<F>(to.y.dtype, from);
        float chain = rows[row].weight;
        if (to.probs) {
            chain *= logit_of_prob_grad(y);
            y = logit_of_prob(y);
        }
        const RowGrad<float> grad = row_grad(rows[row].scales, to.factor, chunk.v[row][col], y);
        if (to.wants_g) {
            *g = rows[row].weight_g * grad.dx;
            Tile::follow(largest, *g);
        }
        if (to.wants_target) *target = chain * grad.dy;
        from += from_step;
        g += step;
        target += step;
    }
}

// Grid: problems x ceil(max(T, R) / 64) x sides. Fills U, G, dY and W of the workspace.
template <typename F, typename Target = Machine>
CACR_KERNEL(kThreads, 3) cacr_backward_rows_kernel(Problem problem, i64 first) {
    using Tile = typename Target::template Tile<F>;
    CACR_SHARED(BackwardRowsShared<Tile>, shared);
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
    const float factor = (float)projection_factor(problem.options, m);
    const RowGradient to = {Scores(problem, place, side, side),
                            workspace.g(side),
                            workspace.target(side),
                            wants_projection(problem, place, side),
                            wants_target(problem, place, side),
                            n,
                            workspace.columns(side),
                            factor,
                            problem.options.kind == Kind::probs};

    const int own_row = row_start + thread_index();
    if (thread_index() < kTile && own_row < n) {
        const float weight = row_weight(problem, place, n);
        const RowScales<float> scales = row_scales(row_numbers(RowStats(problem, place, side), own_row));
        shared.rows[thread_index()] = {scales, weight, weight * factor};
    }
    typename Tile::Slices& slices = shared.tiles.slices;
    const float largest_u = project_rows<Tile>(f, c, row_start, workspace.u(side), leading, slices, shared.scales);
    Tile::note(workspace.notes(kNotedU, side), row_start, largest_u);
    CACR_BARRIER();  // this block's rows of U, and shared.rows, are written
    float largest_g = 0.0f;
    for (int col_start = 0; col_start < n; col_start += kTile) {
        typename Tile::Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::plain, true>(Tile::scaled_rows(u, shared.scales), f, row_start, col_start, m, slices,
                                                    acc);
        Chunk& chunk = shared.tiles.chunk;
        differentiate_chunk<0, F, Tile>(to, shared.rows, row_start, col_start, chunk, acc, largest_g);
        differentiate_chunk<1, F, Tile>(to, shared.rows, row_start, col_start, chunk, acc, largest_g);
    }
    if (!to.wants_g) return;
    Tile::note(workspace.notes(kNotedG, side), row_start, largest_g);
    CACR_BARRIER();  // this block's rows of G are written
    const auto g = Tile::scaled(dense_view(to.g, to.leading, n, n),
                                workspace.notes(kNotedG, side) + row_start / kGroup, kWarpsPerBlock);
    float largest_w = 0.0f;
    for (int col_start = 0; col_start < m; col_start += kTile) {
        typename Tile::Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::transposed>(g, f, row_start, col_start, n, slices, acc);
        store_tile(workspace.w(side), leading, row_start, col_start, n, m, acc);
        Tile::follow(largest_w, acc);
    }
    Tile::note(workspace.notes(kNotedW, side), row_start, largest_w);
}

}  // namespace cacr
