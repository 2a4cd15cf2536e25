// One problem of the scores kernels: loss and gradient of one head, everything in scratch of one thread.
//
// Side a in {text, vision} with n = n_a rows, other side b with m = n_b (paper Eq. 3-5; factor s = projection factor):
//     U = F W,  X = s U F^T,  Y = S_aa,  F = S_ab [n, m], W = S_bb [m, m]  (kind softmax: row softmaxes of both)
// F^T is (F - 1 f_0)^T in float: X changes by a constant a row, which its softmax does not see, and a common offset of F
// does not eat the digits of X. (Not for kind softmax, whose F is small.)
//     G = s dL/dX,  dU = G F,  dF = G^T U + dU W^T,  dW += F^T dU,  dS_aa += dL/dY
// 6 n m (n + m) multiply-adds a side.
#pragma once

#include "blocks.h"
#include "gemm.h"
#include "rows.h"

namespace cacr {
namespace CACR_ISA {

constexpr i64 kAheadBytes = 256 * 1024;

// Scratch matrices of one problem; index ab in {TT, TV, VT, VV}, index a in {0 text, 1 vision}.
template <typename T>
struct Scratch {
    T* raw[4];      // blocks as loaded; kind softmax: TV and VT become probabilities
    T* inner[2];    // W of the other side: raw TT, VV, or their softmaxes
    T* ft;          // F^T of the side at work
    T* wt;          // W^T
    T* grad[4];
    bool fresh[4];  // nothing has been written to grad[ab] yet
    T* grad_inner;  // kind softmax: dW before the softmax backward
    T* u;
    T* du;
    T* x;
    T* rows;  // two row groups
    Workspace<T> work;
    i64 bytes;
};

// Lays the matrices out from `base` (null: only counts bytes).
template <typename T>
static Scratch<T> lay_out(char* base, i64 n_text, i64 n_vision, Kind kind, bool backward) {
    Scratch<T> s;
    i64 used = 0;
    // Five extra lines keep matrices of equal size from falling on the same cache sets.
    auto take = [&](i64 elements) {
        T* at = (T*)(base + used);
        used += (elements * (i64)sizeof(T) + 63) / 64 * 64 + 5 * 64;
        return at;
    };
    const i64 n[2] = {n_text, n_vision};
    const i64 ld[2] = {leading<T>(n_text), leading<T>(n_vision)};
    const i64 widest = ld[0] > ld[1] ? ld[0] : ld[1];
    for (int ab = 0; ab < 4; ++ab) {
        s.raw[ab] = take(n[ab / 2] * ld[ab % 2]);
        s.grad[ab] = backward ? take(n[ab / 2] * ld[ab % 2]) : nullptr;
        s.fresh[ab] = backward;
    }
    for (int a = 0; a < 2; ++a) s.inner[a] = kind == Kind::softmax ? take(n[a] * ld[a]) : s.raw[3 * a];
    s.grad_inner = backward && kind == Kind::softmax ? take(widest * widest) : nullptr;
    s.ft = take(widest * widest);
    s.wt = backward ? take(widest * widest) : nullptr;
    s.u = take(widest * widest);
    s.du = backward ? take(widest * widest) : nullptr;
    s.x = take(widest * widest);
    s.rows = take(2 * kRowGroup * widest);  // after the matrices: products read up to three rows past a left factor
    s.work = {take(pack_elements<T>()), {}, 0};
    s.bytes = used;
    return s;
}

// Loss of side a; with a backward pass, its contributions to the gradients, weighted by `weight`.
template <typename T>
static double run_side(const Options& o, int a, i64 n, i64 m, Scratch<T>& s, bool backward, T weight) {
    const int aa = 3 * a, ab = a ? VT : TV, b = 1 - a;
    const i64 ldn = leading<T>(n), ldm = leading<T>(m);
    const T* f = s.raw[ab];
    const T* w = s.inner[b];
    const T row_weight = (T)row_factor(o, (int)n);
    auto first_write = [&](int block) {
        const bool fresh = s.fresh[block];
        s.fresh[block] = false;
        return fresh;
    };
    multiply<T>(n, m, m, {f, ldm, 1}, w, ldm, s.u, ldm, false, s.work);
    if (o.kind == Kind::softmax)
        transpose<T>(n, m, f, ldm, s.ft, ldn);
    else
        transpose<T, true>(n, m, f, ldm, s.ft, ldn);
    multiply<T>(n, n, m, {s.u, ldm, 1}, s.ft, ldn, s.x, ldn, false, s.work);

    const bool grad_x = backward && o.stop_gradient != StopGradient::projection;
    const bool grad_y = backward && o.stop_gradient != StopGradient::target;
    const GradY dy = !grad_y ? GradY::none : first_write(aa) ? GradY::store : GradY::add;
    const T factor = (T)projection_factor(o, (int)m);
    double loss = o.kind == Kind::probs
                      ? compare_rows<T, true>({n, factor, weight * row_weight, grad_x, dy}, n, ldn, s.x, s.raw[aa], s.grad[aa], s.rows)
                      : compare_rows<T, false>({n, factor, weight * row_weight, grad_x, dy}, n, ldn, s.x, s.raw[aa], s.grad[aa], s.rows);
    loss *= (double)row_weight;
    if (!grad_x) return loss;

    T* grad_f = s.grad[ab];
    s.fresh[ab] = false;
    const bool add = !first_write(3 * b);
    multiply<T>(n, m, n, {s.x, ldn, 1}, f, ldm, s.du, ldm, false, s.work);
    multiply<T>(n, m, n, {s.x, 1, ldn}, s.u, ldm, grad_f, ldm, false, s.work);
    transpose<T>(m, m, w, ldm, s.wt, ldm);
    multiply<T>(n, m, m, {s.du, ldm, 1}, s.wt, ldm, grad_f, ldm, true, s.work);
    if (o.kind != Kind::softmax) {
        multiply<T>(m, m, n, {f, 1, ldm}, s.du, ldm, s.grad[3 * b], ldm, add, s.work);
        return loss;
    }
    multiply<T>(m, m, n, {f, 1, ldm}, s.du, ldm, s.grad_inner, ldm, false, s.work);
    for (i64 i = 0; i < n; ++i) softmax_row_backward<T>(m, f + i * ldm, grad_f + i * ldm, grad_f + i * ldm, false);
    for (i64 i = 0; i < m; ++i)
        softmax_row_backward<T>(m, w + i * ldm, s.grad_inner + i * ldm, s.grad[3 * b] + i * ldm, add);
    return loss;
}

// Blocks; kind softmax: the factors that the active sides need. One attention tensor is read row by row, in the order it lies in.
template <typename T, typename S>
static void load_problem(const Problem& p, const Extent& e, i64 b, i64 h, const Scratch<T>& s) {
    const i64 start[2] = {e.text_start, e.vision_start};
    const i64 n[2] = {e.n_text, e.n_vision};
    const bool by_rows = p.single && p.blocks[TT].stride[3] == 1;
    for (int ab = 0; ab < 4 && !by_rows; ++ab)
        load_block<T, S>(p.blocks[ab], b, h, start[ab / 2], start[ab % 2], n[ab / 2], n[ab % 2], s.raw[ab], s.x);
    for (int a = 0; a < 2; ++a) {
        const ConstTensor& x = p.blocks[TT];
        const i64 ld[2] = {leading<T>(n[0]), leading<T>(n[1])};
        const S* row = (const S*)x.data + b * x.stride[0] + h * x.stride[1] + start[a] * x.stride[2];
        for (i64 i = 0; i < n[a] && by_rows; ++i, row += x.stride[2])
            for (int c = 0; c < 2; ++c) load_row(n[c], row + start[c], 1, s.raw[2 * a + c] + i * ld[c], ld[c]);
    }
    for (int a = 0; a < 2 && p.options.kind == Kind::softmax; ++a) {
        const int ab = a ? VT : TV, bb = 3 * (1 - a);
        const i64 m = n[1 - a], ldm = leading<T>(m);
        if (!side_active(p.options, e, a)) continue;
        for (i64 i = 0; i < n[a]; ++i) softmax_row<T>(m, s.raw[ab] + i * ldm, s.raw[ab] + i * ldm);
        for (i64 i = 0; i < m; ++i) softmax_row<T>(m, s.raw[bb] + i * ldm, s.inner[1 - a] + i * ldm);
    }
}

// Writes gradient matrix (b, h) of block ab: the span's values, zero elsewhere. Row ranges as in Extent.
template <typename T, typename S>
static void store_block(const MutableTensor& grad, i64 b, i64 h, i64 rows, i64 columns, i64 row_start, i64 n_rows, i64 column_start,
                        i64 n_columns, const T* values) {
    S* out = (S*)grad.data + b * grad.stride[0] + h * grad.stride[1];
    const i64 ld = leading<T>(n_columns);
    for (i64 i = 0; i < rows; ++i) {
        S* at = out + i * grad.stride[2];
        if (i < row_start || i >= row_start + n_rows) {
            store_stretch<T, S>(at, nullptr, columns);
            continue;
        }
        at = store_stretch<T, S>(at, nullptr, column_start);
        at = store_stretch<T, S>(at, values + (i - row_start) * ld, n_columns);
        store_stretch<T, S>(at, nullptr, columns - column_start - n_columns);
    }
}

// The same for one attention tensor: each row holds the two spans in either order.
template <typename T, typename S>
static void store_single(const MutableTensor& grad, i64 b, i64 h, i64 size, const Extent& e, const Scratch<T>& s) {
    S* out = (S*)grad.data + b * grad.stride[0] + h * grad.stride[1];
    const i64 start[2] = {e.text_start, e.vision_start};
    const i64 n[2] = {e.n_text, e.n_vision};
    const int first = e.n_text && (!e.n_vision || e.text_start < e.vision_start) ? 0 : 1, last = 1 - first;
    for (i64 i = 0; i < size; ++i) {
        S* row = out + i * grad.stride[2];
        const int a = i >= start[0] && i < start[0] + n[0] ? 0 : i >= start[1] && i < start[1] + n[1] ? 1 : -1;
        if (a < 0 || !n[0] || !n[1]) {
            store_stretch<T, S>(row, nullptr, size);
            continue;
        }
        const i64 r = i - start[a];
        S* at = store_stretch<T, S>(row, nullptr, start[first]);
        at = store_stretch<T, S>(at, s.grad[2 * a + first] + r * leading<T>(n[first]), n[first]);
        at = store_stretch<T, S>(at, nullptr, start[last] - start[first] - n[first]);
        at = store_stretch<T, S>(at, s.grad[2 * a + last] + r * leading<T>(n[last]), n[last]);
        store_stretch<T, S>(at, nullptr, size - start[last] - n[last]);
    }
}

template <typename T, typename S>
static void store_problem(const Problem& p, const Extent& e, i64 b, i64 h, const Scratch<T>& s) {
    const i64 limit[2] = {p.spans.limit_text, p.spans.limit_vision};
    const i64 start[2] = {e.text_start, e.vision_start};
    const i64 n[2] = {e.n_text, e.n_vision};
    if (p.single) {
        store_single<T, S>(p.grads[TT], b, h, limit[0], e, s);
        return;
    }
    const bool empty = !n[0] || !n[1];
    for (int ab = 0; ab < 4; ++ab)
        store_block<T, S>(p.grads[ab], b, h, limit[ab / 2], limit[ab % 2], start[ab / 2], empty ? 0 : n[ab / 2], start[ab % 2],
                          empty ? 0 : n[ab % 2], s.grad[ab]);
}

// Gradient of an invalid example: NaN throughout.
template <typename T, typename S>
static void store_nan(const Problem& p, i64 b, i64 h) {
    const i64 limit[2] = {p.spans.limit_text, p.spans.limit_vision};
    for (int ab = 0; ab < (p.single ? 1 : 4); ++ab) {
        S* out = (S*)p.grads[ab].data + b * p.grads[ab].stride[0] + h * p.grads[ab].stride[1];
        for (i64 i = 0; i < limit[ab / 2] * limit[ab % 2]; ++i) from_float((T)__builtin_nanf(""), out[i]);
    }
}

// What this problem will write and the next one (if any) will read, where both are small enough for the L2 cache.
template <typename T, typename S>
static void look_ahead(const Problem& p, i64 index, i64 next, Workspace<T>& work) {
    const i64 limit[2] = {p.spans.limit_text, p.spans.limit_vision}, size = sizeof(S);
    const i64 total = p.single ? limit[0] * limit[0] : (limit[0] + limit[1]) * (limit[0] + limit[1]);
    if (total * size > kAheadBytes) return;
    for (int ab = 0; next >= 0 && ab < (p.single ? 1 : 4); ++ab) {
        const ConstTensor& x = p.blocks[ab];
        if (x.stride[3] != 1) break;
        const i64 offset = next / p.heads * x.stride[0] + next % p.heads * x.stride[1];
        work.add((const char*)x.data + offset * size, limit[ab % 2] * size, x.stride[2] * size, limit[ab / 2]);
    }
    for (int ab = 0; p.has_grads && ab < (p.single ? 1 : 4); ++ab) {
        const MutableTensor& x = p.grads[ab];
        const i64 offset = index / p.heads * x.stride[0] + index % p.heads * x.stride[1];
        work.add((const char*)x.data + offset * size, limit[ab / 2] * limit[ab % 2] * size, 0, 1);
    }
}

template <typename T, typename S>
static void scores_problem(const Problem& p, i64 index, i64 next, char* scratch) {
    const i64 b = index / p.heads, h = index % p.heads;
    const Extent e = extent_of(p.spans, b);
    const bool backward = p.has_grads;
    T* loss = p.loss ? (T*)p.loss + index : nullptr;
    if (!e.valid) {
        if (loss) *loss = (T)__builtin_nanf("");
        if (backward) store_nan<T, S>(p, b, h);
        return;
    }
    const bool active[2] = {(bool)side_active(p.options, e, 0), (bool)side_active(p.options, e, 1)};
    Scratch<T> s = lay_out<T>(scratch, e.n_text, e.n_vision, p.options.kind, backward);
    double total = 0;
    if (active[0] || active[1]) {
        const i64 n[2] = {e.n_text, e.n_vision};
        const T weight = p.grad_loss ? ((const T*)p.grad_loss)[b * p.grad_loss_stride[0] + h * p.grad_loss_stride[1]] : T(1);
        load_problem<T, S>(p, e, b, h, s);
        look_ahead<T, S>(p, index, next, s.work);
        for (int a = 0; a < 2; ++a)
            if (active[a]) total += run_side<T>(p.options, a, n[a], n[1 - a], s, backward, weight);
        for (int ab = 0; ab < 4; ++ab)
            if (s.fresh[ab]) __builtin_memset(s.grad[ab], 0, (size_t)(n[ab / 2] * leading<T>(n[ab % 2])) * sizeof(T));
    }
    if (loss) *loss = (T)total;
    if (backward) store_problem<T, S>(p, e, b, h, s);
}

}  // namespace CACR_ISA
}  // namespace cacr
