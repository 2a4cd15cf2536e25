// What both ways to multiply (tile_ffma.cuh, tile_mma.cuh) share: 64 x 64 tiles of A B^T, accumulated in float32 by a block
// of 128 threads, operands that are read as they lie or transposed, and finished tiles that pass through shared memory.
//
// A way to multiply has the types Slices, Accumulator and RowScales, the functions clear, product, put_chunk, store_tile,
// and as members what tells a product how large its float32 operands are.
#pragma once

#include "geometry.cuh"

namespace cacr {

constexpr int kDepth = 16;  // inner indices of a slice of the operands
constexpr int kFetchEach = kTile * kDepth / kThreads;
constexpr int kGroup = 16;  // rows of the tile that belong to one warp; columns that are multiplied or left out together
constexpr int kGroups = kTile / kGroup;
constexpr int kChunk = 32;  // columns of a tile that pass through shared memory at a time
constexpr int kChunks = kTile / kChunk;
constexpr int kChunkStep = kThreads / kChunk;  // a thread visits rows t / 32 + 0, 4, ..., 60 of column t % 32 of a chunk
static_assert(kWarpsPerBlock == kGroups, "a warp holds 16 rows of the tile");

// Tiles of the largest block of a problem, a row of tiles after the other.
CACR_HD int tiles_of_block(const SpanTable& spans) {
    const int longest = spans.n_text > spans.n_vision ? spans.n_text : spans.n_vision;
    const int across = (longest + kTile - 1) / kTile;
    return across * across;
}

// Half of a finished tile, rows padded to 33 floats: rows and columns are both read without bank conflicts.
struct Chunk {
    float v[kTile][kChunk + 1];
};

enum class Layout { plain, transposed };

// Groups of 16 columns that this warp computes of a tile of which only `rows` and `cols` lie in the matrix: none if all of
// its 16 rows lie outside.
CACR_DEVICE int groups_inside(int rows, int cols) {
    if (thread_index() / kWarp * kGroup >= rows) return 0;
    return cols < kTile ? (cols + kGroup - 1) / kGroup : kGroups;
}

}  // namespace cacr
