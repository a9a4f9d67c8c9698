// Memory for large outputs, used again. A fresh large block costs a page fault per page, and the kernel zeroes each
// of them, which takes longer than normalizing; a block that comes back here has its pages already.
#pragma once
#include <chrono>
#include <cstddef>

namespace bn::pool {

using Clock = std::chrono::steady_clock;

// One block; while it lies idle, a link of the list of those. Nothing is allocated when it comes back.
struct Block {
    void *data = nullptr;  // what is handed out, 64-byte aligned
    void *base = nullptr;  // what was mapped
    size_t mapped = 0;
    Block *older = nullptr, *newer = nullptr;
    Clock::time_point since{};
};

Block *acquire(size_t bytes);      // throws std::bad_alloc, and then nothing has changed
void release(Block *) noexcept;    // from any thread; keeps it while no more than this process's share lies idle

struct Statistics {
    size_t limit, share, idle_bytes, idle_blocks, used_bytes, hits, misses;
};
Statistics statistics();
bool keeps();                         // whether anything is kept
void set_limit(size_t bytes);         // of all processes of this user together; 0: nothing is kept
void set_patience(double seconds);    // how long a block may lie idle; for tests
void trim() noexcept;                 // gives every idle block back to the system
size_t default_limit();               // a quarter of the memory this process may have

}  // namespace bn::pool
