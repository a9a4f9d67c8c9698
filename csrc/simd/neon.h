// NEON, the least that 64-bit Arm has. Per instruction set: see pack.h.
#pragma once
#include <arm_neon.h>
#include "pack.h"

namespace bn::BN_ISA {

template <class V>
BN_INLINE V fused(V a, V b, V c) {
    if constexpr (sizeof(a[0]) == 4)
        return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else
        return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}

// no store of its own goes past the caches
template <class A, class V>
BN_INLINE void past_caches(A *p, V v) {
    memcpy(p, &v, sizeof v);
}
inline void stream_bytes(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
inline void fence() {}

}  // namespace bn::BN_ISA

#include "vector16.h"
