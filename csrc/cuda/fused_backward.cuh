// Backward of short spans, one kernel: X again, G = factor dL/dX to shared memory, then with F = S_ab, C = S_bb of each side
//     dS_ab = (G^T F) C + (G F) C^T,    dS_bb = (F^T G) F + dL/dS_bb through Y_b,
// every product in brackets 16 columns at a time, in registers. S_aa gets both its contributions in float32 before one rounding.
#pragma once

#include "backward_rows.cuh"
#include "fused.cuh"

namespace cacr {

// What turns X of one row into gradients.
struct FusedRow {
    RowNumbers<float> numbers;
    float inverse_x;  // of the sums
    float inverse_y;

    CACR_DEVICE FusedRow(const RowStats& stats, int row) {
        numbers = row_numbers(stats, row);
        inverse_x = 1.0f / numbers.sum_x;
        inverse_y = 1.0f / numbers.sum_y;
    }

    // Formulas of row_grad; p - q of equal rows is 0 whatever the compiler fuses. The sums are no part of the exponent: what it
    // is rounded by there is many times a nearly uniform row's p - q.
    CACR_DEVICE RowGrad<float> gradient(float factor, float product, float y) const {
        const float u = apart(factor, ordered(factor, product), numbers.max_x);
        const float v = y - numbers.max_y;
        const float d = u - v;
        const float p = product_of(exp2_of(u * kLog2E), inverse_x);
        const float q = product_of(exp2_of(v * kLog2E), inverse_y);
        const float difference = p - q;
        return {fused(p, d - numbers.mean_p, difference), -fused(q, d - numbers.mean_q, difference)};
    }
};

// What all rows of a side share.
template <typename F>
struct FusedSide {
    RowStats stats;
    Matrix<F> target;
    float factor;
    float weight;
    int length;
};

// Calls take(x, dL/dy) for the lane's elements inside the span, and take(row, col, G) for each pair of them.
template <bool probs, typename F, int kSides, typename Take>
CACR_DEVICE void for_gradients(const FusedSide<F>& side, int first_row, Accumulator (&x)[kSides], Take& take) {
    CACR_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + lane_row() + 8 * r;
        const bool used = row < side.length;
        const FusedRow numbers(side.stats, used ? row : 0);
        CACR_UNROLL
        for (int t = 0; t < kSides; ++t) {
            if (t * kSide >= side.length) break;
            CACR_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int col = t * kSide + half * 8 + lane_col();
                const Pair pair = pair_at(side.target, row, col);
                const float s[2] = {pair.first, pair.second};
                float g[2];
                CACR_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float& own = x[t].v[half][2 * r + e];
                    const RowGrad<float> grad =
                        numbers.gradient(side.factor, own, probs ? logit_of_prob(s[e]) : s[e]);
                    const bool inside = used && col + e < side.length;
                    const float chain = probs ? side.weight * logit_of_prob_grad(s[e]) : side.weight;
                    g[e] = inside ? side.weight * side.factor * grad.dx : 0.0f;
                    take(own, inside ? chain * grad.dy : 0.0f);
                }
                take(row, col, {g[0], g[1]});
            }
        }
    }
}

// What is done with the gradients of a row: the largest |G| is found, or G goes to shared memory and x becomes dL/dS_aa.
struct FindLargest {
    float largest = 0.0f;
    CACR_DEVICE void operator()(float&, float) {}
    CACR_DEVICE void operator()(int, int, Pair g) { largest = fmaxf(largest, fmaxf(fabsf(g.first), fabsf(g.second))); }
};

template <typename F>
struct PutGradients {
    WideMatrix<F> to;
    float scale;
    CACR_DEVICE void operator()(float& x, float dy) const { x = dy; }
    CACR_DEVICE void operator()(int row, int col, Pair g) const {
        set_pair_at(to, row, col, {scale * g.first, scale * g.second});
    }
};

// G of 16 rows, of which x is X, to shared memory, with what undoes its scale to the notes, and dL/dS_aa through Y to x.
template <bool probs, typename F, int kSides>
CACR_DEVICE void differentiate_rows(const FusedProblem<F>& fused, const FusedSide<F>& rows, const Strip& strip,
                                    Accumulator (&x)[kSides]) {
    PutGradients<F> put = {fused.g(strip.side), 1.0f};
    if (Words16<F>::scaled) {
        FindLargest find;
        for_gradients<probs>(rows, strip.row, x, find);
        put.scale = scale_of(warp_max(find.largest));
        if (lane_index() == 0) fused.notes[warp_index()] = reciprocal_of_power(put.scale);
    }
    for_gradients<probs>(rows, strip.row, x, put);
}

// X of 16 rows again, and what differentiate_rows makes of it.
template <typename F, int kSides>
CACR_DEVICE void differentiate(const Problem& problem, const FusedProblem<F>& fused, const Strip& strip,
                               Accumulator (&x)[kSides]) {
    const int side = strip.side;
    project<F>(fused.scores(side, 1 - side), fused.scores(1 - side, 1 - side), strip.row, fused.sides(1 - side),
               fused.sides(side), x);
    const FusedSide<F> rows = {RowStats(problem, fused.place, side), fused.scores(side, side),
                               (float)projection_factor(problem.options, fused.length(1 - side)),
                               row_weight(problem, fused.place, fused.length(side)), fused.length(side)};
    if (problem.options.kind == Kind::probs)
        differentiate_rows<true>(fused, rows, strip, x);
    else
        differentiate_rows<false>(fused, rows, strip, x);
}

// Two neighbouring elements of a row to the gradient.
template <typename F>
CACR_DEVICE void set_pair(const ScoresGrad& grad, bool aligned, int row, int col, int cols, Pair values) {
    F* to = grad.pointer<F>(row, col);
    if constexpr (sizeof(F) == sizeof(float)) {
        if (aligned && col + 1 < cols) {
            *(Pair*)to = values;
            return;
        }
        if (col < cols) to[0] = values.first;
        if (col + 1 < cols) to[1] = values.second;
    } else {
        const unsigned word = Words16<F>::word(values);
        if (aligned && col + 1 < cols) {
            *(unsigned*)to = word;
            return;
        }
        if (col < cols) to[0].bits = (unsigned short)(word & 0xffffu);
        if (col + 1 < cols) to[1].bits = (unsigned short)(word >> 16);
    }
}

template <typename F, int kSides>
CACR_DEVICE void set_rows(const Problem& problem, const FusedProblem<F>& fused, int side, int col_side, int first_row,
                          const Accumulator (&acc)[kSides]) {
    const ScoresGrad grad(problem, fused.place, side, col_side);
    const int cols = fused.length(col_side);
    const size_t row_bytes = (size_t)grad.where.row_stride * sizeof(F);
    const bool aligned = ((size_t)grad.pointer<F>(0, 0) | row_bytes) % (2 * sizeof(F)) == 0;
    CACR_UNROLL
    for (int t = 0; t < kSides; ++t) {
        if (t * kSide >= cols) break;
        CACR_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + lane_row() + 8 * r;
            CACR_UNROLL
            for (int half = 0; half < 2; ++half)
                if (row < fused.length(side))
                    set_pair<F>(grad, aligned, row, t * kSide + half * 8 + lane_col(), cols,
                                {acc[t].v[half][2 * r], acc[t].v[half][2 * r + 1]});
        }
    }
}

// 16 rows of dS_aa: acc, which holds dL/dS_aa through Y_a, plus (F^T G) F of the other side b, F = S_ba.
template <typename F, int kSides>
CACR_DEVICE void add_inner(const FusedProblem<F>& fused, const Strip& strip, Accumulator (&acc)[kSides]) {
    const int other = 1 - strip.side;
    const int m = fused.sides(other);
    const Matrix<F> f = fused.scores(other, strip.side);
    const WideMatrix<F> g = fused.g(other);
    const float* undo = fused.notes + (other == kText ? 0 : fused.sides(kText));
    for (int j = 0; j < m; ++j) {
        Accumulator z;
        clear(z);
        CACR_UNROLL_BY((sizeof(F) == 2 ? 2 : 1))
        for (int i = 0; i < m; ++i)
            add_wide(z, left_transposed(f, i * kSide, strip.row), right(g, i * kSide, j * kSide), undo[i]);
        const SplitFragment<F> parts = split<F>(z);
        CACR_UNROLL
        for (int t = 0; t < kSides; ++t)
            if (t < fused.sides(strip.side)) add_product<false>(acc[t], parts, right(f, j * kSide, t * kSide));
    }
}

// 16 rows of dS_ab = (G^T F) C + (G F) C^T.
template <typename F, int kSides>
CACR_DEVICE void add_outer(const FusedProblem<F>& fused, const Strip& strip, Accumulator (&acc)[kSides]) {
    const int side = strip.side;
    const int n = fused.sides(side);
    const int m = fused.sides(1 - side);
    const Matrix<F> f = fused.scores(side, 1 - side);
    const Matrix<F> c = fused.scores(1 - side, 1 - side);
    const WideMatrix<F> g = fused.g(side);
    const float* undo = fused.notes + (side == kText ? 0 : fused.sides(kText));
    for (int j = 0; j < m; ++j) {
        Accumulator v;
        Accumulator w;
        clear(v);
        clear(w);
        CACR_UNROLL_BY((sizeof(F) == 2 ? 2 : 1))
        for (int i = 0; i < n; ++i) {
            const Fragment<F> b = right(f, i * kSide, j * kSide);
            add_wide(w, left_transposed(g, i * kSide, strip.row), b, undo[i]);
            // float: read again, as its parts would be too many registers to hold
            add_wide(v, left(g, strip.row, i * kSide), sizeof(F) == 2 ? b : right(f, i * kSide, j * kSide),
                     undo[strip.row / kSide]);
        }
        const SplitFragment<F> parts_v = split<F>(v);
        const SplitFragment<F> parts_w = split<F>(w);
        CACR_UNROLL
        for (int t = 0; t < kSides; ++t) {
            if (t >= m) break;
            add_product<false>(acc[t], parts_w, right(c, j * kSide, t * kSide));
            add_product<false>(acc[t], parts_v, right_transposed(c, t * kSide, j * kSide));
        }
    }
}

// Grid: problems; a warp for every 16 rows of the longest spans, text first. Writes the gradients inside the spans.
template <typename F, int kSides>
CACR_KERNEL(fused_threads(kSides), fused_blocks(kSides)) cacr_fused_backward_kernel(Problem problem) {
#if CACR_FUSED_DEVICE
    CACR_DYNAMIC_SHARED(shared);
    const FusedProblem<F> fused(problem, block_x(), shared);
    if (!any_side_counts(problem, fused.place)) return;
    copy_problem(problem, fused);
    finish_copies();
    CACR_BARRIER();  // the scores are there

    const Strip strip(fused);
    Accumulator acc[kSides];
    if (strip.used && side_counts(problem, fused.place, strip.side)) differentiate<F>(problem, fused, strip, acc);
    CACR_BARRIER();  // G of both sides is there
    if (!strip.used) return;

    if (!wants_target(problem, fused.place, strip.side)) {
        CACR_UNROLL
        for (int t = 0; t < kSides; ++t) clear(acc[t]);
    }
    if (wants_projection(problem, fused.place, 1 - strip.side)) add_inner<F>(fused, strip, acc);
    set_rows<F>(problem, fused, strip.side, strip.side, strip.row, acc);

    CACR_UNROLL
    for (int t = 0; t < kSides; ++t) clear(acc[t]);
    if (wants_projection(problem, fused.place, strip.side)) add_outer<F>(fused, strip, acc);
    set_rows<F>(problem, fused, strip.side, 1 - strip.side, strip.row, acc);
#endif
}

}  // namespace cacr
