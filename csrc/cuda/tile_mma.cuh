// Matrix products of float16 scores on the tensor cores (from sm_75): a 64 x 64 tile of A B^T.
//
// Warp w holds rows 16 w + 0..15 of the tile as eight accumulators [16, 8]. A and B pass through shared memory in slices of
// 16 inner indices (8 KB in all), in the order in which lanes hold the fragments of an instruction.
//
// Scores are exact in float16. A float32 operand (U, W, G) is scaled by a power of two, because its elements may be far
// beyond float16's range, and split into high + low halves, 22 bits: rows of U as the operand of X each by their own, as each
// has a softmax of its own; what only sums to gradients by one for the matrix: what 2^-40 of its largest element leaves out is
// below float16's last place in the gradients. Products of low with low are left out. The scale is undone where a slice's sum
// joins the accumulator, in float32 and rounded to nearest, because tensor cores truncate their sums.
#pragma once

#include "tile.cuh"

namespace cacr {

constexpr int kInstructionCols = 8;
constexpr int kInstructions = kTile / kInstructionCols;
constexpr int kParts = 2;  // high, low

struct alignas(16) Words {
    unsigned v[4];
};

// Slices of both operands, for each 16 rows the words of a lane: a fragment of A; of B, words 0, 2 are a fragment of rows 0..7
// and words 1, 3 of rows 8..15.
struct MmaSlices {
    Words a[kParts][kGroups][kWarp];
    Words b[kParts][kGroups][kWarp];
};

struct MmaAccumulator {
    float v[kInstructions][4];
};

// Row of the tile of element 0 or 2 of this lane's accumulators, column of element 0 in those of the first instruction.
CACR_DEVICE int mma_row(int r) { return thread_index() / kWarp * kGroup + thread_index() % kWarp / 4 + r / 2 * 8; }
CACR_DEVICE int mma_col(int c) { return thread_index() % 4 * 2 + c * kInstructionCols; }

CACR_DEVICE void clear(MmaAccumulator& acc) {
    CACR_UNROLL
    for (int c = 0; c < kInstructions; ++c) {
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[c][r] = 0.0f;
    }
}

// The power of two that brings `largest` to 2^14..2^15; 2^126 if it is smaller than 2^-112.
CACR_DEVICE float scale_of(float largest) {
    const unsigned exponent = bits_of(largest) >> 23;
    return float_of((268u - (exponent > 15u ? exponent : 15u)) << 23);
}

CACR_DEVICE float reciprocal_of_power(float power) { return float_of(0x7f000000u - bits_of(power)); }

// How an operand's elements become halves: scores as they are, float32 by a scale for each row or by a common one.
struct RowScale {
    const float* of_row;
    CACR_DEVICE float at(int row) const { return of_row[row]; }
};

struct CommonScale {
    float value;
    CACR_DEVICE float at(int) const { return value; }
};

template <typename Scale>
struct Split {
    View<float> view;
    Scale scale;
};

template <typename Operand>
constexpr int kPartsOf = 1;
template <typename Scale>
constexpr int kPartsOf<Split<Scale>> = 2;

CACR_DEVICE const View<Half>& view_of(const View<Half>& operand) { return operand; }
template <typename Scale>
CACR_DEVICE const View<float>& view_of(const Split<Scale>& operand) {
    return operand.view;
}

// What undoes the scale of row `row` of the tile.
CACR_DEVICE float undo_of(const View<Half>&, int) { return 1.0f; }
template <typename Scale>
CACR_DEVICE float undo_of(const Split<Scale>& operand, int row) {
    return reciprocal_of_power(operand.scale.at(row));
}

// Pairs of neighbouring inner indices of a slice: pair e of a thread has these outer and inner / 2.
template <Layout layout>
CACR_DEVICE int outer_of(int e) {
    return layout == Layout::plain ? thread_index() / 8 + e * kGroup : thread_index() % kTile;
}
template <Layout layout>
CACR_DEVICE int pair_of(int e) {
    return layout == Layout::plain ? thread_index() % 8 : thread_index() / kTile * 4 + e;
}

// Slice [64 outer, 16 inner] of an operand, zero outside the matrix. plain: element (outer, inner) = view(outer, inner);
// transposed: view(inner, outer).
template <Layout layout, typename T>
CACR_DEVICE void fetch_pairs(const View<T>& view, int outer_start, int inner_start, T (&values)[kFetchEach]) {
    constexpr bool plain = layout == Layout::plain;
    const int outer = outer_start + outer_of<layout>(0);
    const int inner = inner_start + 2 * pair_of<layout>(0);
    const int row = plain ? outer : inner;
    const int col = plain ? inner : outer;
    const T* where = view.data + row * view.row_stride + col * view.col_stride;
    const i64 stride = (plain ? kGroup : 1) * view.row_stride;
    CACR_UNROLL
    for (int e = 0; e < kFetchEach; ++e) {
        const int down = plain ? e / 2 * kGroup : e;
        const int right = plain ? e % 2 : 0;
        values[e] = row + down < view.rows && col + right < view.cols ? where[right * view.col_stride] : T{};
        if (!plain || e % 2) where += stride;
    }
}

// Lanes' fragments are permuted so that writing them transposed meets 2-way bank conflicts at most, reading them none.
CACR_DEVICE int fragment_slot(int lane) { return lane ^ lane / 8; }

CACR_DEVICE unsigned halves_of(const View<Half>&, int, Half first, Half second, unsigned&) {
    return first.bits | (unsigned)second.bits << 16;
}
template <typename Scale>
CACR_DEVICE unsigned halves_of(const Split<Scale>& operand, int row, float first, float second, unsigned& low) {
    const float scale = operand.scale.at(row);
    first *= scale;
    second *= scale;
    const unsigned short high_first = half_of_float(first);
    const unsigned short high_second = half_of_float(second);
    low = half_of_float(first - float_of_half(high_first)) |
          (unsigned)half_of_float(second - float_of_half(high_second)) << 16;
    return high_first | (unsigned)high_second << 16;
}

template <Layout layout, typename Operand, typename T>
CACR_DEVICE void put_pairs(const Operand& operand, const T (&values)[kFetchEach],
                           Words (&slices)[kParts][kGroups][kWarp]) {
    CACR_UNROLL
    for (int e = 0; e < kFetchEach / 2; ++e) {
        const int outer = outer_of<layout>(e);
        const int pair = pair_of<layout>(e);
        const int slot = fragment_slot(outer % 8 * 4 + pair % 4);
        const int word = outer / 8 % 2 + pair / 4 * 2;
        unsigned low = 0;
        slices[0][outer / kGroup][slot].v[word] = halves_of(operand, outer, values[2 * e], values[2 * e + 1], low);
        if (kPartsOf<Operand> == 2) slices[1][outer / kGroup][slot].v[word] = low;
    }
}

// The first `groups` times 16 columns of the tile: acc += undo A B^T of the slices, undo for this lane's two rows.
template <int parts_a, int parts_b>
CACR_DEVICE void multiply_halves(const MmaSlices& slices, int groups, const float (&undo)[2], MmaAccumulator& acc) {
    const int slot = fragment_slot(thread_index() % kWarp);
    Words a[parts_a];
    CACR_UNROLL
    for (int part = 0; part < parts_a; ++part) a[part] = slices.a[part][thread_index() / kWarp][slot];
    CACR_UNROLL
    for (int group = 0; group < kGroups; ++group) {
        if (group >= groups) break;
        Words b[parts_b];
        CACR_UNROLL
        for (int part = 0; part < parts_b; ++part) b[part] = slices.b[part][group][slot];
        CACR_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            const unsigned high_b[2] = {b[0].v[half], b[0].v[half + 2]};
            if (parts_a == 2) multiply_add(sum, a[parts_a - 1].v, high_b);
            if (parts_b == 2) {
                const unsigned low_b[2] = {b[parts_b - 1].v[half], b[parts_b - 1].v[half + 2]};
                multiply_add(sum, a[0].v, low_b);
            }
            multiply_add(sum, a[0].v, high_b);
            CACR_UNROLL
            for (int r = 0; r < 4; ++r) acc.v[2 * group + half][r] += undo[r / 2] * sum[r];
        }
    }
}

// acc[i][j] += sum_{k < inner} A(row_start + i, k) B(col_start + j, k), with A and B read in their layouts. A: scores or Split
// by rows or as a whole; B: scores or Split as a whole. Nothing is centred: differences of scores are not exact in float16.
// Barriers as in tile_ffma.cuh; the scales of rows are read after the first of them.
template <Layout layout_a, Layout layout_b, bool = false, typename A, typename B>
CACR_DEVICE void product(const A& a, const B& b, int row_start, int col_start, int inner, MmaSlices& slices,
                         MmaAccumulator& acc) {
    const auto& view_a = view_of(a);
    const auto& view_b = view_of(b);
    decltype(element_of(view_a)) next_a[kFetchEach];
    decltype(element_of(view_b)) next_b[kFetchEach];
    fetch_pairs<layout_a>(view_a, row_start, 0, next_a);
    fetch_pairs<layout_b>(view_b, col_start, 0, next_b);
    const int groups = groups_inside((layout_a == Layout::plain ? view_a.rows : view_a.cols) - row_start,
                                     (layout_b == Layout::plain ? view_b.rows : view_b.cols) - col_start);
    for (int k = 0; k < inner; k += kDepth) {
        CACR_BARRIER();  // shared memory has been read
        put_pairs<layout_a>(a, next_a, slices.a);
        put_pairs<layout_b>(b, next_b, slices.b);
        CACR_BARRIER();  // the slices are written
        if (k + kDepth < inner) {
            fetch_pairs<layout_a>(view_a, row_start, k + kDepth, next_a);
            fetch_pairs<layout_b>(view_b, col_start, k + kDepth, next_b);
        }
        const float undo_b = undo_of(b, 0);
        const float undo[2] = {undo_of(a, mma_row(0)) * undo_b, undo_of(a, mma_row(2)) * undo_b};
        multiply_halves<kPartsOf<A>, kPartsOf<B>>(slices, groups, undo, acc);
    }
}

// Columns 32 part + 0..31 of the tile to shared memory; all threads of the block call it.
template <int part>
CACR_DEVICE void put_chunk(Chunk& chunk, const MmaAccumulator& acc) {
    CACR_BARRIER();  // shared memory has been read
    CACR_UNROLL
    for (int c = 0; c < kInstructions / kChunks; ++c) {
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) chunk.v[mma_row(r)][mma_col(c) + r % 2] = acc.v[c + part * kInstructions / kChunks][r];
    }
}

// out[i][j] = acc for the elements of the tile inside [rows, cols].
CACR_DEVICE void store_tile(float* out, int leading, int row_start, int col_start, int rows, int cols,
                            const MmaAccumulator& acc) {
    const int col = col_start + mma_col(0);
    CACR_UNROLL
    for (int r = 0; r < 4; ++r) {
        const int row = row_start + mma_row(r);
        float* to = out + (i64)row * leading + col + r % 2;
        CACR_UNROLL
        for (int c = 0; c < kInstructions; ++c)
            if (row < rows && col + r % 2 + c * kInstructionCols < cols) to[c * kInstructionCols] = acc.v[c][r];
    }
}

struct MmaTile {
    using Slices = MmaSlices;
    using Accumulator = MmaAccumulator;

    // Scales of the 64 rows of U that the block owns.
    struct RowScales {
        float of_row[kTile];
    };

    static CACR_DEVICE Split<RowScale> scaled_rows(const View<float>& view, const RowScales& scales) {
        return {view, {scales.of_row}};
    }

    // The matrix with the scale that `count` notes of its magnitude ask for; the warp takes part.
    static CACR_DEVICE Split<CommonScale> scaled(const View<float>& view, const float* notes, int count) {
        float largest = 0.0f;
        for (int i = thread_index() % kWarp; i < count; i += kWarp) largest = fmaxf(largest, notes[i]);
        return {view, {scale_of(warp_max(largest))}};
    }

    static CACR_DEVICE void follow(float& largest, float value) { largest = fmaxf(largest, fabsf(value)); }

    // Rows and columns outside the matrix are 0 in the accumulators.
    static CACR_DEVICE void follow(float& largest, const MmaAccumulator& acc) {
        CACR_UNROLL
        for (int c = 0; c < kInstructions; ++c) {
            CACR_UNROLL
            for (int r = 0; r < 4; ++r) follow(largest, acc.v[c][r]);
        }
    }

    // This lane's two rows.
    static CACR_DEVICE void follow_rows(float (&largest)[2], const MmaAccumulator& acc) {
        CACR_UNROLL
        for (int c = 0; c < kInstructions; ++c) {
            CACR_UNROLL
            for (int r = 0; r < 4; ++r) follow(largest[r / 2], acc.v[c][r]);
        }
    }

    // Four lanes hold a row; the caller's next barrier makes the scales visible to the block.
    static CACR_DEVICE void set_row_scales(RowScales& scales, float (&largest)[2]) {
        CACR_UNROLL
        for (int r = 0; r < 2; ++r) {
            largest[r] = fmaxf(largest[r], shuffle_xor(largest[r], 1));
            largest[r] = fmaxf(largest[r], shuffle_xor(largest[r], 2));
            if (thread_index() % 4 == 0) scales.of_row[mma_row(2 * r)] = scale_of(largest[r]);
        }
    }

    // Notes the magnitude of this warp's part of a row block of a matrix.
    static CACR_DEVICE void note(float* notes, int row_start, float largest) {
        largest = warp_max(largest);
        if (thread_index() % kWarp == 0) notes[row_start / kGroup + thread_index() / kWarp] = largest;
    }
};

}  // namespace cacr
