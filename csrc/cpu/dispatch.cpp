#include "dispatch.h"

#include <cmath>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace cacr {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool runs;
};

std::vector<Candidate> candidates() {
    std::vector<Candidate> list{{&kBaseKernels, true}};
#if defined(CACR_WITH_AVX)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    list.push_back({&kAvx2Kernels, avx2});
    list.push_back({&kAvx512Kernels, avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
    return list;
}

template <typename T>
i64 scale(const Scaling& s) {
    const i64 count = s.batch * s.heads;
    const bool in_place = s.source == s.target;
    auto factor = [&](i64 index) {
        const i64 b = index / s.heads, h = index % s.heads;
        return ((const T*)s.grad_loss)[b * s.grad_loss_stride[0] + h * s.grad_loss_stride[1]] / (T)s.expected_grad;
    };
    i64 first = 0;
    while (in_place && first < count && factor(first) == T(1)) ++first;  // mostly all of them: no threads are woken
    if (first == count) return 0;
    i64 scaled = 0;
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1) schedule(static) reduction(+ : scaled)
    for (i64 index = first; index < count; ++index) {
        const T* source = (const T*)s.source + index * s.elements;
        T* target = (T*)s.target + index * s.elements;
        const T f = factor(index);
        if (in_place && f == T(1)) continue;
        if (std::isfinite(f))
            for (i64 i = 0; i < s.elements; ++i) target[i] = f * source[i];
        else  // outside the spans a gradient is 0
            for (i64 i = 0; i < s.elements; ++i) target[i] = source[i] == T(0) ? T(0) : f * source[i];
        ++scaled;
    }
    return scaled;
}

// Scratch of one thread.
class Buffer {
   public:
    explicit Buffer(i64 bytes) : data_((char*)std::aligned_alloc(64, (size_t)((bytes + 64) / 64 * 64))) {}
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    char* data() const { return data_; }

   private:
    char* data_;
};

// Rounds results below the normal range to zero while it lives, on x86, where arithmetic on them is a hundred times slower:
// rows of softmax end in such numbers. Subnormal inputs stay (they are how small float16 values are read). Also replaces
// what the calling thread has set, so that results do not depend on the thread.
class FlushToZero {
#if defined(__SSE2__)
   public:
    FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ | 0x8000u) & ~0x0040u); }
    ~FlushToZero() { _mm_setcsr(saved_); }
    FlushToZero(const FlushToZero&) = delete;
    FlushToZero& operator=(const FlushToZero&) = delete;

   private:
    unsigned saved_;
#endif
};

// work(index, next, scratch) for each index below count, every thread with scratch of its own. A thread claims the index
// after its current one early, so that it knows what to fetch.
template <typename F>
void share_out(int threads, i64 count, i64 scratch_bytes, F&& work) {
    threads = (int)std::max<i64>(1, std::min<i64>(threads, count));
    bool out_of_memory = false;
    std::atomic<i64> claimed{0};
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(|| : out_of_memory)
    {
        [[maybe_unused]] const FlushToZero mode;
        const Buffer scratch(scratch_bytes);
        out_of_memory = !scratch.data();
        for (i64 index = scratch.data() ? claimed++ : count; index < count;) {
            const i64 next = claimed++;
            work(index, next < count ? next : -1, scratch.data());
            index = next;
        }
    }
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

std::vector<std::string> cpu_instruction_sets() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates())
        if (c.runs) names.emplace_back(c.kernels->name);
    return names;
}

const Kernels& cpu_kernels(const std::string& name) {
    const Kernels* best = nullptr;
    for (const Candidate& c : candidates())
        if (c.runs && (name.empty() || name == c.kernels->name)) best = c.kernels;
    if (!best) throw std::invalid_argument("instruction set '" + name + "' is not in this build or not on this machine");
    return *best;
}

bool cpu_has_openmp() {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
}

void cacr_scores_cpu(const Problem& problem, const Kernels& kernels) {
    const i64 count = problem.batch * problem.heads;
    share_out(problem.threads, count, kernels.scores_scratch(problem),
              [&](i64 index, i64 next, char* scratch) { kernels.scores(problem, index, next, scratch); });
}

void cacr_qk_cpu(const QkProblem& problem, const Kernels& kernels) {
    share_out(problem.threads, problem.batch * problem.key_heads, kernels.qk_scratch(problem),
              [&](i64 index, i64 next, char* scratch) { kernels.qk(problem, index, next, scratch); });
}

i64 cacr_scale_cpu(const Scaling& scaling) {
    return scaling.dtype == DType::f64 ? scale<double>(scaling) : scale<float>(scaling);
}

double cpu_rate(double (*work)(i64 rounds, float* sink), int threads, double seconds) {
    double total = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : total)
    {
        float sink;
        double done = 0, elapsed = 0;
        const auto start = std::chrono::steady_clock::now();
        while (elapsed < seconds) {
            done += work(1000, &sink);
            elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
        total = done / elapsed;
    }
    return total;
}

}  // namespace cacr
