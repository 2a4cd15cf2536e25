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

// What a row of one side is compared with and what its gradients are multiplied by.
template <typename T>
struct RowTerms {
    i64 n;
    T factor;   // X = factor * x
    T weight;   // dL/d(this row's symmetric KL)
    bool grad_x;
    bool grad_y;
    bool probs;  // y holds probabilities: Y = log max(y, 1e-12)
};

// Symmetric KL of softmax(factor x) and softmax(Y). With gradients: x becomes dL/dx, grad_y += dL/dy.
// e, d: rows of scratch. Row ends up to a whole vector are readable in x and y, and stay out of every sum.
template <typename T>
static T compare_row(const RowTerms<T>& terms, T* x, const T* y, T* grad_y, T* e, T* d) {
    typedef Vec<T> V;
    const i64 n = terms.n;
    const T lowest = -__builtin_inff();
    V max_x = splat(lowest), max_y = splat(lowest);
    for_vectors<T>(n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        V vy = load(y + j);
        if (terms.probs) {
            const V floor = splat(T(1e-12));
            vy = log_of_normal<T>(select<T>(vy < floor, floor, vy));
            store(e + j, vy);
        }
        max_x = larger<T>(select<T>(lanes, load(x + j) * terms.factor, splat(lowest)), max_x);
        max_y = larger<T>(select<T>(lanes, vy, splat(lowest)), max_y);
    });
    const T* logits = terms.probs ? e : y;
    const T mx = max_of<T>(max_x), my = max_of<T>(max_y);
    V sum_x = V{}, sum_y = V{}, dot_x = V{}, dot_y = V{};
    for_vectors<T>(n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        const V u = load(x + j) * terms.factor - mx;
        const V v = load(logits + j) - my;
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
    const T scale_p = T(1) / sum_of<T>(sum_x), scale_q = T(1) / sum_of<T>(sum_y);
    const T mean_p = sum_of<T>(dot_x) * scale_p, mean_q = sum_of<T>(dot_y) * scale_q;
    if (terms.grad_x || terms.grad_y) {
        const T weight_x = terms.weight * terms.factor;
        for_vectors<T>(n, [&](i64 j, IntVec<T>) __attribute__((always_inline)) {
            const V p = load(x + j) * scale_p, q = load(e + j) * scale_q, diff = load(d + j);
            if (terms.grad_x) store(x + j, (p * (diff - mean_p) + (p - q)) * weight_x);
            if (terms.grad_y) {
                V dy = (q * (mean_q - diff) - (p - q)) * terms.weight;
                if (terms.probs) {
                    const V prob = load(y + j);
                    dy = select<T>(prob < T(1e-12), V{}, dy / prob);
                }
                store(grad_y + j, load(grad_y + j) + dy);
            }
        });
    }
    return mean_p - mean_q;
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
