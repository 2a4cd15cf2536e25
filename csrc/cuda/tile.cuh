// The one matrix product of all kernels: a 64 x 64 tile of A B^T, accumulated in float32 by a block of 128 threads.
//
// Thread t holds rows 8 (t / 16) + 0..7 and columns t % 16 + {0, 16, 32, 48} of the tile. A and B pass through shared memory
// in slices of 16 inner indices (8.5 KB in all); the next slice is fetched into registers while the current one is multiplied.
// Each operand is read as it lies or transposed, so that neighbouring threads read along its rows in both cases.
#pragma once

#include "geometry.cuh"

namespace cacr {

constexpr int kThreads = 128;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kRowsEach = 8;
constexpr int kColsEach = 4;
constexpr int kColStep = kTile / kColsEach;
constexpr int kFetchEach = kTile * kDepth / kThreads;
constexpr int kChunk = 32;  // columns of a tile that pass through shared memory at a time
constexpr int kChunks = kTile / kChunk;
constexpr int kChunkStep = kThreads / kChunk;  // a thread visits rows t / 32 + 0, 4, ..., 60 of column t % 32 of a chunk

CACR_DEVICE int tile_row(int r) { return thread_index() / kColStep * kRowsEach + r; }
CACR_DEVICE int tile_col(int c) { return thread_index() % kColStep + c * kColStep; }

// Tiles of the largest block of a problem, a row of tiles after the other.
CACR_HD int tiles_of_block(const SpanTable& spans) {
    const int longest = spans.n_text > spans.n_vision ? spans.n_text : spans.n_vision;
    const int across = (longest + kTile - 1) / kTile;
    return across * across;
}

struct alignas(16) Quad {
    float v[4];
};

// Slices of both operands, inner index first. Rows are padded to 68 floats: Quads stay aligned, bank conflicts at most 2-way.
struct ProductSlices {
    alignas(16) float a[kDepth][kTile + 4];
    alignas(16) float b[kDepth][kTile + 4];
};

// Half of a finished tile, rows padded to 33 floats: rows and columns are both read without bank conflicts.
struct Chunk {
    float v[kTile][kChunk + 1];
};

struct Accumulator {
    float v[kRowsEach][kColsEach];
};

CACR_DEVICE void clear(Accumulator& acc) {
    CACR_UNROLL
    for (int r = 0; r < kRowsEach; ++r) {
        CACR_UNROLL
        for (int c = 0; c < kColsEach; ++c) acc.v[r][c] = 0.0f;
    }
}

enum class Layout { plain, transposed };

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
CACR_DEVICE void multiply_columns(const ProductSlices& slices, Accumulator& acc) {
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

// Groups of 16 columns that this warp computes of a tile of which only `rows` and `cols` lie in the matrix: none if all of
// its 16 rows lie outside.
CACR_DEVICE int groups_inside(int rows, int cols) {
    if (thread_index() / kWarp * (kTile / kWarpsPerBlock) >= rows) return 0;
    return cols < kTile ? (cols + kColStep - 1) / kColStep : kColsEach;
}

// One or two groups are computed as three: with a third variant some architectures spill. Elsewhere acc stays as it is.
CACR_DEVICE void multiply(const ProductSlices& slices, int groups, Accumulator& acc) {
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
                         ProductSlices& slices, Accumulator& acc) {
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
CACR_DEVICE void put_chunk(Chunk& chunk, const Accumulator& acc) {
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
                            const Accumulator& acc) {
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

// Rows [row_start, row_start + 64) of U = F C [n_a, n_b] into `u`; the caller's next barrier makes them visible to the block.
template <typename F>
CACR_DEVICE void project_rows(const View<F>& f, const View<F>& c, int row_start, float* u, int leading,
                              ProductSlices& slices) {
    for (int col_start = 0; col_start < f.cols; col_start += kTile) {
        Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::transposed>(f, c, row_start, col_start, f.cols, slices, acc);
        store_tile(u, leading, row_start, col_start, f.rows, f.cols, acc);
    }
}

}  // namespace cacr
