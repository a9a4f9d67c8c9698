// Packs of 16 lanes over the native vectors of one instruction set. The lane count is the same everywhere, so
// every instruction set sums in the same order. Included by kernels.cpp only, inside a namespace of its own per
// instruction set: nothing here may be shared between translation units built with different flags.
#pragma once
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(BN_NO_FORCED_INLINE)  // sanitizers: checks in every copy would take the compiler for ever
#define BN_INLINE inline
#define BN_LAMBDA_INLINE
#else
#define BN_INLINE inline __attribute__((always_inline))
#define BN_LAMBDA_INLINE __attribute__((always_inline))
#endif
#define BN_UNROLL _Pragma("GCC unroll 16")

namespace bn::BN_ISA {

template <class A>
struct Native;

#if defined(__AVX512F__)
template <>
struct Native<float> {
    using V = __m512;
    using M = __mmask16;
    static constexpr int W = 16;
    static BN_INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
    static BN_INLINE void store(float *p, V v) { _mm512_storeu_ps(p, v); }
    static BN_INLINE V set1(float x) { return _mm512_set1_ps(x); }
    static BN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static BN_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
    static BN_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
    static BN_INLINE void stream(float *p, V v) { _mm512_stream_ps(p, v); }
    static BN_INLINE M lt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static BN_INLINE M le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
    static BN_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
    static BN_INLINE unsigned bits(M m) { return m; }
    static BN_INLINE M from_bits(unsigned b) { return static_cast<M>(b); }
};
template <>
struct Native<double> {
    using V = __m512d;
    using M = __mmask8;
    static constexpr int W = 8;
    static BN_INLINE V load(const double *p) { return _mm512_loadu_pd(p); }
    static BN_INLINE void store(double *p, V v) { _mm512_storeu_pd(p, v); }
    static BN_INLINE V set1(double x) { return _mm512_set1_pd(x); }
    static BN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    static BN_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
    static BN_INLINE V min(V a, V b) { return _mm512_min_pd(a, b); }
    static BN_INLINE void stream(double *p, V v) { _mm512_stream_pd(p, v); }
    static BN_INLINE M lt(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
    static BN_INLINE M le(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
    static BN_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
    static BN_INLINE unsigned bits(M m) { return m; }
    static BN_INLINE M from_bits(unsigned b) { return static_cast<M>(b); }
};
#elif defined(__AVX2__)
template <>
struct Native<float> {
    using V = __m256;
    using M = __m256;
    static constexpr int W = 8;
    static BN_INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
    static BN_INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
    static BN_INLINE V set1(float x) { return _mm256_set1_ps(x); }
    static BN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static BN_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
    static BN_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
    static BN_INLINE void stream(float *p, V v) { _mm256_stream_ps(p, v); }
    static BN_INLINE M lt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    static BN_INLINE M le(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
    static BN_INLINE V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
    static BN_INLINE unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
    static BN_INLINE M from_bits(unsigned b) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i all = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane);
        return _mm256_castsi256_ps(_mm256_cmpeq_epi32(all, lane));
    }
};
template <>
struct Native<double> {
    using V = __m256d;
    using M = __m256d;
    static constexpr int W = 4;
    static BN_INLINE V load(const double *p) { return _mm256_loadu_pd(p); }
    static BN_INLINE void store(double *p, V v) { _mm256_storeu_pd(p, v); }
    static BN_INLINE V set1(double x) { return _mm256_set1_pd(x); }
    static BN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    static BN_INLINE V max(V a, V b) { return _mm256_max_pd(a, b); }
    static BN_INLINE V min(V a, V b) { return _mm256_min_pd(a, b); }
    static BN_INLINE void stream(double *p, V v) { _mm256_stream_pd(p, v); }
    static BN_INLINE M lt(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
    static BN_INLINE M le(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
    static BN_INLINE V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
    static BN_INLINE unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
    static BN_INLINE M from_bits(unsigned b) {
        const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
        const __m256i all = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(b)), lane);
        return _mm256_castsi256_pd(_mm256_cmpeq_epi64(all, lane));
    }
};
#else
// 16-byte vectors by the compiler's own extension: SSE2 and NEON alike.
template <class A, class I, int N>
struct Generic {
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
    static BN_INLINE V fma(V a, V b, V c) {
#if defined(__aarch64__)
        if constexpr (N == 4)
            return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
        else
            return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
        return a * b + c;
#endif
    }
    static BN_INLINE V max(V a, V b) { return a > b ? a : b; }
    static BN_INLINE V min(V a, V b) { return a < b ? a : b; }
    static BN_INLINE void stream(A *p, V v) {
#if defined(__SSE2__)
        __m128i i;
        memcpy(&i, &v, sizeof i);
        _mm_stream_si128(reinterpret_cast<__m128i *>(p), i);
#else
        store(p, v);
#endif
    }
    static BN_INLINE M lt(V a, V b) { return a < b; }
    static BN_INLINE M le(V a, V b) { return a <= b; }
    static BN_INLINE V select(M m, V a, V b) { return m ? a : b; }
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
struct Native<float> : Generic<float, int32_t, 4> {};
template <>
struct Native<double> : Generic<double, int64_t, 2> {};
#endif

constexpr int lanes = 16;

template <class A>
struct Pack {
    using N = Native<A>;
    static constexpr int n = lanes / N::W;
    typename N::V v[n];
};

template <class A>
struct Mask {
    typename Native<A>::M m[Pack<A>::n];
};

#define BN_EACH BN_UNROLL for (int i = 0; i < Pack<A>::n; ++i)

template <class A>
BN_INLINE Pack<A> set1(A x) {
    Pack<A> r;
    BN_EACH r.v[i] = Native<A>::set1(x);
    return r;
}
template <class A>
BN_INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = a.v[i] + b.v[i];
    return a;
}
template <class A>
BN_INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = a.v[i] - b.v[i];
    return a;
}
template <class A>
BN_INLINE Pack<A> operator*(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = a.v[i] * b.v[i];
    return a;
}
template <class A>
BN_INLINE Pack<A> operator/(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = a.v[i] / b.v[i];
    return a;
}
template <class A>
BN_INLINE Pack<A> fma(Pack<A> a, Pack<A> b, Pack<A> c) {
    BN_EACH a.v[i] = Native<A>::fma(a.v[i], b.v[i], c.v[i]);
    return a;
}
// the second of the two where they are equal or one is NaN
template <class A>
BN_INLINE Pack<A> max(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = Native<A>::max(a.v[i], b.v[i]);
    return a;
}
template <class A>
BN_INLINE Pack<A> min(Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = Native<A>::min(a.v[i], b.v[i]);
    return a;
}
template <class A>
BN_INLINE Mask<A> lt(Pack<A> a, Pack<A> b) {
    Mask<A> r;
    BN_EACH r.m[i] = Native<A>::lt(a.v[i], b.v[i]);
    return r;
}
template <class A>
BN_INLINE Mask<A> le(Pack<A> a, Pack<A> b) {
    Mask<A> r;
    BN_EACH r.m[i] = Native<A>::le(a.v[i], b.v[i]);
    return r;
}
template <class A>
BN_INLINE Pack<A> select(Mask<A> m, Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = Native<A>::select(m.m[i], a.v[i], b.v[i]);
    return a;
}
template <class A>
BN_INLINE unsigned bits(Mask<A> m) {
    unsigned b = 0;
    BN_EACH b |= Native<A>::bits(m.m[i]) << (i * Native<A>::W);
    return b;
}
template <class A>
BN_INLINE Mask<A> mask_from(unsigned b) {
    Mask<A> m;
    BN_EACH m.m[i] = Native<A>::from_bits((b >> (i * Native<A>::W)) & ((1u << Native<A>::W) - 1));
    return m;
}
template <class A>
BN_INLINE Pack<A> keep_first(Pack<A> a, size_t count) {  // lanes from count on become 0
    return select(mask_from<A>((1u << count) - 1), a, set1<A>(0));
}
template <class A>
BN_INLINE Pack<A> load_acc(const A *p) {
    Pack<A> r;
    BN_EACH r.v[i] = Native<A>::load(p + i * Native<A>::W);
    return r;
}
template <class A>
BN_INLINE void store_acc(A *p, Pack<A> a) {
    BN_EACH Native<A>::store(p + i * Native<A>::W, a.v[i]);
}
template <class A>
BN_INLINE void stream_acc(A *p, Pack<A> a) {  // past the caches, where there is such a store; p is aligned
    BN_EACH Native<A>::stream(p + i * Native<A>::W, a.v[i]);
}
// lane i becomes lane which[i], of 16
#if defined(__AVX512F__)
#define BN_PERMUTES
BN_INLINE Pack<float> permute(Pack<float> a, const int8_t *which) {
    const __m512i i = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(which)));
    a.v[0] = _mm512_permutexvar_ps(i, a.v[0]);
    return a;
}
#elif defined(__AVX2__)
#define BN_PERMUTES
BN_INLINE Pack<float> permute(Pack<float> a, const int8_t *which) {
    Pack<float> r;
    BN_UNROLL for (int k = 0; k < 2; ++k) {
        const __m256i i = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(which + 8 * k)));
        const __m256 low = _mm256_permutevar8x32_ps(a.v[0], i), high = _mm256_permutevar8x32_ps(a.v[1], i);
        r.v[k] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // bit 3 says which half
    }
    return r;
}
#endif
template <class A>
BN_INLINE double sum_lanes(Pack<A> a) {  // a fixed tree, in double
    A x[lanes];
    store_acc(x, a);
    double s[8];
    for (int i = 0; i < 8; ++i) s[i] = static_cast<double>(x[i]) + static_cast<double>(x[i + 8]);
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
BN_INLINE Pack<double> widen(Pack<double> a) { return a; }
BN_INLINE Pack<double> widen(Pack<float> a) {
    Pack<double> r;
#if defined(__AVX512F__)
    r.v[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v[0]));
    r.v[1] = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v[0]), 1)));
#elif defined(__AVX2__)
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        r.v[2 * i] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v[i]));
        r.v[2 * i + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[i], 1));
    }
#else
    float x[lanes];
    double y[lanes];
    store_acc(x, a);
    for (int i = 0; i < lanes; ++i) y[i] = x[i];
    r = load_acc(y);
#endif
    return r;
}

}  // namespace bn::BN_ISA
