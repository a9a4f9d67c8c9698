// Packs of 16 lanes over the native vectors of one instruction set. The lane count is the same everywhere, so every
// instruction set sums in the same order. Included by kernels.cpp only, inside a namespace of its own per instruction
// set: nothing here may be shared between translation units built with different flags.
//
// The header of an instruction set (avx512.h, avx2.h, sse2.h, neon.h; simd.h picks one) includes this one and gives
//   Native<float>, Native<double>   one vector: load, store, stream, set1, fma, max, min, lt, le, select, only,
//                                   without, bits, from_bits
//   Halves                          16 elements of two bytes: load, store, stream, and of the first `count` alone
//   widen, narrow                   Halves of bf16 or f16 to a pack of floats and back; a pack of floats to doubles
//   load_first, store_first         the first count < 16 lanes of a pack; the others are 0, and nothing beyond is touched
//   to_exponent                     the low byte of each lane's bits becomes its exponent
//   stream_bytes, fence             copies past the caches
//   permute                         where BN_PERMUTES is defined: lane i becomes lane which[i]
//   OrderOfBf16                     in which lanes 16 neighbours of that type are: InOrder<float>, or one of its own
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

// Copied vector by vector: gcc 12 copies a plain struct of two in halves by way of the stack, and to read a vector whole
// that was written in halves waits for both (20 cycles, more than all else in a loop).
template <class V, int N>
struct Vectors {
    static constexpr int n = N;
    V v[N];
    Vectors() = default;
    BN_INLINE Vectors(const Vectors &o) { *this = o; }
    BN_INLINE Vectors &operator=(const Vectors &o) {
        BN_UNROLL for (int i = 0; i < N; ++i) v[i] = o.v[i];
        return *this;
    }
};
template <class A>
struct Pack : Vectors<typename Native<A>::V, lanes / Native<A>::W> {};
template <class A>
struct Mask : Vectors<typename Native<A>::M, lanes / Native<A>::W> {};

#define BN_EACH BN_UNROLL for (int i = 0; i < Pack<A>::n; ++i)

template <class A>
BN_INLINE Pack<A> set1(A x) {
    Pack<A> r;
    BN_EACH r.v[i] = Native<A>::set1(x);
    return r;
}
template <class A>
BN_INLINE Pack<A> all_of(typename Native<A>::V vector) {
    Pack<A> r;
    BN_EACH r.v[i] = vector;
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
    BN_EACH r.v[i] = Native<A>::lt(a.v[i], b.v[i]);
    return r;
}
template <class A>
BN_INLINE Mask<A> le(Pack<A> a, Pack<A> b) {
    Mask<A> r;
    BN_EACH r.v[i] = Native<A>::le(a.v[i], b.v[i]);
    return r;
}
template <class A>
BN_INLINE Pack<A> select(Mask<A> m, Pack<A> a, Pack<A> b) {
    BN_EACH a.v[i] = Native<A>::select(m.v[i], a.v[i], b.v[i]);
    return a;
}
template <class A>
BN_INLINE Pack<A> only(Mask<A> m, Pack<A> a) {  // 0 where it does not hold
    BN_EACH a.v[i] = Native<A>::only(m.v[i], a.v[i]);
    return a;
}
template <class A>
BN_INLINE Pack<A> without(Mask<A> m, Pack<A> a) {  // 0 where it holds
    BN_EACH a.v[i] = Native<A>::without(m.v[i], a.v[i]);
    return a;
}
template <class A>
BN_INLINE unsigned bits(Mask<A> m) {
    unsigned b = 0;
    BN_EACH b |= Native<A>::bits(m.v[i]) << (i * Native<A>::W);
    return b;
}
template <class A>
BN_INLINE Mask<A> mask_from(unsigned b) {
    Mask<A> m;
    BN_EACH m.v[i] = Native<A>::from_bits((b >> (i * Native<A>::W)) & ((1u << Native<A>::W) - 1));
    return m;
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
// Lane i is value i. An order of its own has vectors in memory read and written in that order, and bits in those of
// the values; `turned` makes one order of the other.
template <class A>
struct InOrder {
    static BN_INLINE Pack<A> turned(Pack<A> a) { return a; }
    static BN_INLINE Pack<A> load(const A *p) { return load_acc(p); }
    static BN_INLINE Mask<A> mask(unsigned b) { return mask_from<A>(b); }
    static BN_INLINE unsigned bits(Mask<A> m) { return BN_ISA::bits(m); }
    static BN_INLINE Pack<A> picked(Pack<A> in_order, const int8_t *which) { return permute(in_order, which); }
};
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
