// Register-tiled products of small matrices: C (+)= A B with B and C row-major and padded to whole vectors, A read one
// element at a time at any strides, so that a transposed left factor needs no copy.
#pragma once

#include "quads.h"

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

// With AVX-512 products leave room for prefetches, of what they will store and of the next problem (Zen 4 and 5: 10 % less time where
// memory is new, 3 % more where all is in the cache); with AVX2 (Zen 3) these cost 2 to 10 %.
constexpr bool kPrefetch = CACR_VECTOR_BYTES == 64;

constexpr i64 kDepth = 384;            // inner dimension of one packed panel
constexpr i64 kPackBytes = 96 * 1024;  // right factors larger than this are packed panel by panel

template <typename T>
constexpr i64 pack_elements() {
    return kDepth * kMaxVectors * kLanes<T>;
}

// Rows of memory, `stride` bytes apart, that will be wanted soon; `done` bytes of the first have been fetched.
struct Ahead {
    const char* row;
    i64 bytes, stride, rows;
    i64 done;
};

// Scratch that products share, and the memory to fetch between their register tiles: it arrives while they compute.
template <typename T>
struct Workspace {
    static constexpr i64 kBytes = kPrefetch ? CACR_VECTOR_BYTES * kMaxVectors / 10 * 64 : 0;  // a tile

    T* pack;  // pack_elements<T>()
    Ahead ahead[8];
    int waiting;  // entries of ahead in use; the last one is fetched first

    CACR_INLINE void add(const char* row, i64 bytes, i64 stride, i64 rows) {
        if (rows <= 0 || bytes <= 0) return;
        const bool one = stride == bytes;
        ahead[waiting++] = {row, one ? bytes * rows : bytes, stride, one ? 1 : rows, 0};
    }

    CACR_INLINE void fetch() {
        for (i64 left = kBytes; left > 0 && waiting > 0;) {
            Ahead& a = ahead[waiting - 1];
            const i64 end = a.bytes - a.done < left ? a.bytes : a.done + left;
            left -= end - a.done;
            for (; a.done < end; a.done += 64) __builtin_prefetch(a.row + a.done, 0, 2);
            if (end < a.bytes) return;
            a.done = 0;
            a.row += a.stride;
            if (--a.rows == 0) --waiting;
        }
    }
};

// C [Rows, Vectors vectors] (+)= A B over `depth`.
template <typename T, int Rows, int Vectors>
static void tile(i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    Vec<T> sum[Rows][Vectors];
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<Vectors>([&](auto j) __attribute__((always_inline)) {
            sum[i][j] = Vec<T>{};
            if constexpr (kPrefetch) __builtin_prefetch(c + i * ldc + j * kLanes<T>, 1, 3);
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
static void panel(int vectors, i64 m, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate,
                  Workspace<T>& work) {
    if constexpr (Vectors > 0) {
        if (vectors < Vectors) return panel<T, Vectors - 1>(vectors, m, depth, left, b, ldb, c, ldc, accumulate, work);
        constexpr int rows = rows_for(Vectors);
        i64 i = 0;
        for (; i + rows <= m; i += rows) {
            work.fetch();
            tile<T, rows, Vectors>(depth, left, b, ldb, c + i * ldc, ldc, accumulate);
            left.data += rows * left.row;
        }
        tile_of_rows<T, rows - 1, Vectors>(m - i, depth, left, b, ldb, c + i * ldc, ldc, accumulate);
    }
}

// Columns after the last whole vector, 4 Quads of them. A vector is 4 columns of a group of kQuads rows: lane 4 i + j is
// element (i, j), so that 4 columns cost 4 / kLanes of a vector. ByColumns: A is read along its columns.
// C [rows, 4 Quads] (+)= A B for at most Groups groups; the rest of a vector in C becomes 0.
template <typename T, int Groups, int Quads, bool ByColumns>
static void quad_tile(i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    constexpr int n = kQuads<T>;
    Vec<T> sum[Groups][Quads];
    unrolled<Groups>([&](auto g) __attribute__((always_inline)) {
        unrolled<Quads>([&](auto q) __attribute__((always_inline)) { sum[g][q] = Vec<T>{}; });
    });
    const T* a = left.data;
    auto step = [&](auto&& value) __attribute__((always_inline)) {
        Vec<T> right[Quads];
        unrolled<Quads>([&](auto q) __attribute__((always_inline)) { right[q] = repeated(b + 4 * q); });
        unrolled<Groups>([&](auto g) __attribute__((always_inline)) {
            const Vec<T> factor = value(g);
            unrolled<Quads>([&](auto q) __attribute__((always_inline)) { sum[g][q] += factor * right[q]; });
        });
        b += ldb;
    };
    if constexpr (ByColumns) {
        for (i64 k = 0; k < depth; ++k, a += left.column)
            step([&](auto g) __attribute__((always_inline)) { return stretched(a + g * n); });
    } else {
        auto four = [&](i64 count) __attribute__((always_inline)) {
            Vec<T> values[Groups];
            unrolled<Groups>([&](auto g) __attribute__((always_inline)) { values[g] = joined(a + g * n * left.row, left.row); });
            unrolled<4>([&](auto k) __attribute__((always_inline)) {
                if (k < count) step([&](auto g) __attribute__((always_inline)) { return spread<k>(values[g]); });
            });
            a += 4;
        };
        for (i64 k = 4; k <= depth; k += 4) four(4);
        if (depth % 4) four(depth % 4);
    }
    unrolled<Groups>([&](auto g) __attribute__((always_inline)) {
        unrolled<n>([&](auto i) __attribute__((always_inline)) {
            if (g * n + i >= rows) return;
            unrolled<n>([&](auto q) __attribute__((always_inline)) {
                T* at = c + (g * n + i) * ldc + 4 * q;
                if constexpr (q < Quads)
                    store_quad<i>(at, sum[g][q], accumulate);
                else
                    store_quad<0>(at, Vec<T>{}, false);
            });
        });
    });
}

// Groups of rows that quad_tile takes at a time: a multiply-add of each is on its way before the next of the first.
constexpr int groups_for(int quads) { return quads == 3 ? 6 : 8; }

template <typename T, int Groups, int Quads, bool ByColumns>
static void tile_of_groups(i64 groups, i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc,
                           bool accumulate) {
    if constexpr (Groups > 0) {
        if (groups == Groups)
            quad_tile<T, Groups, Quads, ByColumns>(rows, depth, left, b, ldb, c, ldc, accumulate);
        else
            tile_of_groups<T, Groups - 1, Quads, ByColumns>(groups, rows, depth, left, b, ldb, c, ldc, accumulate);
    }
}

// All rows of the columns that quad_tile serves.
template <typename T, int Quads>
static void quad_panel(int quads, i64 m, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    if constexpr (Quads > 0) {
        if (quads < Quads) return quad_panel<T, Quads - 1>(quads, m, depth, left, b, ldb, c, ldc, accumulate);
        constexpr int most = groups_for(Quads);
        const i64 groups = (m + kQuads<T> - 1) / kQuads<T>, tiles = (groups + most - 1) / most;
        for (i64 t = 0, done = 0; t < tiles; ++t) {
            const i64 count = (groups - done + tiles - t - 1) / (tiles - t), row = done * kQuads<T>;
            const Left<T> factor = {left.data + row * left.row, left.row, left.column};
            if (left.column == 1)
                tile_of_groups<T, most, Quads, false>(count, m - row, depth, factor, b, ldb, c + row * ldc, ldc, accumulate);
            else
                tile_of_groups<T, most, Quads, true>(count, m - row, depth, factor, b, ldb, c + row * ldc, ldc, accumulate);
            done += count;
        }
    }
}

// C [m, n] (+)= A [m, depth] B [depth, n]. A has stride 1 along its rows or its columns, and three rows after its
// last are readable. Columns n .. padded(n) of B must be finite, those of C become so.
// Sums run over the inner index in order, whatever the tile.
template <typename T>
static void multiply(i64 m, i64 n, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate,
                     Workspace<T>& work) {
    const int rest = (int)((n % kLanes<T> + 3) / 4), quads = rest < kQuads<T> ? rest : 0;
    const i64 vectors = quads ? n / kLanes<T> : padded<T>(n) / kLanes<T>;
    const i64 panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    const bool packed = m > 4 * rows_for(kMaxVectors) && depth * ldb * (i64)sizeof(T) > kPackBytes;
    const i64 step = packed ? kDepth : depth + 1;  // depth 0: once, C = 0
    for (i64 start = 0; start < depth || start == 0; start += step) {
        const i64 part = depth - start < step ? depth - start : step;
        const Left<T> factor = {left.data + start * left.column, left.row, left.column};
        const bool add = accumulate || start > 0;
        i64 done = 0;
        for (i64 p = 0; p < panels; ++p) {
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
            panel<T, kMaxVectors>(width, m, part, factor, right, ld, c + column, ldc, add, work);
            done += width;
        }
        const i64 column = done * kLanes<T>;
        quad_panel<T, kQuads<T> - 1>(quads, m, part, factor, b + start * ldb + column, ldb, c + column, ldc, add);
    }
}

}  // namespace CACR_ISA
}  // namespace cacr
