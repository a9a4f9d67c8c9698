#include "memory_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

#include "os.h"

namespace bn::pool {
namespace {

constexpr size_t huge_page = size_t{2} << 20, small_step = size_t{64} << 10;
constexpr std::chrono::seconds recount{1};  // how often the other processes are counted

// Never destroyed: tensors may outlive the interpreter, and hand their memory back after static destructors ran.
struct Pool {
    std::mutex mutex;
    Block *oldest = nullptr, *newest = nullptr;  // of those that lie idle
    size_t limit = default_limit(), idle_bytes = 0, idle_blocks = 0, used_bytes = 0, hits = 0, misses = 0, made = 0;
    Clock::duration patience = std::chrono::seconds(60);

    // The limit is for all processes of the user: each that keeps blocks takes a seat, and they share alike.
    int seats = 1;
    bool seated = false;
    Clock::time_point counted{};

    // Gives back what has lain idle for too long although no call comes. Runs only while something lies idle.
    std::thread sweeper;
    std::condition_variable wake;
    bool sweeping = false, forking = false;

    size_t share() const { return limit / static_cast<size_t>(seats); }

    void link(Block *b) noexcept {
        b->older = newest, b->newer = nullptr;
        (newest ? newest->newer : oldest) = b;
        newest = b;
        idle_bytes += b->mapped;
        ++idle_blocks;
    }
    void unlink(Block *b) noexcept {
        (b->older ? b->older->newer : oldest) = b->newer;
        (b->newer ? b->newer->older : newest) = b->older;
        b->older = b->newer = nullptr;
        idle_bytes -= b->mapped;
        --idle_blocks;
    }
    // takes what must go out of the list, as a chain by `newer`; the caller frees it without the lock
    Block *surplus(size_t most, Clock::time_point before) noexcept {
        Block *chain = nullptr;
        while (oldest && (idle_bytes > most || oldest->since <= before)) {
            Block *const b = oldest;
            unlink(b);
            b->newer = chain;
            chain = b;
        }
        return chain;
    }
    void count_seats(Clock::time_point now) noexcept {
        if (seated && now - counted < recount) return;
        seats = std::max(1, os::take_seat());
        seated = true;
        counted = now;
    }
    void give_up_seat() noexcept {
        if (oldest || !seated) return;
        os::leave_seat();
        seated = false;
    }
};

std::atomic<bool> keeping{true};

void free_chain(Block *chain) noexcept {
    while (chain) {
        Block *const next = chain->newer;
        os::unmap(chain->base, chain->mapped);
        delete chain;
        chain = next;
    }
}

void before_fork();
void in_parent();
void in_child();

Pool &pool() {
    static Pool *p = [] {
        Pool *made = new Pool;
        keeping = made->limit > 0;
        os::at_fork(before_fork, in_parent, in_child);
        return made;
    }();
    return *p;
}

void sweep(Pool &p) {
    std::unique_lock<std::mutex> lock(p.mutex);
    while (p.oldest && !p.forking) {
        p.wake.wait_until(lock, p.oldest->since + p.patience);
        Block *const old = p.forking ? nullptr : p.surplus(p.share(), Clock::now() - p.patience);
        if (!old) continue;
        lock.unlock();
        free_chain(old);
        lock.lock();
    }
    p.give_up_seat();
    p.sweeping = false;
}

// with the lock held
void start_sweeping(Pool &p) noexcept {
    if (p.sweeping || p.forking || !p.oldest) return;
    try {
        if (p.sweeper.joinable()) p.sweeper.join();  // one that has ended, or is about to: it does not need the lock
        const os::WithoutSignals quiet;
        p.sweeper = std::thread([&p] { sweep(p); });
        p.sweeping = true;
    } catch (...) {  // no thread: the next call gives back what is old
    }
}

// A forked child would hold every idle page for as long as it lives, and has none of its parent's threads: so nothing
// lies idle in a fork, and no thread of the pool's is there.
void before_fork() {
    Pool &p = pool();
    std::thread sweeper;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.forking = true;
        sweeper.swap(p.sweeper);
    }
    p.wake.notify_all();
    if (sweeper.joinable()) sweeper.join();
    p.mutex.lock();  // held by another thread, it would stay locked in the child for ever
    free_chain(p.surplus(0, Clock::time_point::max()));
}

void in_parent() {
    Pool &p = pool();
    p.forking = false;
    p.give_up_seat();
    p.mutex.unlock();
}

void in_child() {
    Pool &p = pool();
    p.forking = false;
    p.seated = false;
    p.mutex.unlock();
}

Block *make(size_t size, size_t color) {
    Block *b = new Block;
    void *base = os::map(size, huge_page);
    if (!base) {
        trim();  // what lies idle may be what is missing
        base = os::map(size, huge_page);
    }
    if (!base) {
        delete b;
        throw std::bad_alloc();
    }
    b->base = base;
    b->mapped = size;
    // different starts, so that tensors walked together do not fight for the same cache sets
    b->data = static_cast<char *>(base) + color;
    return b;
}

}  // namespace

Block *acquire(size_t bytes) {
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    const size_t step = bytes >= 4 * huge_page ? huge_page : small_step;
    const size_t size = (bytes + 4096 + step - 1) / step * step;
    Pool &p = pool();
    Block *old;
    size_t color;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        Block *best = nullptr;
        for (Block *b = p.newest; b; b = b->older) {
            if (b->mapped < size || b->mapped > size + size / 8) continue;
            if (!best || b->mapped < best->mapped) best = b;
            if (b->mapped == size) break;
        }
        if (best) {
            p.unlink(best);
            p.used_bytes += best->mapped;
            ++p.hits;
            return best;
        }
        ++p.misses;
        color = p.made++ * 11 % 64 * 64;
        old = p.surplus(p.share(), Clock::now() - p.patience);
    }
    free_chain(old);
    Block *const b = make(size, color);
    std::lock_guard<std::mutex> lock(p.mutex);
    p.used_bytes += size;
    return b;
}

void release(Block *b) noexcept {
    Pool &p = pool();
    Block *old;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        const Clock::time_point now = Clock::now();
        p.used_bytes -= b->mapped;
        b->since = now;
        p.link(b);
        if (p.limit) p.count_seats(now);
        old = p.surplus(p.share(), now - p.patience);
        start_sweeping(p);
    }
    free_chain(old);
}

Statistics statistics() {
    Pool &p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    return {p.limit, p.share(), p.idle_bytes, p.idle_blocks, p.used_bytes, p.hits, p.misses};
}

bool keeps() {
    pool();
    return keeping.load(std::memory_order_relaxed);
}

void set_limit(size_t bytes) {
    Pool &p = pool();
    Block *old;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        p.limit = bytes;
        keeping = bytes > 0;
        old = p.surplus(p.share(), Clock::now() - p.patience);
    }
    free_chain(old);
}

void set_patience(double seconds) {
    Pool &p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    p.patience = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    p.wake.notify_all();
}

void trim() noexcept {
    Pool &p = pool();
    Block *old;
    {
        std::lock_guard<std::mutex> lock(p.mutex);
        old = p.surplus(0, Clock::time_point::max());
    }
    p.wake.notify_all();  // nothing lies idle: the thread ends, and gives up the seat
    free_chain(old);
}

size_t default_limit() { return os::memory() / 4; }

}  // namespace bn::pool
