// Products of the columns after the last whole vector, four at a time: a vector holds quads, four neighbouring elements
// of kQuads rows, so that 4 columns cost 4 / kLanes of a vector. x86 only, with a few intrinsics: what compilers make of shuffles
// between vectors of different lengths goes through memory.
#pragma once

#include "simd.h"

#if defined(__AVX512F__) && CACR_VECTOR_BYTES == 64
#define CACR_QUADS 4
#elif defined(__AVX2__) && CACR_VECTOR_BYTES == 32
#define CACR_QUADS 2
#endif

#if defined(CACR_QUADS)
#include <immintrin.h>
#endif

namespace cacr {
namespace CACR_ISA {

// Element (i, j) at data[i * row + j * column].
template <typename T>
struct Left {
    const T* data;
    i64 row;
    i64 column;
};

#if defined(CACR_QUADS)
template <typename T>
constexpr int kQuads = kLanes<T> / 4;
#else
template <typename T>
constexpr int kQuads = 1;  // none
#endif

// At most so many are taken: three in the place of a vector of four would cost what they save.
template <typename T>
constexpr int kMaxQuads = kQuads<T> / 2;

// repeated(p): lane 4 i + j is p[j].  joined(p, stride): it is p[i * stride + j].
// store_quad<I>(p, v, add): lane 4 I + j to, or added to, p[j]. The general ones have no body: without quads nobody calls them.
template <typename T>
Vec<T> repeated(const T* p);
template <typename T>
Vec<T> joined(const T* p, i64 stride);
template <int I, typename T, typename V>
void store_quad(T* p, V v, bool add);
#if defined(CACR_QUADS)
CACR_INLINE __m256 joined_pair(const float* p, i64 stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
#if CACR_QUADS == 4
CACR_INLINE Vec<float> repeated(const float* p) { return (Vec<float>)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
CACR_INLINE Vec<float> joined(const float* p, i64 stride) {
    return (Vec<float>)_mm512_insertf32x8(_mm512_castps256_ps512(joined_pair(p, stride)), joined_pair(p + 2 * stride, stride), 1);
}
template <int I>
CACR_INLINE void store_quad(float* p, Vec<float> v, bool add) {
    const __m128 quad = _mm512_extractf32x4_ps((__m512)v, I);
    _mm_storeu_ps(p, add ? _mm_add_ps(_mm_loadu_ps(p), quad) : quad);
}
CACR_INLINE Vec<double> repeated(const double* p) { return (Vec<double>)_mm512_broadcast_f64x4(_mm256_loadu_pd(p)); }
CACR_INLINE Vec<double> joined(const double* p, i64 stride) {
    return (Vec<double>)_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p)), _mm256_loadu_pd(p + stride), 1);
}
template <int I>
CACR_INLINE void store_quad(double* p, Vec<double> v, bool add) {
    const __m256d quad = _mm512_extractf64x4_pd((__m512d)v, I);
    _mm256_storeu_pd(p, add ? _mm256_add_pd(_mm256_loadu_pd(p), quad) : quad);
}
#else
CACR_INLINE Vec<float> repeated(const float* p) { return (Vec<float>)_mm256_broadcast_ps((const __m128*)p); }
CACR_INLINE Vec<float> joined(const float* p, i64 stride) { return (Vec<float>)joined_pair(p, stride); }
template <int I>
CACR_INLINE void store_quad(float* p, Vec<float> v, bool add) {
    const __m128 quad = _mm256_extractf128_ps((__m256)v, I);
    _mm_storeu_ps(p, add ? _mm_add_ps(_mm_loadu_ps(p), quad) : quad);
}
#endif
#endif

// Four vectors, seen as 4 x 4 matrices of one quad each, transposed.
template <typename T>
CACR_INLINE void transpose_quads(Vec<T> (&v)[4]) {
    typedef typename MakeIndices<kLanes<T>>::type Lane;
    Vec<T> half[4];
    unrolled<4>([&](auto i) __attribute__((always_inline)) { half[i] = zip<4, 1, i / 2>(v[i % 2 * 2], v[i % 2 * 2 + 1], Lane{}); });
    unrolled<4>([&](auto i) __attribute__((always_inline)) { v[i] = zip<4, 2, i % 2>(half[i / 2 * 2], half[i / 2 * 2 + 1], Lane{}); });
}

// A factor's last columns b [depth, 4 Quads] as quad_rows reads them: quad k / 4 of column c at out[k / 4 * 16 Quads + 4 c], rows
// beyond `depth` zero.
template <typename T>
static void pack_quads(i64 depth, int quads, const T* b, i64 ldb, T* out) {
    constexpr int n = kQuads<T>;
    i64 k = 0;
    for (; k + kLanes<T> <= depth; k += kLanes<T>) {
        for (int q = 0; q < quads; ++q) {
            Vec<T> v[4];
            unrolled<4>([&](auto i) __attribute__((always_inline)) { v[i] = joined(b + (k + i) * ldb + 4 * q, 4 * ldb); });
            transpose_quads<T>(v);
            unrolled<4>([&](auto c) __attribute__((always_inline)) {
                unrolled<n>([&](auto i) __attribute__((always_inline)) {
                    store_quad<i>(out + (k / 4 + i) * 16 * quads + 4 * (4 * q + c), v[c], false);
                });
            });
        }
    }
    for (; k < depth; k += 4)
        for (int c = 0; c < 4 * quads; ++c)
            for (int i = 0; i < 4; ++i) out[k / 4 * 16 * quads + 4 * c + i] = k + i < depth ? b[(k + i) * ldb + c] : T(0);
}

// Rows of C that a unit has, its sums being `sum`: C [rows, 4 Quads] (+)= them, zero in the rest of the vector.
template <typename T, int Quads, int I>
CACR_INLINE void store_quads(const Vec<T> (&row)[Quads], T* c, bool accumulate) {
    unrolled<kQuads<T>>([&](auto q) __attribute__((always_inline)) {
        if constexpr (q < Quads)
            store_quad<I>(c + 4 * q, row[q], accumulate);
        else
            store_quad<0>(c + 4 * q, Vec<T>{}, false);
    });
}

// C [rows, 4 Quads] (+)= A B, A read along its rows: lane 4 i + j of a sum has row i and every fourth inner index from j on.
// packed: of pack_quads. Groups: of kQuads rows.
template <typename T, int Groups, int Quads>
static void quad_rows(i64 rows, i64 depth, const Left<T>& left, const T* packed, T* c, i64 ldc, bool accumulate) {
    constexpr int n = kQuads<T>;
    typedef typename MakeIndices<kLanes<T>>::type Lane;
    Vec<T> sum[Groups][4 * Quads];
    unrolled<Groups>([&](auto g) __attribute__((always_inline)) {
        unrolled<4 * Quads>([&](auto j) __attribute__((always_inline)) { sum[g][j] = Vec<T>{}; });
    });
    const T* a = left.data;
    auto step = [&](auto&& value) __attribute__((always_inline)) {
        Vec<T> factor[Groups];
        unrolled<Groups>([&](auto g) __attribute__((always_inline)) { factor[g] = value(joined(a + g * n * left.row, left.row)); });
        unrolled<4 * Quads>([&](auto j) __attribute__((always_inline)) {
            const Vec<T> right = repeated(packed + 4 * j);
            unrolled<Groups>([&](auto g) __attribute__((always_inline)) { sum[g][j] += factor[g] * right; });
        });
        a += 4;
        packed += 16 * Quads;
    };
    for (i64 k = 4; k <= depth; k += 4) step([](Vec<T> v) __attribute__((always_inline)) { return v; });
    if (depth % 4) {
        IntVec<T> lane;
        for (int i = 0; i < kLanes<T>; ++i) lane[i] = i % 4 < depth % 4 ? -1 : 0;
        step([&](Vec<T> v) __attribute__((always_inline)) { return select<T>(lane, v, Vec<T>{}); });
    }
    unrolled<Groups>([&](auto g) __attribute__((always_inline)) {
        Vec<T> total[Quads];
        unrolled<Quads>([&](auto q) __attribute__((always_inline)) {
            auto& s = sum[g];
            const Vec<T> first = zip<4, 1, false>(s[4 * q], s[4 * q + 1], Lane{}) + zip<4, 1, true>(s[4 * q], s[4 * q + 1], Lane{});
            const Vec<T> second = zip<4, 1, false>(s[4 * q + 2], s[4 * q + 3], Lane{}) + zip<4, 1, true>(s[4 * q + 2], s[4 * q + 3], Lane{});
            total[q] = zip<4, 2, false>(first, second, Lane{}) + zip<4, 2, true>(first, second, Lane{});
        });
        unrolled<n>([&](auto i) __attribute__((always_inline)) {
            if (g * n + i < rows) store_quads<T, Quads, i>(total, c + (g * n + i) * ldc, accumulate);
        });
    });
}

// The same, A read along its columns: a sum has kLanes rows of one column. b: B itself.
template <typename T, int Vectors, int Quads>
static void quad_columns(i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    constexpr int n = kQuads<T>;
    Vec<T> sum[Vectors][4 * Quads];
    unrolled<Vectors>([&](auto v) __attribute__((always_inline)) {
        unrolled<4 * Quads>([&](auto j) __attribute__((always_inline)) { sum[v][j] = Vec<T>{}; });
    });
    const T* a = left.data;
    for (i64 k = 0; k < depth; ++k, a += left.column, b += ldb) {
        Vec<T> factor[Vectors];
        unrolled<Vectors>([&](auto v) __attribute__((always_inline)) { factor[v] = load(a + v * kLanes<T>); });
        unrolled<4 * Quads>([&](auto j) __attribute__((always_inline)) {
            const Vec<T> right = splat(b[j]);
            unrolled<Vectors>([&](auto v) __attribute__((always_inline)) { sum[v][j] += factor[v] * right; });
        });
    }
    unrolled<Vectors>([&](auto v) __attribute__((always_inline)) {
        Vec<T> turned[Quads][4];
        unrolled<Quads>([&](auto q) __attribute__((always_inline)) {
            unrolled<4>([&](auto j) __attribute__((always_inline)) { turned[q][j] = sum[v][4 * q + j]; });
            transpose_quads<T>(turned[q]);
        });
        unrolled<n>([&](auto i) __attribute__((always_inline)) {
            unrolled<4>([&](auto j) __attribute__((always_inline)) {
                constexpr int row = v * kLanes<T> + 4 * i + j;
                Vec<T> quads[Quads];
                unrolled<Quads>([&](auto q) __attribute__((always_inline)) { quads[q] = turned[q][j]; });
                if (row < rows) store_quads<T, Quads, i>(quads, c + row * ldc, accumulate);
            });
        });
    });
}

// Groups of rows, or vectors of them, that are taken at a time: as many sums as the registers hold.
#if CACR_REGISTERS >= 32
constexpr int units_for(int quads) { return quads == 1 ? 5 : 3; }
#else
constexpr int units_for(int) { return 2; }
#endif

template <typename T, int Units, int Quads>
static void quad_tile(i64 units, i64 rows, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate) {
    if constexpr (Units > 0) {
        if (units < Units) return quad_tile<T, Units - 1, Quads>(units, rows, depth, left, b, ldb, c, ldc, accumulate);
        if (left.column == 1)
            quad_rows<T, Units, Quads>(rows, depth, left, b, c, ldc, accumulate);
        else
            quad_columns<T, Units, Quads>(rows, depth, left, b, ldb, c, ldc, accumulate);
    }
}

// C [m, 4 quads] (+)= A [m, depth] B [depth, 4 quads], and zero in the rest of the vector. scratch: 4 quads padded(depth).
// A has stride 1 along its rows, and kQuads - 1 rows after its last are readable; or along its columns, readable up to whole vectors.
template <typename T, int Quads>
static void quad_panel(int quads, i64 m, i64 depth, const Left<T>& left, const T* b, i64 ldb, T* c, i64 ldc, bool accumulate, T* scratch) {
    if constexpr (Quads > 0) {
        if (quads < Quads) return quad_panel<T, Quads - 1>(quads, m, depth, left, b, ldb, c, ldc, accumulate, scratch);
        const bool by_rows = left.column == 1;
        if (by_rows) {
            pack_quads<T>(depth, quads, b, ldb, scratch);
            b = scratch;
        }
        constexpr int most = units_for(Quads);
        const i64 each = by_rows ? kQuads<T> : kLanes<T>, units = (m + each - 1) / each, tiles = (units + most - 1) / most;
        for (i64 t = 0, done = 0; t < tiles; ++t) {
            const i64 count = (units - done + tiles - t - 1) / (tiles - t), row = done * each;
            const Left<T> factor = {left.data + row * left.row, left.row, left.column};
            quad_tile<T, most, Quads>(count, m - row, depth, factor, b, ldb, c + row * ldc, ldc, accumulate);
            done += count;
        }
    }
}

}  // namespace CACR_ISA
}  // namespace cacr
