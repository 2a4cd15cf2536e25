// Scalar formulas of CACR (paper Eq. 3-5), shared by the CPU and CUDA kernels so that they cannot drift.
//
// One row i of one side: logits x (projected attention) and y (own attention), p = softmax(x), q = softmax(y),
//     KL(p||q) + KL(q||p) = sum_j (p_j - q_j)(x_j - y_j) = E_p[d] - E_q[d]
// for d = x - y plus any constant. A common offset of x and y would eat the precision of x - y, so d is always formed from
// referenced logits: d = (x - r_x) - (y - r_y), with r fixed for the whole row before the first element is added.
// T is float or double.
#pragma once

#include "problem.h"

#if !defined(__CUDACC_RTC__)
#include <math.h>
#endif

namespace cacr {

CACR_HD float exp_of(float v) { return expf(v); }
CACR_HD double exp_of(double v) { return exp(v); }
CACR_HD float log_of(float v) { return logf(v); }
CACR_HD double log_of(double v) { return log(v); }

// Running sums over a row. Start with row_begin, add elements (row_add) or other partial rows (row_merge).
template <typename T>
struct RowState {
    T ref_x, ref_y;  // references of d
    T max_x, sum_x;  // m_x, sum exp(x - m_x)
    T max_y, sum_y;  // m_y, sum exp(y - m_y)
    T dot_x, dot_y;  // sum exp(x - m_x) d, sum exp(y - m_y) d, d relative to the references
};

// The finished row, d relative to the maxima: what backward needs.
template <typename T>
struct RowNumbers {
    T max_x, sum_x, max_y, sum_y;
    T mean_p, mean_q;  // E_p[d], E_q[d] with d = (x - m_x) - (y - m_y)
};

// Empty row with references near the row's values, for example the maxima of the first tile; the references also start the
// running maxima, so they must not exceed the row's true maxima.
template <typename T>
CACR_HD RowState<T> row_begin(T ref_x, T ref_y) {
    RowState<T> s;
    s.ref_x = ref_x;
    s.ref_y = ref_y;
    s.max_x = ref_x;
    s.max_y = ref_y;
    s.sum_x = s.sum_y = s.dot_x = s.dot_y = T(0);
    return s;
}

// Raises the running maxima to at least (tile_max_x, tile_max_y) and rescales the sums.
template <typename T>
CACR_HD void row_raise(RowState<T>& s, T tile_max_x, T tile_max_y) {
    if (tile_max_x > s.max_x) {
        const T c = exp_of(s.max_x - tile_max_x);
        s.max_x = tile_max_x;
        s.sum_x *= c;
        s.dot_x *= c;
    }
    if (tile_max_y > s.max_y) {
        const T c = exp_of(s.max_y - tile_max_y);
        s.max_y = tile_max_y;
        s.sum_y *= c;
        s.dot_y *= c;
    }
}

// Adds one element whose logits do not exceed the running maxima.
template <typename T>
CACR_HD void row_add(RowState<T>& s, T x, T y) {
    const T d = (x - s.ref_x) - (y - s.ref_y);
    const T ex = exp_of(x - s.max_x);
    const T ey = exp_of(y - s.max_y);
    s.sum_x += ex;
    s.dot_x += ex * d;
    s.sum_y += ey;
    s.dot_y += ey * d;
}

// Adds the partial row o of the same row; both must have the same references.
template <typename T>
CACR_HD void row_merge(RowState<T>& s, const RowState<T>& o) {
    row_raise(s, o.max_x, o.max_y);
    const T cx = exp_of(o.max_x - s.max_x);
    const T cy = exp_of(o.max_y - s.max_y);
    s.sum_x += cx * o.sum_x;
    s.dot_x += cx * o.dot_x;
    s.sum_y += cy * o.sum_y;
    s.dot_y += cy * o.dot_y;
}

// E_p[d] and E_q[d], moved from the references to the final maxima: d_max = d_ref + (r_x - m_x) - (r_y - m_y).
template <typename T>
CACR_HD RowNumbers<T> row_finish(const RowState<T>& s) {
    const T shift = (s.ref_x - s.max_x) - (s.ref_y - s.max_y);
    RowNumbers<T> r;
    r.max_x = s.max_x;
    r.sum_x = s.sum_x;
    r.max_y = s.max_y;
    r.sum_y = s.sum_y;
    r.mean_p = s.dot_x / s.sum_x + shift;
    r.mean_q = s.dot_y / s.sum_y + shift;
    return r;
}

// Symmetric KL of the finished row (the shift of row_finish cancels; taking it from the state avoids rounding it).
template <typename T>
CACR_HD T row_loss(const RowState<T>& s) {
    return s.dot_x / s.sum_x - s.dot_y / s.sum_y;
}

// Both partial derivatives of the row's symmetric KL at one element:
//     dL/dx = p (d - E_p[d]) + (p - q),   dL/dy = -q (d - E_q[d]) - (p - q)
template <typename T>
struct RowGrad {
    T dx, dy;
};

template <typename T>
CACR_HD RowGrad<T> row_grad(const RowNumbers<T>& r, T x, T y) {
    const T u = x - r.max_x;
    const T v = y - r.max_y;
    const T d = u - v;
    const T p = exp_of(u) / r.sum_x;
    const T q = exp_of(v) / r.sum_y;
    RowGrad<T> g;
    g.dx = p * (d - r.mean_p) + (p - q);
    g.dy = -q * (d - r.mean_q) - (p - q);
    return g;
}

// Kind probs: y = log max(prob, 1e-12), no gradient where clamped; NaN stays NaN.
template <typename T>
CACR_HD T logit_of_prob(T prob) {
    const T floor = T(1e-12);
    return log_of(prob < floor ? floor : prob);
}

// d logit_of_prob / d prob.
template <typename T>
CACR_HD T logit_of_prob_grad(T prob) {
    return prob < T(1e-12) ? T(0) : T(1) / prob;
}

// Kind softmax, one row of a block: P = exp(s - m) / l, dS = P (dP - sum_k P_k dP_k).
template <typename T>
CACR_HD T softmax_of(T score, T row_max, T row_sum) {
    return exp_of(score - row_max) / row_sum;
}

template <typename T>
CACR_HD T softmax_grad(T prob, T grad_prob, T row_dot) {
    return prob * (grad_prob - row_dot);
}

// Factor of X = factor * S_ab S_bb S_ab^T for a side whose other modality has n_b tokens.
CACR_HD double projection_factor(const Options& o, int n_b) {
    return o.projection_mean ? o.projection_scale / ((double)n_b * (double)n_b) : o.projection_scale;
}

// Factor of a side's loss: Eq. 4 sums over rows, IAIS's batchmean divides by n_a.
CACR_HD double row_factor(const Options& o, int n_a) { return o.row_mean ? 1.0 / (double)n_a : 1.0; }

// Whether a side counts: it is asked for and neither span is empty.
CACR_HD int side_active(const Options& o, const Extent& e, int is_vision) {
    if (e.n_text == 0 || e.n_vision == 0) return 0;
    return o.sides == Sides::both || (is_vision ? o.sides == Sides::vision : o.sides == Sides::text);
}

}  // namespace cacr
