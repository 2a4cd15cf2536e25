// The table of CPU kernels that each instruction set provides. One problem at a time, serial: the caller shares problems out
// among threads, so results do not depend on the number of threads.
#pragma once

#include "../include/problem.h"

namespace cacr {

struct Kernels {
    const char* name;
    // Bytes of scratch that one thread needs, 64-byte aligned.
    i64 (*scores_scratch)(const Problem&);
    // Problem number index = b * heads + h: its loss if problem.loss is set, its gradient times grad_loss (1 where null) if
    // problem.has_grads. next: the problem this thread will work on afterwards, whose input is fetched; -1 if none.
    void (*scores)(const Problem&, i64 index, i64 next, char* scratch);
    // The same for q and k; one call works on a key head and all its query heads, index = b * key_heads + key head.
    i64 (*qk_scratch)(const QkProblem&);
    void (*qk)(const QkProblem&, i64 index, i64 next, char* scratch);
    // For measuring this machine's rates in L1: all multiply-adds of `rounds` register tiles, and `rounds` times the exponentials of
    // some numbers. They return how many there were.
    double (*multiply_adds)(i64 rounds, float* sink);
    double (*exponentials)(i64 rounds, float* sink);
};

extern const Kernels kBaseKernels;  // SSE2, NEON or whatever the compiler makes of 16-byte vectors
#if defined(CACR_WITH_AVX)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace cacr
