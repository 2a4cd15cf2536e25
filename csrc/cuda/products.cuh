// How a kernel multiplies: on tensor cores if its scores are float16 and the architecture has them, else in float32.
#pragma once

#include "tile_ffma.cuh"
#include "tile_mma.cuh"

namespace cacr {

template <typename F>
struct TensorTile {
    using Type = FfmaTile;
};
template <>
struct TensorTile<Half> {
    using Type = MmaTile;
};

// What a kernel is compiled for: the machine at hand, whose architecture only its body may ask for. Emulated, a test chooses.
struct TensorCores {
    template <typename F>
    using Tile = typename TensorTile<F>::Type;
};
struct NoTensorCores {
    template <typename F>
    using Tile = FfmaTile;
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
struct Machine : TensorCores {};
#else
struct Machine : NoTensorCores {};
#endif

#if defined(__CUDACC__)
#define CACR_KERNEL_FOR(kernel, F) kernel<F>
#else
#define CACR_KERNEL_FOR(kernel, F) (emulation::tensor_cores() ? kernel<F, TensorCores> : kernel<F, NoTensorCores>)
#endif

// Rows [row_start, row_start + 64) of U = F C [n_a, n_b] into `u`, and their scales; the caller's next barrier makes both
// visible to the block. Returns the largest magnitude that this thread met.
template <typename Tile, typename F>
CACR_DEVICE float project_rows(const View<F>& f, const View<F>& c, int row_start, float* u, int leading,
                               typename Tile::Slices& slices, typename Tile::RowScales& scales) {
    float largest[2] = {0.0f, 0.0f};
    for (int col_start = 0; col_start < f.cols; col_start += kTile) {
        typename Tile::Accumulator acc;
        clear(acc);
        product<Layout::plain, Layout::transposed>(f, c, row_start, col_start, f.cols, slices, acc);
        store_tile(u, leading, row_start, col_start, f.rows, f.cols, acc);
        Tile::follow_rows(largest, acc);
    }
    Tile::set_row_scales(scales, largest);
    return fmaxf(largest[0], largest[1]);
}

}  // namespace cacr
