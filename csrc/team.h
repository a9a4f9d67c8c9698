// Threads: those of the OpenMP runtime that the framework around us has already loaded, found by name at run time; a
// second runtime in one process would have its workers spin against the first one's. Where that has no door for us, or
// is not to be used after a fork, a small team of our own (workers.h), whose threads sleep between calls.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bn::team {

int threads();           // how many a call may use now; 1 inside a parallel region
const char *runtime();   // what was found, for people
void resolve();          // looks for the runtime; call once it is loaded

// `body` may throw: the first exception is thrown again when every thread is done.
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

// [begin, end) of `count` items for one thread of several
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace bn::team
