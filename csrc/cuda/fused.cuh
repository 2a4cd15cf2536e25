// Short spans (from sm_80): one block of threads a problem, one warp for every 16 rows of a side. All of the scores inside the
// spans lie in shared memory, padded with zeros to multiples of 16; no workspace.
//
// What forward and backward share: sizes, the copy of the scores, X of 16 rows, what the host asks.
// Letters as in geometry.cuh: F = S_ab, C = S_bb, U = F C, X = factor U F^T.
#pragma once

#include "geometry.cuh"
#include "warp_mma_float.cuh"

namespace cacr {

// Whether this compilation has the instructions of the fused kernels: their bodies are empty for earlier architectures.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define CACR_FUSED_DEVICE 1
#else
#define CACR_FUSED_DEVICE 0
#endif
constexpr int kFusedArchitecture = 80;

constexpr int kFusedLongest = 112;  // tokens of a span: longer ones spill
constexpr int kFusedNotes = 64;     // floats at the beginning of shared memory
constexpr float kLog2E = 1.44269504088896340736f;

CACR_HD int sides_of(int length) { return (length + kSide - 1) / kSide; }

// Elements: all scores; G of one side, which is two numbers of 16 bits or one of 32 an element.
CACR_HD int fused_scores(int text, int vision) { return kSide * (text + vision) * (pitch_of(text) + pitch_of(vision)); }
template <typename F>
CACR_HD int fused_g(int sides) {
    return (sizeof(F) == 2 ? 2 : 1) * kSide * sides * pitch_of(sides);
}

// Bytes of shared memory for spans of so many times 16 tokens.
template <typename F>
CACR_HD int fused_bytes(int text, int vision, bool backward) {
    const int elements = fused_scores(text, vision) + (backward ? fused_g<F>(text) + fused_g<F>(vision) : 0);
    return 4 * kFusedNotes + (int)sizeof(F) * elements;
}

// One problem of a block.
template <typename F>
struct FusedProblem {
    Place place;
    float* notes;
    F* elements;

    CACR_DEVICE FusedProblem(const Problem& problem, i64 index, unsigned char* shared) {
        place = place_of(problem, index);
        notes = (float*)shared;
        elements = (F*)(notes + kFusedNotes);
    }

    // Tokens of a side, and the same in units of 16.
    CACR_DEVICE int length(int side) const { return length_of(place.extent, side); }
    CACR_DEVICE int sides(int side) const { return sides_of(length(side)); }

    // S[row_side, col_side].
    CACR_DEVICE Matrix<F> scores(int row_side, int col_side) const {
        const int text = pitch_of(sides(kText));
        const int vision = pitch_of(sides(kVision));
        const int above = row_side == kText ? 0 : kSide * sides(kText) * (text + vision);
        const int before = col_side == kText ? 0 : kSide * sides(row_side) * text;
        return {elements + above + before, col_side == kText ? text : vision};
    }

    // G of a side.
    CACR_DEVICE WideMatrix<F> g(int side) const {
        const int pitch = pitch_of(sides(side));
        const int before = fused_scores(sides(kText), sides(kVision)) + (side == kText ? 0 : fused_g<F>(sides(kText)));
        WideMatrix<F> m;
        m.high = {elements + before, pitch};
        if constexpr (sizeof(F) == 2) m.low = {elements + before + kSide * sides(side) * pitch, pitch};
        return m;
    }
};

// 16 rows of a side, the work of one warp.
struct Strip {
    int side;
    int row;  // the first of them
    bool used;

    template <typename F>
    CACR_DEVICE explicit Strip(const FusedProblem<F>& fused) {
        const int warp = warp_index();
        side = warp < fused.sides(kText) ? kText : kVision;
        row = kSide * (side == kText ? warp : warp - fused.sides(kText));
        used = warp < fused.sides(kText) + fused.sides(kVision);
    }
};

// Rows of a block of scores whose bytes lie side by side, `width` bytes at a time; zeros around them.
template <int width, typename F>
CACR_DEVICE void copy_rows(const char* from, i64 row_bytes, int rows, int cols, const Matrix<F>& to, int sides_down,
                           int sides_across) {
    constexpr int each = width / (int)sizeof(F);
    const int across = sides_across * kSide / each;
    const int shift = across > 16 ? 5 : across > 8 ? 4 : across > 4 ? 3 : 2;  // 2^shift threads a row, at most a warp
    const int begin = thread_index() & ((1 << shift) - 1);
    for (int row = thread_index() >> shift; row < sides_down * kSide; row += thread_count() >> shift) {
        for (int unit = begin; unit < across; unit += 1 << shift) {
            const int left_over = row < rows ? cols - unit * each : 0;
            const int bytes = left_over <= 0 ? 0 : left_over < each ? (int)sizeof(F) * left_over : width;
            begin_copy<width>(to.at(row, unit * each), bytes > 0 ? from + row * row_bytes + unit * width : from, bytes);
        }
    }
}

// A block of scores of any strides; threads follow each other along the shorter stride.
template <typename F>
CACR_DEVICE void copy_elements(const F* from, i64 row_stride, i64 col_stride, int rows, int cols, const Matrix<F>& to,
                               int sides_down, int sides_across) {
    const bool down = row_stride < col_stride;
    const int inner = kSide * (down ? sides_down : sides_across);
    const int outer = kSide * (down ? sides_across : sides_down);
    for (int o = warp_index(); o < outer; o += thread_count() / kWarp) {
        for (int i = lane_index(); i < inner; i += kWarp) {
            const int row = down ? i : o;
            const int col = down ? o : i;
            *to.at(row, col) = row < rows && col < cols ? from[row * row_stride + col * col_stride] : F{};
        }
    }
}

// The block's threads begin to copy S[row_side, col_side]; finish_copies and a barrier end it.
template <typename F>
CACR_DEVICE void copy_scores(const Problem& problem, const FusedProblem<F>& fused, int row_side, int col_side) {
    const Scores scores(problem, fused.place, row_side, col_side);
    const Matrix<F> to = fused.scores(row_side, col_side);
    const int rows = fused.length(row_side);
    const int cols = fused.length(col_side);
    const int down = fused.sides(row_side);
    const int across = fused.sides(col_side);
    const char* from = scores.address(0, 0);
    const i64 row_bytes = scores.row_bytes();
    const unsigned alignment = (unsigned)(size_t)from | (unsigned)row_bytes;
    if (scores.where.col_stride != 1 || alignment % 4 != 0)
        copy_elements((const F*)from, scores.where.row_stride, scores.where.col_stride, rows, cols, to, down, across);
    else if (alignment % 16 == 0)
        copy_rows<16>(from, row_bytes, rows, cols, to, down, across);
    else if (alignment % 8 == 0)
        copy_rows<8>(from, row_bytes, rows, cols, to, down, across);
    else
        copy_rows<4>(from, row_bytes, rows, cols, to, down, across);
}

// All scores that a side which counts needs.
template <typename F>
CACR_DEVICE void copy_problem(const Problem& problem, const FusedProblem<F>& fused) {
    for (int row_side = kText; row_side <= kVision; ++row_side) {
        for (int col_side = kText; col_side <= kVision; ++col_side)
            if (row_side == col_side || side_counts(problem, fused.place, row_side))
                copy_scores(problem, fused, row_side, col_side);
    }
}

// Right operand B[k][j] = f(row + j, col + k) of X. In float less f(0, col + k): that is a constant a row of X, which its
// softmax does not see, and a common offset of F does not eat the digits of X.
template <typename F>
CACR_DEVICE Fragment<F> centred(const Matrix<F>& f, int row, int col) {
    return right_transposed(f, row, col);
}
CACR_DEVICE Fragment<float> centred(const Matrix<float>& f, int row, int col) {
    Fragment<float> b = right_transposed(f, row, col);
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        const Pair offset = pair_at(f, 0, col + 8 * s + lane_col());
        CACR_UNROLL
        for (int half = 0; half < 2; ++half) {
            b.v[half][2 * s] -= offset.first;
            b.v[half][2 * s + 1] -= offset.second;
        }
    }
    return b;
}

// X / factor = U F^T (up to a constant a row), 16 rows from `row`, to x[t] columns 16 t + 0..15; m and n: n_b and n_a in units
// of 16.
template <typename F, int kSides>
CACR_DEVICE void project(const Matrix<F>& f, const Matrix<F>& c, int row, int m, int n, Accumulator (&x)[kSides]) {
    constexpr bool exact = Words16<F>::scaled;
    constexpr bool hold = sizeof(F) == 2;  // the left operand in registers
    Fragment<F> own[hold ? kSides : 1];
    if constexpr (hold) {
        CACR_UNROLL
        for (int k = 0; k < kSides; ++k)
            if (k < m) own[k] = left(f, row, k * kSide);
    }
    CACR_UNROLL
    for (int t = 0; t < kSides; ++t) clear(x[t]);
    for (int j = 0; j < m; ++j) {
        Accumulator u;
        clear(u);
        if constexpr (hold) {
            CACR_UNROLL
            for (int k = 0; k < kSides; ++k)
                if (k < m) add_product<exact>(u, own[k], right(c, k * kSide, j * kSide));
        } else {
            for (int k = 0; k < m; ++k) add_product<exact>(u, left(f, row, k * kSide), right(c, k * kSide, j * kSide));
        }
        const SplitFragment<F> parts = split<F>(u);  // NaN of F and C is in it
        CACR_UNROLL
        for (int t = 0; t < kSides; ++t)
            if (t < n) add_product<true>(x[t], parts, centred(f, t * kSide, j * kSide));
    }
}

// Y of two neighbouring elements of S_aa.
template <bool probs, typename F>
CACR_DEVICE void targets_of(const Matrix<F>& s, int row, int col, float (&y)[2]) {
    const Pair pair = pair_at(s, row, col);
    y[0] = probs ? logit_of_prob(pair.first) : pair.first;
    y[1] = probs ? logit_of_prob(pair.second) : pair.second;
}

// Variants of a kernel: the longer side in units of 16, and the warps of a block. 12 warps have 168 registers a thread.
constexpr int fused_threads(int sides) { return kWarp * (sides == 7 ? 12 : 2 * sides); }
constexpr int fused_blocks(int sides) { return sides <= 2 ? 4 : sides <= 4 ? 2 : 1; }
#define CACR_FUSED_FOR(kernel, F, spans) \
    (fused_longest(spans) <= 2 ? kernel<F, 2> : fused_longest(spans) <= 4 ? kernel<F, 4> : kernel<F, 7>)

// Warps and longer side of the bounds of the spans, both in units of 16.
inline int fused_warps(const SpanTable& spans) { return sides_of(spans.n_text) + sides_of(spans.n_vision); }
inline int fused_longest(const SpanTable& spans) {
    return sides_of(spans.n_text > spans.n_vision ? spans.n_text : spans.n_vision);
}

inline int fused_bytes(const Problem& problem, bool backward) {
    const int text = sides_of(problem.spans.n_text);
    const int vision = sides_of(problem.spans.n_vision);
    return problem.dtype == DType::f32 ? fused_bytes<float>(text, vision, backward)
                                       : fused_bytes<Half>(text, vision, backward);
}

// Whether fused kernels take these problems where a block may have `shared_bytes()`, which is asked for if nothing else decides.
// Forward and backward have to agree, as both must form X alike: what matters is what the backward needs.
template <typename SharedBytes>
bool fused_takes(const Problem& problem, SharedBytes&& shared_bytes) {
    const SpanTable& spans = problem.spans;
    return problem.options.kind != Kind::softmax && spans.n_text > 0 && spans.n_vision > 0 &&
           spans.n_text <= kFusedLongest && spans.n_vision <= kFusedLongest &&
           kWarp * fused_warps(spans) <= fused_threads(7) && fused_bytes(problem, true) <= shared_bytes();
}

}  // namespace cacr
