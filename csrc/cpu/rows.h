// Row passes: the symmetric KL of one row with both partial derivatives, and the softmax of a row with its backward.
// Vector form of the scalar formulas in ../include/formulas.h; rows lie whole in cache, so the references of d are the maxima.
#pragma once

#include "../include/formulas.h"
#include "simd.h"

namespace cacr {
namespace CACR_ISA {

// Calls f(column, lanes) for each vector of a row of n elements, lanes being the mask of those below n.
template <typename T, typename F>
CACR_INLINE void for_vectors(i64 n, F&& f) {
    i64 j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) f(j, ~IntVec<T>{});
    if (j < n) f(j, first_lanes<T>(n - j));
}

// How the rows of one side are compared and what their gradients are multiplied by.
// Probs: y holds probabilities, Y = log max(y, 1e-12); otherwise Y = y.
template <typename T, bool Probs>
struct RowTerms {
    i64 n;
    T factor;   // X = factor * x
    T weight;   // dL/d(this row's symmetric KL)
    bool grad_x;
    bool grad_y;
};

constexpr int kRowGroup = 8;  // rows taken through each pass together, so that one row's reductions overlap the next row

// Maxima of factor x and Y over one row; kind probs leaves Y in e.
template <typename T, bool Probs>
CACR_INLINE void row_maxima(const RowTerms<T, Probs>& terms, const T* x, const T* y, T* e, T& max_x, T& max_y) {
    typedef Vec<T> V;
    const T lowest = -__builtin_inff();
    V best_x = splat(lowest), best_y = splat(lowest);
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        V vy = load(y + j);
        if constexpr (Probs) {
            const V floor = splat(T(1e-12));
            vy = log_of_normal<T>(select<T>(vy < floor, floor, vy));
            store(e + j, vy);
        }
        best_x = larger<T>(select<T>(lanes, load(x + j) * terms.factor, splat(lowest)), best_x);
        best_y = larger<T>(select<T>(lanes, vy, splat(lowest)), best_y);
    });
    max_x = max_of<T>(best_x);
    max_y = max_of<T>(best_y);
}

// Numbers of one row after its second pass.
template <typename T>
struct RowSums {
    T scale_p, scale_q;  // 1 / l_x, 1 / l_y
    T mean_p, mean_q;    // E_p[d], E_q[d], d = (x - m_x) - (y - m_y)
};

// Leaves exp(x - m_x) in x, exp(Y - m_y) in e and d in d.
template <typename T, bool Probs>
CACR_INLINE RowSums<T> row_sums(const RowTerms<T, Probs>& terms, T* x, const T* logits, T* e, T* d, T max_x, T max_y) {
    typedef Vec<T> V;
    V sum_x = V{}, sum_y = V{}, dot_x = V{}, dot_y = V{};
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        const V u = load(x + j) * terms.factor - max_x;
        const V v = load(logits + j) - max_y;
        const V diff = select<T>(lanes, u - v, V{});
        const V ex = select<T>(lanes, exp_nonpositive(u), V{});
        const V ey = select<T>(lanes, exp_nonpositive(v), V{});
        sum_x += ex;
        sum_y += ey;
        dot_x += ex * diff;
        dot_y += ey * diff;
        store(x + j, ex);
        store(e + j, ey);
        store(d + j, diff);
    });
    RowSums<T> r;
    r.scale_p = T(1) / sum_of<T>(sum_x);
    r.scale_q = T(1) / sum_of<T>(sum_y);
    r.mean_p = sum_of<T>(dot_x) * r.scale_p;
    r.mean_q = sum_of<T>(dot_y) * r.scale_q;
    return r;
}

// Symmetric KL of the row from exponentials and d: sum_j (p_j - q_j)(d_j - c), c the middle of E_p[d] and E_q[d]. The constant
// changes nothing exactly, but keeps the terms small where p and q nearly agree; E_p[d] - E_q[d] would cancel there.
// Leaves weight dL/dx (times the factor) in x, and adds weight dL/dy to grad_y.
template <typename T, bool Probs>
CACR_INLINE T finish_row(const RowTerms<T, Probs>& terms, const RowSums<T>& r, T* x, const T* y, T* grad_y, const T* e, const T* d) {
    typedef Vec<T> V;
    const T weight_x = terms.weight * terms.factor;
    const T middle = (r.mean_p + r.mean_q) * T(0.5);
    V loss = V{};
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T>) __attribute__((always_inline)) {
        const V p = load(x + j) * r.scale_p, q = load(e + j) * r.scale_q, diff = load(d + j);
        const V change = p - q;
        loss += change * (diff - middle);
        if (terms.grad_x) store(x + j, (p * (diff - r.mean_p) + change) * weight_x);
        if (terms.grad_y) {
            V dy = (q * (r.mean_q - diff) - change) * terms.weight;
            if constexpr (Probs) {
                const V prob = load(y + j);
                dy = select<T>(prob < T(1e-12), V{}, dy / prob);
            }
            store(grad_y + j, load(grad_y + j) + dy);
        }
    });
    return sum_of<T>(loss);
}

// Sum over `rows` rows (stride ld) of the symmetric KL of softmax(factor x) and softmax(Y). With gradients: x becomes dL/dx,
// grad_y += dL/dy. scratch: 2 kRowGroup rows. Row ends up to a whole vector are readable in x and y and stay out of every sum.
template <typename T, bool Probs>
static double compare_rows(const RowTerms<T, Probs>& terms, i64 rows, i64 ld, T* x, const T* y, T* grad_y, T* scratch) {
    T* e = scratch;
    T* d = scratch + kRowGroup * ld;
    double loss = 0;
    for (i64 first = 0; first < rows; first += kRowGroup) {
        const int count = rows - first < kRowGroup ? (int)(rows - first) : kRowGroup;
        T max_x[kRowGroup], max_y[kRowGroup];
        RowSums<T> sums[kRowGroup];
        const i64 at = first * ld;
        for (int i = 0; i < count; ++i) row_maxima<T, Probs>(terms, x + at + i * ld, y + at + i * ld, e + i * ld, max_x[i], max_y[i]);
        for (int i = 0; i < count; ++i) {
            const T* logits = Probs ? e + i * ld : y + at + i * ld;
            sums[i] = row_sums<T, Probs>(terms, x + at + i * ld, logits, e + i * ld, d + i * ld, max_x[i], max_y[i]);
        }
        for (int i = 0; i < count; ++i)
            loss += (double)finish_row<T, Probs>(terms, sums[i], x + at + i * ld, y + at + i * ld,
                                                 terms.grad_y ? grad_y + at + i * ld : nullptr, e + i * ld, d + i * ld);
    }
    return loss;
}

// out = softmax(in), both n long; the padding of out is zero.
template <typename T>
static void softmax_row(i64 n, const T* in, T* out) {
    typedef Vec<T> V;
    const T lowest = -__builtin_inff();
    V max = splat(lowest), sum = V{};
    for_vectors<T>(n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        max = larger<T>(select<T>(lanes, load(in + j), splat(lowest)), max);
    });
    const T m = max_of<T>(max);
    for_vectors<T>(n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        const V e = select<T>(lanes, exp_nonpositive(load(in + j) - m), V{});
        sum += e;
        store(out + j, e);
    });
    const T scale = T(1) / sum_of<T>(sum);
    for_vectors<T>(n, [&](i64 j, IntVec<T>) __attribute__((always_inline)) { store(out + j, load(out + j) * scale); });
}

// grad_scores (+)= prob (grad_prob - sum_k prob_k grad_prob_k).
template <typename T>
static void softmax_row_backward(i64 n, const T* prob, const T* grad_prob, T* grad_scores, bool accumulate) {
    typedef Vec<T> V;
    V dot = V{};
    for_vectors<T>(n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        dot += select<T>(lanes, load(prob + j) * load(grad_prob + j), V{});
    });
    const T mean = sum_of<T>(dot);
    for_vectors<T>(n, [&](i64 j, IntVec<T>) __attribute__((always_inline)) {
        const V grad = load(prob + j) * (load(grad_prob + j) - mean);
        store(grad_scores + j, accumulate ? load(grad_scores + j) + grad : grad);
    });
}

}  // namespace CACR_ISA
}  // namespace cacr
