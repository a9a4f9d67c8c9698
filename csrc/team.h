// Threads: those of the OpenMP runtime that the framework around us has already loaded, found by name at run time.
// A second runtime in one process would have its workers spin against the first one's.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bn::team {

int threads();           // how many a call may use now; 1 inside a parallel region and in a forked child
const char *runtime();   // what was found, for people
void resolve();          // looks for the runtime; call once it is loaded

using Body = void (*)(void *context, int thread, int threads);
void run(int threads, Body body, void *context);

template <class F>
void parallel(int threads, F &&body) {
    if (threads <= 1) {
        body(0, 1);
        return;
    }
    run(threads, [](void *f, int thread, int count) { (*static_cast<F *>(f))(thread, count); }, &body);
}

// Tasks handed out in order as threads come free. What a task computes must not depend on who runs it.
template <class F>
void tasks(int threads, int64_t count, F &&task) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int, int) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    });
}

// [begin, end) of `count` items for one thread of several
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace bn::team
