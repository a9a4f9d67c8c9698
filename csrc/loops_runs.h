// Forward and input gradient of short planes one behind the other, in vectors that know nothing of where a plane begins:
// every store lies on its own boundary, and no last vector of a plane is a part of one. Per instruction set, like simd/pack.h.
#pragma once

#if defined(BN_PERMUTES)
namespace bn::BN_ISA {

// Bits of some rows, an element each: by vectors of the run on one side, from each row's own beginning on the other.
class RunBits {
  public:
    void put(size_t vector, unsigned b) { put_side(flat, vector * lanes, b); }
    unsigned get(size_t vector) const { return get_side(flat, vector * lanes); }
    void to_rows(uint8_t *mask, ptrdiff_t step, size_t rows, size_t len) const {
        for (size_t row = 0; row < rows; ++row, mask += step)
            for (size_t i = 0; i < len; i += lanes) put_side(mask, i, word(row * len + i) >> ((row * len + i) & 7));
    }
    void from_rows(const uint8_t *mask, ptrdiff_t step, size_t rows, size_t len) {
        uint64_t waiting = 0;
        size_t count = 0;
        uint8_t *to = flat;
        for (size_t row = 0; row < rows; ++row, mask += step)
            for (size_t i = 0; i < len; i += lanes) {
                const size_t some = len - i < lanes ? len - i : lanes;
                waiting |= static_cast<uint64_t>(get_side(mask, i) & ((1u << some) - 1)) << count;
                count += some;
                if (count >= lanes) {
                    put_side(to, 0, static_cast<unsigned>(waiting));
                    to += lanes / 8, waiting >>= lanes, count -= lanes;
                }
            }
        put_side(to, 0, static_cast<unsigned>(waiting));
    }

  private:
    uint32_t word(size_t bit) const {
        uint32_t w;
        memcpy(&w, flat + bit / 8, sizeof w);
        return w;
    }
    uint8_t flat[longest_of_run * lanes / 8 + 4];
};

// Calls f(element, vector, count, coefficients...) for every vector of rows one behind the other, so many rows at a
// time as are whole vectors together; a vector's coefficients are picked from those of these rows. before and after are
// called for each such lot. Of a heavy activation there is one body, not two: it is long.
template <class T, class Act, class Before, class F, class After, class... C>
BN_INLINE void each_of_run(const Block &block, Before before, F f, After after, const C *...of_row) {
    const size_t len = block.len, rows = block.rows, even = len & (~len + 1), lot = lanes / even;
    for (size_t row = 0; row < rows; row += lot) {
        const size_t some = rows - row < lot ? rows - row : lot, begin = row * len, count = some * len;
        before(row, some);
        const auto vectors = [&](auto... c) BN_LAMBDA_INLINE {
            size_t i = 0;
            if constexpr (!Act::heavy)
                for (; i + lanes <= count; i += lanes) f(begin + i, i / lanes, lanes, Element<T>::Order::picked(c, block.lanes + i)...);
            for (; i < count; i += lanes)
                f(begin + i, i / lanes, count - i < lanes ? count - i : lanes, Element<T>::Order::picked(c, block.lanes + i)...);
        };
        vectors(load_some(of_row + row, some)...);
        after(row, some);
    }
}

template <class T, class Act, bool Residual>
void run_apply(const Block &block, const ForwardCoefficients<float> &c) {
    constexpr bool with_bits = Residual && Act::has_side;
    T *const y = static_cast<T *>(block.out);
    const T *const z = static_cast<const T *>(block.z), *const r = static_cast<const T *>(block.saved);
    uint8_t *const mask = block.mask;
    const ptrdiff_t mask_step = block.mask_step;
    const size_t len = block.len;
    const bool past = block.stream;
    RunBits bits;
    const auto step = [&, y, z, r, past](size_t i, size_t v, size_t count, Pack<float> m, Pack<float> a, Pack<float> b) BN_LAMBDA_INLINE {
        Pack<float> u = pre_activation(load_some(z + i, count) - m, a, b);
        if constexpr (Residual) u = u + load_some(r + i, count);
        if constexpr (with_bits) bits.put(v, Act::template side<typename Element<T>::Order>(u));
        u = Act::value(u);
        if (count == lanes)
            put<T>(y + i, u, past);
        else
            store_partial(y + i, u, count);
    };
    const auto after = [&](size_t row, size_t some) BN_LAMBDA_INLINE {
        if constexpr (with_bits) {
            if (mask) bits.to_rows(mask + static_cast<ptrdiff_t>(row) * mask_step, mask_step, some, len);
        }
    };
    each_of_run<T, Act>(block, [](size_t, size_t) {}, step, after, c.mean, c.scale, c.shift);
}

template <class T, class Act, bool Saved>
void run_input(const Block &block, const BackwardCoefficients<float> &c) {
    constexpr bool with_bits = Saved && Act::has_side;
    T *const dz = static_cast<T *>(block.out), *const dr = static_cast<T *>(block.out_residual);
    const T *const z = static_cast<const T *>(block.z), *const dy = static_cast<const T *>(block.dy);
    const void *const saved = block.saved;
    const ptrdiff_t mask_step = block.mask_step;
    const size_t len = block.len;
    const bool past = block.stream;
    RunBits bits;
    const auto before = [&](size_t row, size_t some) BN_LAMBDA_INLINE {
        if constexpr (with_bits)
            bits.from_rows(static_cast<const uint8_t *>(saved) + static_cast<ptrdiff_t>(row) * mask_step, mask_step, some, len);
    };
    const auto step = [&, dz, dr, z, dy, saved, past](size_t i, size_t v, size_t count, Pack<float> m, Pack<float> a, Pack<float> b,
                                                      Pack<float> c0, Pack<float> c1) BN_LAMBDA_INLINE {
        const Pack<float> centered = load_some(z + i, count) - m, d = load_some(dy + i, count);
        Pack<float> g;
        if constexpr (with_bits)
            g = Act::template from_side<typename Element<T>::Order>(bits.get(v), d);
        else
            g = gradient<T, Act, Saved>(d, centered, a, b, saved, i, count);
        const Pack<float> out = a * (fma(centered, c1, c0) + g);
        if (count == lanes) {
            put<T>(dz + i, out, past);
            if (dr) put<T>(dr + i, g, past);
        } else {
            store_partial(dz + i, out, count);
            if (dr) store_partial(dr + i, g, count);
        }
    };
    each_of_run<T, Act>(block, before, step, [](size_t, size_t) {}, c.mean, c.scale, c.shift, c.k0, c.k1);
}

}  // namespace bn::BN_ISA
#endif
