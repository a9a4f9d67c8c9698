#include "team.h"

#include <algorithm>
#include <exception>
#include <thread>

#include "os.h"
#include "workers.h"

namespace bn::team {
namespace {

struct Runtime {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
};

Runtime omp;
// A forked child inherits the runtime's idea of a team, but not the team's threads: waiting for them would hang.
std::atomic<bool> forked{false};

template <class F>
bool find(F &function, const char *name) {
    function = reinterpret_cast<F>(os::symbol(name));
    return function != nullptr;
}

bool on_the_frameworks() { return omp.parallel && !forked.load(std::memory_order_relaxed); }

// An exception must not leave a thread of the team: that would end the process.
struct Call {
    Body body;
    void *context;
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    void operator()(int thread, int threads) noexcept {
        try {
            body(context, thread, threads);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
};

}  // namespace

void resolve() {
    static bool watching = false;
    if (!watching) {
        watching = true;
        os::at_fork(nullptr, nullptr, [] {
            forked.store(true, std::memory_order_relaxed);
            workers::forget_after_fork();
        });
    }
    Runtime found;
    find(found.max_threads, "omp_get_max_threads");
    find(found.in_parallel, "omp_in_parallel");
    const bool complete = found.max_threads && found.in_parallel && find(found.parallel, "GOMP_parallel") &&
                          find(found.thread_num, "omp_get_thread_num") && find(found.num_threads, "omp_get_num_threads");
    if (!complete) found.parallel = nullptr;
    omp = found;
}

const char *runtime() {
    if (on_the_frameworks()) return "the OpenMP runtime already loaded (GOMP_parallel)";
    if (!omp.max_threads) return "none: one thread";
    return omp.parallel ? "its own, after a fork" : "its own, as many as the OpenMP runtime already loaded says";
}

int threads() {
    if (!omp.max_threads || workers::inside() || (omp.in_parallel && omp.in_parallel())) return 1;
    return std::max(1, omp.max_threads());
}

void run(int threads, Body body, void *context) {
    Call call{body, context, {}, {}};
    if (on_the_frameworks())
        omp.parallel([](void *c) { (*static_cast<Call *>(c))(omp.thread_num(), omp.num_threads()); }, &call,
                     static_cast<unsigned>(threads), 0);
    else if (omp.max_threads)
        workers::run(threads, [](void *c, int thread, int count) { (*static_cast<Call *>(c))(thread, count); }, &call);
    else
        call(0, 1);
    if (call.error) std::rethrow_exception(call.error);
}

}  // namespace bn::team
