#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <new>
#include <vector>

namespace bn::pool {
namespace {

constexpr size_t huge_page = size_t{2} << 20, small_step = size_t{64} << 10;
constexpr time_t patience = 60;  // seconds that a block may lie idle

struct Idle {
    Block block;
    time_t since;
};

// Never destroyed: tensors may outlive the interpreter, and hand their memory back after static destructors ran.
struct Pool {
    std::mutex mutex;
    std::vector<Idle> idle;  // oldest first
    size_t limit = default_limit(), idle_bytes = 0, used_bytes = 0, hits = 0, misses = 0, made = 0;
};

Pool &pool() {
    static Pool *p = [] {
        Pool *made = new Pool;
        // a fork while another thread holds the lock would leave the child's copy locked for ever
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
        return made;
    }();
    return *p;
}

time_t now() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec;
}

void unmap(const std::vector<Block> &blocks) {
    for (const Block &b : blocks) munmap(b.base, b.mapped);
}

// takes what must go out of the list; the caller unmaps it without the lock
std::vector<Block> surplus(Pool &p, size_t limit, time_t oldest) {
    std::vector<Block> out;
    size_t n = 0;
    while (n < p.idle.size() && (p.idle_bytes > limit || p.idle[n].since < oldest)) {
        p.idle_bytes -= p.idle[n].block.mapped;
        out.push_back(p.idle[n++].block);
    }
    p.idle.erase(p.idle.begin(), p.idle.begin() + static_cast<ptrdiff_t>(n));
    return out;
}

Block map(size_t size, size_t color) {
    const size_t room = size + huge_page;
    void *raw = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    char *start = static_cast<char *>(raw);
    char *aligned = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(start) + huge_page - 1) & ~(huge_page - 1));
    if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
    if (char *end = aligned + size; end < start + room) munmap(end, static_cast<size_t>(start + room - end));
#if defined(MADV_HUGEPAGE)
    madvise(aligned, size, MADV_HUGEPAGE);
#endif
    // different starts, so that tensors walked together do not fight for the same cache sets
    return {aligned, size, aligned + color};
}

}  // namespace

Block acquire(size_t bytes) {
    const size_t step = bytes >= 4 * huge_page ? huge_page : small_step;
    const size_t size = (bytes + 4096 + step - 1) / step * step;
    Pool &p = pool();
    std::vector<Block> old;
    size_t color;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.used_bytes += size;
        size_t best = p.idle.size();
        for (size_t i = p.idle.size(); i-- > 0;) {
            const size_t have = p.idle[i].block.mapped;
            if (have < size || have > size + size / 8) continue;
            if (best == p.idle.size() || have < p.idle[best].block.mapped) best = i;
            if (have == size) break;
        }
        if (best != p.idle.size()) {
            const Block b = p.idle[best].block;
            p.idle.erase(p.idle.begin() + static_cast<ptrdiff_t>(best));
            p.idle_bytes -= b.mapped;
            p.used_bytes += b.mapped - size;
            ++p.hits;
            return b;
        }
        ++p.misses;
        color = p.made++ * 11 % 64 * 64;
        old = surplus(p, p.limit, now() - patience);
    }
    unmap(old);
    try {
        return map(size, color);
    } catch (...) {
        {
            std::lock_guard<std::mutex> lock(p.mutex);
            p.used_bytes -= size;
        }
        trim();  // what lies idle may be what is missing
        const Block b = map(size, color);
        std::lock_guard<std::mutex> lock(p.mutex);
        p.used_bytes += size;
        return b;
    }
}

void release(const Block &b) noexcept {
    Pool &p = pool();
    try {
        std::vector<Block> old;
        {
            std::lock_guard<std::mutex> lock(p.mutex);
            p.used_bytes -= b.mapped;
            p.idle.push_back({b, now()});
            p.idle_bytes += b.mapped;
            old = surplus(p, p.limit, now() - patience);
        }
        unmap(old);
    } catch (...) {
        munmap(b.base, b.mapped);  // no memory for the list's own bookkeeping
    }
}

Statistics statistics() {
    Pool &p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    return {p.limit, p.idle_bytes, p.idle.size(), p.used_bytes, p.hits, p.misses};
}

void set_limit(size_t bytes) {
    Pool &p = pool();
    std::vector<Block> old;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.limit = bytes;
        old = surplus(p, bytes, now() - patience);
    }
    unmap(old);
}

void trim() {
    Pool &p = pool();
    std::vector<Block> old;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        old = surplus(p, 0, 0);
    }
    unmap(old);
}

size_t default_limit() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    size_t memory = pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : size_t{4} << 30;
    // a container's own limit, version 2 and version 1 of control groups
    for (const char *path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
        if (FILE *f = std::fopen(path, "r")) {
            unsigned long long limit = 0;
            if (std::fscanf(f, "%llu", &limit) == 1 && limit) memory = std::min<size_t>(memory, limit);
            std::fclose(f);
        }
    }
    return memory / 4;
}

}  // namespace bn::pool
