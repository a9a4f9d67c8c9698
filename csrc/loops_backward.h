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
        if constexpr (!Act::heavy) {
            for (; i + 2 * lanes <= block.len; i += 2 * lanes) {
                step(i, 0);
                step(i + lanes, 1);
            }
        }
        for (; i + lanes <= block.len; i += lanes) step(i, 0);
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
    const ptrdiff_t z_stride = block.z_stride, dy_stride = block.dy_stride, saved_stride = block.saved_stride;
    const A *means = c.mean, *scales = c.scale, *shifts = c.shift, *invs = c.inv_std;
    for (size_t j0 = 0; j0 < block.cols; j0 += chunk) {
        const size_t cols = block.cols - j0 < chunk ? block.cols - j0 : chunk;
        A s[chunk], t[chunk];
        for (size_t j = 0; j < chunk; ++j) s[j] = t[j] = 0;
        const auto rows = [&](size_t row, size_t count, size_t j, size_t rest) {
            const auto vec = [&](const A *p) { return load_some(p + j0 + j, rest); };
            const Pack<A> mean = vec(means), inv = vec(invs);
            // dead code where the activation needs no pre-activation
            const Pack<A> scale = vec(scales), shift = vec(shifts);
            Pack<A> sj = load_acc(s + j), tj = load_acc(t + j);
            for (size_t k = 0; k < count; ++k) {
                const ptrdiff_t r = static_cast<ptrdiff_t>(row + k);
                const T *z = reinterpret_cast<const T *>(zp + r * z_stride) + j0 + j;
                const T *dy = reinterpret_cast<const T *>(dp + r * dy_stride) + j0 + j;
                const void *saved = Saved ? sp + r * saved_stride : nullptr;
                if (rest == lanes) {  // the next rows, while these are summed
                    __builtin_prefetch(reinterpret_cast<const char *>(z) + static_cast<ptrdiff_t>(group) * z_stride);
                    __builtin_prefetch(reinterpret_cast<const char *>(dy) + static_cast<ptrdiff_t>(group) * dy_stride);
                }
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
            if constexpr (!Act::heavy) {
                if (count == group)
                    for (; j + lanes <= cols; j += lanes) rows(row, group, j, lanes);
            }
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
    const Coefficient<A, Columns> mean(c.mean), scale(c.scale), shift(c.shift), inv(c.inv_std), k0(c.k0), k1(c.k1);
    const auto whole = [=](size_t i) BN_LAMBDA_INLINE {
        const Pack<A> centered = Element<T>::load(z + i) - mean.at(i), a = scale.at(i);
        const Pack<A> g =
            gradient<T, Act, Saved>(Element<T>::load(dy + i), centered, a, shift.at(i), saved, i, lanes);
        Element<T>::store(dz + i, a * (fma(centered * inv.at(i), k1.at(i), k0.at(i)) + g));
        if (dr) Element<T>::store(dr + i, g);
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
        T zs[lanes], ds[lanes], rs[lanes], out[lanes], out_r[lanes];
        A k[6][lanes];
        const auto copy = [=](T *to, const T *from) { store_partial(to, load_partial(from, rest), lanes); };
        copy(zs, z + i);
        copy(ds, dy + i);
        if constexpr (Saved) copy(rs, static_cast<const T *>(saved) + i);
        store_acc(k[0], mean.partial(i, rest));
        store_acc(k[1], scale.partial(i, rest));
        store_acc(k[2], shift.partial(i, rest));
        store_acc(k[3], inv.partial(i, rest));
        store_acc(k[4], k0.partial(i, rest));
        store_acc(k[5], k1.partial(i, rest));
        input<T, Act, true, Saved>(out, dr ? out_r : nullptr, ds, zs, rs, lanes, {k[0], k[1], k[2], k[3], k[4], k[5]});
        memcpy(static_cast<void *>(dz + i), out, rest * sizeof(T));
        if (dr) memcpy(static_cast<void *>(dr + i), out_r, rest * sizeof(T));
    } else {
        const Pack<A> centered = load_partial(z + i, rest) - mean.partial(i, rest), a = scale.partial(i, rest);
        const Pack<A> g =
            gradient<T, Act, Saved>(load_partial(dy + i, rest), centered, a, shift.partial(i, rest), saved, i, rest);
        store_partial(dz + i, a * (fma(centered * inv.partial(i, rest), k1.partial(i, rest), k0.partial(i, rest)) + g),
                      rest);
        if (dr) store_partial(dr + i, g, rest);
    }
}

}  // namespace bn::BN_ISA
