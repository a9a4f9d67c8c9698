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
    static BN_INLINE V only(M m, V a) { return _mm256_and_ps(m, a); }
    static BN_INLINE V without(M m, V a) { return _mm256_andnot_ps(m, a); }
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
    static BN_INLINE V only(M m, V a) { return _mm256_and_pd(m, a); }
    static BN_INLINE V without(M m, V a) { return _mm256_andnot_pd(m, a); }
    static BN_INLINE unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
    static BN_INLINE M from_bits(unsigned b) {
        const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
        const __m256i all = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(b)), lane);
        return _mm256_castsi256_pd(_mm256_cmpeq_epi64(all, lane));
    }
};

template <class I>
BN_INLINE I read(const void *p) {
    I i;
    memcpy(&i, p, sizeof i);
    return i;
}
template <class I>
BN_INLINE void write(void *p, I i) {
    memcpy(p, &i, sizeof i);
}

// the first `bytes` < 32 of a vector; masked stores take as long as ten whole ones on some processors
BN_INLINE void store_pieces(void *p, __m256i v, size_t bytes) {
    char *to = static_cast<char *>(p);
    __m128i x = _mm256_castsi256_si128(v);
    if (bytes & 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), x);
        to += 16, x = _mm256_extracti128_si256(v, 1);
    }
    if (bytes & 8) {
        write(to, _mm_cvtsi128_si64(x));
        to += 8, x = _mm_srli_si128(x, 8);
    }
    if (bytes & 4) {
        write(to, _mm_cvtsi128_si32(x));
        to += 4, x = _mm_srli_si128(x, 4);
    }
    if (bytes & 2) write(to, static_cast<int16_t>(_mm_cvtsi128_si32(x)));
}

struct Halves {
    __m256i v;
    static BN_INLINE Halves load(const void *p) { return {_mm256_loadu_si256(static_cast<const __m256i *>(p))}; }
    static BN_INLINE Halves load_first(const void *p, size_t count) {
        const char *const from = static_cast<const char *>(p), *const rest = from + (count & 8) * 2;
        __m128i x = _mm_setzero_si128();
        if (count & 1) x = _mm_cvtsi32_si128(read<uint16_t>(rest + (count & 6) * 2));
        if (count & 2) x = _mm_or_si128(_mm_slli_si128(x, 4), _mm_cvtsi32_si128(read<int32_t>(rest + (count & 4) * 2)));
        if (count & 4) x = _mm_unpacklo_epi64(_mm_cvtsi64_si128(read<int64_t>(rest)), x);
        if (!(count & 8)) return {_mm256_zextsi128_si256(x)};
        return {_mm256_set_m128i(x, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)))};
    }
    BN_INLINE void store(void *p) const { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
    BN_INLINE void store_first(void *p, size_t count) const { store_pieces(p, v, count * 2); }
    BN_INLINE void stream(void *p) const { _mm256_stream_si256(static_cast<__m256i *>(p), v); }
};

#define BN_PERMUTES
BN_INLINE __m256 picked8(Pack<float> a, __m128i eight) {  // of 16 lanes, those that eight bytes name
    const __m256i i = _mm256_cvtepi8_epi32(eight);
    const __m256 low = _mm256_permutevar8x32_ps(a.v[0], i), high = _mm256_permutevar8x32_ps(a.v[1], i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // bit 3 says which half
}
BN_INLINE Pack<float> permute(Pack<float> a, const int8_t *which) {
    Pack<float> r;
    BN_UNROLL for (int i = 0; i < 2; ++i) r.v[i] = picked8(a, _mm_loadl_epi64(reinterpret_cast<const __m128i *>(which + 8 * i)));
    return r;
}

// The first and the third four values, the second and the fourth: so they come from one instruction a vector, and go back
// by one, where the order of memory would take three.
struct Quarters {
    static BN_INLINE Pack<float> turned(Pack<float> a) {
        Pack<float> r;
        r.v[0] = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x20), r.v[1] = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x31);
        return r;
    }
    static BN_INLINE Pack<float> load(const float *p) {
        Pack<float> r;
        BN_UNROLL for (int i = 0; i < 2; ++i)
            r.v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * i)), _mm_loadu_ps(p + 4 * i + 8), 1);
        return r;
    }
    static BN_INLINE Mask<float> mask(unsigned b) {
        Mask<float> m;
        const __m256i all = _mm256_set1_epi32(static_cast<int>(b));
        const __m256i lane[2] = {_mm256_setr_epi32(1, 2, 4, 8, 256, 512, 1024, 2048),
                                 _mm256_setr_epi32(16, 32, 64, 128, 4096, 8192, 16384, 32768)};
        BN_UNROLL for (int i = 0; i < 2; ++i)
            m.v[i] = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane[i]), lane[i]));
        return m;
    }
    static BN_INLINE unsigned bits(Mask<float> m) {
        const __m256i in_order = _mm256_packs_epi32(_mm256_castps_si256(m.v[0]), _mm256_castps_si256(m.v[1]));
        return static_cast<unsigned>(
            _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1))));
    }
    static BN_INLINE Pack<float> picked(Pack<float> in_order, const int8_t *which) {
        Pack<float> r;
        BN_UNROLL for (int i = 0; i < 2; ++i)
            r.v[i] = picked8(in_order, _mm_unpacklo_epi32(_mm_cvtsi32_si128(read<int32_t>(which + 4 * i)),
                                                          _mm_cvtsi32_si128(read<int32_t>(which + 4 * i + 8))));
        return r;
    }
};
using OrderOfBf16 = Quarters;

BN_INLINE Pack<float> widen(Halves h, bf16) {
    Pack<float> r;
    r.v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), h.v));
    r.v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), h.v));
    return r;
}
BN_INLINE Pack<float> widen(Halves h, f16) {
    Pack<float> r;
    r.v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(h.v)), r.v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h.v, 1));
    return r;
}

// The upper halves, rounded to nearest even. NaN is rare and would round to something else: one look at both vectors.
BN_INLINE Halves narrow(Pack<float> v, bf16) {
    __m256i w[2];
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        const __m256i u = _mm256_castps_si256(v.v[i]);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        w[i] = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    }
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(v.v[0], v.v[1], _CMP_UNORD_Q)), 0))
        BN_UNROLL for (int i = 0; i < 2; ++i) {
            const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v.v[i]), _mm256_set1_epi32(0x400000));
            const __m256 nan = _mm256_cmp_ps(v.v[i], v.v[i], _CMP_UNORD_Q);
            w[i] = _mm256_blendv_epi8(w[i], quiet, _mm256_castps_si256(nan));
        }
    BN_UNROLL for (int i = 0; i < 2; ++i) w[i] = _mm256_srli_epi32(w[i], 16);
    return {_mm256_packus_epi32(w[0], w[1])};
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

// all bits in the first places of a table that begins `count` before its middle
constexpr int32_t first_of[2 * lanes] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
BN_INLINE Pack<float> load_first(const float *p, size_t count) {
    Pack<float> r;
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        const int32_t *const which = first_of + lanes - count + 8 * i;
        r.v[i] = _mm256_maskload_ps(p + 8 * i, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(which)));
    }
    return r;
}
BN_INLINE Pack<double> load_first(const double *p, size_t count) {
    Pack<double> r;
    BN_UNROLL for (int i = 0; i < 4; ++i) {
        const __m128i which = _mm_loadu_si128(reinterpret_cast<const __m128i *>(first_of + lanes - count + 4 * i));
        r.v[i] = _mm256_maskload_pd(p + 4 * i, _mm256_cvtepi32_epi64(which));
    }
    return r;
}
BN_INLINE void store_first(float *p, Pack<float> v, size_t count) {
    if (count & 8) {
        _mm256_storeu_ps(p, v.v[0]);
        p += 8, v.v[0] = v.v[1];
    }
    store_pieces(p, _mm256_castps_si256(v.v[0]), (count & 7) * 4);
}
BN_INLINE void store_first(double *p, Pack<double> v, size_t count) {
    __m256d rest = v.v[0];
    BN_UNROLL for (size_t i = 1; i < 4; ++i) {
        if (count < 4 * i) break;
        _mm256_storeu_pd(p, rest);
        p += 4, rest = v.v[i];
    }
    store_pieces(p, _mm256_castpd_si256(rest), (count & 3) * 8);
}

BN_INLINE Pack<float> to_exponent(Pack<float> t) {
    BN_UNROLL for (int i = 0; i < 2; ++i) t.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v[i]), 23));
    return t;
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
