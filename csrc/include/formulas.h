// Scalar formulas of CACR (paper Eq. 3-5), shared by the CPU and CUDA kernels so that they cannot drift.
//
// One row i of one side: logits x (projected attention) and y (own attention), p = softmax(x), q = softmax(y),
//     KL(p||q) + KL(q||p) = sum_j (p_j - q_j)(x_j - y_j) = E_p[d] - E_q[d]
// for d = x - y plus any constant. A common offset of x and y would eat the precision of x - y, so d is always formed from
// logits relative to their row's maxima: d = (x - m_x) - (y - m_y).
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
// a b + c, rounded once whatever the compiler fuses.
CACR_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
CACR_HD double fused(double a, double b, double c) { return fma(a, b, c); }

// Logits are x = factor * product. Their order is that of the products, or of the negated ones.
template <typename T>
CACR_HD T ordered(T factor, T product) {
    return factor < T(0) ? -product : product;
}

// factor * (a - b) of ordered products: x - m_x, rounded relative to itself, and exactly 0 at the maximum. (A fused
// factor * product - m_x would be what m_x was rounded by there, which is large where x is.)
template <typename T>
CACR_HD T apart(T factor, T a, T b) {
    return (factor < T(0) ? -factor : factor) * (a - b);
}

// Running sums over a row. Start with row_begin, add elements (row_add) or other partial rows (row_merge).
template <typename T>
struct RowState {
    T max_x, sum_x, low_x;  // largest ordered product, sum exp(x - m_x) as sum_x + low_x
    T max_y, sum_y, low_y;  // m_y, sum exp(y - m_y)
    T centre;               // c, near E_p[d]: E_p[d] and E_q[d] of nearly uniform rows agree in most digits
    T dot_x, dot_y;         // sum exp(x - m_x) (d - c), sum exp(y - m_y) (d - c), d = (x - m_x) - (y - m_y)
};

// The finished row, d relative to the maxima: what backward needs.
template <typename T>
struct RowNumbers {
    T max_x, sum_x, max_y, sum_y;
    T mean_p, mean_q;  // E_p[d], E_q[d] with d = (x - m_x) - (y - m_y)
};

// Empty row whose maxima are at least (max_x, max_y), which must not exceed the row's true maxima.
template <typename T>
CACR_HD RowState<T> row_begin(T max_x, T max_y) {
    RowState<T> s;
    s.max_x = max_x;
    s.max_y = max_y;
    s.sum_x = s.low_x = s.sum_y = s.low_y = s.centre = s.dot_x = s.dot_y = T(0);
    return s;
}

// Raises the running maxima to at least (tile_max_x, tile_max_y): d and c of the elements so far move by `shift`. c follows in
// place of the dots, whose small differences would be rounded at the size of `shift`; but where these elements lose most of
// their weight in p, E_p[d] stays behind, and c becomes 0, the d of an element that is the largest in x and in y.
template <typename T>
CACR_HD void row_raise(RowState<T>& s, T factor, T tile_max_x, T tile_max_y) {
    const T max_x = tile_max_x > s.max_x ? tile_max_x : s.max_x;
    const T max_y = tile_max_y > s.max_y ? tile_max_y : s.max_y;
    const T down = apart(factor, s.max_x, max_x);
    const T shift = down - (s.max_y - max_y);
    const T cx = exp_of(down);
    const T cy = exp_of(s.max_y - max_y);
    const T moved = s.centre + shift;
    const bool near = cx > T(0.5);
    const T step = near ? T(0) : moved;
    s.centre = near ? moved : T(0);
    s.dot_x = fused(s.low_x, step, fused(s.sum_x, step, s.dot_x)) * cx;
    s.dot_y = fused(s.low_y, step, fused(s.sum_y, step, s.dot_y)) * cy;
    s.sum_x *= cx;
    s.low_x *= cx;
    s.sum_y *= cy;
    s.low_y *= cy;
    s.max_x = max_x;
    s.max_y = max_y;
}

// sum += term, what that rounds away goes to `low`. Terms of nearly uniform rows are all a little below 1, so that sums round
// the same way at every step, and a move of c, which multiplies them, takes the error into the dots.
template <typename T>
CACR_HD void add_exactly(T& sum, T& low, T term) {
    const T total = sum + term;
    low += term - (total - sum);
    sum = total;
}

// Adds one element whose logits do not exceed the running maxima. x - m_x is rounded once, here and in row_grad: the largest of
// nearly one-hot rows has to be the same in both.
template <typename T>
CACR_HD void row_add(RowState<T>& s, T factor, T product, T y) {
    const T u = apart(factor, ordered(factor, product), s.max_x);
    const T v = y - s.max_y;
    const T d = (u - v) - s.centre;
    const T ex = exp_of(u);
    const T ey = exp_of(v);
    add_exactly(s.sum_x, s.low_x, ex);
    s.dot_x = fused(ex, d, s.dot_x);
    add_exactly(s.sum_y, s.low_y, ey);
    s.dot_y = fused(ey, d, s.dot_y);
}

// Moves c to E_p[d] of the elements so far. What was rounded at the old c stays so: after the first elements, begin again
// with row_restart and the same elements.
template <typename T>
CACR_HD void row_follow(RowState<T>& s) {
    if (!(s.sum_x > T(0))) return;
    const T step = s.dot_x / s.sum_x;
    s.centre += step;
    s.dot_x = fused(-s.low_x, step, fused(-s.sum_x, step, s.dot_x));
    s.dot_y = fused(-s.low_y, step, fused(-s.sum_y, step, s.dot_y));
}

// The empty row with the maxima and c of `s`.
template <typename T>
CACR_HD void row_restart(RowState<T>& s) {
    row_follow(s);
    s.sum_x = s.low_x = s.sum_y = s.low_y = s.dot_x = s.dot_y = T(0);
}

// Adds the partial row o of the same row.
template <typename T>
CACR_HD void row_merge(RowState<T>& s, T factor, RowState<T> o) {
    row_raise(s, factor, o.max_x, o.max_y);
    row_raise(o, factor, s.max_x, s.max_y);
    s.sum_x += s.low_x;
    s.sum_y += s.low_y;
    o.sum_x += o.low_x;
    o.sum_y += o.low_y;
    s.low_x = s.low_y = T(0);
    const T step = o.centre - s.centre;
    s.dot_x += o.dot_x + o.sum_x * step;
    s.dot_y += o.dot_y + o.sum_y * step;
    s.sum_x += o.sum_x;
    s.sum_y += o.sum_y;
}

// E_p[d] and E_q[d] with the row's final maxima.
template <typename T>
CACR_HD RowNumbers<T> row_finish(const RowState<T>& s) {
    RowNumbers<T> r;
    r.max_x = s.max_x;
    r.sum_x = s.sum_x + s.low_x;
    r.max_y = s.max_y;
    r.sum_y = s.sum_y + s.low_y;
    r.mean_p = s.dot_x / r.sum_x + s.centre;
    r.mean_q = s.dot_y / r.sum_y + s.centre;
    return r;
}

// Symmetric KL of the finished row, from sums that do not hold c; not below 0, NaN stays NaN.
template <typename T>
CACR_HD T row_loss(const RowState<T>& s) {
    const T loss = s.dot_x / (s.sum_x + s.low_x) - s.dot_y / (s.sum_y + s.low_y);
    return loss < T(0) ? T(0) : loss;
}

// Both partial derivatives of the row's symmetric KL at one element:
//     dL/dx = p (d - E_p[d]) + (p - q),   dL/dy = -q (d - E_q[d]) - (p - q),   x = factor * product
template <typename T>
struct RowGrad {
    T dx, dy;
};

// RowNumbers with reciprocals in place of the sums: every element of a row needs them.
template <typename T>
struct RowScales {
    T max_x, inverse_x, max_y, inverse_y;
    T mean_p, mean_q;
};

template <typename T>
CACR_HD RowScales<T> row_scales(const RowNumbers<T>& r) {
    return {r.max_x, T(1) / r.sum_x, r.max_y, T(1) / r.sum_y, r.mean_p, r.mean_q};
}

template <typename T>
CACR_HD RowGrad<T> row_grad(const RowScales<T>& r, T factor, T product, T y) {
    const T u = apart(factor, ordered(factor, product), r.max_x);
    const T v = y - r.max_y;
    const T d = u - v;
    const T p = exp_of(u) * r.inverse_x;
    const T q = exp_of(v) * r.inverse_y;
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
