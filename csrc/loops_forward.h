// y = activation((z - mean) * scale + shift [+ residual]). Per instruction set, like simd/pack.h.
#pragma once

namespace bn::BN_ISA {

// A row's coefficient for every lane, or a row of coefficients. The one value is read once, here: a store through a
// vector pointer may alias anything, and the compiler would read it again after each.
template <class A, bool Columns>
struct Coefficient {
    BN_INLINE Coefficient(const A *p, size_t row) : value(set1(p[row])) {}
    BN_INLINE Pack<A> at(size_t) const { return value; }
    BN_INLINE Pack<A> partial(size_t, size_t) const { return value; }
    Pack<A> value;
};
template <class A>
struct Coefficient<A, true> {
    BN_INLINE Coefficient(const A *p, size_t) : columns(p) {}
    BN_INLINE Pack<A> at(size_t i) const { return load_acc(columns + i); }
    BN_INLINE Pack<A> partial(size_t i, size_t count) const { return load_partial(columns + i, count); }
    const A *columns;
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

template <class T>
BN_INLINE T *row_of(const void *p, size_t row, ptrdiff_t step) {
    return reinterpret_cast<T *>(const_cast<char *>(static_cast<const char *>(p)) + static_cast<ptrdiff_t>(row) * step);
}

// Rows one behind the other are one stream: the line that comes this much later is asked for now. The planes of a
// channel were read a moment ago and need none of it.
constexpr ptrdiff_t ahead = 2048;
template <class T, bool Columns>
BN_INLINE void prefetch(const T *p) {
    if constexpr (Columns) {
        __builtin_prefetch(reinterpret_cast<const char *>(p) + ahead, 0, 2);
        if ((reinterpret_cast<uintptr_t>(p) & 4095) < 16 * sizeof(T)) __builtin_prefetch(reinterpret_cast<const char *>(p) + 16384, 0, 2);
    }
}

template <class T, class Act, bool Columns, bool Residual>
void apply(const Block &block, const ForwardCoefficients<typename Element<T>::Acc> &c) {
    using A = typename Element<T>::Acc;
    const size_t len = block.len;
    const bool past = block.stream;
    for (size_t row = 0; row < block.rows; ++row) {
        T *const y = row_of<T>(block.out, row, block.step);
        const T *const z = row_of<T>(block.z, row, block.z_step);
        const T *const r = Residual ? row_of<T>(block.saved, row, block.step) : nullptr;
        uint8_t *const mask = block.mask ? block.mask + static_cast<ptrdiff_t>(row) * block.mask_step : nullptr;
        const Coefficient<A, Columns> mean(c.mean, row), scale(c.scale, row), shift(c.shift, row);
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
            prefetch<T, Columns>(z + i);
            if constexpr (Residual) {
                prefetch<T, Columns>(r + i);
                add = Element<T>::load(r + i);
            }
            put<T>(y + i, step(i, Element<T>::load(z + i), mean.at(i), scale.at(i), shift.at(i), add), past);
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
        if (!rest) continue;
        if constexpr (Act::heavy) {
            // one body, not two: it is long, and a short copy costs little beside it
            T zs[lanes], ys[lanes], rs[lanes];
            A k[3][lanes];
            const auto copy = [=](T *to, const T *from) { Element<T>::store(to, load_partial(from, rest)); };
            copy(zs, z + i);
            if constexpr (Residual) copy(rs, r + i);
            store_acc(k[0], mean.partial(i, rest));
            store_acc(k[1], scale.partial(i, rest));
            store_acc(k[2], shift.partial(i, rest));
            Block one;
            one.z = zs, one.saved = rs, one.out = ys, one.rows = 1, one.len = lanes;
            apply<T, Act, true, Residual>(one, {k[0], k[1], k[2]});
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
}

}  // namespace bn::BN_ISA
