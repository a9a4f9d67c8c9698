#include "team.h"

#include <dlfcn.h>
#include <pthread.h>

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
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
}

void in_child() {
    forked.store(true, std::memory_order_relaxed);
}

struct Call {
    Body body;
    void *context;
};

}  // namespace

void resolve() {
    static bool watching = false;
    if (!watching) watching = pthread_atfork(nullptr, nullptr, in_child) == 0;
    Runtime found;
    const bool complete = find(found.parallel, "GOMP_parallel") && find(found.thread_num, "omp_get_thread_num") &&
                          find(found.num_threads, "omp_get_num_threads") &&
                          find(found.max_threads, "omp_get_max_threads") &&
                          find(found.in_parallel, "omp_in_parallel");
    omp = complete ? found : Runtime{};
}

const char *runtime() { return omp.parallel ? "the OpenMP runtime already loaded (GOMP_parallel)" : "none: one thread"; }

int threads() {
    if (!omp.parallel || forked.load(std::memory_order_relaxed) || omp.in_parallel()) return 1;
    return omp.max_threads();
}

void run(int threads, Body body, void *context) {
    if (!omp.parallel) return body(context, 0, 1);
    Call call{body, context};
    omp.parallel(
        [](void *c) {
            const Call &call = *static_cast<Call *>(c);
            call.body(call.context, omp.thread_num(), omp.num_threads());
        },
        &call, static_cast<unsigned>(threads), 0);
}

}  // namespace bn::team
