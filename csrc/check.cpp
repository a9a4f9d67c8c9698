// The core without Python: small runs of every operation, type, activation and path, for the sanitizers and valgrind.
// Also compares each with a plain loop in double, and thread counts with one another bit for bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "memory_pool.h"
#include "problem.h"
#include "team.h"

// A team for this program: threads made for the call. The core finds it by name, as it finds the framework's.
namespace {
thread_local int own_number = 0, own_count = 1;
int wanted = 1;
}  // namespace
extern "C" {
__attribute__((visibility("default"))) void GOMP_parallel(void (*f)(void *), void *data, unsigned count, unsigned) {
    faults::exempt = true;
    std::vector<std::thread> team;
    for (unsigned i = 1; i < count; ++i)
        team.emplace_back([=] {
            own_number = static_cast<int>(i), own_count = static_cast<int>(count);
            f(data);
        });
    own_count = static_cast<int>(count);
    faults::exempt = false;
    f(data);
    own_count = 1;
    for (auto &t : team) t.join();
}
__attribute__((visibility("default"))) int omp_get_thread_num() { return own_number; }
__attribute__((visibility("default"))) int omp_get_num_threads() { return own_count; }
__attribute__((visibility("default"))) int omp_get_max_threads() { return wanted; }
__attribute__((visibility("default"))) int omp_in_parallel() { return own_count > 1; }
}

namespace {

using namespace bn;

int failures = 0;

float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

double get(const std::vector<char> &v, DType t, int64_t i) {
    switch (t) {
        case DType::f64: {
            double x;
            std::memcpy(&x, &v[static_cast<size_t>(i) * 8], 8);
            return x;
        }
        case DType::f32: {
            float x;
            std::memcpy(&x, &v[static_cast<size_t>(i) * 4], 4);
            return x;
        }
        default: {
            uint16_t h;
            std::memcpy(&h, &v[static_cast<size_t>(i) * 2], 2);
            if (t == DType::bf16) return from_bits(static_cast<uint32_t>(h) << 16);
            const int exponent = (h >> 10) & 31, mantissa = h & 1023;
            const double m = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            return h & 0x8000 ? -m : m;
        }
    }
}

void put(std::vector<char> &v, DType t, int64_t i, double x) {
    if (t == DType::f64) return void(std::memcpy(&v[static_cast<size_t>(i) * 8], &x, 8));
    const float f = static_cast<float>(x);
    if (t == DType::f32) return void(std::memcpy(&v[static_cast<size_t>(i) * 4], &f, 4));
    uint32_t u;
    std::memcpy(&u, &f, 4);
    uint16_t h = static_cast<uint16_t>(u >> 16);
    if (t == DType::f16) {  // multiples of 1/64 below 8 in size are exact
        const double a = std::fabs(x);
        int e = 0;
        const double m = a > 0 ? std::frexp(a, &e) : 0;  // a = m 2^e, m in [1/2, 1)
        h = a > 0 ? static_cast<uint16_t>(((e + 14) << 10) | (static_cast<int>(std::ldexp(m, 11)) & 1023)) : 0;
        if (x < 0) h |= 0x8000;
    }
    std::memcpy(&v[static_cast<size_t>(i) * 2], &h, 2);
}

double activate(Activation a, double u) {
    switch (a) {
        case Activation::relu: return u > 0 ? u : 0;
        case Activation::relu6: return u > 0 ? (u < 6 ? u : 6) : 0;
        case Activation::leaky_relu: return u > 0 ? u : 0.01 * u;
        case Activation::silu: return u / (1 + std::exp(-u));
        case Activation::hardswish: return u * std::fmin(std::fmax(u + 3, 0), 6) / 6;
        case Activation::sigmoid: return 1 / (1 + std::exp(-u));
        case Activation::tanh: return std::tanh(u);
        case Activation::gelu: return 0.5 * u * std::erfc(-u / std::sqrt(2.0));
        default: return u;
    }
}

void expect(bool good, const char *what, const Shape &x, Activation a) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s: dtype %d layout %d n %lld c %lld s %lld activation %d isa %s\n", what,
                static_cast<int>(x.dtype), static_cast<int>(x.layout), static_cast<long long>(x.n),
                static_cast<long long>(x.c), static_cast<long long>(x.s), static_cast<int>(a), kernels().isa);
}

template <class A>
struct Result {
    std::vector<char> y, dz, dr;
    std::vector<A> mean, var, inv_std, sum_dy, sum_dy_zhat, running_mean, running_var;
    bool operator==(const Result &o) const {
        return y == o.y && dz == o.dz && dr == o.dr && mean == o.mean && var == o.var && inv_std == o.inv_std &&
               sum_dy == o.sum_dy && sum_dy_zhat == o.sum_dy_zhat && running_mean == o.running_mean;
    }
};

template <class A>
Result<A> once(const Shape &x, Activation a, bool residual, int threads, const std::vector<char> &z,
               const std::vector<char> &r, const std::vector<char> &dy, const Keep *keep = nullptr) {
    const size_t c = static_cast<size_t>(x.c), bytes = z.size();
    Result<A> out;
    out.y.resize(bytes), out.dz.resize(bytes), out.dr.resize(residual ? bytes : 0);
    for (auto *v : {&out.mean, &out.var, &out.inv_std, &out.sum_dy, &out.sum_dy_zhat, &out.running_mean, &out.running_var})
        v->assign(c, A{0});
    std::vector<A> gamma(c), beta(c);
    for (size_t i = 0; i < c; ++i) gamma[i] = static_cast<A>(0.5 + 0.01 * double(i % 50)), beta[i] = static_cast<A>(0.1 * double(i % 7));
    std::vector<uint8_t> mask(static_cast<size_t>(Sides(x).bytes()));
    int64_t tracked = 0;
    bool skipped = false;
    const bool with_mask = residual && piecewise_linear(a);
    ForwardProblem<A> f;
    f.shape = x, f.activation = a, f.z = z.data(), f.y = out.y.data(), f.residual = residual ? r.data() : nullptr;
    f.mask = with_mask ? mask.data() : nullptr;
    f.gamma = gamma.data(), f.beta = beta.data();
    f.mean = out.mean.data(), f.var = out.var.data(), f.inv_std = out.inv_std.data(), f.eps = 1e-5;
    f.tracking.running_mean = out.running_mean.data(), f.tracking.running_var = out.running_var.data();
    f.tracking.num_batches_tracked = &tracked, f.skipped = &skipped;
    f.threads = threads;
    f.keep = keep;
    forward(f);
    BackwardProblem<A> b;
    b.keep = keep;
    b.shape = x, b.activation = a, b.dy = dy.data(), b.z = z.data(), b.dz = out.dz.data();
    b.dresidual = residual ? out.dr.data() : nullptr;
    b.saved = !residual || a == Activation::identity ? nullptr : with_mask ? static_cast<const void *>(mask.data()) : r.data();
    b.gamma = gamma.data(), b.beta = beta.data(), b.mean = out.mean.data(), b.inv_std = out.inv_std.data();
    b.sum_dy = out.sum_dy.data(), b.sum_dy_zhat = out.sum_dy_zhat.data();
    b.count = static_cast<double>(keep ? keep->count : x.n * x.s), b.threads = threads;
    backward(b);

    // the same in parts must be the same in bits
    std::vector<char> y2(bytes), dz2(bytes);
    std::vector<A> mean2(c), m2(c);
    ForwardProblem<A> s = f;
    s.parts = statistics, s.y = nullptr, s.mask = nullptr, s.residual = nullptr, s.mean = mean2.data(), s.m2 = m2.data();
    s.var = s.inv_std = nullptr, s.tracking = {};
    forward(s);
    ForwardProblem<A> n = f;
    n.parts = normalization, n.y = y2.data(), n.mask = nullptr, n.tracking = {};
    forward(n);
    expect(mean2 == out.mean && y2 == out.y, "forward in parts", x, a);
    if (tracked != 1 || skipped) expect(false, "tracking", x, a);
    return out;
}

template <class A>
void check(const Shape &x, Activation a, bool residual) {
    const int64_t count = x.n * x.c * x.s;
    const size_t bytes = static_cast<size_t>(count) * element_size(x.dtype);
    std::vector<char> z(bytes), r(bytes), dy(bytes);
    uint32_t seed = 12345;
    const auto draw = [&] {
        seed = seed * 1664525u + 1013904223u;
        return (static_cast<int>(seed >> 24) - 128) / 64.0;  // exact in every type
    };
    for (int64_t i = 0; i < count; ++i) put(z, x.dtype, i, draw()), put(r, x.dtype, i, draw()), put(dy, x.dtype, i, draw());
    const Result<A> one = once<A>(x, a, residual, 1, z, r, dy);
    for (int threads : {2, 3}) {
        wanted = threads;
        expect(one == once<A>(x, a, residual, threads, z, r, dy), "same bits for every number of threads", x, a);
    }
    const double tolerance = x.dtype == DType::f64 ? 1e-12 : x.dtype == DType::f32 ? 1e-5 : x.dtype == DType::f16 ? 2e-3 : 1.6e-2;
    for (int64_t c = 0; c < x.c; ++c) {
        const auto at = [&](int64_t i) { return x.layout == Layout::rc ? i * x.c + c : (i / x.s * x.c + c) * x.s + i % x.s; };
        const int64_t m = x.n * x.s;
        double mean = 0, var = 0;
        for (int64_t i = 0; i < m; ++i) mean += get(z, x.dtype, at(i)) / double(m);
        for (int64_t i = 0; i < m; ++i) var += std::pow(get(z, x.dtype, at(i)) - mean, 2) / double(m);
        const size_t k = static_cast<size_t>(c);
        expect(std::fabs(double(one.mean[k]) - mean) < 1e-5 && std::fabs(double(one.var[k]) - var) < 1e-5 * (1 + var), "moments", x, a);
        for (int64_t i = 0; i < m; ++i) {
            const double u = (0.5 + 0.01 * double(c % 50)) * (get(z, x.dtype, at(i)) - mean) / std::sqrt(var + 1e-5) +
                             0.1 * double(c % 7) + (residual ? get(r, x.dtype, at(i)) : 0);
            const double want = activate(a, u), have = get(one.y, x.dtype, at(i));
            if (!(std::fabs(have - want) <= tolerance * (1 + std::fabs(want)))) return expect(false, "output", x, a);
        }
    }
}

// What a mask leaves out is NaN here: it must be in no sum, and 0 in every output.
template <class A>
void check_masked(const Shape &x, Activation a, bool residual, int kind) {
    const int64_t count = x.n * x.c * x.s, m = x.n * x.s;
    const size_t bytes = static_cast<size_t>(count) * element_size(x.dtype);
    std::vector<uint8_t> kept(static_cast<size_t>(m));
    int64_t kept_count = 0;
    uint32_t seed = 54321;
    const auto draw = [&] { return (seed = seed * 1664525u + 1013904223u) >> 24; };
    for (int64_t i = 0; i < m; ++i) {
        // at random, the beginning of each sample, whole samples, a single position, none
        const bool of_kind[] = {draw() < 128, i % x.s <= x.s * (i / x.s + 1) / x.n / 2, i / x.s % 3 == 1, i == m / 2, false};
        kept_count += kept[static_cast<size_t>(i)] = of_kind[kind];
    }
    const Keep keep(x, kept.data(), kept_count);
    const auto at = [&](int64_t i, int64_t c) { return x.layout == Layout::rc ? i * x.c + c : (i / x.s * x.c + c) * x.s + i % x.s; };
    std::vector<char> z(bytes), r(bytes), dy(bytes);
    for (int64_t c = 0; c < x.c; ++c)
        for (int64_t i = 0; i < m; ++i)
            for (auto *v : {&z, &r, &dy})
                put(*v, x.dtype, at(i, c), kept[static_cast<size_t>(i)] ? (static_cast<int>(draw()) - 128) / 64.0 : NAN);
    const Result<A> one = once<A>(x, a, residual, 1, z, r, dy, &keep);
    wanted = 3;
    expect(one == once<A>(x, a, residual, 3, z, r, dy, &keep), "masked: same bits for every number of threads", x, a);
    if (!kept_count) {
        const auto all_zero = [](const std::vector<char> &v) { return v == std::vector<char>(v.size(), 0); };
        return expect(all_zero(one.y) && all_zero(one.dz) && all_zero(one.dr), "nothing is kept", x, a);
    }
    const double n = static_cast<double>(kept_count);
    const double tolerance = x.dtype == DType::f64 ? 1e-11 : x.dtype == DType::f32 ? 3e-5 : x.dtype == DType::f16 ? 4e-3 : 3e-2;
    for (int64_t c = 0; c < x.c; ++c) {
        const auto each = [&](const auto &f) {
            for (int64_t i = 0; i < m; ++i)
                if (kept[static_cast<size_t>(i)]) f(i);
        };
        double mean = 0, var = 0, sum = 0, product = 0;
        each([&](int64_t i) { mean += get(z, x.dtype, at(i, c)) / n; });
        each([&](int64_t i) { var += std::pow(get(z, x.dtype, at(i, c)) - mean, 2) / n; });
        const double scale = 0.5 + 0.01 * double(c % 50), inv = 1 / std::sqrt(var + 1e-5);
        const auto normal = [&](int64_t i) { return (get(z, x.dtype, at(i, c)) - mean) * inv; };
        const auto before = [&](int64_t i) { return scale * normal(i) + 0.1 * double(c % 7) + (residual ? get(r, x.dtype, at(i, c)) : 0); };
        // the derivative by differences, away from the kinks
        const auto gradient = [&](int64_t i) { return get(dy, x.dtype, at(i, c)) * (activate(a, before(i) + 1e-6) - activate(a, before(i) - 1e-6)) / 2e-6; };
        bool by_a_kink = false;
        each([&](int64_t i) {
            sum += gradient(i), product += gradient(i) * normal(i);
            for (double kink : {-3.0, 0.0, 3.0, 6.0}) by_a_kink |= std::fabs(before(i) - kink) < 1e-4;
        });
        for (int64_t i = 0; i < m; ++i) {
            const bool here = kept[static_cast<size_t>(i)];
            const double y = here ? activate(a, before(i)) : 0;
            if (!(std::fabs(get(one.y, x.dtype, at(i, c)) - y) <= tolerance * (1 + std::fabs(y)))) return expect(false, "masked output", x, a);
            const double dz = here ? scale * inv * (gradient(i) - sum / n - normal(i) * product / n) : 0;
            const double have = get(one.dz, x.dtype, at(i, c));
            if (!here && have != 0) return expect(false, "masked gradient: 0", x, a);
            if (kept_count > 1 && !by_a_kink && !(std::fabs(have - dz) <= 4 * (tolerance + 1e-8) * scale * inv * 4))
                return expect(false, "masked gradient", x, a);
        }
    }
}

}  // namespace

int main(int argc, char **argv) {
    const bool brief = argc > 1 && !std::strcmp(argv[1], "--brief");
    team::resolve();
    std::printf("threads: %s\n", team::runtime());
    std::string isas = available_isas();
    for (char *isa = std::strtok(isas.data(), " "); isa; isa = std::strtok(nullptr, " "))
        for (size_t last : {size_t{0}, size_t{16} << 10}) {  // this machine's caches, and such as nothing fits
        select_isa(isa);
        pretend_cache(last / 4, last);
        for (int dtype = 0; dtype < 4; ++dtype)
            for (int act = 0; act < activation_count; ++act)
                for (int residual = 0; residual < 2; ++residual) {
                    struct Case {
                        Layout layout;
                        int64_t n, c, s;
                    };
                    const Case cases[] = {{Layout::ncs, 3, 5, 49},  {Layout::ncs, 2, 3, 90},    {Layout::ncs, 40, 70, 4},
                                          {Layout::ncs, 1, 1, 5000}, {Layout::ncs, 2, 3, 2500}, {Layout::rc, 70, 33, 1},
                                          {Layout::rc, 9000, 5, 1},  {Layout::rc, 200, 300, 1}, {Layout::rc, 2, 1, 1},
                                          {Layout::ncs, 2, 1, 1030}, {Layout::ncs, 129, 65, 65}};
                    for (const Case &k : cases) {
                        if (brief && (k.n * k.c * k.s > 6000 || (act > 2 && dtype))) continue;
                        const int64_t sn = k.c * k.s;
                        Shape x{static_cast<DType>(dtype), k.layout, k.n, k.c, k.s, sn, k.s};
                        x.form = natural_form(x);
                        if (x.dtype == DType::f64)
                            check<double>(x, static_cast<Activation>(act), residual);
                        else
                            check<float>(x, static_cast<Activation>(act), residual);
                        for (int kind = 0; kind < 5; ++kind) {
                            if (kind > 1 && act > 2) continue;
                            if (x.dtype == DType::f64)
                                check_masked<double>(x, static_cast<Activation>(act), residual, kind);
                            else
                                check_masked<float>(x, static_cast<Activation>(act), residual, kind);
                        }
                        if (x.form != Form::side_by_side) continue;
                        x.form = Form::columns;  // as a mask takes rows of whole vectors, see arguments.h
                        if (x.dtype == DType::f64)
                            check_masked<double>(x, static_cast<Activation>(act), residual, 0);
                        else
                            check_masked<float>(x, static_cast<Activation>(act), residual, 0);
                    }
                }
        std::printf("%s, last level %zu KiB: %d failures\n", isa, cache().last >> 10, failures);
    }
    pretend_cache(0, 0);
    pool::set_limit(size_t{256} << 20);
    pool::release(pool::acquire(size_t{1} << 20));  // now this process counts those that share the limit with it
    const size_t unit = pool::statistics().share / 16;
    std::vector<pool::Block *> blocks;
    for (size_t i = 1; i <= 6; ++i) {
        blocks.push_back(pool::acquire(i * unit));
        std::memset(blocks.back()->data, 1, i * unit);
    }
    for (pool::Block *b : blocks) pool::release(b);
    if (pool::statistics().idle_bytes > pool::statistics().limit) ++failures, std::printf("FAILED pool limit\n");
    pool::release(pool::acquire(6 * unit));
    if (pool::statistics().hits == 0) ++failures, std::printf("FAILED pool reuse\n");
    pool::trim();
    if (pool::statistics().idle_bytes != 0 || pool::statistics().used_bytes != 0) ++failures, std::printf("FAILED pool trim\n");
    failures += check_faults();
    std::printf("%s\n", failures ? "FAILED" : "all good");
    return failures != 0;
}
