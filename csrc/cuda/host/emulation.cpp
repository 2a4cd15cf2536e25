// Blocks of fibers: see emulation.h.
#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
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

enum class Meeting { shuffle, product, matrices };

// What a lane gives its warp.
struct Message {
    Meeting meeting;
    float value;            // shuffle
    unsigned a[4];          // product
    unsigned b[2];          // product
    unsigned short row[8];  // matrices
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int width;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::finished;
    Message sent[2];  // the last two: a lane may be one ahead of its warp
    int messages = 0;
    std::vector<Copy> copies;  // begun
};

struct Settings {
    std::mt19937_64 random{0};
    std::string skipped;  // barrier site that does nothing
    std::set<std::string> sites;
    std::string error;
    bool tensor_cores = true;
    int shared_limit = 227 << 10;
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
    Fiber& fiber = block.fibers[(size_t)block.current];
    if (!fiber.copies.empty()) fail("a thread ends without waiting for its copies");
    fiber.state = State::finished;
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
    fiber.messages = 0;
    fiber.copies.clear();
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

// Sends a message to the warp; when it returns, all lanes have sent theirs to the slot.
int exchange(const Message& message) {
    Fiber& fiber = block.fibers[(size_t)block.current];
    const int slot = fiber.messages++ % 2;
    fiber.sent[slot] = message;
    wait_as(State::at_shuffle);
    return slot;
}

const Message& received(int thread, int slot, Meeting meeting) {
    const Message& message = block.fibers[(size_t)thread].sent[slot];
    if (message.meeting != meeting) fail("lanes of a warp meet at different instructions");
    return message;
}

const std::vector<double>& half_values() {
    static std::vector<double> values;
    if (values.empty())
        for (int bits = 0; bits < 1 << 16; ++bits) values.push_back(float_of_half((unsigned short)bits));
    return values;
}

double value_of(unsigned word, int half, Factors factors) {
    if (factors == Factors::tf32) return (double)float_of(word & 0xffffe000u);
    const unsigned bits = half ? word >> 16 : word & 0xffffu;
    return factors == Factors::bfloat16 ? (double)float_of(bits << 16) : half_values()[bits];
}

constexpr int kSummands = 4;  // products that a tensor core adds at a time

// The accumulator plus exact products as tensor cores form it: all are cut off at the 24 bits of the largest of them, and so is
// the sum. Cards round no worse (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021: Volta so, later ones keep
// more bits).
float tensor_core_sum(float accumulator, const double (&products)[kSummands]) {
    double largest = fabs((double)accumulator);
    double sum = accumulator;
    for (const double product : products) {
        largest = largest >= fabs(product) ? largest : fabs(product);
        sum += product;
    }
    if (sum != sum) return float_of(0x7fffffffu);  // a card's NaN
    if (!(largest > 0) || !std::isfinite(sum)) return (float)sum;
    const double unit = ldexp(1.0, ilogb(largest) - 23);
    sum = trunc(accumulator / unit);
    for (const double product : products) sum += trunc(product / unit);
    const double last = fabs(sum) < 1 << 24 ? 1.0 : ldexp(1.0, ilogb(sum) - 23);
    return (float)(trunc(sum / last) * last * unit);
}

}  // namespace

int thread_index() { return block.current; }

int thread_count() { return block.threads; }

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
    const int thread = block.current;
    const int slot = exchange({Meeting::shuffle, value, {}, {}, {}});
    return received(thread ^ mask, slot, Meeting::shuffle).value;
}

// The fragments as the PTX ISA lays them out over the lanes (mma.m16n8k16, whose halves are mma.m16n8k8, and mma.m16n8k8 of tf32):
// a lane holds two neighbouring inner indices a word of 16-bit numbers, one of tf32.
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Factors factors) {
    const int thread = block.current;
    const int slot = exchange({Meeting::product, 0, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {}});
    const int first = thread / kLanes * kLanes;
    const int each = factors == Factors::tf32 ? 1 : 2;
    for (int i = 0; i < 4; ++i) {
        const int row = thread % kLanes / 4 + i / 2 * 8;
        const int col = thread % 4 * 2 + i % 2;
        for (int begin = 0; begin < 8 * each; begin += kSummands) {
            double products[kSummands];
            for (int s = 0; s < kSummands; ++s) {
                const int k = begin + s;
                const int lane = k / each % 4;
                const int word = k / each / 4;
                const unsigned word_a = received(first + row % 8 * 4 + lane, slot, Meeting::product).a[row / 8 + word * 2];
                const unsigned word_b = received(first + col * 4 + lane, slot, Meeting::product).b[word];
                products[s] = value_of(word_a, k % each, factors) * value_of(word_b, k % each, factors);
            }
            d[i] = tensor_core_sum(d[i], products);
        }
    }
}

// PTX ISA, ldmatrix .m8n8.x4: threads 8 i + 0..7 hold the addresses of the rows of matrix i, which goes to register i; thread t
// gets of it row t / 4, elements 2 (t % 4) and the next one, of the matrix or with .trans of its transpose.
void load_matrices(unsigned (&words)[4], const void* row, bool transposed) {
    const int thread = block.current;
    const int first = thread / kLanes * kLanes;
    Message own = {Meeting::matrices, 0, {}, {}, {}};
    const unsigned char* begin = block.shared.data();
    const size_t offset = (size_t)((const unsigned char*)row - begin);
    if (offset % 16 || offset + 16 > block.shared.size()) {
        fail("a row of a matrix is not aligned or not in shared memory");
    } else {
        memcpy(own.row, row, sizeof(own.row));
    }
    const int slot = exchange(own);
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned element[2];
        for (int e = 0; e < 2; ++e) {
            const int i = thread % kLanes / 4;
            const int j = thread % 4 * 2 + e;
            const int stored_row = transposed ? j : i;
            const int stored_col = transposed ? i : j;
            element[e] = received(first + 8 * matrix + stored_row, slot, Meeting::matrices).row[stored_col];
        }
        words[matrix] = element[0] | element[1] << 16;
    }
}

void begin_copy(void* to, const void* from, int bytes, int width) {
    if (((size_t)to | (size_t)from) % (size_t)width) fail("a copy is not aligned");
    block.fibers[(size_t)block.current].copies.push_back({to, from, bytes, width});
}

void finish_copies() {
    std::vector<Copy>& copies = block.fibers[(size_t)block.current].copies;
    for (const Copy& copy : copies) {
        memcpy(copy.to, copy.from, (size_t)copy.bytes);
        memset((char*)copy.to + copy.bytes, 0, (size_t)(copy.width - copy.bytes));
    }
    copies.clear();
}

bool tensor_cores() { return settings.tensor_cores; }

int shared_limit() { return settings.shared_limit; }

void* shared_memory(size_t bytes) {
    if (block.shared.size() < bytes) block.shared.resize(bytes, 0xff);
    return block.shared.data();
}

void* dynamic_shared_memory() { return block.shared.data(); }

int run_grid(i64 x, int y, int z, int threads, const std::function<void()>& body, size_t dynamic_bytes) {
    settings.error.clear();
    block.shared.resize(dynamic_bytes);
    ++settings.launches;
    settings.largest_y = std::max(settings.largest_y, y);
    if (threads < 1 || threads > 1024 || (i64)dynamic_bytes > (227 << 10)) fail("invalid launch");
    if (x < 1 || y < 1 || z < 1 || x > 0x7fffffff || y > 65535 || z > 65535 || threads % kLanes) fail("invalid launch");
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
    cacr::emulation::settings.sites.clear();
    cacr::emulation::settings.launches = cacr::emulation::settings.largest_y = 0;
}

// Whether float16 scores are multiplied on tensor cores, as from sm_75.
extern "C" __attribute__((visibility("default"))) void cacr_emulation_tensor_cores(int on) {
    cacr::emulation::settings.tensor_cores = on != 0;
}

// Dynamic shared memory that a block may have: the fused kernels run where theirs fits.
extern "C" __attribute__((visibility("default"))) void cacr_emulation_shared_limit(int bytes) {
    cacr::emulation::settings.shared_limit = bytes;
}

// One instruction of a warp: rows [32, 8] of 16-bit elements in shared memory, one a lane, to words [32, 4].
extern "C" __attribute__((visibility("default"))) int cacr_emulation_load_matrices(const unsigned short* rows, unsigned* words,
                                                                                   int transposed) {
    return cacr::emulation::run_grid(1, 1, 1, cacr::emulation::kLanes, [&] {
        const int lane = cacr::thread_index();
        unsigned own[4];
        unsigned short* shared = (unsigned short*)cacr::emulation::dynamic_shared_memory() + 8 * lane;
        memcpy(shared, rows + 8 * lane, 16);
        cacr::emulation::load_matrices(own, shared, transposed != 0);
        memcpy(words + 4 * lane, own, sizeof(own));
    }, 512);
}

// One instruction of a warp: the words of 32 lanes, a [32, 4] and b [32, 2], d [32, 4] in and out. factors: of half (0), bfloat16
// (1), tf32 (2).
extern "C" __attribute__((visibility("default"))) int cacr_emulation_multiply_add(const unsigned* a, const unsigned* b, float* d,
                                                                                  int factors) {
    return cacr::emulation::run_grid(1, 1, 1, cacr::emulation::kLanes, [&] {
        const int lane = cacr::thread_index();
        unsigned own_a[4], own_b[2];
        float own_d[4];
        memcpy(own_a, a + 4 * lane, sizeof(own_a));
        memcpy(own_b, b + 2 * lane, sizeof(own_b));
        memcpy(own_d, d + 4 * lane, sizeof(own_d));
        cacr::emulation::multiply_add(own_d, own_a, own_b, (cacr::emulation::Factors)factors);
        memcpy(d + 4 * lane, own_d, sizeof(own_d));
    });
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
