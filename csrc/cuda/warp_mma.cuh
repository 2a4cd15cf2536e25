// Matrix products of one warp on the tensor cores (from sm_80), 16 rows at a time: operands of 16 bits in shared memory as they
// lie or transposed, or the accumulators of the product before, split into two numbers of 16 bits each.
//
// bfloat16 has float32's range; a float32 keeps 16 bits in two of them. float16 has not: every row of 16 numbers is scaled by
// a power of two first, and 22 bits are kept. Tensor cores truncate their sums: products that ask to be exact begin every 16
// inner indices anew and add them in float32, rounded to nearest.
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

// A 16 x 16 operand as a lane holds it: the left one, or both halves (words 0, 1 and 2, 3) of the right one.
struct Fragment {
    unsigned v[4];
};

// A matrix of shared memory. An odd number of 16-byte units a row keeps ldmatrix free of bank conflicts.
struct Matrix {
    unsigned short* data;
    int pitch;

    CACR_DEVICE unsigned short* at(int row, int col) const { return data + row * pitch + col; }
};

// Rows of the 8 x 8 matrices top left, bottom left, top right, bottom right of a 16 x 16 one.
CACR_DEVICE const unsigned short* down_first(const Matrix& m, int row, int col) {
    return m.at(row + lane_index() % 16, col + lane_index() / 16 * 8);
}
// Top left, top right, bottom left, bottom right.
CACR_DEVICE const unsigned short* right_first(const Matrix& m, int row, int col) {
    return m.at(row + lane_index() / 16 * 8 + lane_index() % 8, col + lane_index() / 8 % 2 * 8);
}

// Left operand A[i][k] = m(row + i, col + k).
CACR_DEVICE Fragment left(const Matrix& m, int row, int col) {
    Fragment f;
    load_matrices(f.v, down_first(m, row, col));
    return f;
}
// Left operand A[i][k] = m(row + k, col + i).
CACR_DEVICE Fragment left_transposed(const Matrix& m, int row, int col) {
    Fragment f;
    load_transposed(f.v, right_first(m, row, col));
    return f;
}
// Right operand B[k][j] = m(row + k, col + j).
CACR_DEVICE Fragment right(const Matrix& m, int row, int col) {
    Fragment f;
    load_transposed(f.v, down_first(m, row, col));
    return f;
}
// Right operand B[k][j] = m(row + j, col + k).
CACR_DEVICE Fragment right_transposed(const Matrix& m, int row, int col) {
    Fragment f;
    load_matrices(f.v, right_first(m, row, col));
    return f;
}

// What differs between the two types of 16 bits: the instruction, pairs of them in a word, and whether rows need a scale.
template <typename F>
struct Words16;

template <>
struct Words16<Bfloat16> {
    static constexpr bool scaled = false;
    static CACR_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        multiply_add_bfloat16(d, a, b);
    }
    static CACR_DEVICE unsigned pair(float first, float second) { return bfloat16_pair(first, second); }
    static CACR_DEVICE float first(unsigned word) { return float_of(word << 16); }
    static CACR_DEVICE float second(unsigned word) { return float_of(word & 0xffff0000u); }
};

template <>
struct Words16<Half> {
    static constexpr bool scaled = true;
    static CACR_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        multiply_add(d, a, b);
    }
    static CACR_DEVICE unsigned pair(float first, float second) { return half_pair(first, second); }
    static CACR_DEVICE float first(unsigned word) { return float_of_half((unsigned short)(word & 0xffffu)); }
    static CACR_DEVICE float second(unsigned word) { return float_of_half((unsigned short)(word >> 16)); }
};

// d += a b for one half of the columns of b.
template <typename F>
CACR_DEVICE void multiply(float (&d)[4], const Fragment& a, const Fragment& b, int half) {
    const unsigned columns[2] = {b.v[2 * half], b.v[2 * half + 1]};
    Words16<F>::multiply(d, a.v, columns);
}

// Two floats as the sum of two words' numbers.
template <typename F>
CACR_DEVICE void split_pair(float first, float second, unsigned& high, unsigned& low) {
    high = Words16<F>::pair(first, second);
    low = Words16<F>::pair(first - Words16<F>::first(high), second - Words16<F>::second(high));
}

// A left operand of float32: (high + low) times undo, which belongs to this lane's two rows.
struct SplitFragment {
    Fragment high;
    Fragment low;
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
CACR_DEVICE SplitFragment split(const Accumulator& acc) {
    SplitFragment f;
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
            split_pair<F>(scale * acc.v[half][2 * r], scale * acc.v[half][2 * r + 1], f.high.v[2 * half + r],
                          f.low.v[2 * half + r]);
    }
    return f;
}

// acc += a b, 16 inner indices. exact: in a sum of their own.
template <typename F, bool exact>
CACR_DEVICE void add_product(Accumulator& acc, const Fragment& a, const Fragment& b) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (!exact) {
            multiply<F>(acc.v[half], a, b, half);
            continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply<F>(sum, a, b, half);
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[half][r] += sum[r];
    }
}

template <typename F, bool exact>
CACR_DEVICE void add_product(Accumulator& acc, const SplitFragment& a, const Fragment& b) {
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (!exact && !Words16<F>::scaled) {
            multiply<F>(acc.v[half], a.low, b, half);
            multiply<F>(acc.v[half], a.high, b, half);
            continue;
        }
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply<F>(sum, a.low, b, half);
        multiply<F>(sum, a.high, b, half);
        CACR_UNROLL
        for (int r = 0; r < 4; ++r)
            acc.v[half][r] = Words16<F>::scaled ? fused(a.undo[r / 2], sum[r], acc.v[half][r]) : acc.v[half][r] + sum[r];
    }
}

}  // namespace cacr
