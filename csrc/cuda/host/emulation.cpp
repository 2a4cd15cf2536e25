// Blocks of fibers: see emulation.h.
#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_api.h"

namespace cacr {
namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class State { ready, at_barrier, at_shuffle, finished };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::finished;
    float sent[2] = {0, 0};  // values of the last two shuffles: a lane may be one shuffle ahead of its warp
    int shuffles = 0;
};

struct Settings {
    std::mt19937_64 random{0};
    std::string skipped;  // barrier site that does nothing
    std::set<std::string> sites;
    std::string error;
    int launches = 0;
    int largest_y = 0;  // of the grids launched
} settings;

struct Block {
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<int> ready;
    std::vector<unsigned char> shared;
    std::string site;  // of the barrier that some fibers wait at
    i64 index[3] = {0, 0, 0};
    int threads = 0;
    int current = 0;
    int waiting = 0;
    int finished = 0;
    const std::function<void()>* body = nullptr;
} block;

void fail(const std::string& reason) {
    if (settings.error.empty()) settings.error = reason;
}

void wait_as(State state) {
    Fiber& fiber = block.fibers[(size_t)block.current];
    fiber.state = state;
    swapcontext(&fiber.context, &block.scheduler);
}

void fiber_main() {
    (*block.body)();
    block.fibers[(size_t)block.current].state = State::finished;
}

void wake(int thread) {
    block.fibers[(size_t)thread].state = State::ready;
    block.ready.push_back(thread);
}

void wake_block_if_complete() {
    if (block.waiting == 0 || block.waiting + block.finished < block.threads) return;
    if (block.finished) fail("barrier at " + block.site + " is not reached by threads that have returned");
    block.waiting = 0;
    for (int t = 0; t < block.threads; ++t)
        if (block.fibers[(size_t)t].state == State::at_barrier) wake(t);
}

void wake_warp_if_complete(int warp) {
    const int first = warp * kLanes;
    for (int t = first; t < first + kLanes; ++t)
        if (block.fibers[(size_t)t].state != State::at_shuffle) return;
    for (int t = first; t < first + kLanes; ++t) wake(t);
}

void start(int thread) {
    Fiber& fiber = block.fibers[(size_t)thread];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.shuffles = 0;
    wake(thread);
}

void run_block(int threads) {
    block.fibers.resize((size_t)threads);
    block.ready.clear();
    block.shared.assign(block.shared.size(), 0xff);
    block.threads = threads;
    block.waiting = block.finished = 0;
    for (int t = 0; t < threads; ++t) start(t);
    while (!block.ready.empty() && settings.error.empty()) {
        const size_t pick = settings.random() % block.ready.size();
        std::swap(block.ready[pick], block.ready.back());
        block.current = block.ready.back();
        block.ready.pop_back();
        swapcontext(&block.scheduler, &block.fibers[(size_t)block.current].context);
        switch (block.fibers[(size_t)block.current].state) {
            case State::at_barrier: ++block.waiting; break;
            case State::at_shuffle: wake_warp_if_complete(block.current / kLanes); break;
            default: ++block.finished;
        }
        wake_block_if_complete();
    }
    if (block.finished < threads) fail("threads wait for each other at different places");
}

}  // namespace

int thread_index() { return block.current; }

i64 block_index(int axis) { return block.index[axis]; }

void barrier(const char* file, int line) {
    const std::string path = file;
    const std::string site = path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
    settings.sites.insert(site);
    if (site == settings.skipped) return;
    if (block.waiting == 0) block.site = site;
    if (site != block.site) fail("threads meet at different barriers, " + site + " and " + block.site);
    wait_as(State::at_barrier);
}

float shuffle_xor(float value, int mask) {
    Fiber& fiber = block.fibers[(size_t)block.current];
    const int slot = fiber.shuffles++ % 2;
    fiber.sent[slot] = value;
    const int thread = block.current;
    wait_as(State::at_shuffle);
    return block.fibers[(size_t)(thread ^ mask)].sent[slot];
}

void* shared_memory(size_t bytes) {
    if (block.shared.size() < bytes) block.shared.resize(bytes, 0xff);
    return block.shared.data();
}

int run_grid(i64 x, int y, int z, int threads, const std::function<void()>& body) {
    settings.error.clear();
    ++settings.launches;
    settings.largest_y = std::max(settings.largest_y, y);
    if (x < 1 || y < 1 || z < 1 || y > 65535 || z > 65535 || threads % kLanes) fail("invalid launch");
    std::vector<i64> order((size_t)(settings.error.empty() ? x * y * z : 0));
    for (size_t i = 0; i < order.size(); ++i) order[i] = (i64)i;
    std::shuffle(order.begin(), order.end(), settings.random);
    block.body = &body;
    for (const i64 i : order) {
        block.index[0] = i % x;
        block.index[1] = i / x % y;
        block.index[2] = i / x / y;
        run_block(threads);
        if (!settings.error.empty()) return 1;
    }
    return settings.error.empty() ? 0 : 1;
}

}  // namespace emulation

const char* cacr_error_cuda(int) {
    return emulation::settings.error.empty() ? "invalid value" : emulation::settings.error.c_str();
}

int cacr_device_count_cuda(const char** reason) {
    *reason = "emulation";
    return 0;
}

}  // namespace cacr

// Order of threads and blocks from now on, and the barrier ("file:line") that shall do nothing ("" for none); counts begin.
extern "C" __attribute__((visibility("default"))) void cacr_emulation_configure(unsigned long long seed, const char* skipped_barrier) {
    cacr::emulation::settings.random.seed(seed);
    cacr::emulation::settings.skipped = skipped_barrier;
    cacr::emulation::settings.launches = cacr::emulation::settings.largest_y = 0;
}

// Kernels launched so far, and the largest axis y of their grids.
extern "C" __attribute__((visibility("default"))) int cacr_emulation_launches() {
    return cacr::emulation::settings.launches;
}
extern "C" __attribute__((visibility("default"))) int cacr_emulation_largest_y() {
    return cacr::emulation::settings.largest_y;
}

// The barriers met so far, "file:line" joined by newlines.
extern "C" __attribute__((visibility("default"))) const char* cacr_emulation_barriers() {
    static std::string joined;
    joined.clear();
    for (const std::string& site : cacr::emulation::settings.sites) joined += site + "\n";
    return joined.c_str();
}
