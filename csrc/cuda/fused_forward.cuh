// Forward of short spans, one kernel: X of 16 rows stays in registers and is compared with Y there, rows as a whole.
#pragma once

#include "forward.cuh"
#include "fused.cuh"

namespace cacr {

// Sums over a row relative to c: E_p[d] - c = dot_x / sum_x and E_q[d] - c = dot_y / sum_y, d = (x - m_x) - (y - m_y).
struct RowSums {
    float sum_x, dot_x, sum_y, dot_y;
};

// Calls take(x, y, inside) for the lane's elements of its row r, inside the span or not, and then() after every 16 columns.
template <bool probs, typename F, int kSides, typename Take, typename Then>
CACR_DEVICE void for_elements(const Matrix<F>& target, int row, int r, int length, const Accumulator (&x)[kSides], Take take,
                              Then then) {
    CACR_UNROLL
    for (int t = 0; t < kSides; ++t) {
        if (t * kSide >= length) break;
        CACR_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int col = t * kSide + half * 8 + lane_col();
            float y[2];
            targets_of<probs>(target, row + lane_row() + 8 * r, col, y);
            CACR_UNROLL
            for (int e = 0; e < 2; ++e) take(x[t].v[half][2 * r + e], y[e], col + e < length);
        }
        then();
    }
}

// Compares the lane's two rows of X = factor * x with Y = S_aa: their numbers and losses. c, near E_p[d], is the mean of d with
// weights that are 1 at the largest x and 0 from 4 below it: rows whose E_p[d] and E_q[d] are nearly equal keep the digits of
// the difference, and rows where p is q are 0 to the bit.
template <bool probs, typename F, int kSides>
CACR_DEVICE void compare_rows(const Matrix<F>& target, int row, int length, float factor, const Accumulator (&x)[kSides],
                              RowNumbers<float> (&numbers)[2], float (&losses)[2]) {
    const auto nothing = [] {};
    CACR_UNROLL
    for (int r = 0; r < 2; ++r) {
        float max_x = -infinity();
        float max_y = -infinity();
        const auto raise = [&](float product, float y, bool inside) {
            if (!inside) return;
            max_x = fmaxf(max_x, ordered(factor, product));
            max_y = fmaxf(max_y, y);
        };
        for_elements<probs>(target, row, r, length, x, raise, nothing);
        max_x = row_max(max_x);
        max_y = row_max(max_y);

        float weights = 0.0f;
        float weighted = 0.0f;
        const auto weigh = [&](float product, float y, bool inside) {
            const float u = apart(factor, ordered(factor, product), max_x);
            const float d = u - (y - max_y);
            if (!inside) return;
            const float weight = fmaxf(fused(0.25f, u, 1.0f), 0.0f);
            weights += weight;
            weighted = fused(weight, d, weighted);
        };
        for_elements<probs>(target, row, r, length, x, weigh, nothing);
        const float c = row_sum(weighted) / row_sum(weights);

        RowSums all = {0.0f, 0.0f, 0.0f, 0.0f};
        RowSums few = {0.0f, 0.0f, 0.0f, 0.0f};  // sums of sums: terms of nearly uniform rows all round alike
        const auto add = [&](float product, float y, bool inside) {
            const float u = apart(factor, ordered(factor, product), max_x);
            const float v = y - max_y;
            const float d = (u - v) - c;
            const float ex = exp2_of(u * kLog2E);
            const float ey = exp2_of(v * kLog2E);
            if (!inside) return;
            few.sum_x += ex;
            few.dot_x = fused(ex, d, few.dot_x);
            few.sum_y += ey;
            few.dot_y = fused(ey, d, few.dot_y);
        };
        const auto add_few = [&] {
            all.sum_x += few.sum_x;
            all.dot_x += few.dot_x;
            all.sum_y += few.sum_y;
            all.dot_y += few.dot_y;
            few = {0.0f, 0.0f, 0.0f, 0.0f};
        };
        for_elements<probs>(target, row, r, length, x, add, add_few);
        RowState<float> state = row_begin(max_x, max_y);
        state.centre = c;
        state.sum_x = row_sum(all.sum_x);
        state.dot_x = row_sum(all.dot_x);
        state.sum_y = row_sum(all.sum_y);
        state.dot_y = row_sum(all.dot_y);
        numbers[r] = row_finish(state);
        losses[r] = row_loss(state);
    }
}

// Grid: problems; a warp for every 16 rows of the longest spans, text first. Writes the loss and the row numbers.
template <typename F, int kSides>
CACR_KERNEL(fused_threads(kSides), fused_blocks(kSides)) cacr_fused_forward_kernel(Problem problem) {
#if CACR_FUSED_DEVICE
    CACR_DYNAMIC_SHARED(shared);
    const FusedProblem<F> fused(problem, block_x(), shared);
    if (!any_side_counts(problem, fused.place)) {
        if (thread_index() == 0)
            ((float*)problem.loss)[fused.place.index] = fused.place.extent.valid ? 0.0f : not_a_number();
        return;
    }
    copy_problem(problem, fused);
    finish_copies();
    CACR_BARRIER();  // the scores are there

    const Strip strip(fused);
    float loss = 0.0f;  // of the lane's rows
    if (strip.used && side_counts(problem, fused.place, strip.side)) {
        const int side = strip.side;
        const int length = fused.length(side);
        Accumulator x[kSides];
        project<F>(fused.scores(side, 1 - side), fused.scores(1 - side, 1 - side), strip.row, fused.sides(1 - side),
                   fused.sides(side), x);
        const float factor = (float)projection_factor(problem.options, fused.length(1 - side));
        RowNumbers<float> numbers[2];
        float losses[2];
        if (problem.options.kind == Kind::probs)
            compare_rows<true>(fused.scores(side, side), strip.row, length, factor, x, numbers, losses);
        else
            compare_rows<false>(fused.scores(side, side), strip.row, length, factor, x, numbers, losses);
        const RowStats stats(problem, fused.place, side);
        CACR_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = strip.row + lane_row() + 8 * r;
            if (lane_col() != 0 || row >= length) continue;
            if (problem.stats) set_row_numbers(stats, row, numbers[r]);
            loss += losses[r];
        }
    }
    loss = warp_sum(loss);
    if (lane_index() == 0) fused.notes[warp_index()] = loss;
    CACR_BARRIER();  // the losses of all strips are there
    if (thread_index() != 0) return;
    float total = 0.0f;
    for (int side = kText, warp = 0; side <= kVision; ++side) {
        float sum = 0.0f;
        for (int i = 0; i < fused.sides(side); ++i) sum += fused.notes[warp++];
        if (side_counts(problem, fused.place, side)) total += (float)row_factor(problem.options, fused.length(side)) * sum;
    }
    ((float*)problem.loss)[fused.place.index] = total;
#endif
}

}  // namespace cacr
