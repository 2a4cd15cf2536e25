// Vectors of T for the instruction set this file is compiled for: CACR_VECTOR_BYTES wide, in namespace cacr::CACR_ISA.
// Compiler vector extensions only (GCC, Clang), so the same source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <stddef.h>

#include "../include/problem.h"

#define CACR_INLINE inline __attribute__((always_inline))

namespace cacr {
namespace CACR_ISA {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(CACR_VECTOR_BYTES)));
    typedef int integer __attribute__((vector_size(CACR_VECTOR_BYTES)));
    typedef unsigned bits __attribute__((vector_size(CACR_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(CACR_VECTOR_BYTES)));
    typedef long long integer __attribute__((vector_size(CACR_VECTOR_BYTES)));
    typedef unsigned long long bits __attribute__((vector_size(CACR_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using IntVec = typename VectorOf<T>::integer;

// Lanes of a vector.
template <typename T>
constexpr int kLanes = CACR_VECTOR_BYTES / (int)sizeof(T);

template <typename T>
constexpr i64 padded(i64 n) {
    return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Row length of a scratch matrix with n columns: whole vectors, and no multiple of 512 bytes, whose rows would compete for
// the same few cache sets.
template <typename T>
constexpr i64 leading(i64 n) {
    return padded<T>(n) * (i64)sizeof(T) % 512 ? padded<T>(n) : padded<T>(n) + kLanes<T>;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};
template <int I>
struct Index {
    constexpr operator int() const { return I; }
};

template <typename F, int... I>
CACR_INLINE void unrolled_impl(F&& f, Indices<I...>) {
    (f(Index<I>{}), ...);
}

// f(0), ..., f(N - 1), expanded by the front end: arrays of vectors indexed inside stay in registers.
template <int N, typename F>
CACR_INLINE void unrolled(F&& f) {
    unrolled_impl(f, typename MakeIndices<N>::type{});
}

template <typename T>
CACR_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <typename T>
CACR_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <typename T>
CACR_INLINE Vec<T> splat(T value) {
    return value - Vec<T>{};
}

template <typename T>
CACR_INLINE Vec<T> select(IntVec<T> mask, Vec<T> yes, Vec<T> no) {
    return mask ? yes : no;
}

// Lanes 0 .. count - 1 set.
template <typename T>
CACR_INLINE IntVec<T> first_lanes(i64 count) {
    IntVec<T> lane;
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
    return lane < (IntVec<T>{} + (int)(count < kLanes<T> ? count : kLanes<T>));
}

// Lane-wise maximum. A comparison with NaN is false, so NaN in a is dropped here; the row sums bring it back.
template <typename T>
CACR_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
    return a > b ? a : b;
}

template <typename T, int Lanes>
struct Narrow {
    typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};

// combine(lower half, upper half), again and again down to one number: log2(lanes) steps, each on half the register.
template <typename T, int Lanes, typename V, typename F, int... I>
CACR_INLINE T fold(V v, F&& combine, Indices<I...>) {
    if constexpr (Lanes == 2) {
        return combine(v[0], v[1]);
    } else {
        typedef typename Narrow<T, Lanes / 2>::type Half;
        const Half lower = __builtin_shufflevector(v, v, I...);
        const Half upper = __builtin_shufflevector(v, v, (I + Lanes / 2)...);
        return fold<T, Lanes / 2>((Half)combine(lower, upper), combine, typename MakeIndices<Lanes / 4>::type{});
    }
}

template <typename T>
CACR_INLINE T sum_of(Vec<T> v) {
    return fold<T, kLanes<T>>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; },
                              typename MakeIndices<kLanes<T> / 2>::type{});
}

template <typename T>
CACR_INLINE T max_of(Vec<T> v) {
    return fold<T, kLanes<T>>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; },
                              typename MakeIndices<kLanes<T> / 2>::type{});
}

// Interleaves the lower (Upper: upper) halves of every group of Lanes lanes of a and b, Width lanes at a time.
template <int Lanes, int Width, bool Upper, typename V, int... I>
CACR_INLINE V zip(V a, V b, Indices<I...>) {
    constexpr int n = (int)sizeof...(I);
    return __builtin_shufflevector(
        a, b, (I / Width % 2 * n + I / Lanes * Lanes + Upper * Lanes / 2 + I % Lanes / (2 * Width) * Width + I % Width)...);
}

// Reduces each of v[0] .. v[kLanes - 1] to one number, number i in lane i: two shuffles and a combination a vector, where fold takes
// four of each.
template <typename T, int Count = kLanes<T>, typename F>
CACR_INLINE Vec<T> fold_all(const Vec<T>* v, F&& combine) {
    constexpr int n = kLanes<T>, half = Count / 2;
    typedef typename MakeIndices<n>::type Lane;
    Vec<T> next[half];
    unrolled<half>([&](auto i) __attribute__((always_inline)) {
        next[i] = combine(zip<n, 1, false>(v[i], v[i + half], Lane{}), zip<n, 1, true>(v[i], v[i + half], Lane{}));
    });
    if constexpr (half == 1)
        return next[0];
    else
        return fold_all<T, half>(next, combine);
}

template <typename T, int... I>
CACR_INLINE void add_lanes_impl(Vec<double>& total, Vec<T> v, Indices<I...>) {
    typedef typename Narrow<T, (int)sizeof...(I)>::type Half;
    const Half lower = __builtin_shufflevector(v, v, I...), upper = __builtin_shufflevector(v, v, (I + (int)sizeof...(I))...);
    total += __builtin_convertvector(lower, Vec<double>) + __builtin_convertvector(upper, Vec<double>);
}

// Adds all lanes of v to those of total, in double.
CACR_INLINE void add_lanes(Vec<double>& total, Vec<double> v) { total += v; }
CACR_INLINE void add_lanes(Vec<double>& total, Vec<float> v) { add_lanes_impl<float>(total, v, MakeIndices<kLanes<double>>::type{}); }

// exp(v) for v <= 0 (NaN stays NaN, below the normal range 0): 2^n times a polynomial for exp on [-ln 2 / 2, ln 2 / 2]
// (float: least relative error, 3e-9, with 1 + r kept; double: the Taylor series), n = round(v / ln 2) taken from the low
// bits of v / ln 2 + 1.5 * 2^mantissa.
CACR_INLINE Vec<float> exp_nonpositive(Vec<float> v) {
    typedef Vec<float> V;
    typedef VectorOf<float>::bits Bits;  // lanes beyond the exponents are discarded below
    const float magic = 12582912.0f;
    const V shifted = v * 1.44269504088896341f + magic;
    const V n = shifted - magic;
    V r = v - n * 0.693145751953125f;
    r = r - n * 1.42860677e-6f;
    V p = splat(1.381459879e-03f);
    p = p * r + 8.368716575e-03f;
    p = p * r + 4.166838899e-02f;
    p = p * r + 1.666652113e-01f;
    p = p * r + 4.999999404e-01f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const V scaled = p * (V)(((Bits)shifted << 23) + 0x3f800000u);
    return select<float>(v < -87.0f, V{}, scaled);
}

CACR_INLINE Vec<double> exp_nonpositive(Vec<double> v) {
    typedef Vec<double> V;
    typedef VectorOf<double>::bits Bits;  // lanes beyond the exponents are discarded below
    const double magic = 6755399441055744.0;
    const V shifted = v * 1.44269504088896340736 + magic;
    const V n = shifted - magic;
    V r = v - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10;
    V p = splat(1.0 / 6227020800.0);
    double factorial_inverse[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                  1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                  0.5,               1.0,              1.0};
    for (double f : factorial_inverse) p = p * r + f;
    const V scaled = p * (V)(((Bits)shifted << 52) + 0x3ff0000000000000ULL);
    return select<double>(v < -700.0, V{}, scaled);
}

// Natural logarithm of normal positive v (inf and NaN stay): v = 2^n m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
template <typename T>
CACR_INLINE Vec<T> log_of_normal(Vec<T> v) {
    typedef Vec<T> V;
    typedef IntVec<T> I;
    constexpr bool wide = sizeof(T) == 8;
    constexpr int mantissa_bits = wide ? 52 : 23;
    constexpr i64 sqrt_half = wide ? 0x3fe6a09e667f3bcdLL : 0x3f3504f3;
    typedef decltype(I{}[0] + 0) Scalar;
    const I n = ((I)v - (Scalar)sqrt_half) >> mantissa_bits;
    const V m = (V)((I)v - (n << mantissa_bits));
    const V s = (m - T(1)) / (m + T(1));
    const V z = s * s;
    constexpr int terms = wide ? 11 : 5;
    V series = splat(T(1) / (2 * terms + 1));
    unrolled<terms>([&](auto i) __attribute__((always_inline)) { series = series * z + T(1) / (2 * (terms - 1 - i) + 1); });
    const V exponent = __builtin_convertvector(n, V);
    const V tail = s * T(2) * series;
    const V log = exponent * T(0.693145751953125) + (tail + exponent * T(1.428606820309417e-06));
    return select<T>(v <= (wide ? T(__DBL_MAX__) : T(__FLT_MAX__)), log, v);
}

}  // namespace CACR_ISA
}  // namespace cacr
