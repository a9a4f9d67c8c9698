// AVX-512 (F, BW, DQ, VL), and BF16 where the compiler's flags have it. Per instruction set: see pack.h.
#pragma once
#include <immintrin.h>
#include "pack.h"

namespace bn::BN_ISA {

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
    static BN_INLINE V only(M m, V a) { return _mm512_maskz_mov_ps(m, a); }
    static BN_INLINE V without(M m, V a) { return _mm512_maskz_mov_ps(static_cast<M>(~m), a); }
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
    static BN_INLINE V only(M m, V a) { return _mm512_maskz_mov_pd(m, a); }
    static BN_INLINE V without(M m, V a) { return _mm512_maskz_mov_pd(static_cast<M>(~m), a); }
    static BN_INLINE unsigned bits(M m) { return m; }
    static BN_INLINE M from_bits(unsigned b) { return static_cast<M>(b); }
};

struct Halves {
    __m256i v;
    static BN_INLINE Halves load(const void *p) { return {_mm256_loadu_si256(static_cast<const __m256i *>(p))}; }
    static BN_INLINE Halves load_first(const void *p, size_t count) {
        return {_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p)};
    }
    BN_INLINE void store(void *p) const { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
    BN_INLINE void store_first(void *p, size_t count) const {
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), v);
    }
    BN_INLINE void stream(void *p) const { _mm256_stream_si256(static_cast<__m256i *>(p), v); }
};

BN_INLINE Pack<float> widen(Halves h, bf16) {
    return all_of<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h.v), 16)));
}
BN_INLINE Pack<float> widen(Halves h, f16) { return all_of<float>(_mm512_cvtph_ps(h.v)); }

BN_INLINE Halves narrow(Pack<float> v, bf16) {
#if defined(__AVX512BF16__)
    return {(__m256i)_mm512_cvtneps_pbh(v.v[0])};  // subnormal numbers become 0
#else
    const __m512i u = _mm512_castps_si512(v.v[0]);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v.v[0], v.v[0], _CMP_UNORD_Q);
    return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16))};
#endif
}
BN_INLINE Halves narrow(Pack<float> v, f16) { return {_mm512_cvtps_ph(v.v[0], _MM_FROUND_TO_NEAREST_INT)}; }

BN_INLINE Pack<double> widen(Pack<float> a) {
    Pack<double> r;
    r.v[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v[0]));
    r.v[1] = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v[0]), 1)));
    return r;
}

BN_INLINE Pack<float> load_first(const float *p, size_t count) {
    return all_of<float>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
BN_INLINE Pack<double> load_first(const double *p, size_t count) {
    const unsigned which = (1u << count) - 1;
    Pack<double> r;
    r.v[0] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(which), p);
    r.v[1] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(which >> 8), p + 8);
    return r;
}
BN_INLINE void store_first(float *p, Pack<float> v, size_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v.v[0]);
}
BN_INLINE void store_first(double *p, Pack<double> v, size_t count) {
    const unsigned which = (1u << count) - 1;
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(which), v.v[0]);
    _mm512_mask_storeu_pd(p + 8, static_cast<__mmask8>(which >> 8), v.v[1]);
}

BN_INLINE Pack<float> to_exponent(Pack<float> t) {
    return all_of<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v[0]), 23)));
}

#define BN_PERMUTES
BN_INLINE Pack<float> permute(Pack<float> a, const int8_t *which) {
    const __m512i i = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(which)));
    a.v[0] = _mm512_permutexvar_ps(i, a.v[0]);
    return a;
}

using OrderOfBf16 = InOrder<float>;

inline void stream_bytes(void *to, const void *from, size_t bytes) {
    copy_lines(to, from, bytes, [](char *t, const char *f) BN_LAMBDA_INLINE {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(t), _mm512_loadu_si512(f));
    });
}
inline void fence() { _mm_sfence(); }

}  // namespace bn::BN_ISA
