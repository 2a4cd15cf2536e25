// Forward of CACR (paper Eq. 3-6): per row block U = S_ab S_bb, then X = factor U (S_ab - 1 f)^T tile by tile against
// Y = S_aa with the online row sums of formulas.h; nothing [n_a, n_a] is stored. f is the first row of S_ab: a constant of a
// row of X changes nothing, and an offset that all scores share does not enter the rounding of X.
#pragma once

#include "row_softmax.cuh"

namespace cacr {

CACR_DEVICE void set_row_numbers(const RowStats& stats, int row, const RowNumbers<float>& numbers) {
    stats.at(kMaxX, row) = numbers.max_x;
    stats.at(kSumX, row) = numbers.sum_x;
    stats.at(kMaxY, row) = numbers.max_y;
    stats.at(kSumY, row) = numbers.sum_y;
    stats.at(kMeanP, row) = numbers.mean_p;
    stats.at(kMeanQ, row) = numbers.mean_q;
}

constexpr int kThreadsPerRow = kThreads / kTile;  // threads 2 i and 2 i + 1 follow row i
constexpr int kColsPerThread = kChunk / kThreadsPerRow;

struct LogitChunks {
    Chunk x;
    Chunk y;
};

template <typename Tile>
struct ForwardShared {
    union {
        typename Tile::Slices slices;
        LogitChunks logits;
    };
    typename Tile::RowScales scales;
};

// Both threads of a row combine their sums; afterwards both hold the whole row.
CACR_DEVICE void merge_row_pair(float factor, RowState<float>& state) {
    RowState<float> other = state;
    other.max_x = shuffle_xor(state.max_x, 1);
    other.sum_x = shuffle_xor(state.sum_x, 1);
    other.low_x = shuffle_xor(state.low_x, 1);
    other.dot_x = shuffle_xor(state.dot_x, 1);
    other.max_y = shuffle_xor(state.max_y, 1);
    other.sum_y = shuffle_xor(state.sum_y, 1);
    other.low_y = shuffle_xor(state.low_y, 1);
    other.dot_y = shuffle_xor(state.dot_y, 1);
    other.centre = shuffle_xor(state.centre, 1);
    row_merge(state, factor, other);
}

// Adds this thread's half of its row's first `cols` logits; those of the first chunk twice, to know E_p[d] beforehand.
CACR_DEVICE void add_logits(const LogitChunks& logits, int cols, bool first, float factor, RowState<float>& state) {
    const float* x = logits.x.v[thread_index() / kThreadsPerRow];
    const float* y = logits.y.v[thread_index() / kThreadsPerRow];
    const int begin = thread_index() % kThreadsPerRow * kColsPerThread;
    const int end = cols < begin + kColsPerThread ? cols : begin + kColsPerThread;
    float max_x = -infinity();
    float max_y = -infinity();
    for (int col = begin; col < end; ++col) {
        max_x = fmaxf(max_x, ordered(factor, x[col]));
        max_y = fmaxf(max_y, y[col]);
    }
    if (first) {
        max_x = fmaxf(max_x, shuffle_xor(max_x, 1));
        max_y = fmaxf(max_y, shuffle_xor(max_y, 1));
        state = row_begin(max_x, max_y);
        for (int col = begin; col < end; ++col) row_add(state, factor, x[col], y[col]);
        row_restart(state);
    }
    row_raise(state, factor, max_x, max_y);
    for (int col = begin; col < end; ++col) row_add(state, factor, x[col], y[col]);
    row_follow(state);
}

// Compares columns col_start + 32 part + 0..31 of X = factor * acc with Y, a chunk of 64 rows.
template <int part, typename F, typename Accumulator>
CACR_DEVICE void compare_chunk(const Scores& y, bool probs, int n, int row_start, int col_start, float factor,
                               LogitChunks& logits, const Accumulator& acc, RowState<float>& state) {
    const int start = col_start + part * kChunk;
    if (start >= n) return;
    put_chunk<part>(logits.x, acc);
    const int col = thread_index() % kChunk;
    const int rows = start + col < n ? n - row_start : 0;
    const char* from = y.address(row_start + thread_index() / kChunk, start + col);
    const i64 step = kChunkStep * y.row_bytes();
    CACR_UNROLL_SOME
    for (int row = thread_index() / kChunk; row < kTile; row += kChunkStep) {
        const float value = row < rows ? load_score<F>(y.dtype, from) : 0.0f;
        logits.y.v[row][col] = probs ? logit_of_prob(value) : value;
        from += step;
    }
    CACR_BARRIER();  // the chunks are written
    add_logits(logits, n - start < kChunk ? n - start : kChunk, start == 0, factor, state);
}

// Grid: problems x ceil(max(T, R) / 64) x sides. Writes U and the row losses to the workspace, row numbers to stats.
template <typename F, typename Target = Machine>
CACR_KERNEL(kThreads, 3) cacr_forward_kernel(Problem problem, i64 first) {
    using Tile = typename Target::template Tile<F>;
    CACR_SHARED(ForwardShared<Tile>, shared);
    const Place place = place_of(problem, first + block_x());
    const int side = block_z();
    const int row_start = block_y() * kTile;
    const int n = length_of(place.extent, side);
    if (!side_counts(problem, place, side) || row_start >= n) return;

    const Workspace workspace = forward_workspace(problem, block_x());
    const int m = length_of(place.extent, 1 - side);
    const int leading = workspace.columns(1 - side);
    const View<F> f = factor_view<F>(problem, place, workspace, side, 1 - side);
    const View<F> c = factor_view<F>(problem, place, workspace, 1 - side, 1 - side);
    const View<float> u = dense_view(workspace.u(side), leading, n, m);
    const Scores y(problem, place, side, side);
    const RowStats stats(problem, place, side);
    float* row_losses = workspace.row_loss(side);
    const bool probs = problem.options.kind == Kind::probs;
    const float factor = (float)projection_factor(problem.options, m);

    project_rows<Tile>(f, c, row_start, workspace.u(side), leading, shared.slices, shared.scales);
    CACR_BARRIER();  // this block's rows of U are written
    RowState<float> state = row_begin(0.0f, 0.0f);
    for (int col_start = 0; col_start < n; col_start += kTile) {
        typename Tile::Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::plain, true>(Tile::scaled_rows(u, shared.scales), f, row_start, col_start, m,
                                                    shared.slices, acc);
        compare_chunk<0, F>(y, probs, n, row_start, col_start, factor, shared.logits, acc, state);
        compare_chunk<1, F>(y, probs, n, row_start, col_start, factor, shared.logits, acc, state);
    }
    merge_row_pair(factor, state);
    const int row = row_start + thread_index() / kThreadsPerRow;
    if (thread_index() % kThreadsPerRow != 0 || row >= n) return;
    set_row_numbers(stats, row, row_finish(state));
    row_losses[row] = row_loss(state);
}

// Grid: problems; one warp. loss[b, h] = sum over sides of row_factor_a * sum of the row losses, in a fixed order.
CACR_KERNEL(kWarp, 1) cacr_loss_kernel(Problem problem, i64 first) {
    const Place place = place_of(problem, first + block_x());
    const Workspace workspace = forward_workspace(problem, block_x());
    float loss = place.extent.valid ? 0.0f : not_a_number();
    for (int side = kText; side <= kVision; ++side) {
        if (!side_counts(problem, place, side)) continue;
        const int n = length_of(place.extent, side);
        const float* row_losses = workspace.row_loss(side);
        float sum = 0.0f;
        for (int row = thread_index(); row < n; row += kWarp) sum += row_losses[row];
        loss += (float)row_factor(problem.options, n) * warp_sum(sum);
    }
    if (thread_index() == 0) ((float*)problem.loss)[place.index] = loss;
}

}  // namespace cacr
