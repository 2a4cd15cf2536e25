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

// Tile shapes: kMaxVectors columns of vectors, and for each width as many rows as the registers hold beside the right
// vectors and one left element (without fused multiply-add: and one product).
#if CACR_REGISTERS >= 32
constexpr int kMaxVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : 8; }
#elif defined(__FMA__)
constexpr int kMaxVectors = 3;
constexpr int rows_for(int vectors) { return 10 - 2 * vectors; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 4 : 8; }
#endif

// 512-bit units of two 256-bit halves do half a vector in half the time.
constexpr bool kHalves = CACR_VECTOR_BYTES == 64;

// With AVX-512 (Zen 4) products leave room for prefetches, of what they will store and of the next problem; with AVX2 (Zen 3) these cost
// 2 to 10 %.
constexpr bool kPrefetch = CACR_VECTOR_BYTES == 64;

constexpr i64 kDepth = 384;            // inner dimension of one packed panel
constexpr i64 kPackBytes = 96 * 1024;  // right factors larger than this are packed panel by panel

template <typename T>
constexpr i64 pack_elements() {
    return kDepth * kMaxVectors * kLanes<T>;
}

// Rows of memory, `stride` bytes apart, that will be wanted soon.
struct Ahead {
    const char* row;
    i64 bytes, stride, rows;
    i64 offset;
};

// Scratch that products share, and the memory to fetch between their register tiles: it arrives while they compute.
template <typename T>
struct Workspace {
    static constexpr int kLines = kPrefetch ? CACR_VECTOR_BYTES * kMaxVectors / 10 : 0;  // cache lines a tile

    T* pack;  // pack_elements<T>()
    Ahead ahead[8];
    int waiting;  // entries of ahead in use; the last one is fetched first

    CACR_INLINE void add(const char* row, i64 bytes, i64 stride, i64 rows) {
        if (rows > 0 && bytes > 0) ahead[waiting++] = {row, bytes, stride, rows, 0};
    }

    CACR_INLINE void fetch() {
        for (int line = 0; line < kLines && waiting > 0; ++line) {
            Ahead& a = ahead[waiting - 1];
            __builtin_prefetch(a.row + a.offset, 0, 2);
            a.offset += 64;
            if (a.offset < a.bytes) continue;
            a.offset = 0;
            a.row += a.stride;
            if (--a.rows == 0) --waiting;
        }
    }
};

// C [Rows, Vectors vectors] (+)= A B over `depth`. Half: of the last vector only the lower half.
template <typename T, int Rows, int Vectors, bool Half>
static void tile(i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    constexpr int full = Vectors - Half, last = full * kLanes<T>;
    Vec<T> sum[Rows][full ? full : 1];
    HalfVec<T> rest[Rows];
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<full>([&](auto j) __attribute__((always_inline)) { sum[i][j] = Vec<T>{}; });
        rest[i] = HalfVec<T>{};
        if constexpr (kPrefetch)
            unrolled<Vectors>([&](auto j) __attribute__((always_inline)) {
                __builtin_prefetch(c + i * ldc + j * kLanes<T>, 1, 3);
            });
    });
    const T* a = left.data;
    const i64 row = left.row, column = left.column;
    for (i64 k = 0; k < depth; ++k) {
        Vec<T> right[full ? full : 1];
        HalfVec<T> right_rest;
        unrolled<full>([&](auto j) __attribute__((always_inline)) { right[j] = load(b + j * kLanes<T>); });
        if constexpr (Half) right_rest = load<T, HalfVec<T>>(b + last);
        unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
            const Vec<T> value = splat(a[i * row]);
            unrolled<full>([&](auto j) __attribute__((always_inline)) { sum[i][j] += value * right[j]; });
            if constexpr (Half) rest[i] += lower_half<T>(value) * right_rest;
        });
        a += column;
        b += ldb;
    }
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<full>([&](auto j) __attribute__((always_inline)) {
            T* at = c + i * ldc + j * kLanes<T>;
            store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
        });
        if constexpr (Half) {
            T* at = c + i * ldc + last;
            store(at, with_zeros<T>(accumulate ? load<T, HalfVec<T>>(at) + rest[i] : rest[i]));
        }
    });
}

template <typename T, int Rows, int Vectors, bool Half>
static void tile_of_rows(i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    if constexpr (Rows > 0) {
        if (rows == Rows)
            tile<T, Rows, Vectors, Half>(depth, left, b, ldb, c, ldc, accumulate);
        else
            tile_of_rows<T, Rows - 1, Vectors, Half>(rows, depth, left, b, ldb, c, ldc, accumulate);
    }
}

// One panel of columns, all rows.
template <typename T, int Vectors, bool Half>
static void panel(i64 m, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate,
                  Workspace<T>& work) {
    constexpr int rows = rows_for(Vectors);
    i64 i = 0;
    for (; i + rows <= m; i += rows) {
        work.fetch();
        tile<T, rows, Vectors, Half>(depth, left, b, ldb, c + i * ldc, ldc, accumulate);
        left.data += rows * left.row;
    }
    tile_of_rows<T, rows - 1, Vectors, Half>(m - i, depth, left, b, ldb, c + i * ldc, ldc, accumulate);
}

template <typename T, int Vectors>
static void panel_of_vectors(int vectors, bool half, i64 m, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c,
                             i64 ldc, bool accumulate, Workspace<T>& work) {
    if constexpr (Vectors > 0) {
        if (vectors < Vectors)
            return panel_of_vectors<T, Vectors - 1>(vectors, half, m, depth, left, b, ldb, c, ldc, accumulate, work);
        if constexpr (kHalves)
            if (half) return panel<T, Vectors, true>(m, depth, left, b, ldb, c, ldc, accumulate, work);
        panel<T, Vectors, false>(m, depth, left, b, ldb, c, ldc, accumulate, work);
    }
}

// C [m, n] (+)= A [m, depth] B [depth, n]. Columns n .. padded(n) of B must be finite, those of C become so.
// Sums run over the inner index in order, whatever the tile.
template <typename T>
static void multiply(i64 m, i64 n, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate,
                     Workspace<T>& work) {
    const i64 vectors = padded<T>(n) / kLanes<T>;
    const i64 panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    const bool half = kHalves && 2 * (vectors * kLanes<T> - n) >= kLanes<T>;  // lower half of the last one will do
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
                for (i64 k = 0; k < part; ++k)
                    __builtin_memcpy(work.pack + k * ld, right + k * ldb, (size_t)ld * sizeof(T));
                right = work.pack;
            }
            const Left<T> factor = {left.data + start * left.column, left.row, left.column};
            panel_of_vectors<T, kMaxVectors>(width, half && p == panels - 1, m, part, factor, right, ld, c + column,
                                             ldc, accumulate || start > 0, work);
            done += width;
        }
    }
}

}  // namespace CACR_ISA
}  // namespace cacr
