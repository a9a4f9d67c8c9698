// Loading and storing 16 elements of any type as a pack of its accumulator type. Per instruction set, like simd/pack.h.
#pragma once
#include "simd/simd.h"

namespace bn::BN_ISA {

BN_INLINE Pack<double> widen(Pack<double> a) { return a; }

template <class T>
struct Element;

template <class A>
struct Plain {
    using Acc = A;
    static BN_INLINE Pack<A> load(const A *p) { return load_acc(p); }
    static BN_INLINE void store(A *p, Pack<A> v) { store_acc(p, v); }
    static BN_INLINE void stream(A *p, Pack<A> v) { stream_acc(p, v); }
    static BN_INLINE Pack<A> load_first(const A *p, size_t count) { return BN_ISA::load_first(p, count); }
    static BN_INLINE void store_first(A *p, Pack<A> v, size_t count) { BN_ISA::store_first(p, v, count); }
};
template <>
struct Element<float> : Plain<float> {};
template <>
struct Element<double> : Plain<double> {};

template <class T>
struct Half {
    using Acc = float;
    static BN_INLINE Pack<float> load(const T *p) { return widen(Halves::load(p), T{}); }
    static BN_INLINE void store(T *p, Pack<float> v) { narrow(v, T{}).store(p); }
    static BN_INLINE void stream(T *p, Pack<float> v) { narrow(v, T{}).stream(p); }
    static BN_INLINE Pack<float> load_first(const T *p, size_t count) { return widen(Halves::load_first(p, count), T{}); }
    static BN_INLINE void store_first(T *p, Pack<float> v, size_t count) { narrow(v, T{}).store_first(p, count); }
};
template <>
struct Element<bf16> : Half<bf16> {};
template <>
struct Element<f16> : Half<f16> {};

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
    return Element<T>::load_first(p, count);
}
template <class T>
BN_INLINE void store_partial(T *p, Pack<typename Element<T>::Acc> v, size_t count) {
    if (count == lanes) return Element<T>::store(p, v);
    Element<T>::store_first(p, v, count);
}

template <class T>
BN_INLINE auto load_some(const T *p, size_t rest) {
    return rest == lanes ? Element<T>::load(p) : load_partial(p, rest);
}

}  // namespace bn::BN_ISA
