// Register-tiled products of small matrices: C (+)= A B with B and C row-major and padded to whole vectors, A read one
// element at a time at any strides, so that a transposed left factor needs no copy.
#pragma once

#include "simd.h"

namespace cacr {
namespace CACR_ISA {

// Element (i, j) at data[i * row + j * column].
template <typename T>
struct Left {
    const T* data;
    i64 row;
    i64 column;
};

// Tile shapes: kMaxVectors columns of vectors, and for each width as many rows as the registers hold.
#if CACR_REGISTERS >= 32
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? CACR_TILE_ROWS : 8; }
#endif

constexpr i64 kDepth = 384;            // inner dimension of one packed panel
constexpr i64 kPackBytes = 96 * 1024;  // right factors larger than this are packed panel by panel

template <typename T>
constexpr i64 pack_elements() {
    return kDepth * kMaxVectors * kLanes<T>;
}

template <typename T, int Rows, int Vectors>
static void tile(i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    Vec<T> sum[Rows][Vectors];
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<Vectors>([&](auto j) __attribute__((always_inline)) {
            sum[i][j] = Vec<T>{};
            __builtin_prefetch(c + i * ldc + j * kLanes<T>, 1, 3);
        });
    });
    const T* a = left.data;
    const i64 row = left.row, column = left.column;
    for (i64 k = 0; k < depth; ++k) {
        Vec<T> right[Vectors];
        unrolled<Vectors>([&](auto j) __attribute__((always_inline)) { right[j] = load(b + j * kLanes<T>); });
        unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
            const Vec<T> value = splat(a[i * row]);
            unrolled<Vectors>([&](auto j) __attribute__((always_inline)) { sum[i][j] += value * right[j]; });
        });
        a += column;
        b += ldb;
    }
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<Vectors>([&](auto j) __attribute__((always_inline)) {
            T* at = c + i * ldc + j * kLanes<T>;
            store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
        });
    });
}

template <typename T, int Rows, int Vectors>
static void tile_of_rows(i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    if constexpr (Rows > 0) {
        if (rows == Rows)
            tile<T, Rows, Vectors>(depth, left, b, ldb, c, ldc, accumulate);
        else
            tile_of_rows<T, Rows - 1, Vectors>(rows, depth, left, b, ldb, c, ldc, accumulate);
    }
}

// One panel of columns, all rows.
template <typename T, int Vectors>
static void panel(i64 m, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    constexpr int rows = rows_for(Vectors);
    i64 i = 0;
    for (; i + rows <= m; i += rows) {
        tile<T, rows, Vectors>(depth, left, b, ldb, c + i * ldc, ldc, accumulate);
        left.data += rows * left.row;
    }
    tile_of_rows<T, rows - 1, Vectors>(m - i, depth, left, b, ldb, c + i * ldc, ldc, accumulate);
}

template <typename T, int Vectors>
static void panel_of_vectors(int vectors, i64 m, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc,
                             bool accumulate) {
    if constexpr (Vectors > 0) {
        if (vectors == Vectors)
            panel<T, Vectors>(m, depth, left, b, ldb, c, ldc, accumulate);
        else
            panel_of_vectors<T, Vectors - 1>(vectors, m, depth, left, b, ldb, c, ldc, accumulate);
    }
}

// C [m, n] (+)= A [m, depth] B [depth, n]. Columns n .. padded(n) of B must be finite; those of C receive A times them.
// pack: pack_elements<T>() of scratch. Sums run over the inner index in order, whatever the tile.
template <typename T>
static void multiply(i64 m, i64 n, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate, T* pack) {
    const i64 vectors = padded<T>(n) / kLanes<T>;
    const i64 panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    const bool packed = m > 4 * rows_for(kMaxVectors) && depth * ldb * (i64)sizeof(T) > kPackBytes;
    const i64 step = packed ? kDepth : depth;
    for (i64 start = 0; start < depth || start == 0; start += step) {
        const i64 part = depth - start < step ? depth - start : step;
        for (i64 p = 0, done = 0; p < panels; ++p) {
            const int width = (int)((vectors - done + panels - p - 1) / (panels - p));
            const i64 column = done * kLanes<T>;
            const T* right = b + start * ldb + column;
            i64 ld = ldb;
            if (packed) {
                ld = width * kLanes<T>;
                for (i64 k = 0; k < part; ++k) __builtin_memcpy(pack + k * ld, right + k * ldb, (size_t)ld * sizeof(T));
                right = pack;
            }
            panel_of_vectors<T, kMaxVectors>(width, m, part, {left.data + start * left.column, left.row, left.column}, right, ld,
                                             c + column, ldc, accumulate || start > 0);
            done += width;
        }
    }
}

}  // namespace CACR_ISA
}  // namespace cacr
