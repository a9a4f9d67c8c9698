// y = activation((z - mean) * scale + shift [+ residual]). Per instruction set, like simd/pack.h.
#pragma once

namespace bn::BN_ISA {

// A row's coefficient for every lane, or a row of coefficients. The one value is read once, here: a store through a
// vector pointer may alias anything, and the compiler would read it again after each.
template <class T, bool Columns>
struct Coefficient {
    using A = typename Element<T>::Acc;
    BN_INLINE Coefficient(const A *p, size_t row) : value(Native<A>::set1(p[row])) {}
    BN_INLINE Pack<A> at(size_t) const { return all_of<A>(value); }
    BN_INLINE Pack<A> partial(size_t, size_t) const { return all_of<A>(value); }
    typename Native<A>::V value;  // one vector, for all of a pack: registers are few
};
template <class T>
struct Coefficient<T, true> {
    using A = typename Element<T>::Acc;
    BN_INLINE Coefficient(const A *p, size_t) : columns(p) {}
    BN_INLINE Pack<A> at(size_t i) const { return vector_of<T>(columns + i); }
    BN_INLINE Pack<A> partial(size_t i, size_t count) const { return vector_of<T>(columns + i, count); }
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

// which of 16 elements count: those a mask keeps (nullptr: all) of the first `rest`
BN_INLINE unsigned counted(const uint8_t *kept, size_t i, size_t rest) {
    return (kept ? get_side(kept, i) : 0xffffu) & ((1u << rest) - 1);
}

// which of some rows count, each for all lanes (nullptr: all)
template <class T, size_t group>
struct Lines {
    using A = typename Element<T>::Acc;
    bool given;
    Mask<A> kept[group];
    BN_INLINE Lines(const uint8_t *lines, size_t row, size_t count = group) : given(lines) {
        for (size_t k = 0; given && k < count; ++k) kept[k] = mask_of<T>(lines[row + k] ? 0xffffu : 0);
    }
    BN_INLINE Pack<A> operator()(size_t k, Pack<A> a) const { return given ? only(kept[k], a) : a; }
};

template <class T>
BN_INLINE T *row_of(const void *p, size_t row, ptrdiff_t step) {
    return reinterpret_cast<T *>(const_cast<char *>(static_cast<const char *>(p)) + static_cast<ptrdiff_t>(row) * step);
}

// What is to come, asked for in the order of memory while the rows before it are summed: columns are visited several
// rows at a time, and no hardware takes that for one stream. Where rows are not packed, row by row; a single row: what
// comes a little later.
template <class T, size_t group>
struct Ahead {
    static constexpr size_t lines = group * lanes * sizeof(T) / 64;
    static_assert(lines > 0 || group == 1);
    const char *next;
    ptrdiff_t stride;
    bool packed;
    BN_INLINE Ahead(const T *rows, ptrdiff_t stride_, size_t len)
        : next(reinterpret_cast<const char *>(rows) + static_cast<ptrdiff_t>(group) * stride_), stride(stride_),
          packed(stride_ == static_cast<ptrdiff_t>(len * sizeof(T))) {}
    BN_INLINE void fetch(size_t j) const {
        if constexpr (group == 1) {
            __builtin_prefetch(next - stride + j * sizeof(T) + 2048, 0, 2);
        } else if (packed) {
            const char *p = next + j * group * sizeof(T);
            BN_UNROLL for (size_t i = 0; i < lines; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
            if ((j * group * sizeof(T)) % 4096 == 0) __builtin_prefetch(p + 16384, 0, 2);
        } else {
            const char *p = next + j * sizeof(T);
            BN_UNROLL for (size_t k = 0; k < group; ++k) __builtin_prefetch(p + static_cast<ptrdiff_t>(k) * stride);
        }
    }
};

constexpr size_t rows_at_once = 4;  // of a map by columns; of wide rows one at a time: four took 3 times as long
constexpr size_t wide_row = 1024;

template <class T, class Act, bool Columns, bool Residual>
void apply(const Block &block, const ForwardCoefficients<typename Element<T>::Acc> &c);

// `together` rows of which each column's coefficients are read once
template <class T, class Act, bool Columns, bool Residual, size_t together>
BN_INLINE void apply_rows(const Block &block, const ForwardCoefficients<typename Element<T>::Acc> &c, size_t row) {
    using A = typename Element<T>::Acc;
    const size_t len = block.len;
    const bool past = block.stream;
    const ptrdiff_t z_step = block.z_step, by = block.step, mask_step = block.mask_step;
    T *const y = row_of<T>(block.out, row, by);
    const T *const z = row_of<T>(block.z, row, z_step);
    const T *const r = Residual ? row_of<T>(block.saved, row, by) : nullptr;
    uint8_t *const mask = block.mask ? block.mask + static_cast<ptrdiff_t>(row) * mask_step : nullptr;
    const Coefficient<T, Columns> mean(c.mean, row), scale(c.scale, row), shift(c.shift, row);
    const Ahead<T, together> next_z(z, z_step, len), next_r(r, by, len);
    const uint8_t *const kept = together == 1 && block.kept ? block.kept + static_cast<ptrdiff_t>(row) * block.kept_step : nullptr;
    const Lines<T, together> line(Columns ? block.lines : nullptr, row);
    const auto at = [](auto *p, size_t k, ptrdiff_t step) BN_LAMBDA_INLINE { return row_of<std::remove_pointer_t<decltype(p)>>(p, k, step); };
    const auto value = [=, &line](size_t k, size_t i, Pack<A> x, Pack<A> m, Pack<A> a, Pack<A> b, Pack<A> add) BN_LAMBDA_INLINE {
        Pack<A> u = pre_activation(x - m, a, b);
        if constexpr (Residual) u = u + add;
        if constexpr (Residual && Act::has_side) {
            if (mask) put_side(mask + static_cast<ptrdiff_t>(k) * mask_step, i, Act::template side<typename Element<T>::Order>(u));
        }
        u = line(k, Act::value(u));
        return kept ? only(mask_of<T>(get_side(kept, i)), u) : u;
    };
    const auto whole = [&](size_t i) BN_LAMBDA_INLINE {
        if constexpr (Columns) next_z.fetch(i);
        if constexpr (Columns && Residual) next_r.fetch(i);
        const Pack<A> m = mean.at(i), a = scale.at(i), b = shift.at(i);
        BN_UNROLL for (size_t k = 0; k < together; ++k) {
            Pack<A> add{};
            if constexpr (Residual) add = Element<T>::load(at(r, k, by) + i);
            put<T>(at(y, k, by) + i, value(k, i, Element<T>::load(at(z, k, z_step) + i), m, a, b, add), past);
        }
    };
    size_t i = 0;
    for (; i + lanes <= len; i += lanes) whole(i);
    const size_t rest = len - i;
    if (!rest) return;
    for (size_t k = 0; k < together; ++k) {
        T *const to = at(y, k, by) + i;
        const T *const from = at(z, k, z_step) + i, *const from_r = Residual ? at(r, k, by) + i : nullptr;
        if constexpr (Act::heavy) {
            // one body, not two: it is long, and a short copy costs little beside it
            T zs[lanes], ys[lanes], rs[lanes];
            A of[3][lanes];
            const auto copy = [=](T *t, const T *f) { Element<T>::store(t, load_partial(f, rest)); };
            copy(zs, from);
            if constexpr (Residual) copy(rs, from_r);
            store_vector<T>(of[0], mean.partial(i, rest));
            store_vector<T>(of[1], scale.partial(i, rest));
            store_vector<T>(of[2], shift.partial(i, rest));
            Block one;
            one.z = zs, one.saved = rs, one.out = ys, one.rows = 1, one.len = lanes;
            one.kept = kept ? kept + i / 8 : nullptr;
            one.lines = block.lines ? block.lines + row + k : nullptr;
            apply<T, Act, true, Residual>(one, {of[0], of[1], of[2]});
            memcpy(static_cast<void *>(to), ys, rest * sizeof(T));
        } else {
            Pack<A> add{};
            if constexpr (Residual) add = load_partial(from_r, rest);
            store_partial(to,
                          value(k, i, load_partial(from, rest), mean.partial(i, rest), scale.partial(i, rest),
                                shift.partial(i, rest), add),
                          rest);
        }
    }
}

template <class T, class Act, bool Columns, bool Residual>
void apply(const Block &block, const ForwardCoefficients<typename Element<T>::Acc> &c) {
    size_t row = 0;
    if constexpr (Columns && !Act::heavy)
        for (; !block.kept && block.len < wide_row && row + rows_at_once <= block.rows; row += rows_at_once) apply_rows<T, Act, true, Residual, rows_at_once>(block, c, row);
    for (; row < block.rows; ++row) apply_rows<T, Act, Columns, Residual, 1>(block, c, row);
}

}  // namespace bn::BN_ISA
