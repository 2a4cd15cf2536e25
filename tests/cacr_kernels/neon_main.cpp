// Runs the CPU kernels of another architecture under an emulator: problems from standard input, results to standard output.
// Input: int32 variant (0 scores, 1 q/k), kind, heads, n, n_text, dim; then float32 attn [heads, n, n], or q and k
// [heads, n, dim]. Output: float32 losses [heads], then the gradients in the inputs' shapes.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

using namespace cacr;

static void read(void* data, size_t bytes) {
    if (std::fread(data, 1, bytes, stdin) != bytes) std::abort();
}

int main() {
    int header[6];
    read(header, sizeof header);
    const i64 heads = header[2], n = header[3], n_text = header[4], dim = header[5];
    const Options options = {(Kind)header[1], Sides::both, StopGradient::none, 1.0, 0, 0};
    const SpanTable spans = {nullptr, 0, (int)n_text, (int)n_text, (int)(n - n_text), (int)n, (int)n, 1};
    const i64 elements = heads * n * (header[0] ? dim : n);
    std::vector<float> in[2], out[2], loss(heads);
    for (int i = 0; i < 1 + header[0]; ++i) {
        in[i].resize(elements);
        out[i].resize(elements);
        read(in[i].data(), elements * sizeof(float));
    }
    auto scratch = [](i64 bytes) { return (char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64); };
    if (header[0]) {
        QkProblem p = {};
        p.dtype = DType::f32, p.options = options, p.spans = spans;
        p.batch = 1, p.heads = heads, p.key_heads = heads, p.n = (int)n, p.dim = (int)dim, p.scale = 1.0, p.threads = 1;
        p.q = {in[0].data(), {elements, n * dim, dim, 1}}, p.grad_q = {out[0].data(), {elements, n * dim, dim, 1}};
        p.has_grads = 1;
        p.k = {in[1].data(), {elements, n * dim, dim, 1}}, p.grad_k = {out[1].data(), {elements, n * dim, dim, 1}};
        p.loss = loss.data();
        char* memory = scratch(kBaseKernels.qk_scratch(p));
        for (i64 i = 0; i < heads; ++i) kBaseKernels.qk(p, i, -1, memory);
        std::free(memory);
    } else {
        Problem p = {};
        p.dtype = DType::f32, p.options = options, p.spans = spans;
        p.batch = 1, p.heads = heads, p.single = 1, p.threads = 1, p.device = -1, p.has_grads = 1, p.loss = loss.data();
        for (int ab = 0; ab < 4; ++ab) {
            p.blocks[ab] = {in[0].data(), {elements, n * n, n, 1}};
            p.grads[ab] = {out[0].data(), {elements, n * n, n, 1}};
        }
        char* memory = scratch(kBaseKernels.scores_scratch(p));
        for (i64 i = 0; i < heads; ++i) kBaseKernels.scores(p, i, -1, memory);
        std::free(memory);
    }
    std::fwrite(loss.data(), sizeof(float), heads, stdout);
    for (const std::vector<float>& gradient : out) std::fwrite(gradient.data(), sizeof(float), gradient.size(), stdout);
    return 0;
}
