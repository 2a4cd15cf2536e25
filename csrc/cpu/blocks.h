// Moves blocks between tensors (any dtype, any strides) and scratch matrices (float or double, rows padded with zeros to
// whole vectors), and transposes them.
#pragma once

#include "quads.h"

namespace cacr {
namespace CACR_ISA {

CACR_INLINE float float_of_bits(unsigned bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

CACR_INLINE unsigned bits_of_float(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Storage types of 16 bits, converted without branches so that loops over them vectorise.
struct Bf16 {
    unsigned short bits;
};
struct Half {
    unsigned short bits;
};

CACR_INLINE float to_float(Bf16 v) { return float_of_bits((unsigned)v.bits << 16); }

// Exponents are moved to float's bias by a product with 2^112, which also turns subnormals right; inf and NaN are patched.
CACR_INLINE float to_float(Half v) {
    const unsigned magnitude = ((unsigned)v.bits & 0x7fffu) << 13;
    const unsigned sign = ((unsigned)v.bits & 0x8000u) << 16;
    const unsigned scaled = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    const unsigned special = 0u - (unsigned)(magnitude >= 0x0f800000u);
    return float_of_bits(sign | (special & (magnitude | 0x7f800000u)) | (~special & scaled));
}
CACR_INLINE float to_float(float v) { return v; }
CACR_INLINE double to_float(double v) { return v; }

// Rounds to nearest even.
CACR_INLINE void from_float(float value, Bf16& out) {
    const unsigned bits = bits_of_float(value);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = (unsigned short)(value == value ? rounded : 0x7fc0u);
}

CACR_INLINE void from_float(float value, Half& out) {
    const unsigned bits = bits_of_float(value);
    const unsigned sign = (bits >> 16) & 0x8000u;
    const unsigned magnitude = bits & 0x7fffffffu;
    // Normal halves: move the exponent bias and round the low 13 bits. Subnormal halves: adding 0.5 rounds at 2^-24.
    const unsigned normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    const unsigned subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    unsigned half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out.bits = (unsigned short)(sign | half);
}
CACR_INLINE void from_float(float value, float& out) { out = value; }
CACR_INLINE void from_float(double value, double& out) { out = value; }

// Rows 2 i and 2 i + 1 of out: rows i and i + n / 2 zipped over the whole vector. log2(n) such rounds transpose n rows.
template <int n, typename V>
CACR_INLINE void shuffle_round(V (&rows)[n]) {
    typedef typename MakeIndices<n>::type Lane;
    V next[n];
    unrolled<n / 2>([&](auto i) __attribute__((always_inline)) {
        next[2 * i] = zip<n, 1, false>(rows[i], rows[i + n / 2], Lane{});
        next[2 * i + 1] = zip<n, 1, true>(rows[i], rows[i + n / 2], Lane{});
    });
    unrolled<n>([&](auto i) __attribute__((always_inline)) { rows[i] = next[i]; });
}

// Transposes a square of vectors.
template <typename T>
CACR_INLINE void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
    constexpr int n = kLanes<T>;
    constexpr int rounds = n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : 1;
    if constexpr (CACR_VECTOR_BYTES == 32 && n == 8) {
        // AVX2 zips within 128 bits in one instruction and needs two across: two rounds of the 4 x 4 quarters, which are then swapped.
        typedef typename MakeIndices<n>::type Lane;
        Vec<T> next[n];
        unrolled<n>([&](auto r) __attribute__((always_inline)) {
            constexpr int i = r / 2 * 2, upper = r % 2;
            next[r] = zip<4, 1, upper>(rows[i], rows[i + 1], Lane{});
        });
        unrolled<n>([&](auto r) __attribute__((always_inline)) {
            constexpr int i = r / 4 * 4 + r % 4 / 2, upper = r % 2;
            rows[r] = zip<4, 2, upper>(next[i], next[i + 2], Lane{});
        });
        unrolled<n>([&](auto r) __attribute__((always_inline)) {
            constexpr int i = r % 4, upper = r / 4;
            next[r] = zip<8, 4, upper>(rows[i], rows[i + 4], Lane{});
        });
        unrolled<n>([&](auto r) __attribute__((always_inline)) { rows[r] = next[r]; });
    } else {
        unrolled<rounds>([&](auto) __attribute__((always_inline)) { shuffle_round(rows); });
    }
}

// out [columns, ld_out] = in^T for in [rows, ld_in]; the padding of out is finite, and zero unless Centred.
// Centred: out = (in - 1 in_0)^T, row 0 taken from every row.
template <typename T, bool Centred = false>
static void transpose(i64 rows, i64 columns, const T* in, i64 ld_in, T* out, i64 ld_out) {
    constexpr int n = kLanes<T>;
    i64 i = 0;
    // Four columns of kLanes rows: vectors of quads, each transposed. Half the shuffles of whole squares, and reads are 16 bytes.
    if constexpr (kQuads<T> > 1) {
        for (; i + n <= rows; i += n) {
            for (i64 j = 0; j < columns; j += 4) {
                Vec<T> quads[4];
                unrolled<4>([&](auto r) __attribute__((always_inline)) { quads[r] = joined(in + (i + r) * ld_in + j, 4 * ld_in); });
                transpose_quads<T>(quads);
                unrolled<4>([&](auto c) __attribute__((always_inline)) {
                    if (j + c < columns) store(out + (j + c) * ld_out + i, Centred ? quads[c] - in[j + c] : quads[c]);
                });
            }
        }
    }
    for (; i < rows; i += n) {
        for (i64 j = 0; j < columns; j += n) {
            Vec<T> square[n];
            unrolled<n>([&](auto r) __attribute__((always_inline)) {
                square[r] = i + r < rows ? load(in + (i + r) * ld_in + j) : Vec<T>{};
            });
            transpose_square<T>(square);
            unrolled<n>([&](auto r) __attribute__((always_inline)) {
                if (j + r < columns) store(out + (j + r) * ld_out + i, Centred ? square[r] - in[j + r] : square[r]);
            });
        }
    }
}

// out[0 .. count) = in: whole vectors, and one that ends with the last element. Rows are too short for a call of memcpy.
template <typename T>
CACR_INLINE void copy(T* out, const T* in, i64 count) {
    i64 j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) store(out + j, load(in + j));
    if (j < count && j > 0)
        store(out + count - kLanes<T>, load(in + count - kLanes<T>));
    else
        for (; j < count; ++j) out[j] = in[j];
}

template <typename T, typename S>
CACR_INLINE void load_row(i64 columns, const S* in, i64 step, T* out, i64 ld) {
    if (step == 1 && sizeof(S) == sizeof(T)) {
        if (columns % kLanes<T>) store(out + padded<T>(columns) - kLanes<T>, Vec<T>{});
        copy(out, (const T*)in, columns);
        for (i64 j = padded<T>(columns); j < ld; ++j) out[j] = T(0);
        return;
    }
    if (step == 1)
        for (i64 j = 0; j < columns; ++j) out[j] = to_float(in[j]);
    else
        for (i64 j = 0; j < columns; ++j) out[j] = to_float(in[j * step]);
    for (i64 j = columns; j < ld; ++j) out[j] = T(0);
}

// out [rows, ld] = the block of `tensor` whose corner is (row, column) in matrix (b, h). Column-major sources are read along
// their columns into `swap` [columns, padded(rows)] and transposed.
template <typename T, typename S>
static void load_block(const ConstTensor& tensor, i64 b, i64 h, i64 row, i64 column, i64 rows, i64 columns, T* out, T* swap) {
    const i64* s = tensor.stride;
    const S* in = (const S*)tensor.data + b * s[0] + h * s[1] + row * s[2] + column * s[3];
    const i64 ld = leading<T>(columns), ld_swap = leading<T>(rows);
    if (s[3] != 1 && s[2] == 1) {
        for (i64 j = 0; j < columns; ++j) load_row(rows, in + j * s[3], 1, swap + j * ld_swap, ld_swap);
        transpose(columns, rows, swap, ld_swap, out, ld);
    } else {
        for (i64 i = 0; i < rows; ++i) load_row(columns, in + i * s[2], s[3], out + i * ld, ld);
    }
}

// One stretch of an output row: `count` values, or zeros where `values` is null. Returns its end.
template <typename T, typename S>
CACR_INLINE S* store_stretch(S* out, const T* values, i64 count) {
    if (values && sizeof(S) == sizeof(T))
        copy((T*)out, values, count);
    else if (values)
        for (i64 j = 0; j < count; ++j) from_float(values[j], out[j]);
    else if (count > 0)
        __builtin_memset(out, 0, (size_t)count * sizeof(S));
    return out + count;
}

}  // namespace CACR_ISA
}  // namespace cacr
