// AVX2 with FMA and F16C. Per instruction set: see pack.h.
#pragma once
#include <immintrin.h>
#include "pack.h"

namespace bn::BN_ISA {

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

struct Halves {
    __m256i v;
    static BN_INLINE Halves load(const void *p) { return {_mm256_loadu_si256(static_cast<const __m256i *>(p))}; }
    static BN_INLINE Halves load_first(const void *p, size_t count) {
        uint16_t whole[lanes] = {};
        copy_first(whole, static_cast<const uint16_t *>(p), count);
        return load(whole);
    }
    BN_INLINE void store(void *p) const { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
    BN_INLINE void store_first(void *p, size_t count) const {
        uint16_t whole[lanes];
        store(whole);
        copy_first(static_cast<uint16_t *>(p), whole, count);
    }
    BN_INLINE void stream(void *p) const { _mm256_stream_si256(static_cast<__m256i *>(p), v); }
};

BN_INLINE Pack<float> widen(Halves h, bf16) {
    const auto half = [](__m128i x) BN_LAMBDA_INLINE {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    };
    return {{half(_mm256_castsi256_si128(h.v)), half(_mm256_extracti128_si256(h.v, 1))}};
}
BN_INLINE Pack<float> widen(Halves h, f16) {
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(h.v)), _mm256_cvtph_ps(_mm256_extracti128_si256(h.v, 1))}};
}

BN_INLINE Halves narrow(Pack<float> v, bf16) {
    __m256i w[2];
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        const __m256i u = _mm256_castps_si256(v.v[i]);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256 nan = _mm256_cmp_ps(v.v[i], v.v[i], _CMP_UNORD_Q);
        w[i] = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
    }
    return {_mm256_permute4x64_epi64(_mm256_packus_epi32(w[0], w[1]), 0xd8)};
}
BN_INLINE Halves narrow(Pack<float> v, f16) {
    return {_mm256_set_m128i(_mm256_cvtps_ph(v.v[1], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(v.v[0], _MM_FROUND_TO_NEAREST_INT))};
}

BN_INLINE Pack<double> widen(Pack<float> a) {
    Pack<double> r;
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        r.v[2 * i] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v[i]));
        r.v[2 * i + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[i], 1));
    }
    return r;
}

template <class A>
BN_INLINE Pack<A> load_first(const A *p, size_t count) {
    return load_first_by_copy(p, count);
}
template <class A>
BN_INLINE void store_first(A *p, Pack<A> v, size_t count) {
    store_first_by_copy(p, v, count);
}

BN_INLINE Pack<float> to_exponent(Pack<float> t) {
    BN_UNROLL for (int i = 0; i < 2; ++i) t.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v[i]), 23));
    return t;
}

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

inline void stream_bytes(void *to, const void *from, size_t bytes) {
    copy_lines(to, from, bytes, [](char *t, const char *f) BN_LAMBDA_INLINE {
        BN_UNROLL for (int i = 0; i < 64; i += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(t + i),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(f + i)));
    });
}
inline void fence() { _mm_sfence(); }

}  // namespace bn::BN_ISA
