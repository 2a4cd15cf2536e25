// The part of the gradients that no other kernel writes: exactly 0 outside the spans and where no side counts, NaN over
// the whole of an invalid example.
#pragma once

#include "tile.cuh"

namespace cacr {

constexpr int kFillRows = 16;

// Whether a position of an axis lies in a span; `axis` is the modality of the axis, both for one attention tensor.
CACR_DEVICE bool in_span(const Problem& problem, const Extent& extent, int axis, int position) {
    for (int side = kText; side <= kVision; ++side) {
        const int start = start_of(extent, side);
        if ((problem.single || axis == side) && position >= start && position < start + length_of(extent, side))
            return true;
    }
    return false;
}

// Grid: all problems x ceil(rows / 16) x (1 attention tensor | 4 blocks); one warp a row.
CACR_KERNEL(kThreads, 1) cacr_fill_kernel(Problem problem) {
    const Place place = place_of(problem, block_x());
    const bool written = any_side_counts(problem, place);
    const float value = place.extent.valid ? 0.0f : not_a_number();
    const int row_side = block_z() / 2;
    const int col_side = block_z() % 2;
    const MutableTensor& grad = problem.grads[block_z()];
    const int rows = row_side == kText ? problem.spans.limit_text : problem.spans.limit_vision;
    const int cols = col_side == kText ? problem.spans.limit_text : problem.spans.limit_vision;
    const i64 start = place.b * grad.stride[0] + place.h * grad.stride[1];
    const int row_end = (block_y() + 1) * kFillRows < rows ? (block_y() + 1) * kFillRows : rows;
    for (int row = block_y() * kFillRows + thread_index() / kWarp; row < row_end; row += kWarpsPerBlock) {
        const bool row_written = written && in_span(problem, place.extent, row_side, row);
        for (int col = thread_index() % kWarp; col < cols; col += kWarp) {
            if (row_written && in_span(problem, place.extent, col_side, col)) continue;
            store(problem.dtype, grad.data, start + row * grad.stride[2] + col * grad.stride[3], value);
        }
    }
}

}  // namespace cacr
