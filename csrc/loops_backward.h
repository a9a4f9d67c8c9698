// The sums of the backward, and the gradient of the input. Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

// g = dy * activation'(u) for one pack; `saved` is where this piece's bit mask or residual starts
template <class T, class Act, bool Saved, class A = typename Element<T>::Acc>
BN_INLINE Pack<A> gradient(Pack<A> dy, Pack<A> centered, Pack<A> scale, Pack<A> shift, const void *saved, size_t i,
                           size_t rest) {
    if constexpr (Saved && Act::has_side) return Act::from_side(get_side(saved, i), dy);
    Pack<A> u = pre_activation(centered, scale, shift);
    if constexpr (Saved) {
        const T *r = static_cast<const T *>(saved) + i;
        u = u + (rest == lanes ? Element<T>::load(r) : load_partial(r, rest));
    }
    return Act::gradient(u, dy);
}

template <class T>
BN_INLINE auto load_some(const T *p, size_t rest) {
    return rest == lanes ? Element<T>::load(p) : load_partial(p, rest);
}

template <class T, class Act, bool Saved>
Sums plane_reduce(const PlaneBlock &block, const BackwardCoefficients<typename Element<T>::Acc> &c) {
    using A = typename Element<T>::Acc;
    const Pack<A> mean = set1(*c.mean), scale = set1(*c.scale), shift = set1(*c.shift), inv = set1(*c.inv_std);
    Pack<A> s[2] = {set1<A>(0), set1<A>(0)}, t[2] = {set1<A>(0), set1<A>(0)};
    const char *zp = static_cast<const char *>(block.z), *dp = static_cast<const char *>(block.dy);
    const char *sp = static_cast<const char *>(block.saved);
    for (size_t p = 0; p < block.planes; ++p) {
        const T *z = reinterpret_cast<const T *>(zp + static_cast<ptrdiff_t>(p) * block.z_stride);
        const T *dy = reinterpret_cast<const T *>(dp + static_cast<ptrdiff_t>(p) * block.dy_stride);
        const void *saved = Saved ? sp + static_cast<ptrdiff_t>(p) * block.saved_stride : nullptr;
        const auto step = [&](size_t i, int k) {
            const Pack<A> centered = Element<T>::load(z + i) - mean;
            const Pack<A> g = gradient<T, Act, Saved>(Element<T>::load(dy + i), centered, scale, shift, saved, i, lanes);
            s[k] = s[k] + g;
            t[k] = fma(g, centered * inv, t[k]);
        };
        size_t i = 0;
        for (; i + 2 * lanes <= block.len; i += 2 * lanes) {
            step(i, 0);
            step(i + lanes, 1);
        }
        if (i + lanes <= block.len) {
            step(i, 0);
            i += lanes;
        }
        if (const size_t rest = block.len - i) {
            const Pack<A> centered = keep_first(load_partial(z + i, rest) - mean, rest);
            Pack<A> g = gradient<T, Act, Saved>(load_partial(dy + i, rest), centered, scale, shift, saved, i, rest);
            g = keep_first(g, rest);
            s[1] = s[1] + g;
            t[1] = fma(g, centered * inv, t[1]);
        }
    }
    return {sum_lanes(s[0] + s[1]), sum_lanes(t[0] + t[1])};
}

// Rows in groups of four per visit of the accumulators, which live in the first-level cache.
template <class T, class Act, bool Saved>
void column_reduce(const ColumnBlock &block, const BackwardCoefficients<typename Element<T>::Acc> &c, double *sum_dy,
                   double *sum_dy_zhat) {
    using A = typename Element<T>::Acc;
    constexpr size_t chunk = 512, group = 4;
    const char *zp = static_cast<const char *>(block.z), *dp = static_cast<const char *>(block.dy);
    const char *sp = static_cast<const char *>(block.saved);
    for (size_t j0 = 0; j0 < block.cols; j0 += chunk) {
        const size_t cols = block.cols - j0 < chunk ? block.cols - j0 : chunk;
        A s[chunk], t[chunk];
        for (size_t j = 0; j < chunk; ++j) s[j] = t[j] = 0;
        const auto rows = [&](size_t row, size_t count, size_t j, size_t rest) {
            const auto vec = [&](const A *p) { return load_some(p + j0 + j, rest); };
            const Pack<A> mean = vec(c.mean), inv = vec(c.inv_std);
            // dead code where the activation needs no pre-activation
            const Pack<A> scale = vec(c.scale), shift = vec(c.shift);
            Pack<A> sj = load_acc(s + j), tj = load_acc(t + j);
            for (size_t k = 0; k < count; ++k) {
                const ptrdiff_t r = static_cast<ptrdiff_t>(row + k);
                const T *z = reinterpret_cast<const T *>(zp + r * block.z_stride) + j0 + j;
                const T *dy = reinterpret_cast<const T *>(dp + r * block.dy_stride) + j0 + j;
                const void *saved = Saved ? sp + r * block.saved_stride : nullptr;
                const Pack<A> centered = load_some(z, rest) - mean;
                const Pack<A> g =
                    gradient<T, Act, Saved>(load_some(dy, rest), centered, scale, shift, saved, j0 + j, rest);
                sj = sj + g;
                tj = fma(g, centered * inv, tj);
            }
            store_acc(s + j, sj);
            store_acc(t + j, tj);
        };
        for (size_t row = 0; row < block.rows; row += group) {
            const size_t count = block.rows - row < group ? block.rows - row : group;
            size_t j = 0;
            if (count == group)
                for (; j + lanes <= cols; j += lanes) rows(row, group, j, lanes);
            for (; j < cols; j += lanes) rows(row, count, j, cols - j < lanes ? cols - j : lanes);
        }
        for (size_t j = 0; j < cols; ++j) {
            sum_dy[j0 + j] += static_cast<double>(s[j]);
            sum_dy_zhat[j0 + j] += static_cast<double>(t[j]);
        }
    }
}

template <class T, class Act, bool Columns, bool Saved>
void input(void *dz_, void *dr_, const void *dy_, const void *z_, const void *saved, size_t len,
           const BackwardCoefficients<typename Element<T>::Acc> &c) {
    using A = typename Element<T>::Acc;
    T *dz = static_cast<T *>(dz_), *dr = static_cast<T *>(dr_);
    const T *dy = static_cast<const T *>(dy_), *z = static_cast<const T *>(z_);
    const auto step = [&](size_t i, Pack<A> d, Pack<A> x, size_t rest, const auto &vec, Pack<A> &g) {
        const Pack<A> centered = x - vec(c.mean), scale = vec(c.scale);
        g = gradient<T, Act, Saved>(d, centered, scale, vec(c.shift), saved, i, rest);
        return scale * (fma(centered * vec(c.inv_std), vec(c.k1), vec(c.k0)) + g);
    };
    size_t i = 0;
    for (; i + lanes <= len; i += lanes) {
        Pack<A> g;
        const auto vec = [&](const A *p) { return coefficient<A, Columns>(p, i); };
        const Pack<A> v = step(i, Element<T>::load(dy + i), Element<T>::load(z + i), lanes, vec, g);
        Element<T>::store(dz + i, v);
        if (dr) Element<T>::store(dr + i, g);
    }
    if (const size_t rest = len - i) {
        Pack<A> g;
        const auto vec = [&](const A *p) { return coefficient_partial<A, Columns>(p, i, rest); };
        const Pack<A> v = step(i, load_partial(dy + i, rest), load_partial(z + i, rest), rest, vec, g);
        store_partial(dz + i, v, rest);
        if (dr) store_partial(dr + i, g, rest);
    }
}

}  // namespace bn::BN_ISA
