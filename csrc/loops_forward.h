// y = activation((z - mean) * scale + shift [+ residual]). Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

// A channel's coefficient for every lane, or a row of coefficients. The one value is read once, here: a store through a
// vector pointer may alias anything, and the compiler would read it again after each.
template <class A, bool Columns>
struct Coefficient {
    explicit BN_INLINE Coefficient(const A *p) : value(set1(*p)) {}
    BN_INLINE Pack<A> at(size_t) const { return value; }
    BN_INLINE Pack<A> partial(size_t, size_t) const { return value; }
    Pack<A> value;
};
template <class A>
struct Coefficient<A, true> {
    explicit BN_INLINE Coefficient(const A *p) : row(p) {}
    BN_INLINE Pack<A> at(size_t i) const { return load_acc(row + i); }
    BN_INLINE Pack<A> partial(size_t i, size_t count) const { return load_partial(row + i, count); }
    const A *row;
};

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
    const Coefficient<A, Columns> mean(c.mean), scale(c.scale), shift(c.shift);
    const auto step = [=](size_t i, Pack<A> x, Pack<A> m, Pack<A> a, Pack<A> b, Pack<A> add) BN_LAMBDA_INLINE {
        Pack<A> u = pre_activation(x - m, a, b);
        if constexpr (Residual) u = u + add;
        if constexpr (Residual && Act::has_side) {
            if (mask) put_side(mask, i, Act::side(u));
        }
        return Act::value(u);
    };
    const auto whole = [=](size_t i) BN_LAMBDA_INLINE {
        Pack<A> add{};
        if constexpr (Residual) add = Element<T>::load(r + i);
        Element<T>::store(y + i, step(i, Element<T>::load(z + i), mean.at(i), scale.at(i), shift.at(i), add));
    };
    size_t i = 0;
    if constexpr (!Act::heavy) {
        for (; i + 2 * lanes <= len; i += 2 * lanes) {
            whole(i);
            whole(i + lanes);
        }
    }
    for (; i + lanes <= len; i += lanes) whole(i);
    const size_t rest = len - i;
    if (!rest) return;
    if constexpr (Act::heavy) {
        // one body, not two: it is long, and a short copy costs little beside it
        T zs[lanes], ys[lanes], rs[lanes];
        A coefficients[3][lanes];
        const auto copy = [=](T *to, const T *from) { store_partial(to, load_partial(from, rest), lanes); };
        copy(zs, z + i);
        if constexpr (Residual) copy(rs, r + i);
        store_acc(coefficients[0], mean.partial(i, rest));
        store_acc(coefficients[1], scale.partial(i, rest));
        store_acc(coefficients[2], shift.partial(i, rest));
        apply<T, Act, true, Residual>(ys, zs, rs, nullptr, lanes, {coefficients[0], coefficients[1], coefficients[2]});
        memcpy(static_cast<void *>(y + i), ys, rest * sizeof(T));
    } else {
        Pack<A> add{};
        if constexpr (Residual) add = load_partial(r + i, rest);
        store_partial(y + i,
                      step(i, load_partial(z + i, rest), mean.partial(i, rest), scale.partial(i, rest),
                           shift.partial(i, rest), add),
                      rest);
    }
}

}  // namespace bn::BN_ISA
