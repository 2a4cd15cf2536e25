// Quads, four neighbouring elements of a row, and vectors of kQuads of them. AVX-512 only (with AVX2 they cost what they
// save), by intrinsics: what compilers make of shuffles between vectors of different lengths goes through memory.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace cacr {
namespace CACR_ISA {

#if defined(__AVX512F__)
template <typename T>
constexpr int kQuads = kLanes<T> / 4;

// repeated(p): lane 4 i + j is p[j].  stretched(p): it is p[i].  joined(p, stride): it is p[i * stride + j].
// spread<K>(v): it is lane 4 i + K of v.  store_quad<I>(p, v, add): lane 4 I + j to, or added to, p[j].
CACR_INLINE Vec<float> repeated(const float* p) { return (Vec<float>)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
CACR_INLINE Vec<float> stretched(const float* p) {
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return (Vec<float>)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
CACR_INLINE __m256 joined_pair(const float* p, i64 stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
CACR_INLINE Vec<float> joined(const float* p, i64 stride) {
    return (Vec<float>)_mm512_insertf32x8(_mm512_castps256_ps512(joined_pair(p, stride)), joined_pair(p + 2 * stride, stride), 1);
}
template <int K>
CACR_INLINE Vec<float> spread(Vec<float> v) {
    return (Vec<float>)_mm512_permute_ps((__m512)v, 0x55 * K);
}
template <int I>
CACR_INLINE void store_quad(float* p, Vec<float> v, bool accumulate) {
    const __m128 quad = _mm512_extractf32x4_ps((__m512)v, I);
    _mm_storeu_ps(p, accumulate ? _mm_add_ps(_mm_loadu_ps(p), quad) : quad);
}

CACR_INLINE Vec<double> repeated(const double* p) { return (Vec<double>)_mm512_broadcast_f64x4(_mm256_loadu_pd(p)); }
CACR_INLINE Vec<double> stretched(const double* p) {
    const __m512i lanes = _mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0);
    return (Vec<double>)_mm512_permutexvar_pd(lanes, _mm512_castpd128_pd512(_mm_loadu_pd(p)));
}
CACR_INLINE Vec<double> joined(const double* p, i64 stride) {
    return (Vec<double>)_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p)), _mm256_loadu_pd(p + stride), 1);
}
template <int K>
CACR_INLINE Vec<double> spread(Vec<double> v) {
    return (Vec<double>)_mm512_permutex_pd((__m512d)v, 0x55 * K);
}
template <int I>
CACR_INLINE void store_quad(double* p, Vec<double> v, bool accumulate) {
    const __m256d quad = _mm512_extractf64x4_pd((__m512d)v, I);
    _mm256_storeu_pd(p, accumulate ? _mm256_add_pd(_mm256_loadu_pd(p), quad) : quad);
}
#else
template <typename T>
constexpr int kQuads = 1;  // none, and nobody calls these
template <int K, typename V>
V spread(V v);
template <int I, typename T, typename V>
void store_quad(T* p, V v, bool accumulate);
#endif

}  // namespace CACR_ISA
}  // namespace cacr
