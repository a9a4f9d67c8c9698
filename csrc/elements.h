// Loading and storing 16 elements of any type as a pack of its accumulator type, in the type's own order of lanes; and
// what else depends on that order. Per instruction set, like simd/pack.h.
#pragma once
#include "simd/simd.h"

namespace bn::BN_ISA {

BN_INLINE Pack<double> widen(Pack<double> a) { return a; }

template <class T>
struct Element;

template <class A>
struct Plain {
    using Acc = A;
    using Order = InOrder<A>;
    static BN_INLINE Pack<A> load(const A *p) { return load_acc(p); }
    static BN_INLINE void store(A *p, Pack<A> v) { store_acc(p, v); }
    static BN_INLINE void put(A *p, Pack<A> v, bool past) { past ? stream_acc(p, v) : store_acc(p, v); }
    static BN_INLINE Pack<A> load_first(const A *p, size_t count) { return BN_ISA::load_first(p, count); }
    static BN_INLINE void store_first(A *p, Pack<A> v, size_t count) { BN_ISA::store_first(p, v, count); }
};
template <>
struct Element<float> : Plain<float> {};
template <>
struct Element<double> : Plain<double> {};

template <class T, class OrderOfT>
struct Half {
    using Acc = float;
    using Order = OrderOfT;
    static BN_INLINE Pack<float> load(const T *p) { return widen(Halves::load(p), T{}); }
    static BN_INLINE void store(T *p, Pack<float> v) { narrow(v, T{}).store(p); }
    static BN_INLINE void put(T *p, Pack<float> v, bool past) {
        const Halves h = narrow(v, T{});
        past ? h.stream(p) : h.store(p);
    }
    static BN_INLINE Pack<float> load_first(const T *p, size_t count) { return widen(Halves::load_first(p, count), T{}); }
    static BN_INLINE void store_first(T *p, Pack<float> v, size_t count) { narrow(v, T{}).store_first(p, count); }
};
template <>
struct Element<bf16> : Half<bf16, OrderOfBf16> {};
template <>
struct Element<f16> : Half<f16, InOrder<float>> {};

// 16 elements with a store that the caller chooses: into the caches, or past them
template <class T>
BN_INLINE void put(T *p, Pack<typename Element<T>::Acc> v, bool past) {
    Element<T>::put(p, v, past);
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

template <class T>
BN_INLINE auto load_in_order(const T *p, size_t rest) {
    return Element<T>::Order::turned(load_some(p, rest));
}

// the same of a vector of coefficients or sums beside elements of type T
template <class T>
BN_INLINE auto vector_of(const typename Element<T>::Acc *p) {
    return Element<T>::Order::load(p);
}
template <class T>
BN_INLINE auto vector_of(const typename Element<T>::Acc *p, size_t rest) {
    return rest == lanes ? vector_of<T>(p) : Element<T>::Order::turned(load_partial(p, rest));
}
template <class T>
BN_INLINE void store_vector(typename Element<T>::Acc *p, Pack<typename Element<T>::Acc> v) {
    store_acc(p, Element<T>::Order::turned(v));
}

template <class T>
BN_INLINE auto mask_of(unsigned bits) {
    return Element<T>::Order::mask(bits);
}
template <class T>
BN_INLINE Pack<typename Element<T>::Acc> keep_first(Pack<typename Element<T>::Acc> a, size_t count) {  // 0 in the others
    return only(mask_of<T>((1u << count) - 1), a);
}

}  // namespace bn::BN_ISA
