// What happens when memory ends: every allocation of every route fails once, and so does every mapping of the pool's.
// A call that fails throws std::bad_alloc and has changed nothing; the next one is right. Then threads: exceptions of a
// parallel region come out of it, a forked child has threads of its own, and idle blocks go back with no call coming.
#include "check.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "os.h"
#include "memory_pool.h"
#include "problem.h"
#include "team.h"
#include "workers.h"

namespace {

std::atomic<long> countdown{0};  // the allocation that fails, counted from now; 0: none does
std::atomic<bool> hit{false};

bool fails_now() {
    if (faults::exempt || countdown.load(std::memory_order_relaxed) <= 0) return false;
    if (countdown.fetch_sub(1) != 1) return false;
    hit = true;
    return true;
}

void *allocate(size_t bytes, size_t alignment) {
    if (fails_now()) return nullptr;
    bytes = (bytes + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
    return _aligned_malloc(bytes ? bytes : alignment, alignment);
#else
    return std::aligned_alloc(alignment, bytes ? bytes : alignment);
#endif
}

void give_back(void *p) {
#if defined(_WIN32)
    _aligned_free(p);
#else
    std::free(p);
#endif
}

void *or_throw(void *p) {
    if (!p) throw std::bad_alloc();
    return p;
}

constexpr size_t usual = alignof(std::max_align_t);

}  // namespace

thread_local bool faults::exempt = false;

void *operator new(size_t n) { return or_throw(allocate(n, usual)); }
void *operator new[](size_t n) { return or_throw(allocate(n, usual)); }
void *operator new(size_t n, std::align_val_t a) { return or_throw(allocate(n, static_cast<size_t>(a))); }
void *operator new[](size_t n, std::align_val_t a) { return or_throw(allocate(n, static_cast<size_t>(a))); }
void *operator new(size_t n, const std::nothrow_t &) noexcept { return allocate(n, usual); }
void *operator new[](size_t n, const std::nothrow_t &) noexcept { return allocate(n, usual); }
void operator delete(void *p) noexcept { give_back(p); }
void operator delete[](void *p) noexcept { give_back(p); }
void operator delete(void *p, size_t) noexcept { give_back(p); }
void operator delete[](void *p, size_t) noexcept { give_back(p); }
void operator delete(void *p, std::align_val_t) noexcept { give_back(p); }
void operator delete[](void *p, std::align_val_t) noexcept { give_back(p); }
void operator delete(void *p, size_t, std::align_val_t) noexcept { give_back(p); }
void operator delete[](void *p, size_t, std::align_val_t) noexcept { give_back(p); }

#if defined(BN_WRAPPED_MMAP)  // linked with --wrap=mmap
extern "C" void *__real_mmap(void *, size_t, int, int, int, off_t);
extern "C" void *__wrap_mmap(void *p, size_t n, int protection, int flags, int file, off_t at) {
    return fails_now() ? MAP_FAILED : __real_mmap(p, n, protection, flags, file, at);
}
#endif

namespace {

using namespace bn;

int failures = 0;
void expect(bool good, const char *what) {
    if (!good) ++failures, std::printf("FAILED %s (%s)\n", what, kernels().isa);
}

// Calls f with the first, the second, ... allocation failing until none is left to fail; `unchanged` is asked after
// each failure. Returns how many failed. Some may be made up for, with another attempt or by doing without.
template <class F, class Unchanged>
int each_failing(const char *what, F f, Unchanged unchanged, bool must_throw = true) {
    for (int n = 1;; ++n) {
        hit = false;
        countdown = n;
        bool thrown = false;
        try {
            f();
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        countdown = 0;
        if (!hit) {
            expect(!thrown, what);
            return n - 1;
        }
        expect(thrown || !must_throw, what);
        expect(unchanged(), what);
        if (n > 10000) return expect(false, "an end of allocations"), n;
    }
}

template <class A>
struct Buffers {
    std::vector<A> z, y, dy, dz, gamma, beta, mean, var, inv_std, sum_dy, sum_dy_zhat;
    std::vector<A> running_mean, running_var;
    std::vector<uint8_t> mask;
    int64_t tracked = 0;

    Buffers(const Shape &x, const A *values) {
        const size_t all = static_cast<size_t>(x.n * x.c * x.s), c = static_cast<size_t>(x.c);
        z.assign(values, values + all), dy = z, y.resize(all), dz.resize(all);
        for (auto *v : {&gamma, &beta, &mean, &var, &inv_std, &sum_dy, &sum_dy_zhat, &running_mean, &running_var}) v->assign(c, A{1});
        mask.resize(static_cast<size_t>(Sides(x).bytes()));
    }
    ForwardProblem<A> forward(const Shape &x, Activation a, bool residual, int threads) {
        ForwardProblem<A> f;
        f.shape = x, f.activation = a, f.z = z.data(), f.y = y.data(), f.residual = residual ? dy.data() : nullptr;
        f.mask = residual && piecewise_linear(a) ? mask.data() : nullptr;
        f.mean = mean.data(), f.var = var.data(), f.inv_std = inv_std.data(), f.eps = 1e-5, f.threads = threads;
        f.tracking.running_mean = running_mean.data(), f.tracking.running_var = running_var.data();
        f.tracking.num_batches_tracked = &tracked;
        return f;
    }
    BackwardProblem<A> backward(const Shape &x, Activation a, bool residual, int threads) {
        BackwardProblem<A> b;
        b.shape = x, b.activation = a, b.z = z.data(), b.dy = dy.data(), b.dz = dz.data();
        b.dresidual = residual ? y.data() : nullptr;
        b.saved = residual && piecewise_linear(a) ? mask.data() : nullptr;
        b.mean = mean.data(), b.inv_std = inv_std.data(), b.sum_dy = sum_dy.data(), b.sum_dy_zhat = sum_dy_zhat.data();
        b.count = static_cast<double>(x.n * x.s), b.threads = threads;
        return b;
    }
    bool tracks_nothing() const {
        const auto ones = [](const std::vector<A> &v) { return v == std::vector<A>(v.size(), A{1}); };
        return ones(running_mean) && ones(running_var) && tracked == 0;
    }
};

void routes() {
    struct Case {
        const char *what;
        Layout layout;
        int64_t n, c, s;
    };
    // every route of drivers.h: groups of planes, runs, large planes, columns, rows side by side, few wide rows
    const Case cases[] = {{"planes", Layout::ncs, 9, 70, 256},   {"runs", Layout::ncs, 40, 70, 49}, {"large planes", Layout::ncs, 2, 3, 40000},
                          {"short planes", Layout::ncs, 40, 70, 16}, {"rows", Layout::rc, 300, 400, 1}, {"narrow rows", Layout::rc, 40000, 5, 1},
                          {"wide rows", Layout::rc, 4, 40000, 1}};
    for (const Case &k : cases)
        for (size_t last : {size_t{0}, size_t{16} << 10})
            for (int threads : {1, 3})
                for (int with = 0; with < 4; ++with) {
                    pretend_cache(last / 4, last);
                    const bool residual = with & 1;
                    const Activation a = Activation::relu;
                    Shape x{DType::f32, k.layout, k.n, k.c, k.s, k.c * k.s, k.s};
                    x.form = natural_form(x);
                    std::vector<float> values(static_cast<size_t>(k.n * k.c * k.s));
                    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 2654435761u % 1000) / 500 - 1;
                    std::vector<uint8_t> kept(static_cast<size_t>(k.n * k.s));
                    int64_t count = 0;
                    for (size_t i = 0; i < kept.size(); ++i) count += kept[i] = i * 2654435761u % 5 > 1;
                    const Keep keep(x, kept.data(), count);
                    const auto masked = [&](auto problem) {
                        problem.keep = with & 2 ? &keep : nullptr;
                        return problem;
                    };
                    Buffers<float> want(x, values.data()), have(x, values.data());
                    forward(masked(want.forward(x, a, residual, 1)));
                    backward(masked(want.backward(x, a, residual, 1)));
                    const auto f = masked(have.forward(x, a, residual, threads));
                    const int failed = each_failing(k.what, [&] { forward(f); }, [&] { return have.tracks_nothing(); });
                    const auto b = masked(have.backward(x, a, residual, threads));
                    const int also = each_failing(k.what, [&] { backward(b); }, [] { return true; });
                    expect(failed > 0 && also > 0, "allocations are counted");
                    expect(have.y == want.y && have.dz == want.dz && have.running_mean == want.running_mean &&
                               have.running_var == want.running_var && have.sum_dy == want.sum_dy && have.tracked == 1,
                           k.what);
                }
    pretend_cache(0, 0);
}

void pool_without_memory() {
    constexpr size_t large = size_t{3} << 20;
    pool::set_limit(size_t{64} << 20);
    pool::release(pool::acquire(large));
    const size_t used = pool::statistics().used_bytes;
    const auto same = [&] { return pool::statistics().used_bytes == used; };
    each_failing("a new block", [] { pool::release(pool::acquire(size_t{5} << 20)); }, same, false);
    // what lies idle is not unmapped, and not handed out twice
    pool::Block *a = pool::acquire(large), *b = pool::acquire(large);
    expect(a->data != b->data, "two blocks");
    std::memset(a->data, 1, large), std::memset(b->data, 2, large);
    expect(*static_cast<char *>(a->data) == 1, "blocks of their own");
    pool::trim();
    each_failing("a block comes back", [&] {
        if (a) pool::release(a);
        a = nullptr;
    }, [] { return true; }, false);
    pool::release(b);
    a = pool::acquire(large), b = pool::acquire(large);
    std::memset(a->data, 1, large), std::memset(b->data, 2, large);
    pool::release(a), pool::release(b);
}

void give_back_in_time() {
    pool::set_patience(0.05);
    pool::release(pool::acquire(size_t{3} << 20));
    for (int i = 0; i < 100 && pool::statistics().idle_bytes; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    expect(pool::statistics().idle_bytes == 0, "idle blocks go back with no call");
    pool::set_patience(60);
}

void throwing_regions() {
    for (int thrower = 0; thrower < 3; ++thrower) {
        bool thrown = false;
        std::atomic<int> ran{0};
        try {
            team::parallel(3, [&](int thread, int) {
                ++ran;
                if (thread == thrower) throw std::bad_alloc();
            });
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        expect(thrown && ran == 3, "an exception comes out of its region");
    }
}

#if !defined(_WIN32)
template <class F>
bool in_child(F f) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(f() ? 0 : 1);
    int status = 0;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void forks() {
    pool::release(pool::acquire(size_t{3} << 20));
    expect(in_child([] {
               std::atomic<int> ran{0};
               team::parallel(3, [&](int, int) { ++ran; });
               const bool first = ran == 3;
               bool thrown = false;
               try {
                   team::parallel(3, [&](int thread, int) {
                       if (thread == 2) throw std::bad_alloc();
                   });
               } catch (const std::bad_alloc &) {
                   thrown = true;
               }
               pool::release(pool::acquire(size_t{3} << 20));
               return first && thrown && pool::statistics().idle_blocks == 1 && in_child([] {
                          std::atomic<int> ran{0};
                          team::parallel(2, [&](int, int) { ++ran; });
                          return ran == 2 && pool::statistics().idle_blocks == 0;
                      });
           }),
           "threads and memory in a forked child");
    // processes that keep blocks share the limit
    pool::set_limit(size_t{8} << 20);
    pool::release(pool::acquire(size_t{3} << 20));
    expect(in_child([] {
               pool::release(pool::acquire(size_t{3} << 20));
               const pool::Statistics s = pool::statistics();
               return s.share <= s.limit && (s.share < s.limit || os::take_seat() == 1);
           }),
           "a share of the limit");
}
#endif

}  // namespace

int check_faults() {
    throwing_regions();
    routes();
    pool_without_memory();
    give_back_in_time();
#if !defined(_WIN32)
    forks();
#endif
    pool::trim();
    return failures;
}
