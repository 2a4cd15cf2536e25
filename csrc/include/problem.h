// The plain-data problem that Python hands to the native kernels: pointers, strides, sizes, options.
// No torch, no STL: this header is read by the host compiler, nvcc and NVRTC.
#pragma once

#if defined(__CUDACC__)
#define CACR_HD __host__ __device__ __forceinline__
#else
// Internal linkage and forced inlining: the CPU kernels are compiled once per instruction set, and a shared
// out-of-line copy would let the linker pick the one with instructions this machine does not have.
#define CACR_HD static inline __attribute__((always_inline))
#endif

namespace cacr {

using i64 = long long;

enum class DType : int { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };
enum class Kind : int { scores = 0, softmax = 1, probs = 2 };
enum class Sides : int { both = 0, text = 1, vision = 2 };
enum class StopGradient : int { none = 0, target = 1, projection = 2 };

// Index of a block in Problem::blocks and Problem::grads: [row modality][column modality].
enum BlockIndex : int { TT = 0, TV = 1, VT = 2, VV = 3 };

// Floats kept per row in Problem::stats, which is [B, H, kRowStats, n_text + n_vision] float32, text rows first.
enum RowStat : int {
    kMaxX = 0,      // m_x = max_j x_j
    kSumX = 1,      // l_x = sum_j exp(x_j - m_x)
    kMaxY = 2,      // m_y
    kSumY = 3,      // l_y
    kMeanP = 4,     // E_p[d], d = (x - m_x) - (y - m_y)
    kMeanQ = 5,     // E_q[d]
    kMaxCross = 6,  // row max of S_ab (kind softmax)
    kSumCross = 7,  // row sum of exp(S_ab - max) (kind softmax)
    kRowStats = 8
};

// Which matrices enter the product, which sides count, how the result is scaled.
struct Options {
    Kind kind;
    Sides sides;
    StopGradient stop_gradient;
    double projection_scale;  // X is multiplied by it ...
    int projection_mean;      // ... and by 1 / n_b^2 if set
    int row_mean;             // a side's loss is divided by its n_a if set
};

// Where the two modalities lie. Element (i, j) of block ab is at row start_a + i, column start_b + j of its tensor.
struct SpanTable {
    const int* table;   // null, or int32 [B, 4] contiguous: text_start, n_text, vision_start, n_vision
    int text_start;     // used when table is null
    int vision_start;   // used when table is null
    int n_text;         // exact when table is null, otherwise an upper bound that sizes launches and stats
    int n_vision;       // same
    int limit_text;     // size of the text axis of the tensors (N for one attention tensor, T for blocks)
    int limit_vision;   // size of the vision axis (N, or R)
    int disjoint;       // overlapping spans make an example invalid (one attention tensor, or q and k)
};

// A [B, H, rows, columns] tensor, strides in elements, any value including 0.
struct ConstTensor {
    const void* data;
    i64 stride[4];
};

struct MutableTensor {
    void* data;
    i64 stride[4];
};

// One call of the scores kernels. The loss of problem (b, h) is L_text + L_vision (paper, Eq. 6).
struct Problem {
    DType dtype;  // of blocks and grads; loss, grad_loss: float64 for f64, otherwise float32
    Options options;
    SpanTable spans;
    i64 batch;
    i64 heads;
    ConstTensor blocks[4];    // indexed by BlockIndex; one attention tensor: the same pointer four times
    MutableTensor grads[4];   // contiguous [B, H, limit_a, limit_b]; may be uninitialised: the kernel writes every
                              // element, 0 outside the spans and NaN throughout for an invalid example.
                              // One attention tensor: the same pointer four times, one [N, N] matrix per problem.
    int single;               // blocks are views of one attention tensor
    int has_grads;            // gradients are wanted (an empty tensor's pointer is null, so the pointers do not say)
    void* loss;               // [B, H] contiguous; NaN for an invalid example
    const void* grad_loss;    // [B, H] with grad_loss_stride
    i64 grad_loss_stride[2];
    float* stats;             // [B, H, kRowStats, spans.n_text + spans.n_vision] or null (cpu: always null)
    void* workspace;          // workspace_bytes of device memory (cuda); null on cpu
    i64 workspace_bytes;
    void* stream;             // cudaStream_t; null on cpu
    int device;               // CUDA ordinal; -1 on cpu
    int threads;              // OpenMP threads (cpu)
};

// One call of the q/k kernels: S = scale q k^T per head, head h uses key head h / (heads / key_heads).
struct QkProblem {
    DType dtype;
    Options options;          // kinds scores and softmax
    SpanTable spans;          // limits: N
    i64 batch;
    i64 heads;
    i64 key_heads;
    int n;                    // sequence length
    int dim;                  // D
    double scale;
    ConstTensor q;            // [B, H, N, D]
    ConstTensor k;            // [B, Hk, N, D]
    MutableTensor grad_q;     // contiguous, every element is written
    MutableTensor grad_k;     // contiguous, every element is written
    int has_grads;            // gradients are wanted
    void* loss;               // [B, H] contiguous
    const void* grad_loss;    // [B, H] with grad_loss_stride
    i64 grad_loss_stride[2];
    int threads;
};

// The spans of one example, after validation.
struct Extent {
    int text_start;
    int n_text;
    int vision_start;
    int n_vision;
    int valid;  // 0: loss and whole gradient are NaN, nothing may be read
};

// Spans of example b and whether they lie inside the tensors (arithmetic in 64 bits: the table may hold anything).
CACR_HD Extent extent_of(const SpanTable& spans, i64 b) {
    Extent e;
    if (spans.table) {
        const int* row = spans.table + 4 * b;
        e.text_start = row[0];
        e.n_text = row[1];
        e.vision_start = row[2];
        e.n_vision = row[3];
    } else {
        e.text_start = spans.text_start;
        e.n_text = spans.n_text;
        e.vision_start = spans.vision_start;
        e.n_vision = spans.n_vision;
    }
    const i64 text_end = (i64)e.text_start + e.n_text;
    const i64 vision_end = (i64)e.vision_start + e.n_vision;
    e.valid = e.text_start >= 0 && e.vision_start >= 0 && e.n_text >= 0 && e.n_vision >= 0 && e.n_text <= spans.n_text &&
              e.n_vision <= spans.n_vision && text_end <= spans.limit_text && vision_end <= spans.limit_vision;
    if (spans.disjoint && e.n_text > 0 && e.n_vision > 0 && e.text_start < vision_end && e.vision_start < text_end)
        e.valid = 0;
    return e;
}

}  // namespace cacr
