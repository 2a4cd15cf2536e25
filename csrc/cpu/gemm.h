// Register-tiled products of small matrices: C (+)= A B with B and C row-major and padded to whole vectors, A read one
// element at a time at any strides, so that a transposed left factor needs no copy.
#pragma once

#include "quads.h"

namespace cacr {
namespace CACR_ISA {

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

// With AVX-512 products leave room for prefetches, of the next problem and of where this one's gradient goes (Zen 4 and 5: 10 % less
// time where memory is new, 3 % more where all is in the cache); with AVX2 (Zen 3) these cost 2 to 10 %.
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
        unrolled<Vectors>([&](auto j) __attribute__((always_inline)) { sum[i][j] = Vec<T>{}; });
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

// C [m, n] (+)= A [m, depth] B [depth, n]. A has stride 1 along its rows, three of which are readable after its last, or along
// its columns, readable up to whole vectors. Columns n .. padded(n) of B must be finite, those of C become so.
template <typename T>
static void multiply(i64 m, i64 n, i64 depth, Left<T> left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate,
                     Workspace<T>& work) {
    const int rest = (int)((n % kLanes<T> + 3) / 4), quads = rest <= kMaxQuads<T> ? rest : 0;
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
        for (i64 k = 0; quads && (k < part || k == 0); k += kDepth)
            quad_panel<T, kMaxQuads<T>>(quads, m, part - k < kDepth ? part - k : kDepth, {factor.data + k * left.column, left.row, left.column},
                                         b + (start + k) * ldb + column, ldb, c + column, ldc, add || k > 0, work.pack);
    }
}

}  // namespace CACR_ISA
}  // namespace cacr
