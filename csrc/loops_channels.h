// What is computed once a channel, for some of them at a time: plain loops that the compiler makes vectors of. Division
// and root are exact to the last bit everywhere, so every instruction set gives the same. Per instruction set.
#pragma once
#include <math.h>

namespace bn::BN_ISA {

template <class A>
struct Unsigned {
    using Type = uint32_t;
};
template <>
struct Unsigned<double> {
    using Type = uint64_t;
};

template <class A>
void inverse_deviations(const A *var, double eps, size_t count, A *out) {
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<A>(1.0 / sqrt(static_cast<double>(var[i]) + eps));
}

// `sums` are about `center`
template <class A>
void channel_moments(const Sums *sums, const A *center, size_t count, double m, double eps, const ChannelMoments<A> &out) {
    const double each = m > 0 ? 1 / m : 0;  // one division for all: they take as long as ten multiplications
    for (size_t i = 0; i < count; ++i) {
        const double off = sums[i].a * each, square = sums[i].b - sums[i].a * off;
        out.exact_mean[i] = static_cast<double>(center[i]) + off;
        out.exact_m2[i] = square < 0 ? 0 : square;  // NaN stays NaN
    }
    for (size_t i = 0; i < count; ++i) out.mean[i] = static_cast<A>(out.exact_mean[i]);
    if (out.var)
        for (size_t i = 0; i < count; ++i) out.var[i] = static_cast<A>(out.exact_m2[i] * each);
    if (out.inv_std)
        for (size_t i = 0; i < count; ++i)
            out.inv_std[i] = static_cast<A>(1.0 / sqrt(out.exact_m2[i] * each + eps));
}

// whether all are finite, where that is asked; then the running ones have moved
template <class A>
bool move(const A *mean, const double *m2, size_t count, double divisor, double weight, bool only_finite, A *running_mean,
          A *running_var) {
    using Bits = typename Unsigned<A>::Type;
    constexpr Bits exponent = sizeof(A) == 8 ? static_cast<Bits>(0x7ff0000000000000ull) : static_cast<Bits>(0x7f800000u);
    A var[channels_at_once];
    const double each = 1 / divisor;
    for (size_t i = 0; i < count; ++i) var[i] = static_cast<A>(m2[i] * each);
    if (only_finite) {
        unsigned bad = 0;
        for (size_t i = 0; i < count; ++i) {
            Bits a, b;
            memcpy(&a, mean + i, sizeof a);
            memcpy(&b, var + i, sizeof b);
            bad |= ((a & exponent) == exponent) | ((b & exponent) == exponent);
        }
        if (bad) return false;
    }
    const double rest = 1.0 - weight;
    for (size_t i = 0; i < count; ++i)
        running_mean[i] = static_cast<A>(rest * static_cast<double>(running_mean[i]) + weight * static_cast<double>(mean[i]));
    for (size_t i = 0; i < count; ++i)
        running_var[i] = static_cast<A>(rest * static_cast<double>(running_var[i]) + weight * static_cast<double>(var[i]));
    return true;
}

// an infinite count: the statistics are constants, and a NaN in the sums must not spread through them
template <class A>
void input_constants(const Sums *sums, const A *inv_std, size_t count, double m, A *k0, A *k1) {
    if (isinf(m)) {
        for (size_t i = 0; i < count; ++i) k0[i] = k1[i] = 0;
        return;
    }
    const double each = -1 / m;
    for (size_t i = 0; i < count; ++i) {
        k0[i] = static_cast<A>(sums[i].a * each);
        k1[i] = static_cast<A>(sums[i].b * each * static_cast<double>(inv_std[i]));
    }
}

}  // namespace bn::BN_ISA
