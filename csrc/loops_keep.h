// Copies in which what a mask leaves out is another value. Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

// 16 elements of two bytes as they are: to widen and to narrow them costs more than all else here
BN_INLINE void keep_halves(uint16_t *to, const uint16_t *from, unsigned bits, const uint16_t *other) {
    typedef uint16_t V __attribute__((vector_size(2 * lanes)));
    constexpr V lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    V a, b;
    memcpy(&a, from, sizeof a);
    memcpy(&b, other, sizeof b);
    const V which = (V)(((V{} + static_cast<uint16_t>(bits)) & lane) == lane);
    a = (a & which) | (b & ~which);
    memcpy(to, &a, sizeof a);
}

// `to` may be `from`; one fill for all elements, or one for each
template <class T, bool Columns>
void keep(void *to_, const void *from_, const uint8_t *bits, size_t len, const typename Element<T>::Acc *fill) {
    using A = typename Element<T>::Acc;
    T *const to = static_cast<T *>(to_);
    const T *const from = static_cast<const T *>(from_);
    const Coefficient<A, Columns> other(fill, 0);
    size_t i = 0;
    if constexpr (sizeof(T) == 2) {
        T fills[lanes];
        if constexpr (!Columns) Element<T>::store(fills, other.at(0));
        for (; i + lanes <= len; i += lanes) {
            if constexpr (Columns) Element<T>::store(fills, other.at(i));
            keep_halves(reinterpret_cast<uint16_t *>(to + i), reinterpret_cast<const uint16_t *>(from + i), get_side(bits, i),
                        reinterpret_cast<const uint16_t *>(fills));
        }
    } else {
        for (; i + lanes <= len; i += lanes)
            Element<T>::store(to + i, select(mask_from<A>(get_side(bits, i)), Element<T>::load(from + i), other.at(i)));
    }
    if (const size_t rest = len - i)
        store_partial(to + i, select(mask_from<A>(get_side(bits, i)), load_partial(from + i, rest), other.partial(i, rest)),
                      rest);
}

}  // namespace bn::BN_ISA
