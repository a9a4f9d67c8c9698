// Loading and storing 16 elements of any type as a pack of its accumulator type. Per instruction set, like simd.h.
#pragma once
#include "dtypes.h"
#include "simd.h"

namespace bn::BN_ISA {

template <class T>
struct Element;

template <class A>
struct Plain {
    using Acc = A;
    static BN_INLINE Pack<A> load(const A *p) { return load_acc(p); }
    static BN_INLINE void store(A *p, Pack<A> v) { store_acc(p, v); }
    static BN_INLINE void stream(A *p, Pack<A> v) { stream_acc(p, v); }
};

// 16 elements of two bytes, in the registers of this instruction set
struct Halves {
#if defined(__AVX2__)
    __m256i v;
#else
    uint16_t v[lanes];
#endif
    BN_INLINE void store(void *p) const {
#if defined(__AVX2__)
        _mm256_storeu_si256(static_cast<__m256i *>(p), v);
#else
        memcpy(p, v, sizeof v);
#endif
    }
    BN_INLINE void stream(void *p) const {
#if defined(__AVX2__)
        _mm256_stream_si256(static_cast<__m256i *>(p), v);
#elif defined(__SSE2__)
        for (int i = 0; i < 2; ++i)
            _mm_stream_si128(static_cast<__m128i *>(p) + i, _mm_loadu_si128(reinterpret_cast<const __m128i *>(v) + i));
#else
        store(p);
#endif
    }
};

template <>
struct Element<float> : Plain<float> {};
template <>
struct Element<double> : Plain<double> {};

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

BN_INLINE Halves narrow(Pack<float> v, bf16) {
    Halves h;
#if defined(__AVX512BF16__)
    h.v = (__m256i)_mm512_cvtneps_pbh(v.v[0]);  // subnormal numbers become 0
#elif defined(__AVX512F__)
    const __m512i u = _mm512_castps_si512(v.v[0]);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v.v[0], v.v[0], _CMP_UNORD_Q);
    h.v = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#elif defined(__AVX2__)
    __m256i w[2];
    BN_UNROLL for (int i = 0; i < 2; ++i) {
        const __m256i u = _mm256_castps_si256(v.v[i]);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256 nan = _mm256_cmp_ps(v.v[i], v.v[i], _CMP_UNORD_Q);
        w[i] = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
    }
    h.v = _mm256_permute4x64_epi64(_mm256_packus_epi32(w[0], w[1]), 0xd8);
#else
    float x[lanes];
    store_acc(x, v);
    for (int i = 0; i < lanes; ++i) h.v[i] = to_bf16(x[i]);
#endif
    return h;
}

BN_INLINE Halves narrow(Pack<float> v, f16) {
    Halves h;
#if defined(__AVX512F__)
    h.v = _mm512_cvtps_ph(v.v[0], _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    h.v = _mm256_set_m128i(_mm256_cvtps_ph(v.v[1], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(v.v[0], _MM_FROUND_TO_NEAREST_INT));
#else
    float x[lanes];
    store_acc(x, v);
    for (int i = 0; i < lanes; ++i) h.v[i] = to_f16(x[i]);
#endif
    return h;
}

template <class T>
struct HalfStores {
    static BN_INLINE void store(T *p, Pack<float> v) { narrow(v, T{}).store(p); }
    static BN_INLINE void stream(T *p, Pack<float> v) { narrow(v, T{}).stream(p); }
};

template <>
struct Element<bf16> : HalfStores<bf16> {
    using Acc = float;
    static BN_INLINE Pack<float> load(const bf16 *p) {
        Pack<float> r;
#if defined(__AVX512F__)
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        r.v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
        BN_UNROLL for (int i = 0; i < 2; ++i) {
            const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8 * i));
            r.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
        }
#else
        uint32_t u[lanes];
        float x[lanes];
        for (int i = 0; i < lanes; ++i) u[i] = static_cast<uint32_t>(p[i].bits) << 16;
        memcpy(x, u, sizeof x);
        r = load_acc(x);
#endif
        return r;
    }
};

template <>
struct Element<f16> : HalfStores<f16> {
    using Acc = float;
    static BN_INLINE Pack<float> load(const f16 *p) {
        Pack<float> r;
#if defined(__AVX512F__)
        r.v[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
        BN_UNROLL for (int i = 0; i < 2; ++i)
            r.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8 * i)));
#else
        float x[lanes];
        for (int i = 0; i < lanes; ++i) x[i] = from_f16(p[i].bits);
        r = load_acc(x);
#endif
        return r;
    }
};

// 16 elements with a store that the caller chooses: into the caches, or past them
template <class T>
BN_INLINE void put(T *p, Pack<typename Element<T>::Acc> v, bool past) {
    if (past)
        Element<T>::stream(p, v);
    else
        Element<T>::store(p, v);
}

// the first count < 16 elements; the other lanes are 0 and nothing beyond is touched
template <class T>
BN_INLINE Pack<typename Element<T>::Acc> load_partial(const T *p, size_t count) {
#if defined(__AVX512F__)
    const unsigned which = (1u << count) - 1;
    Pack<typename Element<T>::Acc> r;
    if constexpr (sizeof(T) == 8) {
        r.v[0] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(which), p);
        r.v[1] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(which >> 8), p + 8);
        return r;
    } else if constexpr (sizeof(T) == 4) {
        r.v[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(which), p);
        return r;
    } else {
        T tmp[lanes];
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(tmp), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(which), p));
        return Element<T>::load(tmp);
    }
#else
    T tmp[lanes];
    memset(static_cast<void *>(tmp), 0, sizeof tmp);
    memcpy(static_cast<void *>(tmp), p, count * sizeof(T));
    return Element<T>::load(tmp);
#endif
}
template <class T>
BN_INLINE void store_partial(T *p, Pack<typename Element<T>::Acc> v, size_t count) {
    if (count == lanes) return Element<T>::store(p, v);
#if defined(__AVX512F__)
    const unsigned which = (1u << count) - 1;
    if constexpr (sizeof(T) == 8) {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>(which), v.v[0]);
        _mm512_mask_storeu_pd(p + 8, static_cast<__mmask8>(which >> 8), v.v[1]);
    } else if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>(which), v.v[0]);
    } else {
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(which), narrow(v, T{}).v);
    }
#else
    T tmp[lanes];
    Element<T>::store(tmp, v);
    memcpy(static_cast<void *>(p), tmp, count * sizeof(T));
#endif
}

template <class T>
BN_INLINE auto load_some(const T *p, size_t rest) {
    return rest == lanes ? Element<T>::load(p) : load_partial(p, rest);
}

}  // namespace bn::BN_ISA
