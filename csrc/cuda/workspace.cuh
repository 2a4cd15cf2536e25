// Float32 workspace of one problem: T = spans.n_text, R = spans.n_vision (upper bounds), matrices row-major with these
// leading dimensions. The host sizes it, the kernels find their matrices in it.
#pragma once

#include "primitives.cuh"

namespace cacr {

constexpr int kThreads = 128;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kTile = 64;  // a block of threads computes 64 x 64 tiles

// Magnitudes of the rows of a matrix that the backward notes: one a warp of a row block of 64.
CACR_HD i64 notes_of_rows(i64 rows) { return (rows + kTile - 1) / kTile * kWarpsPerBlock; }

CACR_HD i64 score_floats(const SpanTable& spans) {
    const i64 all = (i64)spans.n_text + spans.n_vision;
    return all * all;
}

// Floats of one problem in the forward: P of the four blocks (kind softmax), U of both sides, row losses.
CACR_HD i64 forward_floats(const Problem& problem) {
    const SpanTable& spans = problem.spans;
    const i64 probs = problem.options.kind == Kind::softmax ? score_floats(spans) : 0;
    return probs + 2 * (i64)spans.n_text * spans.n_vision + spans.n_text + spans.n_vision;
}

// Matrices whose magnitudes the backward notes.
enum Noted : int { kNotedU = 0, kNotedW = 1, kNotedG = 2, kNoted = 3 };

// Floats of one problem in the backward: P and dP of the four blocks (kind softmax), U, W, G, dY of both sides, magnitudes.
CACR_HD i64 backward_floats(const Problem& problem) {
    const SpanTable& spans = problem.spans;
    return (problem.options.kind == Kind::softmax ? 4 : 2) * score_floats(spans) +
           kNoted * (notes_of_rows(spans.n_text) + notes_of_rows(spans.n_vision));
}

// The matrices of the slot-th problem of a chunk.
struct Workspace {
    float* base;   // after P and dP: what every kind has
    float* probs;  // kind softmax
    int text;
    int vision;

    CACR_DEVICE Workspace(const Problem& problem, i64 floats_each, i64 slot, int score_sized) {
        text = problem.spans.n_text;
        vision = problem.spans.n_vision;
        probs = (float*)problem.workspace + slot * floats_each;
        base = probs + (problem.options.kind == Kind::softmax ? score_sized * score_floats(problem.spans) : 0);
    }

    // U_a = S_ab S_bb [n_a, n_b].
    CACR_DEVICE float* u(int side) const { return base + side * cross(); }
    // Forward: loss of every row.
    CACR_DEVICE float* row_loss(int side) const { return base + 2 * cross() + (side ? text : 0); }
    // Backward: W_a = G_a S_ab [n_a, n_b].
    CACR_DEVICE float* w(int side) const { return base + (2 + side) * cross(); }
    // Backward: G_a = projection factor * dL/dX_a [n_a, n_a].
    CACR_DEVICE float* g(int side) const { return base + 4 * cross() + own_offset(side); }
    // Backward: dL/dS_aa through Y_a [n_a, n_a].
    CACR_DEVICE float* target(int side) const { return g(side) + (i64)text * text + (i64)vision * vision; }
    // Backward: largest |element| of U, W or G of a side, one a warp of every row block.
    CACR_DEVICE float* notes(Noted matrix, int side) const {
        const i64 all = (i64)text + vision;
        return base + 2 * all * all + matrix * (notes_of_rows(text) + notes_of_rows(vision)) +
               (side ? notes_of_rows(text) : 0);
    }

    // P of block [row_side, col_side].
    CACR_DEVICE float* prob(int row_side, int col_side) const {
        return probs + (row_side == col_side ? 2 * cross() + own_offset(row_side) : row_side * cross());
    }
    // Backward: dL/dP.
    CACR_DEVICE float* grad_prob(int row_side, int col_side) const {
        const i64 all = (i64)text + vision;
        return prob(row_side, col_side) + all * all;
    }

    // Leading dimension of matrices whose columns belong to a side.
    CACR_DEVICE int columns(int side) const { return side ? vision : text; }
    CACR_DEVICE i64 cross() const { return (i64)text * vision; }
    CACR_DEVICE i64 own_offset(int side) const { return side ? (i64)text * text : 0; }
};

CACR_DEVICE Workspace forward_workspace(const Problem& problem, i64 slot) {
    return Workspace(problem, forward_floats(problem), slot, 1);
}

CACR_DEVICE Workspace backward_workspace(const Problem& problem, i64 slot) {
    return Workspace(problem, backward_floats(problem), slot, 2);
}

}  // namespace cacr
