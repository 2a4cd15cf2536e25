// warp_mma.cuh for scores of float: every operand is split into two numbers of tf32, 11 bits each, and low times low is left out:
// three instructions for eight inner indices. All products begin every 16 inner indices anew (tensor cores truncate their sums).
// Of a lane, g = lane / 4 and p = lane % 4.
#pragma once

#include "warp_mma.cuh"

namespace cacr {

// Inner index 8 s + 2 p + e is index p + 4 e of instruction s, so that accumulators are a left operand as they are. The left
// operand: v[s] as the instruction has it; the right one: v[half], element 2 s + e.
template <>
struct Fragment<float> {
    float v[2][4];
};

// Lanes read pairs at rows g and columns 2 p, or single elements at rows 2 p and columns g. An odd number of eights a row
// serves the pairs; single elements of lanes p and p + 2 would meet in a bank, if rows 4 to 7 of every eight had not the halves
// of every 16 columns exchanged.
template <>
struct Matrix<float> {
    float* data;
    int pitch;

    CACR_DEVICE float* at(int row, int col) const { return data + row * pitch + (col ^ (row & 4) * 2); }
    // Offsets, from rows that are multiples of 8 and columns that are multiples of 16, of a lane's pair at (g, 2 p + 8 right)
    // and of its element at (2 p + down, g + 8 right).
    CACR_DEVICE int pair_of_lane(int right) const;
    CACR_DEVICE int element_of_lane(int down, int right) const;
};

CACR_DEVICE Pair pair_at(const Matrix<float>& m, int row, int col) { return *(const Pair*)m.at(row, col); }
CACR_DEVICE void set_pair_at(const Matrix<float>& m, int row, int col, Pair values) { *(Pair*)m.at(row, col) = values; }

CACR_DEVICE int Matrix<float>::pair_of_lane(int right) const {
    const int first = lane_row() * pitch + lane_col();
    const int moved = (lane_row() & 4) * 2;
    return first + (right ? 8 - moved : moved);
}
CACR_DEVICE int Matrix<float>::element_of_lane(int down, int right) const {
    const int first = lane_col() * pitch + lane_row();
    const int moved = (lane_col() & 4) * 2;
    return first + (right ? 8 - moved : moved) + down * pitch;
}

CACR_DEVICE Fragment<float> left(const Matrix<float>& m, int row, int col) {
    Fragment<float> f;
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        CACR_UNROLL
        for (int down = 0; down < 2; ++down) {
            const Pair pair = *(const Pair*)(m.data + (row + 8 * down) * m.pitch + col + m.pair_of_lane(s));
            f.v[s][down] = pair.first;
            f.v[s][down + 2] = pair.second;
        }
    }
    return f;
}
CACR_DEVICE Fragment<float> right_transposed(const Matrix<float>& m, int row, int col) {
    Fragment<float> f;
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        CACR_UNROLL
        for (int s = 0; s < 2; ++s) {
            const Pair pair = *(const Pair*)(m.data + (row + 8 * half) * m.pitch + col + m.pair_of_lane(s));
            f.v[half][2 * s] = pair.first;
            f.v[half][2 * s + 1] = pair.second;
        }
    }
    return f;
}
CACR_DEVICE Fragment<float> left_transposed(const Matrix<float>& m, int row, int col) {
    Fragment<float> f;
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        CACR_UNROLL
        for (int i = 0; i < 4; ++i) f.v[s][i] = m.data[(row + 8 * s) * m.pitch + col + m.element_of_lane(i / 2, i % 2)];
    }
    return f;
}
CACR_DEVICE Fragment<float> right(const Matrix<float>& m, int row, int col) {
    Fragment<float> f;
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        CACR_UNROLL
        for (int i = 0; i < 4; ++i)
            f.v[half][i] = m.data[(row + i / 2 * 8) * m.pitch + col + m.element_of_lane(i % 2, half)];
    }
    return f;
}

template <>
struct SplitFragment<float> {
    Fragment<float> high;
    Fragment<float> low;
};

// bits + 0x1000: the first 19 bits rounded to nearest, ties away from zero. A card's NaN, 0x7fffffff, would become -0.
CACR_DEVICE float rounded_tf32(float value) { return float_of((bits_of(value) + 0x1000u) & 0xffffe000u); }

// value = high + low in tf32, both rounded. NaN stays.
CACR_DEVICE SplitFragment<float> split(const Fragment<float>& a) {
    SplitFragment<float> f;
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        CACR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float value = a.v[s][i];
            const float high = rounded_tf32(value);
            f.high.v[s][i] = high;
            f.low.v[s][i] = value == value ? rounded_tf32(value - high) : value;
        }
    }
    return f;
}

// The same of a right operand, for fewer instructions. exact: NaN may get lost; otherwise the instruction cuts low off.
template <bool exact>
CACR_DEVICE SplitFragment<float> split_right(const Fragment<float>& b) {
    SplitFragment<float> f;
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        CACR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float value = b.v[half][i];
            const float high = rounded_tf32(value);
            f.high.v[half][i] = high;
            f.low.v[half][i] = exact ? rounded_tf32(value - high) : value - high;
        }
    }
    return f;
}

template <>
CACR_DEVICE SplitFragment<float> split<float>(const Accumulator& acc) {
    Fragment<float> a;
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        CACR_UNROLL
        for (int i = 0; i < 4; ++i) a.v[s][i] = acc.v[s][i % 2 * 2 + i / 2];
    }
    return split(a);
}

// Sums of float are always their own.
template <bool exact>
CACR_DEVICE void add_product(Accumulator& acc, const SplitFragment<float>& a, const Fragment<float>& b) {
    const SplitFragment<float> parts = split_right<exact>(b);
    float sum[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    CACR_UNROLL
    for (int s = 0; s < 2; ++s) {
        CACR_UNROLL
        for (int part = 0; part < 3; ++part) {  // low high, high low, high high
            CACR_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float(&from)[4] = part == 1 ? parts.low.v[half] : parts.high.v[half];
                const float columns[2] = {from[2 * s], from[2 * s + 1]};
                multiply_add_tf32(sum[half], part == 0 ? a.low.v[s] : a.high.v[s], columns);
            }
        }
    }
    CACR_UNROLL
    for (int half = 0; half < 2; ++half) {
        CACR_UNROLL
        for (int r = 0; r < 4; ++r) acc.v[half][r] += sum[half][r];
    }
}

template <bool exact>
CACR_DEVICE void add_product(Accumulator& acc, const Fragment<float>& a, const Fragment<float>& b) {
    add_product<exact>(acc, split(a), b);
}

template <>
struct WideMatrix<float> {
    Matrix<float> high;  // all of it
};

CACR_DEVICE void set_pair_at(const WideMatrix<float>& m, int row, int col, Pair values) {
    set_pair_at(m.high, row, col, values);
}

CACR_DEVICE Fragment<float> left(const WideMatrix<float>& m, int row, int col) { return left(m.high, row, col); }
CACR_DEVICE Fragment<float> left_transposed(const WideMatrix<float>& m, int row, int col) {
    return left_transposed(m.high, row, col);
}
CACR_DEVICE Fragment<float> right(const WideMatrix<float>& m, int row, int col) { return right(m.high, row, col); }

CACR_DEVICE void add_wide(Accumulator& acc, const Fragment<float>& a, const Fragment<float>& b, float) {
    add_product<false>(acc, a, b);
}

}  // namespace cacr
