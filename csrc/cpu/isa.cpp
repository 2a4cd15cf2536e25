// Compiled once per instruction set with -DCACR_ISA=<name> -DCACR_TABLE=<table> -DCACR_VECTOR_BYTES and
// -DCACR_REGISTERS. Nothing here may have external linkage outside namespace CACR_ISA (see problem.h, CACR_HD).
#include "kernels.h"
#include "qk.h"
#include "scores.h"

#define CACR_STRING_OF(x) #x
#define CACR_STRING(x) CACR_STRING_OF(x)

namespace cacr {
namespace CACR_ISA {

static i64 scores_scratch(const Problem& p) {
    return p.dtype == DType::f64
               ? lay_out<double>(nullptr, p.spans.n_text, p.spans.n_vision, p.options.kind, p.has_grads).bytes
               : lay_out<float>(nullptr, p.spans.n_text, p.spans.n_vision, p.options.kind, p.has_grads).bytes;
}

static void scores(const Problem& p, i64 index, i64 next, char* scratch) {
    switch (p.dtype) {
        case DType::f64: return scores_problem<double, double>(p, index, next, scratch);
        case DType::f32: return scores_problem<float, float>(p, index, next, scratch);
        case DType::bf16: return scores_problem<float, Bf16>(p, index, next, scratch);
        case DType::f16: return scores_problem<float, Half>(p, index, next, scratch);
    }
}

static i64 qk_scratch(const QkProblem& p) {
    return p.dtype == DType::f64 ? lay_out_qk<double>(nullptr, p, p.spans.n_text, p.spans.n_vision).bytes
                                 : lay_out_qk<float>(nullptr, p, p.spans.n_text, p.spans.n_vision).bytes;
}

static void qk(const QkProblem& p, i64 index, i64, char* scratch) {
    switch (p.dtype) {
        case DType::f64: return qk_problem<double, double>(p, index, scratch);
        case DType::f32: return qk_problem<float, float>(p, index, scratch);
        case DType::bf16: return qk_problem<float, Bf16>(p, index, scratch);
        case DType::f16: return qk_problem<float, Half>(p, index, scratch);
    }
}

static double multiply_adds(i64 rounds, float* sink) {
    constexpr int rows = rows_for(kMaxVectors), width = kMaxVectors * kLanes<float>, depth = 64;
    alignas(64) float left[rows * depth], right[depth * width], out[rows * width];
    for (int i = 0; i < rows * depth; ++i) left[i] = 1e-3f * (float)(i % 7);
    for (int i = 0; i < depth * width; ++i) right[i] = 1e-3f * (float)(i % 5);
    for (int i = 0; i < rows * width; ++i) out[i] = 0.0f;
    for (i64 r = 0; r < rounds; ++r) {
        tile<float, rows, kMaxVectors>(depth, {left, depth, 1}, right, width, out, width, true);
        asm volatile("" : : "r"(out) : "memory");  // every element is wanted
    }
    *sink = out[0];
    return (double)rounds * rows * width * depth;
}

static double exponentials(i64 rounds, float* sink) {
    constexpr int count = 64 * kLanes<float>;
    alignas(64) float in[count], out[count];
    for (int i = 0; i < count; ++i) in[i] = -1e-2f * (float)i;
    for (i64 r = 0; r < rounds; ++r) {
        for (int i = 0; i < count; i += kLanes<float>) store(out + i, exp_nonpositive(load(in + i)));
        asm volatile("" : : "r"(out), "r"(in) : "memory");
    }
    *sink = out[0];
    return (double)rounds * count;
}

}  // namespace CACR_ISA

extern const Kernels CACR_TABLE;
const Kernels CACR_TABLE = {CACR_STRING(CACR_ISA), CACR_ISA::scores_scratch, CACR_ISA::scores,
                            CACR_ISA::qk_scratch,       CACR_ISA::qk,            CACR_ISA::multiply_adds,
                            CACR_ISA::exponentials};

}  // namespace cacr
