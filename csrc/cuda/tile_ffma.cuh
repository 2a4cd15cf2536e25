// Matrix products without tensor cores: a 64 x 64 tile of A B^T in float32 multiply-adds.
//
// Thread t holds rows 8 (t / 16) + 0..7 and columns t % 16 + {0, 16, 32, 48} of the tile. A and B pass through shared memory
// in slices of 16 inner indices (8.5 KB in all); the next slice is fetched into registers while the current one is multiplied.
// Each operand is read as it lies or transposed, so that neighbouring threads read along its rows in both cases.
#pragma once

#include "tile.cuh"

namespace cacr {

constexpr int kRowsEach = 8;
constexpr int kColsEach = 4;
constexpr int kColStep = kTile / kColsEach;
static_assert(kColStep == kGroup, "a group of columns is one column of every thread");

CACR_DEVICE int tile_row(int r) { return thread_index() / kColStep * kRowsEach + r; }
CACR_DEVICE int tile_col(int c) { return thread_index() % kColStep + c * kColStep; }

struct alignas(16) Quad {
    float v[4];
};

// Slices of both operands, inner index first. Rows are padded to 68 floats: Quads stay aligned, bank conflicts at most 2-way.
struct ProductSlices {
    alignas(16) float a[kDepth][kTile + 4];
    alignas(16) float b[kDepth][kTile + 4];
};

struct FfmaAccumulator {
    float v[kRowsEach][kColsEach];
};

CACR_DEVICE void clear(FfmaAccumulator& acc) {
    CACR_UNROLL
    for (int r = 0; r < kRowsEach; ++r) {
        CACR_UNROLL
        for (int c = 0; c < kColsEach; ++c) acc.v[r][c] = 0.0f;
    }
}

// Slice [64 outer, 16 inner] of an operand, 8 elements a thread, zero outside the matrix.
// plain: element (outer, inner) = view(outer, inner), less view(0, inner) if centred; transposed: view(inner, outer).
template <Layout layout, bool centred = false, typename T>
CACR_DEVICE void fetch(const View<T>& view, int outer_start, int inner_start, float (&values)[kFetchEach]) {
    constexpr int width = layout == Layout::plain ? kDepth : kTile;
    constexpr int step = kThreads / width;
    const int first_row = (layout == Layout::plain ? outer_start : inner_start) + thread_index() / width;
    const int col = (layout == Layout::plain ? inner_start : outer_start) + thread_index() % width;
    const T* where = view.data + first_row * view.row_stride + col * view.col_stride;
    const i64 stride = step * view.row_stride;
    const float first = centred && col < view.cols ? to_float(view.data[col * view.col_stride]) : 0.0f;
    CACR_UNROLL
    for (int e = 0; e < kFetchEach; ++e) {
        values[e] = first_row + e * step < view.rows && col < view.cols ? to_float(*where) - first : 0.0f;
        where += stride;
    }
}

template <Layout layout>
CACR_DEVICE void put(float (&slice)[kDepth][kTile + 4], const float (&values)[kFetchEach]) {
    CACR_UNROLL
    for (int e = 0; e < kFetchEach; ++e) {
        if (layout == Layout::plain)
            slice[thread_index() % kDepth][thread_index() / kDepth + e * (kThreads / kDepth)] = values[e];
        else
            slice[thread_index() / kTile + e * (kThreads / kTile)][thread_index() % kTile] = values[e];
    }
}

// The first `groups` times 16 columns of the tile: acc += A B^T of the slices.
template <int groups>
CACR_DEVICE void multiply_columns(const ProductSlices& slices, FfmaAccumulator& acc) {
    CACR_UNROLL_SOME
    for (int k = 0; k < kDepth; ++k) {
        const Quad* a = (const Quad*)&slices.a[k][tile_row(0)];
        const Quad low = a[0];
        const Quad high = a[1];
        CACR_UNROLL
        for (int c = 0; c < groups; ++c) {
            const float b = slices.b[k][tile_col(c)];
            CACR_UNROLL
            for (int r = 0; r < 4; ++r) {
                acc.v[r][c] += low.v[r] * b;
                acc.v[r + 4][c] += high.v[r] * b;
            }
        }
    }
}

// One or two groups are computed as three: with a third variant some architectures spill. Elsewhere acc stays as it is.
CACR_DEVICE void multiply(const ProductSlices& slices, int groups, FfmaAccumulator& acc) {
    if (groups > 3)
        multiply_columns<4>(slices, acc);
    else if (groups > 0)
        multiply_columns<3>(slices, acc);
}

// acc[i][j] += sum_{k < inner} A(row_start + i, k) B(col_start + j, k), with A and B read in their layouts; if centred,
// with B(col_start + j, k) - B(0, k), B plain.
// The whole block takes part. What other threads wrote to A, B or the slices needs no barrier of the caller only if this
// thread reads it through shared memory; after the product the slices are free at the caller's next barrier.
template <Layout layout_a, Layout layout_b, bool centred = false, typename A, typename B>
CACR_DEVICE void product(const View<A>& a, const View<B>& b, int row_start, int col_start, int inner,
                         ProductSlices& slices, FfmaAccumulator& acc) {
    float next_a[kFetchEach];
    float next_b[kFetchEach];
    fetch<layout_a>(a, row_start, 0, next_a);
    fetch<layout_b, centred>(b, col_start, 0, next_b);
    for (int k = 0; k < inner; k += kDepth) {
        CACR_BARRIER();  // shared memory has been read
        put<layout_a>(slices.a, next_a);
        put<layout_b>(slices.b, next_b);
        CACR_BARRIER();  // the slices are written
        if (k + kDepth < inner) {
            fetch<layout_a>(a, row_start, k + kDepth, next_a);
            fetch<layout_b, centred>(b, col_start, k + kDepth, next_b);
        }
        // once a slice: held in a register, it spills
        const int groups = groups_inside((layout_a == Layout::plain ? a.rows : a.cols) - row_start,
                                         (layout_b == Layout::plain ? b.rows : b.cols) - col_start);
        multiply(slices, groups, acc);
    }
}

// Columns 32 part + 0..31 of the tile to shared memory; all threads of the block call it.
template <int part>
CACR_DEVICE void put_chunk(Chunk& chunk, const FfmaAccumulator& acc) {
    CACR_BARRIER();  // shared memory has been read
    CACR_UNROLL
    for (int r = 0; r < kRowsEach; ++r) {
        CACR_UNROLL
        for (int c = 0; c < kColsEach / kChunks; ++c)
            chunk.v[tile_row(r)][tile_col(c)] = acc.v[r][c + part * kColsEach / kChunks];
    }
}

// out[i][j] = acc for the elements of the tile inside [rows, cols].
CACR_DEVICE void store_tile(float* out, int leading, int row_start, int col_start, int rows, int cols,
                            const FfmaAccumulator& acc) {
    const int row = row_start + tile_row(0);
    const int col = col_start + tile_col(0);
    float* to = out + (i64)row * leading + col;
    CACR_UNROLL
    for (int r = 0; r < kRowsEach; ++r) {
        CACR_UNROLL
        for (int c = 0; c < kColsEach; ++c)
            if (row + r < rows && col + c * kColStep < cols) to[c * kColStep] = acc.v[r][c];
        to += leading;
    }
}

// Float32 operands enter as they are, so nothing is noted about their size.
struct FfmaTile {
    using Slices = ProductSlices;
    using Accumulator = cacr::FfmaAccumulator;
    struct RowScales {};

    static CACR_DEVICE View<float> scaled_rows(const View<float>& view, const RowScales&) { return view; }
    static CACR_DEVICE View<float> scaled(const View<float>& view, const float*, int) { return view; }
    static CACR_DEVICE void follow(float&, float) {}
    static CACR_DEVICE void follow(float&, const Accumulator&) {}
    static CACR_DEVICE void follow_rows(float (&)[2], const Accumulator&) {}
    static CACR_DEVICE void set_row_scales(RowScales&, float (&)[2]) {}
    static CACR_DEVICE void note(float*, int, float) {}
};

}  // namespace cacr
