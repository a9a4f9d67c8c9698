// y = activation((z - mean) * scale + shift [+ residual]). Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

// one value for every lane, or an array as long as the row
template <class A, bool Columns>
BN_INLINE Pack<A> coefficient(const A *p, size_t i) {
    if constexpr (Columns)
        return load_acc(p + i);
    else
        return set1(*p);
}
template <class A, bool Columns>
BN_INLINE Pack<A> coefficient_partial(const A *p, size_t i, size_t count) {
    if constexpr (Columns)
        return load_partial(p + i, count);
    else
        return set1(*p);
}

// the one form in which forward and backward compute the pre-activation: the same bits in both
template <class A>
BN_INLINE Pack<A> pre_activation(Pack<A> centered, Pack<A> scale, Pack<A> shift) {
    return fma(centered, scale, shift);
}

BN_INLINE void put_side(uint8_t *mask, size_t i, unsigned b) {
    const uint16_t w = static_cast<uint16_t>(b);
    memcpy(mask + i / 8, &w, 2);
}
BN_INLINE unsigned get_side(const void *mask, size_t i) {
    uint16_t w;
    memcpy(&w, static_cast<const uint8_t *>(mask) + i / 8, 2);
    return w;
}

template <class T, class Act, bool Columns, bool Residual>
void apply(void *y_, const void *z_, const void *r_, uint8_t *mask, size_t len,
           const ForwardCoefficients<typename Element<T>::Acc> &c) {
    using A = typename Element<T>::Acc;
    T *y = static_cast<T *>(y_);
    const T *z = static_cast<const T *>(z_);
    const T *r = static_cast<const T *>(r_);
    const auto step = [&](size_t i, Pack<A> x, Pack<A> m, Pack<A> a, Pack<A> b, Pack<A> add) {
        Pack<A> u = pre_activation(x - m, a, b);
        if constexpr (Residual) u = u + add;
        if constexpr (Residual && Act::has_side) {
            if (mask) put_side(mask, i, Act::side(u));
        }
        return Act::value(u);
    };
    size_t i = 0;
    for (; i + lanes <= len; i += lanes) {
        Pack<A> add{};
        if constexpr (Residual) add = Element<T>::load(r + i);
        Element<T>::store(y + i, step(i, Element<T>::load(z + i), coefficient<A, Columns>(c.mean, i),
                                      coefficient<A, Columns>(c.scale, i), coefficient<A, Columns>(c.shift, i), add));
    }
    if (const size_t rest = len - i) {
        Pack<A> add{};
        if constexpr (Residual) add = load_partial(r + i, rest);
        store_partial(y + i,
                      step(i, load_partial(z + i, rest), coefficient_partial<A, Columns>(c.mean, i, rest),
                           coefficient_partial<A, Columns>(c.scale, i, rest),
                           coefficient_partial<A, Columns>(c.shift, i, rest), add),
                      rest);
    }
}

}  // namespace bn::BN_ISA
