// The sums of the backward, and the gradient of the input. Per instruction set, like simd/pack.h.
#pragma once

namespace bn::BN_ISA {

// g = dy * activation'(u) for one pack; `saved` is where this row's bit mask or residual starts
template <class T, class Act, bool Saved, class A = typename Element<T>::Acc>
BN_INLINE Pack<A> gradient(Pack<A> dy, Pack<A> centered, Pack<A> scale, Pack<A> shift, const void *saved, size_t i,
                           size_t rest) {
    if constexpr (Saved && Act::has_side) return Act::from_side(get_side(saved, i), dy);
    Pack<A> u = pre_activation(centered, scale, shift);
    if constexpr (Saved) u = u + load_some(static_cast<const T *>(saved) + i, rest);
    return Act::gradient(u, dy);
}

template <class Act, bool Saved>
BN_INLINE const void *saved_row(const Block &block, size_t row) {
    if constexpr (!Saved) return nullptr;
    return static_cast<const char *>(block.saved) + static_cast<ptrdiff_t>(row) * (Act::has_side ? block.mask_step : block.step);
}

template <class T, class Act, bool Saved>
void plane_reduce(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c,
                  typename Element<T>::Acc *out) {
    using A = typename Element<T>::Acc;
    for (size_t row = 0; row < block.rows; ++row, out += 2 * lanes) {
        const T *const z = row_of<T>(block.z, row, block.z_step), *const dy = row_of<T>(block.dy, row, block.step);
        const void *const saved = saved_row<Act, Saved>(block, row);
        const Pack<A> mean = set1(c.mean[row]), scale = set1(c.scale[row]), shift = set1(c.shift[row]);
        const Pack<A> inv = set1(c.inv_std[row]), zero = set1<A>(0);
        Pack<A> s[4] = {load_acc(out), zero, zero, zero}, t[4] = {load_acc(out + lanes), zero, zero, zero};
        const auto step = [&](size_t i, size_t rest, int k) BN_LAMBDA_INLINE {
            Pack<A> centered = load_some(z + i, rest) - mean;
            if (rest != lanes) centered = keep_first(centered, rest);
            Pack<A> g = gradient<T, Act, Saved>(load_some(dy + i, rest), centered, scale, shift, saved, i, rest);
            if (rest != lanes) g = keep_first(g, rest);
            s[k] = s[k] + g;
            t[k] = fma(g, centered * inv, t[k]);
        };
        if constexpr (Act::heavy) {
            for (size_t i = 0; i < block.len; i += lanes) step(i, block.len - i < lanes ? block.len - i : lanes, 0);
        } else {
            four_chains(
                block.len, [&](size_t i, int k) BN_LAMBDA_INLINE { step(i, lanes, k); },
                [&](size_t i, size_t rest) BN_LAMBDA_INLINE { step(i, rest, 3); });
        }
        store_acc(out, (s[0] + s[1]) + (s[2] + s[3]));
        store_acc(out + lanes, (t[0] + t[1]) + (t[2] + t[3]));
    }
}

// Eight rows per visit of the accumulators, which live in the first-level cache.
template <class T, class Act, bool Saved>
void column_reduce(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c, double *sum_dy,
                   double *sum_dy_zhat) {
    using A = typename Element<T>::Acc;
    constexpr size_t chunk = 8192 / sizeof(A), group = 8;
    for (size_t j0 = 0; j0 < block.len; j0 += chunk) {
        const size_t cols = block.len - j0 < chunk ? block.len - j0 : chunk, padded = (cols + lanes - 1) / lanes * lanes;
        A s[chunk], t[chunk];
        memset(s, 0, padded * sizeof(A));
        memset(t, 0, padded * sizeof(A));
        for (size_t row = 0; row < block.rows; row += group) {
            const size_t count = block.rows - row < group ? block.rows - row : group;
            const T *const z = row_of<T>(block.z, row, block.z_step) + j0, *const dy = row_of<T>(block.dy, row, block.step) + j0;
            const Ahead<T, group> next_z(z, block.z_step, block.len), next_dy(dy, block.step, block.len);
            const auto visit = [&](size_t count, size_t j, size_t rest) BN_LAMBDA_INLINE {
                const auto vec = [&](const A *p) BN_LAMBDA_INLINE { return load_some(p + j0 + j, rest); };
                const Pack<A> mean = vec(c.mean), inv = vec(c.inv_std);
                // dead code where the activation needs no pre-activation
                const Pack<A> scale = vec(c.scale), shift = vec(c.shift);
                Pack<A> sj = load_acc(s + j), tj = load_acc(t + j);
                for (size_t k = 0; k < count; ++k) {
                    const Pack<A> centered = load_some(row_of<T>(z + j, k, block.z_step), rest) - mean;
                    const Pack<A> g = gradient<T, Act, Saved>(load_some(row_of<T>(dy + j, k, block.step), rest), centered,
                                                              scale, shift, saved_row<Act, Saved>(block, row + k), j0 + j, rest);
                    sj = sj + g;
                    tj = fma(g, centered * inv, tj);
                }
                store_acc(s + j, sj);
                store_acc(t + j, tj);
            };
            size_t j = 0;
            if constexpr (!Act::heavy) {
                if (count == group)
                    for (; j + lanes <= cols; j += lanes) {
                        next_z.fetch(j);
                        next_dy.fetch(j);
                        visit(group, j, lanes);
                    }
            }
            for (; j < cols; j += lanes) visit(count, j, cols - j < lanes ? cols - j : lanes);
        }
        for (size_t j = 0; j < cols; ++j) {
            sum_dy[j0 + j] += static_cast<double>(s[j]);
            sum_dy_zhat[j0 + j] += static_cast<double>(t[j]);
        }
    }
}

template <class T, class Act, bool Columns, bool Saved>
void input(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c) {
    using A = typename Element<T>::Acc;
    const size_t len = block.len;
    const bool past = block.stream;
    for (size_t row = 0; row < block.rows; ++row) {
        T *const dz = row_of<T>(block.out, row, block.step);
        T *const dr = block.out_residual ? row_of<T>(block.out_residual, row, block.step) : nullptr;
        const T *const dy = row_of<T>(block.dy, row, block.step), *const z = row_of<T>(block.z, row, block.z_step);
        const void *const saved = saved_row<Act, Saved>(block, row);
        const Coefficient<A, Columns> mean(c.mean, row), scale(c.scale, row), shift(c.shift, row), k0(c.k0, row), k1(c.k1, row);
        const auto whole = [=](size_t i) BN_LAMBDA_INLINE {
            prefetch<T, Columns>(z + i);
            prefetch<T, Columns>(dy + i);
            const Pack<A> centered = Element<T>::load(z + i) - mean.at(i), a = scale.at(i);
            const Pack<A> g =
                gradient<T, Act, Saved>(Element<T>::load(dy + i), centered, a, shift.at(i), saved, i, lanes);
            put<T>(dz + i, a * (fma(centered, k1.at(i), k0.at(i)) + g), past);
            if (dr) put<T>(dr + i, g, past);
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
            T zs[lanes], ds[lanes], rs[lanes], out[lanes], out_r[lanes];
            A k[5][lanes];
            const auto copy = [=](T *to, const T *from) { Element<T>::store(to, load_partial(from, rest)); };
            copy(zs, z + i);
            copy(ds, dy + i);
            if constexpr (Saved) copy(rs, static_cast<const T *>(saved) + i);
            store_acc(k[0], mean.partial(i, rest));
            store_acc(k[1], scale.partial(i, rest));
            store_acc(k[2], shift.partial(i, rest));
            store_acc(k[3], k0.partial(i, rest));
            store_acc(k[4], k1.partial(i, rest));
            Block one;
            one.z = zs, one.dy = ds, one.saved = rs, one.out = out, one.out_residual = dr ? out_r : nullptr;
            one.rows = 1, one.len = lanes;
            input<T, Act, true, Saved>(one, {k[0], k[1], k[2], nullptr, k[3], k[4]});
            memcpy(static_cast<void *>(dz + i), out, rest * sizeof(T));
            if (dr) memcpy(static_cast<void *>(dr + i), out_r, rest * sizeof(T));
        } else {
            const Pack<A> centered = load_partial(z + i, rest) - mean.partial(i, rest), a = scale.partial(i, rest);
            const Pack<A> g = gradient<T, Act, Saved>(load_partial(dy + i, rest), centered, a, shift.partial(i, rest),
                                                      saved, i, rest);
            store_partial(dz + i, a * (fma(centered, k1.partial(i, rest), k0.partial(i, rest)) + g), rest);
            if (dr) store_partial(dr + i, g, rest);
        }
    }
}

}  // namespace bn::BN_ISA
