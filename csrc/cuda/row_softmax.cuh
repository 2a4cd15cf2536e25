// Kind softmax: P = exp(S - m) / l of every block into the workspace, before anything else, and its Jacobian afterwards.
#pragma once

#include "products.cuh"

namespace cacr {

struct RowSoftmax {
    float row_max;
    float row_sum;
};

// max_j S[row, j] and sum_j exp(S[row, j] - max), one row by one warp, the result in every lane.
CACR_DEVICE RowSoftmax reduce_row(const Scores& scores, int row, int cols) {
    const int lane = thread_index() % kWarp;
    RowSoftmax result;
    result.row_max = -infinity();
    for (int col = lane; col < cols; col += kWarp) result.row_max = fmaxf(result.row_max, scores.at(row, col));
    result.row_max = warp_max(result.row_max);
    result.row_sum = 0.0f;
    for (int col = lane; col < cols; col += kWarp) result.row_sum += exp_of(scores.at(row, col) - result.row_max);
    result.row_sum = warp_sum(result.row_sum);
    return result;
}

// Grid: problems x ceil(max(T, R) / 4) x the four blocks; one warp a row. In the forward the statistics are found and kept
// in stats (m_y, l_y for S_aa), in the backward they are read from there.
template <bool is_forward>
CACR_KERNEL(kThreads, 1) cacr_row_softmax_kernel(Problem problem, i64 first) {
    const Place place = place_of(problem, first + block_x());
    const int row_side = block_z() / 2;
    const int col_side = block_z() % 2;
    const bool cross = row_side != col_side;
    const int row = block_y() * kWarpsPerBlock + thread_index() / kWarp;
    if (!(cross ? side_counts(problem, place, row_side) : any_side_counts(problem, place))) return;
    if (row >= length_of(place.extent, row_side)) return;

    const Workspace workspace =
        is_forward ? forward_workspace(problem, block_x()) : backward_workspace(problem, block_x());
    const Scores scores(problem, place, row_side, col_side);
    const int cols = length_of(place.extent, col_side);
    const RowStats stats(problem, place, row_side);
    float* row_max = &stats.at(cross ? kMaxCross : kMaxY, row);
    float* row_sum = &stats.at(cross ? kSumCross : kSumY, row);
    RowSoftmax statistics;
    if (is_forward) {
        statistics = reduce_row(scores, row, cols);
        if (thread_index() % kWarp == 0) {
            *row_max = statistics.row_max;
            *row_sum = statistics.row_sum;
        }
    } else {
        statistics = {*row_max, *row_sum};
    }
    float* probs = workspace.prob(row_side, col_side) + (i64)row * workspace.columns(col_side);
    for (int col = thread_index() % kWarp; col < cols; col += kWarp)
        probs[col] = softmax_of(scores.at(row, col), statistics.row_max, statistics.row_sum);
}

}  // namespace cacr
