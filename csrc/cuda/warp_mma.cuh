// Matrix products of one warp on the tensor cores (from sm_80), 16 rows at a time: operands in shared memory as they lie or
// transposed, or the accumulators of the product before. F is the type of the scores: Half or Bfloat16; warp_mma_float.cuh has
// the same of float.
//
// An operand of float32 is split into two numbers of 16 bits. bfloat16 has float32's range, and two of them keep 16 bits;
// float16 has not: every row of 16 numbers is scaled by a power of two first, and 22 bits are kept. Tensor cores truncate their
// sums: products that ask to be exact begin every 16 inner indices anew and add them in float32, rounded to nearest.
#pragma once

#include "tile_mma.cuh"

namespace cacr {

constexpr int kSide = 16;  // rows and columns of what is multiplied or left out together

CACR_DEVICE int warp_index() { return thread_index() / kWarp; }
CACR_DEVICE int lane_index() { return thread_index() % kWarp; }
// Row of elements 0 and 1 of an accumulator (2 and 3: 8 further down), column of elements 0 and 2.
CACR_DEVICE int lane_row() { return lane_index() / 4; }
CACR_DEVICE int lane_col() { return lane_index() % 4 * 2; }

// Two instructions' worth of columns: 16 x 16 of a product.
struct Accumulator {
    float v[2][4];
};

CACR_DEVICE void clear(Accumulator& acc) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[half][r] = 0.0f;
    }
}

// A 16 x 16 operand as a lane holds it: the left one, or both halves of its columns (words 0, 1 and 2, 3) of the right one.
template <typename F>
struct Fragment {
    unsigned v[4];
};

// A matrix of shared memory, without bank conflicts. 16 bits: ldmatrix reads rows of 16 bytes, of which an odd number are a row.
template <typename F>
struct Matrix {
    F* data;
    int pitch;

    CACR_DEVICE F* at(int row, int col) const { return data + row * pitch + col; }
};

CACR_HD int pitch_of(int sides) { return sides * kSide + 8; }

// Two neighbouring elements of a row; col is even.
struct alignas(8) Pair {
    float first;
    float second;
};
// What differs between the two types of 16 bits: the instruction, pairs of them in a word, and whether rows need a scale (not in
// float either).
template <typename F>
struct Words16 {
    static constexpr bool scaled = false;
};

template <>
struct Words16<Bfloat16> {
    static constexpr bool scaled = false;
    static CACR_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        multiply_add_bfloat16(d, a, b);
    }
    static CACR_DEVICE unsigned word(Pair pair) { return bfloat16_pair(pair.first, pair.second); }
    static CACR_DEVICE Pair pair(unsigned word) { return {float_of(word << 16), float_of(word & 0xffff0000u)}; }
};

template <>
struct Words16<Half> {
    static constexpr bool scaled = true;
    static CACR_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        multiply_add(d, a, b);
    }
    static CACR_DEVICE unsigned word(Pair pair) { return half_pair(pair.first, pair.second); }
    static CACR_DEVICE Pair pair(unsigned word) {
        return {float_of_half((unsigned short)(word & 0xffffu)), float_of_half((unsigned short)(word >> 16))};
    }
};

template <typename F>
CACR_DEVICE Pair pair_at(const Matrix<F>& m, int row, int col) {
    return Words16<F>::pair(*(const unsigned*)m.at(row, col));
}

// Rows of the 8 x 8 matrices top left, bottom left, top right, bottom right of a 16 x 16 one.
template <typename F>
CACR_DEVICE const F* down_first(const Matrix<F>& m, int row, int col) {
    return m.at(row + lane_index() % 16, col + lane_index() / 16 * 8);
}
// Top left, top right, bottom left, bottom right.
template <typename F>
CACR_DEVICE const F* right_first(const Matrix<F>& m, int row, int col) {
    return m.at(row + lane_index() / 16 * 8 + lane_index() % 8, col + lane_index() / 8 % 2 * 8);
}

// Left operand A[i][k] = m(row + i, col + k).
template <typename F>
CACR_DEVICE Fragment<F> left(const Matrix<F>& m, int row, int col) {
    Fragment<F> f;
    load_matrices(f.v, down_first(m, row, col));
    return f;
}
// Left operand A[i][k] = m(row + k, col + i).
template <typename F>
CACR_DEVICE Fragment<F> left_transposed(const Matrix<F>& m, int row, int col) {
    Fragment<F> f;
    load_transposed(f.v, right_first(m, row, col));
    return f;
}
// Right operand B[k][j] = m(row + k, col + j).
template <typename F>
CACR_DEVICE Fragment<F> right(const Matrix<F>& m, int row, int col) {
    Fragment<F> f;
    load_transposed(f.v, down_first(m, row, col));
    return f;
}
// Right operand B[k][j] = m(row + j, col + k).
template <typename F>
CACR_DEVICE Fragment<F> right_transposed(const Matrix<F>& m, int row, int col) {
    Fragment<F> f;
    load_matrices(f.v, right_first(m, row, col));
    return f;
}

// d += a b for one half of the columns of b.
template <typename F>
CACR_DEVICE void multiply(float (&d)[4], const Fragment<F>& a, const Fragment<F>& b, int half) {
    const unsigned columns[2] = {b.v[2 * half], b.v[2 * half + 1]};
    Words16<F>::multiply(d, a.v, columns);
}

// A pair as the sum of two words' numbers.
template <typename F>
CACR_DEVICE void split_pair(Pair pair, unsigned& high, unsigned& low) {
    high = Words16<F>::word(pair);
    const Pair rounded = Words16<F>::pair(high);
    low = Words16<F>::word({pair.first - rounded.first, pair.second - rounded.second});
}

// A left operand of float32: (high + low) times undo, which belongs to this lane's two rows.
template <typename F>
struct SplitFragment {
    Fragment<F> high;
    Fragment<F> low;
    float undo[2];
};

// Maximum over the four lanes that hold a row.
CACR_DEVICE float row_max(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}
CACR_DEVICE float row_sum(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// The accumulators of a product as the left operand of the next one.
template <typename F>
CACR_DEVICE SplitFragment<F> split(const Accumulator& acc) {
    SplitFragment<F> f;
    CACR_UNROLL
    for (int r = 0; r < 2; ++r) {
        float scale = 1.0f;
        f.undo[r] = 1.0f;
        if (Words16<F>::scaled) {
            const float largest = fmaxf(fmaxf(fabsf(acc.v[0][2 * r]), fabsf(acc.v[0][2 * r + 1])),
                                        fmaxf(fabsf(acc.v[1][2 * r]), fabsf(acc.v[1][2 * r + 1])));
            scale = scale_of(row_max(largest));
            f.undo[r] = reciprocal_of_power(scale);
        }
        CACR_UNROLL
        for (int half = 0; half < 2; ++half)
            split_pair<F>({scale * acc.v[half][2 * r], scale * acc.v[half][2 * r + 1]}, f.high.v[2 * half + r],
                          f.low.v[2 * half + r]);
    }
    return f;
}

// acc += a b, 16 inner indices. exact: in a sum of their own.
template <bool exact, typename F>
CACR_DEVICE void add_product(Accumulator& acc, const Fragment<F>& a, const Fragment<F>& b) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (!exact) {
            multiply(acc.v[half], a, b, half);
            continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply(sum, a, b, half);
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[half][r] += sum[r];
    }
}

template <bool exact, typename F>
CACR_DEVICE void add_product(Accumulator& acc, const SplitFragment<F>& a, const Fragment<F>& b) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (!exact && !Words16<F>::scaled) {
            multiply(acc.v[half], a.low, b, half);
            multiply(acc.v[half], a.high, b, half);
            continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply(sum, a.low, b, half);
        multiply(sum, a.high, b, half);
        CACR_UNROLL
        for (int r = 0; r < 4; ++r)
            acc.v[half][r] = Words16<F>::scaled ? fused(a.undo[r / 2], sum[r], acc.v[half][r]) : acc.v[half][r] + sum[r];
    }
}

// A matrix of float32 numbers in shared memory as operands of the products: of 16 bits in two parts, high + low.
template <typename F>
struct WideMatrix {
    Matrix<F> high;
    Matrix<F> low;
};
template <typename F>
CACR_DEVICE void set_pair_at(const WideMatrix<F>& m, int row, int col, Pair values) {
    split_pair<F>(values, *(unsigned*)m.high.at(row, col), *(unsigned*)m.low.at(row, col));
}
template <typename F>
struct WideFragment {
    Fragment<F> low;
    Fragment<F> high;
};

template <typename F>
CACR_DEVICE WideFragment<F> left(const WideMatrix<F>& m, int row, int col) {
    return {left(m.low, row, col), left(m.high, row, col)};
}
template <typename F>
CACR_DEVICE WideFragment<F> left_transposed(const WideMatrix<F>& m, int row, int col) {
    return {left_transposed(m.low, row, col), left_transposed(m.high, row, col)};
}
template <typename F>
CACR_DEVICE WideFragment<F> right(const WideMatrix<F>& m, int row, int col) {
    return {right(m.low, row, col), right(m.high, row, col)};
}
// acc += undo a b, where one of the factors is wide.
template <typename F>
CACR_DEVICE void add_scaled(Accumulator& acc, const Fragment<F>& a_low, const Fragment<F>& a_high, const Fragment<F>& b_low,
                            const Fragment<F>& b_high, float undo) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (!Words16<F>::scaled) {
            multiply(acc.v[half], a_low, b_low, half);
            multiply(acc.v[half], a_high, b_high, half);
            continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply(sum, a_low, b_low, half);
        multiply(sum, a_high, b_high, half);
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[half][r] = fused(undo, sum[r], acc.v[half][r]);
    }
}
template <typename F>
CACR_DEVICE void add_wide(Accumulator& acc, const WideFragment<F>& a, const Fragment<F>& b, float undo) {
    add_scaled(acc, a.low, a.high, b, b, undo);
}
template <typename F>
CACR_DEVICE void add_wide(Accumulator& acc, const Fragment<F>& a, const WideFragment<F>& b, float undo) {
    add_scaled(acc, a, a, b.low, b.high, undo);
}
}  // namespace cacr
