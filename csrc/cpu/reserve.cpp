#include "reserve.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cacr {
namespace {

struct Block {
    void* data;
    std::size_t capacity;
};

struct Reserve {
    std::mutex mutex;
    std::vector<Block> blocks;
    std::size_t kept = 0;
    std::size_t limit = 0;

    void free_all() {
        for (const Block& block : blocks) std::free(block.data);
        blocks.clear();
        kept = 0;
    }
};

// Never destroyed: tensors may outlive everything else in the process.
Reserve& reserve() {
    static Reserve* const only = new Reserve;
    return *only;
}

}  // namespace

void reserve_limit(std::size_t bytes) {
    Reserve& r = reserve();
    const std::lock_guard<std::mutex> lock(r.mutex);
    r.limit = bytes;
    if (r.kept > bytes) r.free_all();
}

std::size_t reserve_kept() {
    Reserve& r = reserve();
    const std::lock_guard<std::mutex> lock(r.mutex);
    return r.kept;
}

void* reserve_take(std::size_t bytes, std::size_t& capacity) {
    constexpr std::size_t line = 64, huge_page = 2 << 20;
    Reserve& r = reserve();
    {
        const std::lock_guard<std::mutex> lock(r.mutex);
        std::size_t best = r.blocks.size();
        for (std::size_t i = 0; i < r.blocks.size(); ++i) {
            const std::size_t size = r.blocks[i].capacity;
            if (size >= bytes && size / 2 <= bytes && (best == r.blocks.size() || size < r.blocks[best].capacity)) best = i;
        }
        if (best < r.blocks.size()) {
            const Block block = r.blocks[best];
            r.blocks[best] = r.blocks.back();
            r.blocks.pop_back();
            r.kept -= block.capacity;
            capacity = block.capacity;
            return block.data;
        }
        r.free_all();
    }
    const std::size_t alignment = bytes >= huge_page ? huge_page : line;
    capacity = (bytes + line - 1) / line * line;
    void* data = nullptr;
    if (capacity < bytes || posix_memalign(&data, alignment, capacity)) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // A page fault every 4 KiB costs as much as a tenth of the arithmetic. Advice only: errors are of no consequence.
    if (bytes >= huge_page) madvise(data, capacity, MADV_HUGEPAGE);
#endif
    return data;
}

void reserve_release(void* data, std::size_t capacity) {
    Reserve& r = reserve();
    {
        const std::lock_guard<std::mutex> lock(r.mutex);
        if (r.kept + capacity <= r.limit) {
            r.blocks.push_back({data, capacity});
            r.kept += capacity;
            return;
        }
    }
    std::free(data);
}

}  // namespace cacr
