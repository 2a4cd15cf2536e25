// One key head of the q/k kernels: loss and gradients of its query heads without any N x N matrix.
//
// With Q = scale q the scores are S_ab = Q_a K_b^T. Both kinds project first and then compare rows, X = s U F^T:
//     kind scores:   C = K_b^T Q_b, W = K_b^T K_b, M = C W [D, D];  U = Q_a M, F = Q_a                  rank r = D
//     kind softmax:  F = softmax(Q_a K_b^T) [n, m], U = F softmax(Q_b K_b^T), the latter in row panels   rank r = m
// Kind scores goes the second way too, without the softmaxes, where sequences are so short that D x D products cost more.
// and Y = Q_a K_a^T. Rows are compared kPanel at a time: G = s dL/dX, H = dL/dY,
//     dU = G F,  dF = G^T U,  dQ_a += H K_a,  dK_a += H^T Q_a
//     kind scores:   dM = Q_a^T dU, dQ_a += dF + dU M^T, dC = dM W, dW = C^T dM, dQ_b += K_b dC, dK_b += Q_b dC^T + K_b (dW + dW^T)
//     kind softmax:  dF += dU P_bb^T, dP_bb = F^T dU, then through both softmaxes into Q_a, K_b and Q_b, K_b.
#pragma once

#include "blocks.h"
#include "gemm.h"
#include "rows.h"

namespace cacr {
namespace CACR_ISA {

constexpr i64 kPanel = 48;  // rows of X, Y or P_bb held at a time; a multiple of every vector and row group

template <typename T>
struct QkScratch {
    i64 dim, ld;  // D and D padded
    bool softmax;
    bool dense;   // F and the other side's S_bb or P_bb are formed
    T* q[2];      // Q_a [n, D]
    T* k[2];
    T* kt[2];     // K_a^T [D, n]
    T* dq[2];
    T* dk[2];
    T* f;         // dense: S_ab or P_ab [n, m]
    T* ft;        // F^T [r, n]
    T* u;         // [n, r]
    T* du;
    T* df;        // dense
    T* x;         // [kPanel, widest]
    T* y;
    T* h;
    T* square[6];  // [D, D]
    T* pt;         // dense: transposed panel of S_bb or P_bb [m, kPanel]
    T* rows;
    Workspace<T> work;
    i64 bytes;
};

// Whether S_ab, S_bb, S_ab S_bb and the last product cost less than C, W, M, Q_a M and the last product; both sides.
static bool forms_scores(double t, double r, double d) {
    return 2 * t * r * d + (t * t + r * r) * d + 2 * t * r * (t + r) < 3 * (t + r) * d * d + 2 * d * d * d + (t * t + r * r) * d;
}

template <typename T>
static QkScratch<T> lay_out_qk(char* base, const QkProblem& p, i64 n_text, i64 n_vision) {
    QkScratch<T> s;
    i64 used = 0;
    auto take = [&](i64 elements) {
        T* at = (T*)(base + used);
        used += (elements * (i64)sizeof(T) + 63) / 64 * 64 + 5 * 64;
        return at;
    };
    const bool backward = p.has_grads;
    s.softmax = p.options.kind == Kind::softmax;
    s.dense = s.softmax || forms_scores(p.spans.n_text, p.spans.n_vision, p.dim);
    const i64 n[2] = {n_text, n_vision};
    const i64 widest = leading<T>(n_text > n_vision ? n_text : n_vision);
    s.dim = p.dim;
    s.ld = leading<T>(p.dim);
    const i64 tv = n_text * leading<T>(n_vision), vt = n_vision * leading<T>(n_text);
    const i64 factor = s.dense ? (tv > vt ? tv : vt) : widest * s.ld;
    for (int a = 0; a < 2; ++a) {
        s.q[a] = take(n[a] * s.ld);
        s.k[a] = take(n[a] * s.ld);
        s.kt[a] = take(s.dim * leading<T>(n[a]));
        s.dq[a] = backward ? take(n[a] * s.ld) : nullptr;
        s.dk[a] = backward ? take(n[a] * s.ld) : nullptr;
    }
    s.f = s.dense ? take(factor) : nullptr;
    s.ft = take(factor);
    s.u = take(factor);
    s.du = backward ? take(factor) : nullptr;
    s.df = backward && s.dense ? take(factor) : nullptr;
    s.x = take(kPanel * widest);
    s.y = take(kPanel * widest);
    s.h = take(kPanel * widest);
    for (T*& square : s.square) square = s.dense ? nullptr : take(s.dim * s.ld);
    s.pt = s.dense ? take(widest * kPanel) : nullptr;
    s.rows = take(2 * kRowGroup * widest);  // after the matrices: products read up to three rows past a left factor
    s.work = {take(pack_elements<T>()), {}, 0};
    s.bytes = used;
    return s;
}

// Factors of the projection of one side. r: rank, ld: padded rank.
template <typename T>
struct Factors {
    const T* f;
    T* df;  // where dF is accumulated
    i64 r, ld;
};

// Rows of S_ab or its softmax from `first` on: count rows of Q_a K_b^T into out [count, padded(m)].
template <typename T>
static void scores_panel(QkScratch<T>& s, int a, int b, i64 first, i64 count, i64 m, T* out) {
    const i64 ldm = leading<T>(m);
    multiply<T>(count, m, s.dim, {s.q[a] + first * s.ld, s.ld, 1}, s.kt[b], ldm, out, ldm, false, s.work);
    for (i64 i = 0; i < count && s.softmax; ++i) softmax_row<T>(m, out + i * ldm, out + i * ldm);
}

// Gradient of the scores behind a panel: prob is what scores_panel gave, ds its gradient, replaced. Nothing for kind scores.
template <typename T>
static void scores_panel_backward(const QkScratch<T>& s, i64 count, i64 m, const T* prob, T* ds) {
    const i64 ldm = leading<T>(m);
    for (i64 i = 0; i < count && s.softmax; ++i)
        softmax_row_backward<T>(m, prob + i * ldm, ds + i * ldm, ds + i * ldm, false);
}

// Fills U, F and F^T of side a.
template <typename T>
static Factors<T> project(QkScratch<T>& s, int a, i64 n, i64 m) {
    const int b = 1 - a;
    const i64 ld = s.ld, ldn = leading<T>(n), ldm = leading<T>(m);
    if (!s.dense) {
        T *c = s.square[0], *w = s.square[1], *product = s.square[2];
        multiply<T>(s.dim, s.dim, m, {s.k[b], 1, ld}, s.q[b], ld, c, ld, false, s.work);
        multiply<T>(s.dim, s.dim, m, {s.k[b], 1, ld}, s.k[b], ld, w, ld, false, s.work);
        multiply<T>(s.dim, s.dim, s.dim, {c, ld, 1}, w, ld, product, ld, false, s.work);
        multiply<T>(n, s.dim, s.dim, {s.q[a], ld, 1}, product, ld, s.u, ld, false, s.work);
        transpose<T, true>(n, s.dim, s.q[a], ld, s.ft, ldn);
        return {s.q[a], s.dq[a], s.dim, ld};
    }
    scores_panel<T>(s, a, b, 0, n, m, s.f);
    if (s.softmax)
        transpose<T>(n, m, s.f, ldm, s.ft, ldn);
    else
        transpose<T, true>(n, m, s.f, ldm, s.ft, ldn);
    for (i64 first = 0; first < m; first += kPanel) {
        const i64 count = m - first < kPanel ? m - first : kPanel;
        scores_panel<T>(s, b, b, first, count, m, s.x);
        multiply<T>(n, m, count, {s.f + first, ldm, 1}, s.x, ldm, s.u, ldm, first > 0, s.work);
    }
    return {s.f, s.df, m, ldm};
}

// Adds the gradients of scores S = Q_a K_b^T, rows first .. first + count, given ds [count, padded(m)].
template <typename T>
static void scores_backward_into(QkScratch<T>& s, int a, int b, i64 first, i64 count, i64 m, const T* ds) {
    const i64 ld = s.ld, ldm = leading<T>(m);
    multiply<T>(count, s.dim, m, {ds, ldm, 1}, s.k[b], ld, s.dq[a] + first * ld, ld, true, s.work);
    multiply<T>(m, s.dim, count, {ds, 1, ldm}, s.q[a] + first * ld, ld, s.dk[b], ld, true, s.work);
}

// The chain from dU (and dF, kind softmax) back to q and k of both modalities.
template <typename T>
static void project_backward(QkScratch<T>& s, int a, i64 n, i64 m) {
    const int b = 1 - a;
    const i64 d = s.dim, ld = s.ld, ldm = leading<T>(m);
    if (!s.dense) {
        T *c = s.square[0], *w = s.square[1], *product = s.square[2], *dm = s.square[3], *dc = s.square[4], *turned = s.square[5];
        multiply<T>(d, d, n, {s.q[a], 1, ld}, s.du, ld, dm, ld, false, s.work);
        transpose<T>(d, d, product, ld, turned, ld);
        multiply<T>(n, d, d, {s.du, ld, 1}, turned, ld, s.dq[a], ld, true, s.work);
        multiply<T>(d, d, d, {dm, ld, 1}, w, ld, dc, ld, false, s.work);  // W is symmetric
        multiply<T>(m, d, d, {s.k[b], ld, 1}, dc, ld, s.dq[b], ld, true, s.work);
        transpose<T>(d, d, dc, ld, turned, ld);
        multiply<T>(m, d, d, {s.q[b], ld, 1}, turned, ld, s.dk[b], ld, true, s.work);
        T *dw = product, *sum = w;
        multiply<T>(d, d, d, {c, 1, ld}, dm, ld, dw, ld, false, s.work);
        transpose<T>(d, d, dw, ld, turned, ld);
        for (i64 i = 0; i < d * ld; ++i) sum[i] = dw[i] + turned[i];
        multiply<T>(m, d, d, {s.k[b], ld, 1}, sum, ld, s.dk[b], ld, true, s.work);
        return;
    }
    for (i64 first = 0; first < m; first += kPanel) {
        const i64 count = m - first < kPanel ? m - first : kPanel;
        scores_panel<T>(s, b, b, first, count, m, s.x);
        transpose<T>(count, m, s.x, ldm, s.pt, leading<T>(count));
        multiply<T>(n, count, m, {s.du, ldm, 1}, s.pt, leading<T>(count), s.df + first, ldm, true, s.work);
        multiply<T>(count, m, n, {s.f + first, 1, ldm}, s.du, ldm, s.y, ldm, false, s.work);
        scores_panel_backward<T>(s, count, m, s.x, s.y);
        scores_backward_into<T>(s, b, b, first, count, m, s.y);
    }
    scores_panel_backward<T>(s, n, m, s.f, s.df);
    scores_backward_into<T>(s, a, b, 0, n, m, s.df);
}

// Loss of side a of one query head; with a backward pass, its contributions to dq and dk.
template <typename T>
static double run_qk_side(const Options& o, int a, i64 n, i64 m, QkScratch<T>& s, bool backward, T weight) {
    const i64 ldn = leading<T>(n);
    const T row_weight = (T)row_factor(o, (int)n);
    const bool grad_x = backward && o.stop_gradient != StopGradient::projection;
    const bool grad_y = backward && o.stop_gradient != StopGradient::target;
    const RowTerms<T, false> terms = {n, (T)projection_factor(o, (int)m), weight * row_weight, grad_x,
                                      grad_y ? GradY::store : GradY::none};
    const Factors<T> f = project<T>(s, a, n, m);
    double loss = 0;
    for (i64 first = 0; first < n; first += kPanel) {
        const i64 count = n - first < kPanel ? n - first : kPanel;
        T* u = s.u + first * f.ld;
        multiply<T>(count, n, f.r, {u, f.ld, 1}, s.ft, ldn, s.x, ldn, false, s.work);
        multiply<T>(count, n, s.dim, {s.q[a] + first * s.ld, s.ld, 1}, s.kt[a], ldn, s.y, ldn, false, s.work);
        loss += compare_rows<T, false>(terms, count, ldn, s.x, s.y, s.h, s.rows);
        if (grad_x) {
            multiply<T>(count, f.r, n, {s.x, ldn, 1}, f.f, f.ld, s.du + first * f.ld, f.ld, false, s.work);
            const bool add = !s.dense || first > 0;
            multiply<T>(n, f.r, count, {s.x, 1, ldn}, u, f.ld, f.df, f.ld, add, s.work);
        }
        if (grad_y) scores_backward_into<T>(s, a, a, first, count, n, s.h);
    }
    if (grad_x) project_backward<T>(s, a, n, m);
    return loss * (double)row_weight;
}

// Rows start .. start + n of head h as [n, padded(D)], times `scale`.
template <typename T, typename S>
static void load_head(const ConstTensor& x, i64 b, i64 h, i64 start, i64 n, i64 dim, T scale, T* out) {
    const S* in = (const S*)x.data + b * x.stride[0] + h * x.stride[1] + start * x.stride[2];
    const i64 ld = leading<T>(dim);
    for (i64 i = 0; i < n; ++i) {
        load_row(dim, in + i * x.stride[2], x.stride[3], out + i * ld, ld);
        for (i64 j = 0; j < dim; ++j) out[i * ld + j] *= scale;
    }
}

// Gradient [N, D] of one head: `scale` times the spans' rows, `fill` elsewhere.
template <typename T, typename S>
static void store_head(const MutableTensor& x, i64 b, i64 h, i64 size, i64 dim, const Extent& e, T* const (&grad)[2], T scale, T fill) {
    S* out = (S*)x.data + b * x.stride[0] + h * x.stride[1];
    const i64 start[2] = {e.text_start, e.vision_start}, n[2] = {e.n_text, e.n_vision}, ld = leading<T>(dim);
    for (i64 i = 0; i < size; ++i) {
        S* row = out + i * x.stride[2];
        const int a = !e.valid ? -1 : i >= start[0] && i < start[0] + n[0] ? 0 : i >= start[1] && i < start[1] + n[1] ? 1 : -1;
        const T* values = a < 0 ? nullptr : grad[a] + (i - start[a]) * ld;
        for (i64 j = 0; j < dim; ++j) from_float(values ? values[j] * scale : fill, row[j]);
    }
}

template <typename T, typename S>
static void qk_problem(const QkProblem& p, i64 index, char* scratch) {
    const i64 b = index / p.key_heads, key_head = index % p.key_heads, group = p.heads / p.key_heads;
    const Extent e = extent_of(p.spans, b);
    const bool backward = p.has_grads;
    const bool active[2] = {e.valid && side_active(p.options, e, 0), e.valid && side_active(p.options, e, 1)};
    const i64 start[2] = {e.text_start, e.vision_start};
    const i64 n[2] = {e.valid ? e.n_text : 0, e.valid ? e.n_vision : 0};
    const T fill = e.valid ? T(0) : (T)__builtin_nanf("");
    QkScratch<T> s = lay_out_qk<T>(scratch, p, n[0], n[1]);
    for (int a = 0; a < 2; ++a) {
        load_head<T, S>(p.k, b, key_head, start[a], n[a], p.dim, T(1), s.k[a]);
        transpose<T>(n[a], p.dim, s.k[a], s.ld, s.kt[a], leading<T>(n[a]));
        if (backward) __builtin_memset(s.dk[a], 0, (size_t)(n[a] * s.ld) * sizeof(T));
    }
    for (i64 h = key_head * group; h < (key_head + 1) * group; ++h) {
        double total = 0;
        const T weight = p.grad_loss ? ((const T*)p.grad_loss)[b * p.grad_loss_stride[0] + h * p.grad_loss_stride[1]] : T(1);
        for (int a = 0; a < 2; ++a) {
            load_head<T, S>(p.q, b, h, start[a], n[a], p.dim, (T)p.scale, s.q[a]);
            if (backward) __builtin_memset(s.dq[a], 0, (size_t)(n[a] * s.ld) * sizeof(T));
        }
        for (int a = 0; a < 2; ++a)
            if (active[a]) total += run_qk_side<T>(p.options, a, n[a], n[1 - a], s, backward, weight);
        if (p.loss) ((T*)p.loss)[b * p.heads + h] = e.valid ? (T)total : fill;
        if (backward) store_head<T, S>(p.grad_q, b, h, p.n, p.dim, e, s.dq, (T)p.scale, fill);
    }
    if (backward) store_head<T, S>(p.grad_k, b, key_head, p.n, p.dim, e, s.dk, T(1), fill);
}

}  // namespace CACR_ISA
}  // namespace cacr
