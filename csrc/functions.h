// exp, sigmoid, tanh and the normal distribution, on packs of floats, to a few units in the last place; on packs
// of doubles by the C library, lane by lane. Polynomials fitted for these ranges (Chebyshev nodes, Lawson weights).
// Per instruction set, like simd/pack.h.
#pragma once
#include <math.h>
#include "simd/simd.h"

namespace bn::BN_ISA {

// e^x within 2 ulp on [-87, 88]; outside it stays at the value of the nearer end; NaN stays NaN
BN_INLINE Pack<float> exp(Pack<float> x) {
    const Pack<float> low = set1(-87.0f), high = set1(88.0f);
    x = select(lt(x, low), low, x);
    x = select(lt(high, x), high, x);
    const Pack<float> magic = set1(12583039.0f);  // 1.5 * 2^23 + 127: rounds, and biases the exponent
    const Pack<float> t = fma(x, set1(0x1.715476p+0f), magic);
    const Pack<float> n = t - magic;
    Pack<float> r = fma(n, set1(-0x1.62ep-1f), x);
    r = fma(n, set1(-0x1.0bfbe8p-15f), r);
    Pack<float> p = set1(0x1.6d7c42p-10f);
    p = fma(p, r, set1(0x1.121070p-7f));
    p = fma(p, r, set1(0x1.5554b2p-5f));
    p = fma(p, r, set1(0x1.5554d8p-3f));
    p = fma(p, r, set1(0.5f));
    p = fma(p * r, r, r) + set1(1.0f);
    return p * to_exponent(t);  // a product, so that NaN stays NaN
}

BN_INLINE Pack<float> sigmoid(Pack<float> x) {
    const Pack<float> one = set1(1.0f);
    return one / (one + exp(set1(0.0f) - x));
}

BN_INLINE Pack<float> tanh(Pack<float> x) {
    const Pack<float> s = x * x;
    Pack<float> p = set1(-0x1.90a246p-8f);
    p = fma(p, s, set1(0x1.583aa8p-6f));
    p = fma(p, s, set1(-0x1.b92c2cp-5f));
    p = fma(p, s, set1(0x1.110e3ep-3f));
    p = fma(p, s, set1(-0x1.555552p-2f));
    const Pack<float> small = fma(x * s, p, x);
    const Pack<float> big = set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));
    return select(lt(s, set1(0.390625f)), small, big);
}

// Phi(x) of the standard normal distribution and its density. erfc(t) = w exp(-t^2) P(w), w = 1 / (1 + t/2).
BN_INLINE void normal(Pack<float> x, Pack<float> &cdf, Pack<float> &pdf) {
    const Pack<float> zero = set1(0.0f), one = set1(1.0f), half = set1(0.5f);
    const Mask<float> negative = lt(x, zero);
    Pack<float> t = select(negative, zero - x, x) * set1(0x1.6a09e6p-1f);
    t = select(lt(set1(10.0f), t), set1(10.0f), t);
    const Pack<float> w = one / fma(half, t, one);
    Pack<float> p = set1(0x1.21ccaap-5f);
    p = fma(p, w, set1(-0x1.8279ccp-3f));
    p = fma(p, w, set1(0x1.805f90p-2f));
    p = fma(p, w, set1(-0x1.1f3d14p-2f));
    p = fma(p, w, set1(-0x1.f5f012p-6f));
    p = fma(p, w, set1(0x1.4f0f28p-5f));
    p = fma(p, w, set1(0x1.ae7528p-5f));
    p = fma(p, w, set1(0x1.7d6f8ep-3f));
    p = fma(p, w, set1(0x1.f5e418p-3f));
    p = fma(p, w, set1(0x1.2109ccp-2f));
    p = fma(p, w, set1(0x1.20dbaep-2f));
    const Pack<float> e = exp(zero - x * x * half);
    const Pack<float> tail = half * w * p * e;
    cdf = select(negative, tail, one - tail);
    pdf = e * set1(0x1.988454p-2f);
}

template <class F>
BN_INLINE Pack<double> each_lane(Pack<double> x, F f) {
    double y[lanes];
    store_acc(y, x);
    for (int i = 0; i < lanes; ++i) y[i] = f(y[i]);
    return load_acc(y);
}
BN_INLINE Pack<double> sigmoid(Pack<double> x) {
    return each_lane(x, [](double v) { return 1.0 / (1.0 + ::exp(-v)); });
}
BN_INLINE Pack<double> tanh(Pack<double> x) {
    return each_lane(x, [](double v) { return ::tanh(v); });
}
BN_INLINE void normal(Pack<double> x, Pack<double> &cdf, Pack<double> &pdf) {
    cdf = each_lane(x, [](double v) { return 0.5 * ::erfc(-v * 0.70710678118654752440); });
    pdf = each_lane(x, [](double v) { return ::exp(-0.5 * v * v) * 0.39894228040143267794; });
}

}  // namespace bn::BN_ISA
