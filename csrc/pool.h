// Memory for large outputs, used again. A fresh large block costs a page fault per page, and the kernel zeroes each
// of them, which takes longer than normalizing; a block that comes back here has its pages already.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bn::pool {

struct Block {
    void *base = nullptr;  // what was mapped
    size_t mapped = 0;
    void *data = nullptr;  // what is handed out, 64-byte aligned
};

Block acquire(size_t bytes);          // throws std::bad_alloc
void release(const Block &) noexcept;  // from any thread; keeps it while no more than the limit lies idle

struct Statistics {
    size_t limit, idle_bytes, idle_blocks, used_bytes, hits, misses;
};
Statistics statistics();
void set_limit(size_t bytes);  // 0: nothing is kept
void trim();                   // gives every idle block back to the system
size_t default_limit();        // a quarter of the memory this process may have

}  // namespace bn::pool
