// Packs of 16 lanes over the native vectors of one instruction set. The lane count is the same everywhere, so every
// instruction set sums in the same order. Included by kernels.cpp only, inside a namespace of its own per instruction
// set: nothing here may be shared between translation units built with different flags.
//
// The header of an instruction set (avx512.h, avx2.h, sse2.h, neon.h; simd.h picks one) includes this one and gives
//   Native<float>, Native<double>   one vector: load, store, stream, set1, fma, max, min, lt, le, select, bits, from_bits
//   Halves                          16 elements of two bytes: load, store, stream, and of the first `count` alone
//   widen, narrow                   Halves of bf16 or f16 to a pack of floats and back; a pack of floats to doubles
//   load_first, store_first         the first count < 16 lanes of a pack; the others are 0, and nothing beyond is touched
//   to_exponent                     the low byte of each lane's bits becomes its exponent
//   stream_bytes, fence             copies past the caches
//   permute                         where BN_PERMUTES is defined: lane i becomes lane which[i]
#pragma once
#include <string.h>
#include "dtypes.h"

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
template <class A>
BN_INLINE double sum_lanes(Pack<A> a) {  // a fixed tree, in double
    A x[lanes];
    store_acc(x, a);
    double s[8];
    for (int i = 0; i < 8; ++i) s[i] = static_cast<double>(x[i]) + static_cast<double>(x[i + 8]);
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
// for instruction sets without masked loads and stores: by way of a whole pack in memory
template <class T>
BN_INLINE void copy_first(T *to, const T *from, size_t count) {
    memcpy(static_cast<void *>(to), static_cast<const void *>(from), count * sizeof(T));
}
template <class A>
BN_INLINE Pack<A> load_first_by_copy(const A *p, size_t count) {
    A whole[lanes];
    memset(static_cast<void *>(whole), 0, sizeof whole);
    copy_first(whole, p, count);
    return load_acc(whole);
}
template <class A>
BN_INLINE void store_first_by_copy(A *p, Pack<A> v, size_t count) {
    A whole[lanes];
    store_acc(whole, v);
    copy_first(p, whole, count);
}

// memcpy with whole lines given to `line(to, from)`, which leaves the caches alone
template <class Line>
BN_INLINE void copy_lines(void *to_, const void *from_, size_t bytes, Line line) {
    char *to = static_cast<char *>(to_);
    const char *from = static_cast<const char *>(from_);
    size_t head = (64 - (reinterpret_cast<uintptr_t>(to) & 63)) & 63;
    if (head > bytes) head = bytes;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) line(to, from);
    memcpy(to, from, bytes);
}

}  // namespace bn::BN_ISA
