// What instruction sets with vectors of 16 bytes share, by the compiler's own vectors. The header that includes this
// one has defined fused(a, b, c) = a * b + c, past_caches(p, v), stream_bytes and fence. Per instruction set: see pack.h.
#pragma once
#include "pack.h"

namespace bn::BN_ISA {

template <class A, class I, int N>
struct Vector16 {
    typedef A V __attribute__((vector_size(16)));
    typedef I M __attribute__((vector_size(16)));
    static constexpr int W = N;
    static BN_INLINE V load(const A *p) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static BN_INLINE void store(A *p, V v) { memcpy(p, &v, sizeof v); }
    static BN_INLINE V set1(A x) { return V{} + x; }
    static BN_INLINE V fma(V a, V b, V c) { return fused(a, b, c); }
    static BN_INLINE void stream(A *p, V v) { past_caches(p, v); }
    static BN_INLINE V max(V a, V b) { return a > b ? a : b; }
    static BN_INLINE V min(V a, V b) { return a < b ? a : b; }
    static BN_INLINE M lt(V a, V b) { return a < b; }
    static BN_INLINE M le(V a, V b) { return a <= b; }
    static BN_INLINE V select(M m, V a, V b) { return m ? a : b; }
    static BN_INLINE V only(M m, V a) { return (V)(m & (M)a); }
    static BN_INLINE V without(M m, V a) { return (V)(~m & (M)a); }
    static BN_INLINE unsigned bits(M m) {
        unsigned b = 0;
        BN_UNROLL for (int i = 0; i < N; ++i) b |= static_cast<unsigned>(m[i] & 1) << i;
        return b;
    }
    static BN_INLINE M from_bits(unsigned b) {
        M m;
        BN_UNROLL for (int i = 0; i < N; ++i) m[i] = -static_cast<I>((b >> i) & 1);
        return m;
    }
};
template <>
struct Native<float> : Vector16<float, int32_t, 4> {};
template <>
struct Native<double> : Vector16<double, int64_t, 2> {};

struct Halves {
    uint16_t v[lanes];
    static BN_INLINE Halves load(const void *p) {
        Halves h;
        memcpy(h.v, p, sizeof h.v);
        return h;
    }
    static BN_INLINE Halves load_first(const void *p, size_t count) {
        Halves h{};
        copy_first(h.v, static_cast<const uint16_t *>(p), count);
        return h;
    }
    BN_INLINE void store(void *p) const { memcpy(p, v, sizeof v); }
    BN_INLINE void store_first(void *p, size_t count) const { copy_first(static_cast<uint16_t *>(p), v, count); }
    BN_INLINE void stream(void *p) const {
        typedef float V __attribute__((vector_size(16)));
        for (int i = 0; i < 2; ++i) {
            V half;
            memcpy(&half, v + 8 * i, sizeof half);
            past_caches(static_cast<float *>(p) + 4 * i, half);
        }
    }
};

// round to nearest even; NaN stays a (quiet) NaN
inline uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline float from_f16(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t body = h & 0x7fffu;
    // shift exponent and mantissa into place, then a multiplication re-biases and normalizes subnormals
    uint32_t u = body << 13;
    float x;
    memcpy(&x, &u, 4);
    x *= 0x1p112f;
    memcpy(&u, &x, 4);
    if (body >= 0x7c00u) u |= 0x7f800000u;
    u |= sign;
    memcpy(&x, &u, 4);
    return x;
}

inline uint16_t to_f16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    uint32_t h;
    if (u >= 0x47800000u) {  // 65536 and above, inf, NaN
        h = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (u < 0x38800000u) {  // below 2^-14: adding 0.5 makes the hardware round to a multiple of 2^-24
        float f;
        memcpy(&f, &u, 4);
        f += 0.5f;
        memcpy(&h, &f, 4);
        h -= 0x3f000000u;
    } else {
        const uint32_t odd = (u >> 13) & 1u;
        h = (u - 0x38000000u + 0xfffu + odd) >> 13;  // may carry into infinity, as it should
    }
    return static_cast<uint16_t>(h | sign);
}

BN_INLINE Pack<float> widen(Halves h, bf16) {
    uint32_t u[lanes];
    float x[lanes];
    for (int i = 0; i < lanes; ++i) u[i] = static_cast<uint32_t>(h.v[i]) << 16;
    memcpy(x, u, sizeof x);
    return load_acc(x);
}
BN_INLINE Pack<float> widen(Halves h, f16) {
    float x[lanes];
    for (int i = 0; i < lanes; ++i) x[i] = from_f16(h.v[i]);
    return load_acc(x);
}
BN_INLINE Halves narrow(Pack<float> v, bf16) {
    float x[lanes];
    Halves h;
    store_acc(x, v);
    for (int i = 0; i < lanes; ++i) h.v[i] = to_bf16(x[i]);
    return h;
}
BN_INLINE Halves narrow(Pack<float> v, f16) {
    float x[lanes];
    Halves h;
    store_acc(x, v);
    for (int i = 0; i < lanes; ++i) h.v[i] = to_f16(x[i]);
    return h;
}

BN_INLINE Pack<double> widen(Pack<float> a) {
    float x[lanes];
    double y[lanes];
    store_acc(x, a);
    for (int i = 0; i < lanes; ++i) y[i] = x[i];
    return load_acc(y);
}

template <class A>
BN_INLINE Pack<A> load_first(const A *p, size_t count) {
    return load_first_by_copy(p, count);
}
template <class A>
BN_INLINE void store_first(A *p, Pack<A> v, size_t count) {
    store_first_by_copy(p, v, count);
}

using OrderOfBf16 = InOrder<float>;

BN_INLINE Pack<float> to_exponent(Pack<float> t) {
    typedef uint32_t U __attribute__((vector_size(16)));
    BN_UNROLL for (int i = 0; i < 4; ++i) t.v[i] = (Native<float>::V)(((U)t.v[i]) << 23);
    return t;
}

}  // namespace bn::BN_ISA
