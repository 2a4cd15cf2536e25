// Entry points of the CPU backend: choose the instruction set, share problems out among OpenMP threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace cacr {

// Names of the instruction sets this build holds and this machine runs, narrowest first.
std::vector<std::string> cpu_instruction_sets();

// Kernels for `name`; an empty name means the widest this machine runs. Throws std::invalid_argument otherwise.
const Kernels& cpu_kernels(const std::string& name);

bool cpu_has_openmp();

// Loss and/or gradients of every problem, on problem.threads threads (see Kernels::scores).
void cacr_scores_cpu(const Problem& problem, const Kernels& kernels);

// The same from q and k; work is shared out by key head.
void cacr_qk_cpu(const QkProblem& problem, const Kernels& kernels);

// A gradient kept from the forward pass, for another grad_loss than the one expected there.
struct Scaling {
    DType dtype;         // f32 or f64, of everything here
    i64 batch, heads;
    i64 elements;        // of one problem; source and target are contiguous [B, H, elements]
    const void* source;  // gradient for grad_loss = expected_grad
    void* target;        // may be the source
    const void* grad_loss;
    i64 grad_loss_stride[2];
    double expected_grad;
    int threads;
};
// Returns how many problems were written.
i64 cacr_scale_cpu(const Scaling& scaling);

// What `threads` threads do of a kernel's multiply_adds or exponentials in a second: the arithmetic roofs of these kernels.
double cpu_rate(double (*work)(i64 rounds, float* sink), int threads, double seconds);

}  // namespace cacr
