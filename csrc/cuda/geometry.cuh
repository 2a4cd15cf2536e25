// Where the matrices of one problem (b, h) lie: views of the four blocks, of the row numbers, of the workspace.
// Letters: side a in {text, vision}, b the other one; F = S_ab [n_a, n_b], C = S_bb [n_b, n_b], Y = S_aa [n_a, n_a];
// for kind softmax F and C are the row softmaxes P_ab and P_bb, kept in the workspace.
#pragma once

#include "element.cuh"
#include "formulas.h"
#include "workspace.cuh"

namespace cacr {

constexpr int kText = 0;
constexpr int kVision = 1;

// One problem of the batch: index = b * heads + h < 2^31, as B x H lies on the grid's axis x.
struct Place {
    int index;
    int b;
    int h;
    Extent extent;
};

CACR_DEVICE Place place_of(const Problem& problem, i64 index) {
    Place place;
    place.index = (int)index;
    place.b = (int)index / (int)problem.heads;
    place.h = (int)index % (int)problem.heads;
    place.extent = extent_of(problem.spans, place.b);
    return place;
}

CACR_DEVICE int length_of(const Extent& extent, int side) { return side == kText ? extent.n_text : extent.n_vision; }
CACR_DEVICE int start_of(const Extent& extent, int side) {
    return side == kText ? extent.text_start : extent.vision_start;
}

CACR_DEVICE bool side_counts(const Problem& problem, const Place& place, int side) {
    return place.extent.valid && side_active(problem.options, place.extent, side);
}

// Whether the four blocks of this problem get gradients from the kernels; otherwise the fill kernel writes all of it.
CACR_DEVICE bool any_side_counts(const Problem& problem, const Place& place) {
    return side_counts(problem, place, kText) || side_counts(problem, place, kVision);
}

// The row numbers of a side: float32 [kRowStats, n_a], a row of it for each number.
struct RowStats {
    float* data;
    i64 width;

    CACR_DEVICE RowStats(const Problem& problem, const Place& place, int side) {
        width = (i64)problem.spans.n_text + problem.spans.n_vision;
        data = problem.stats + (i64)place.index * kRowStats * width + (side == kText ? 0 : problem.spans.n_text);
    }
    CACR_DEVICE float& at(RowStat stat, int row) const { return data[stat * width + row]; }
};

// Element (row, col) of a block lies at `start + row * row_stride + col * col_stride` of its tensor.
struct BlockPlace {
    i64 start;
    i64 row_stride;
    i64 col_stride;

    CACR_DEVICE i64 at(int row, int col) const { return start + row * row_stride + col * col_stride; }
};

CACR_DEVICE BlockPlace block_place(const Place& place, const i64 (&stride)[4], int row_side, int col_side) {
    const i64 start = place.b * stride[0] + place.h * stride[1] + start_of(place.extent, row_side) * stride[2] +
                      start_of(place.extent, col_side) * stride[3];
    return {start, stride[2], stride[3]};
}

// Scores S[row_side, col_side] of the problem's dtype.
struct Scores {
    const void* data;
    DType dtype;
    BlockPlace where;

    CACR_DEVICE Scores(const Problem& problem, const Place& place, int row_side, int col_side) {
        const ConstTensor& tensor = problem.blocks[2 * row_side + col_side];
        data = tensor.data;
        dtype = problem.dtype;
        where = block_place(place, tensor.stride, row_side, col_side);
    }
    CACR_DEVICE const char* address(int row, int col) const {
        return (const char*)data + where.at(row, col) * size_of(dtype);
    }
    CACR_DEVICE i64 row_bytes() const { return where.row_stride * size_of(dtype); }
    CACR_DEVICE float at(int row, int col) const { return load(dtype, data, where.at(row, col)); }
};

// Gradient of S[row_side, col_side].
struct ScoresGrad {
    void* data;
    DType dtype;
    BlockPlace where;

    CACR_DEVICE ScoresGrad(const Problem& problem, const Place& place, int row_side, int col_side) {
        const MutableTensor& tensor = problem.grads[2 * row_side + col_side];
        data = tensor.data;
        dtype = problem.dtype;
        where = block_place(place, tensor.stride, row_side, col_side);
    }
    // Type S must be that of dtype.
    template <typename S>
    CACR_DEVICE S* pointer(int row, int col) const {
        return (S*)data + where.at(row, col);
    }
    CACR_DEVICE void set(int row, int col, float value) const { store(dtype, data, where.at(row, col), value); }
};

// Operand of a product: a strided matrix.
template <typename T>
struct View {
    const T* data;
    i64 row_stride;
    i64 col_stride;
    int rows;
    int cols;
};

template <typename T>
CACR_DEVICE T element_of(const View<T>&);  // only its type

// A matrix of the workspace.
CACR_DEVICE View<float> dense_view(const float* data, int leading, int rows, int cols) {
    return {data, leading, 1, rows, cols};
}

// The matrix of block [row_side, col_side] that enters the products; F is the problem's type, float for kind softmax.
template <typename F>
CACR_DEVICE View<F> factor_view(const Problem& problem, const Place& place, const Workspace& workspace, int row_side,
                                int col_side) {
    const int rows = length_of(place.extent, row_side);
    const int cols = length_of(place.extent, col_side);
    if (problem.options.kind == Kind::softmax)
        return {(const F*)workspace.prob(row_side, col_side), workspace.columns(col_side), 1, rows, cols};
    const ConstTensor& tensor = problem.blocks[2 * row_side + col_side];
    const BlockPlace where = block_place(place, tensor.stride, row_side, col_side);
    return {(const F*)tensor.data + where.start, where.row_stride, where.col_stride, rows, cols};
}

}  // namespace cacr
