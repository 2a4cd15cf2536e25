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

enum class GradY { none, store, add };  // what becomes of dL/dY

// How the rows of one side are compared and what their gradients are multiplied by.
// Probs: y holds probabilities, Y = log max(y, 1e-12); otherwise Y = y.
template <typename T, bool Probs>
struct RowTerms {
    i64 n;
    T factor;   // X = factor * x
    T weight;   // dL/d(this row's symmetric KL)
    bool grad_x;
    GradY grad_y;
};

// Rows that go through each pass together, so that their partial results are reduced all at once.
constexpr int kRowGroup = 8;

// Quantities of the rows of a group. Long vectors of partial results wait for those of the other rows: reduced all at once they
// take half the shuffles. Shorter ones are reduced as they come.
template <typename T, int Quantities>
struct RowGroup {
    static constexpr bool kAtOnce = kLanes<T> > kRowGroup;

    Vec<T> partial[Quantities][kAtOnce ? kRowGroup : 1];
    alignas(CACR_VECTOR_BYTES) T value[Quantities][kRowGroup];

    // Quantity q of row i, of which v holds the partial results. combine(a, b) of vectors of any length, and of numbers.
    template <typename F>
    CACR_INLINE void put(int q, int i, Vec<T> v, F&& combine) {
        if constexpr (kAtOnce)
            partial[q][i] = v;
        else
            value[q][i] = fold<T, kLanes<T>>(v, combine, typename MakeIndices<kLanes<T> / 2>::type{});
    }

    // After the last row.
    template <typename F>
    CACR_INLINE void finish(F&& combine) {
        if constexpr (kAtOnce) {
            static_assert(Quantities * kRowGroup % kLanes<T> == 0, "whole vectors of results");
            unrolled<Quantities * kRowGroup / kLanes<T>>([&](auto i) __attribute__((always_inline)) {
                constexpr int first = i * kLanes<T>;
                store(&value[first / kRowGroup][first % kRowGroup], fold_all<T>(&partial[first / kRowGroup][first % kRowGroup], combine));
            });
        }
    }

    // l_x, l_y, sum_j exp(x_j - m_x) d_j, sum_j exp(Y_j - m_y) d_j become 1 / l_x, 1 / l_y, E_p[d], E_q[d].
    CACR_INLINE void normalise() {
        for (int first = 0; first < 2 * kRowGroup; first += kLanes<T>) {
            T *scale = value[0] + first, *mean = value[2] + first;
            store(scale, T(1) / load(scale));
            store(mean, load(mean) * load(scale));
        }
    }
};

constexpr auto kSum = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
constexpr auto kMaximum = [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; };

// x or -x: what is largest where factor x is.
template <typename T>
CACR_INLINE T sign_of(T factor) {
    return factor < T(0) ? T(-1) : T(1);
}

// Maxima of x (-x where the factor is negative) and of Y over row i of a group; kind probs leaves Y in e.
template <typename T, bool Probs>
CACR_INLINE void row_maxima(const RowTerms<T, Probs>& terms, const T* x, const T* y, T* e, RowGroup<T, 2>& maxima, int i) {
    typedef Vec<T> V;
    const T lowest = -__builtin_inff(), sign = sign_of(terms.factor);
    V max_x = splat(lowest), max_y = splat(lowest);
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        V vy = load(y + j);
        if constexpr (Probs) {
            const V floor = splat(T(1e-12));
            vy = log_of_normal<T>(select<T>(vy < floor, floor, vy));
            store(e + j, vy);
        }
        max_x = larger<T>(select<T>(lanes, load(x + j) * sign, splat(lowest)), max_x);
        max_y = larger<T>(select<T>(lanes, vy, splat(lowest)), max_y);
    });
    maxima.put(0, i, max_x, kMaximum);
    maxima.put(1, i, max_y, kMaximum);
}

// Leaves exp(X - m_X) in x, exp(Y - m_y) in e and d = (X - m_X) - (y - m_y) in d; the sums of both exponentials, and of d times each.
// X - m_X = factor (x - x of the maximum): exactly 0 there, where a fused factor x - m_X would be the rounding of m_X.
template <typename T, bool Probs>
CACR_INLINE void row_sums(const RowTerms<T, Probs>& terms, T* x, const T* logits, T* e, T* d, const RowGroup<T, 2>& maxima,
                          RowGroup<T, 4>& sums, int i) {
    typedef Vec<T> V;
    const T sign = sign_of(terms.factor), factor = terms.factor * sign, max_x = maxima.value[0][i], max_y = maxima.value[1][i];
    V sum_x = V{}, sum_y = V{}, dot_x = V{}, dot_y = V{};
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T> lanes) __attribute__((always_inline)) {
        const V u = (load(x + j) * sign - max_x) * factor;
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
    sums.put(0, i, sum_x, kSum);
    sums.put(1, i, sum_y, kSum);
    sums.put(2, i, dot_x, kSum);
    sums.put(3, i, dot_y, kSum);
}

// Symmetric KL of the row from exponentials and d: sum_j (p_j - q_j)(d_j - c), c the middle of E_p[d] and E_q[d]. The constant
// changes nothing exactly, but keeps the terms small where p and q nearly agree; E_p[d] - E_q[d] would cancel there.
// Leaves weight dL/dx (times the factor) in x; weight dL/dy goes to grad_y.
template <typename T, bool Probs>
CACR_INLINE Vec<T> finish_row(const RowTerms<T, Probs>& terms, const RowGroup<T, 4>& sums, int i, T* x, const T* y, T* grad_y, const T* e,
                              const T* d) {
    typedef Vec<T> V;
    const T scale_p = sums.value[0][i], scale_q = sums.value[1][i], mean_p = sums.value[2][i], mean_q = sums.value[3][i];
    const T middle = (mean_p + mean_q) * T(0.5), weight = terms.weight, weight_x = terms.weight * terms.factor;
    V loss = V{};
    for_vectors<T>(terms.n, [&](i64 j, IntVec<T>) __attribute__((always_inline)) {
        const V p = load(x + j) * scale_p, q = load(e + j) * scale_q, diff = load(d + j);
        // Two rounded products, so that 0 where p is q: both are needed below, and compilers fuse only a product that is not.
        const V change = p - q;
        loss += change * (diff - middle);
        if (terms.grad_x) store(x + j, (p * (diff - mean_p) + change) * weight_x);
        if (terms.grad_y != GradY::none) {
            V dy = (q * (mean_q - diff) - change) * weight;
            if constexpr (Probs) {
                const V prob = load(y + j);
                dy = select<T>(prob < T(1e-12), V{}, dy / prob);
            }
            store(grad_y + j, terms.grad_y == GradY::add ? load(grad_y + j) + dy : dy);
        }
    });
    return loss;
}

// Sum over `rows` rows (stride ld) of the symmetric KL of softmax(factor x) and softmax(Y). With gradients: x becomes dL/dx,
// dL/dY goes to grad_y. scratch: 2 kRowGroup rows. Row ends up to a whole vector are readable in x and y and stay out of every sum.
template <typename T, bool Probs>
static double compare_rows(const RowTerms<T, Probs>& terms, i64 rows, i64 ld, T* x, const T* y, T* grad_y, T* scratch) {
    T* e = scratch;
    T* d = scratch + kRowGroup * ld;
    RowGroup<T, 2> maxima = {};
    RowGroup<T, 4> sums = {};
    Vec<double> loss = {};
    for (i64 first = 0; first < rows; first += kRowGroup) {
        const i64 count = rows - first < kRowGroup ? rows - first : kRowGroup;
        for (i64 i = 0; i < count; ++i) {
            const i64 at = (first + i) * ld;
            row_maxima<T, Probs>(terms, x + at, y + at, e + i * ld, maxima, (int)i);
        }
        maxima.finish(kMaximum);
        for (i64 i = 0; i < count; ++i) {
            const i64 at = (first + i) * ld;
            row_sums<T, Probs>(terms, x + at, Probs ? e + i * ld : y + at, e + i * ld, d + i * ld, maxima, sums, (int)i);
        }
        sums.finish(kSum);
        sums.normalise();
        for (i64 i = 0; i < count; ++i) {
            const i64 at = (first + i) * ld;
            T* dy = terms.grad_y == GradY::none ? nullptr : grad_y + at;
            add_lanes(loss, finish_row<T, Probs>(terms, sums, (int)i, x + at, y + at, dy, e + i * ld, d + i * ld));
        }
    }
    return sum_of<double>(loss);
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
