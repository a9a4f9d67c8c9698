// SSE2, the least that x86-64 has. Multiply and add are not fused. Per instruction set: see pack.h.
#pragma once
#include <emmintrin.h>
#include "pack.h"

namespace bn::BN_ISA {

template <class V>
BN_INLINE V fused(V a, V b, V c) {
    return a * b + c;
}
template <class A, class V>
BN_INLINE void past_caches(A *p, V v) {  // p lies on a vector's boundary
    _mm_stream_si128(reinterpret_cast<__m128i *>(p), (__m128i)v);
}

inline void stream_bytes(void *to, const void *from, size_t bytes) {
    copy_lines(to, from, bytes, [](char *t, const char *f) BN_LAMBDA_INLINE {
        BN_UNROLL for (int i = 0; i < 64; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i *>(t + i), _mm_loadu_si128(reinterpret_cast<const __m128i *>(f + i)));
    });
}
inline void fence() { _mm_sfence(); }

}  // namespace bn::BN_ISA

#include "vector16.h"
