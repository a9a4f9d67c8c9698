// Any processor that the compiler knows vectors for. Per instruction set: see pack.h.
#pragma once
#include "pack.h"

namespace bn::BN_ISA {

template <class V>
BN_INLINE V fused(V a, V b, V c) {
    return a * b + c;
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
