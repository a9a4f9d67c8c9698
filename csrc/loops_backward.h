// The sums of the backward, and the gradient of the input. Per instruction set, like simd/pack.h.
#pragma once

namespace bn::BN_ISA {

// g = dy * activation'(u) for one pack; `saved` is where this row's bit mask or residual starts
template <class T, class Act, bool Saved, class A = typename Element<T>::Acc>
BN_INLINE Pack<A> gradient(Pack<A> dy, Pack<A> centered, Pack<A> scale, Pack<A> shift, const void *saved, size_t i,
                           size_t rest) {
    if constexpr (Saved && Act::has_side) return Act::template from_side<typename Element<T>::Order>(get_side(saved, i), dy);
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
        Pack<A> s[4] = {vector_of<T>(out), zero, zero, zero}, t[4] = {vector_of<T>(out + lanes), zero, zero, zero};
        const uint8_t *const kept = block.kept ? block.kept + static_cast<ptrdiff_t>(row) * block.kept_step : nullptr;
        const auto step = [&](size_t i, size_t rest, int k, bool all) BN_LAMBDA_INLINE {
            Pack<A> centered = load_some(z + i, rest) - mean;
            Pack<A> g = gradient<T, Act, Saved>(load_some(dy + i, rest), centered, scale, shift, saved, i, rest);
            if (!all) {
                const Mask<A> here = mask_of<T>(counted(kept, i, rest));
                centered = only(here, centered), g = only(here, g);
            }
            s[k] = s[k] + g;
            t[k] = fma(g, centered * inv, t[k]);
        };
        if (Act::heavy || kept) {
            for (size_t i = 0; i < block.len; i += lanes) step(i, block.len - i < lanes ? block.len - i : lanes, 0, false);
        } else if constexpr (!Act::heavy) {
            four_chains(
                block.len, [&](size_t i, int k) BN_LAMBDA_INLINE { step(i, lanes, k, true); },
                [&](size_t i, size_t rest) BN_LAMBDA_INLINE { step(i, rest, 3, false); });
        }
        store_vector<T>(out, (s[0] + s[1]) + (s[2] + s[3]));
        store_vector<T>(out + lanes, (t[0] + t[1]) + (t[2] + t[3]));
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
            const T *const zs = row_of<T>(block.z, row, block.z_step) + j0, *const dys = row_of<T>(block.dy, row, block.step) + j0;
            const Ahead<T, group> next_z(zs, block.z_step, block.len), next_dy(dys, block.step, block.len);
            const Lines<T, group> line(block.lines, row, count);
            const void *saved[group] = {};
            if constexpr (Saved)
                for (size_t k = 0; k < count; ++k) saved[k] = saved_row<Act, Saved>(block, row + k);
            const auto visit = [&](size_t count, size_t j, size_t rest, bool all) BN_LAMBDA_INLINE {
                const auto vec = [&](const A *p) BN_LAMBDA_INLINE { return vector_of<T>(p + j0 + j, rest); };
                const Pack<A> mean = vec(c.mean), inv = vec(c.inv_std);
                // dead code where the activation needs no pre-activation
                const Pack<A> scale = vec(c.scale), shift = vec(c.shift);
                Pack<A> sj = vector_of<T>(s + j), tj = vector_of<T>(t + j);
                for (size_t k = 0; k < count; ++k) {
                    Pack<A> centered = load_some(row_of<T>(zs, k, block.z_step) + j, rest) - mean;
                    Pack<A> g = gradient<T, Act, Saved>(load_some(row_of<T>(dys, k, block.step) + j, rest), centered, scale,
                                                        shift, saved[k], j0 + j, rest);
                    if (!all) {
                        const Mask<A> here = mask_of<T>(counted(kept_row(block, row + k), j0 + j, rest));
                        centered = only(here, centered), g = only(here, g);
                    }
                    centered = line(k, centered), g = line(k, g);
                    sj = sj + g;
                    tj = fma(g, centered * inv, tj);
                }
                store_vector<T>(s + j, sj);
                store_vector<T>(t + j, tj);
            };
            size_t j = 0;
            if constexpr (!Act::heavy) {
                const auto whole = [&](bool all) BN_LAMBDA_INLINE {
                    for (; j + lanes <= cols; j += lanes) {
                        next_z.fetch(j), next_dy.fetch(j);
                        visit(group, j, lanes, all);
                    }
                };
                if (count == group) block.kept ? whole(false) : whole(true);
            }
            for (; j < cols; j += lanes) visit(count, j, cols - j < lanes ? cols - j : lanes, false);
        }
        for (size_t j = 0; j < cols; ++j) {
            sum_dy[j0 + j] += static_cast<double>(s[j]);
            sum_dy_zhat[j0 + j] += static_cast<double>(t[j]);
        }
    }
}

template <class T, class Act, bool Columns, bool Saved>
void input(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c);

// `together` rows of which each column's coefficients are read once
template <class T, class Act, bool Columns, bool Saved, size_t together>
BN_INLINE void input_rows(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c, size_t row) {
    using A = typename Element<T>::Acc;
    const size_t len = block.len;
    const bool past = block.stream;
    const ptrdiff_t z_step = block.z_step, step = block.step;
    T *const dz = row_of<T>(block.out, row, step);
    T *const dr = block.out_residual ? row_of<T>(block.out_residual, row, step) : nullptr;
    const T *const dy = row_of<T>(block.dy, row, step), *const z = row_of<T>(block.z, row, z_step);
    const Coefficient<T, Columns> mean(c.mean, row), scale(c.scale, row), shift(c.shift, row), k0(c.k0, row), k1(c.k1, row);
    const Ahead<T, together> next_z(z, z_step, len), next_dy(dy, step, len);
    const uint8_t *const kept = together == 1 && block.kept ? block.kept + static_cast<ptrdiff_t>(row) * block.kept_step : nullptr;
    const Lines<T, together> line(Columns ? block.lines : nullptr, row);
    const auto at = [](auto *p, size_t k, ptrdiff_t by) BN_LAMBDA_INLINE { return row_of<std::remove_pointer_t<decltype(p)>>(p, k, by); };
    const auto whole = [&](size_t i) BN_LAMBDA_INLINE {
        if constexpr (Columns) next_z.fetch(i), next_dy.fetch(i);
        const Pack<A> m = mean.at(i), a = scale.at(i), b = shift.at(i), c0 = k0.at(i), c1 = k1.at(i);
        BN_UNROLL for (size_t k = 0; k < together; ++k) {
            const Pack<A> centered = Element<T>::load(at(z, k, z_step) + i) - m;
            Pack<A> g = gradient<T, Act, Saved>(Element<T>::load(at(dy, k, step) + i), centered, a, b,
                                                saved_row<Act, Saved>(block, row + k), i, lanes);
            Pack<A> x = line(k, a * (fma(centered, c1, c0) + g));
            g = line(k, g);
            if (kept) {
                const Mask<A> here = mask_of<T>(get_side(kept, i));
                x = only(here, x), g = only(here, g);
            }
            put<T>(at(dz, k, step) + i, x, past);
            if (dr) put<T>(at(dr, k, step) + i, g, past);
        }
    };
    size_t i = 0;
    for (; i + lanes <= len; i += lanes) whole(i);
    const size_t rest = len - i;
    if (!rest) return;
    for (size_t k = 0; k < together; ++k) {
        T *const to = at(dz, k, step) + i, *const to_r = dr ? at(dr, k, step) + i : nullptr;
        const T *const from = at(z, k, z_step) + i, *const from_dy = at(dy, k, step) + i;
        const void *const saved = saved_row<Act, Saved>(block, row + k);
        if constexpr (Act::heavy) {
            T zs[lanes], ds[lanes], rs[lanes], out[lanes], out_r[lanes];
            A of[5][lanes];
            const auto copy = [=](T *t, const T *f) { Element<T>::store(t, load_partial(f, rest)); };
            copy(zs, from);
            copy(ds, from_dy);
            if constexpr (Saved) copy(rs, static_cast<const T *>(saved) + i);
            store_vector<T>(of[0], mean.partial(i, rest));
            store_vector<T>(of[1], scale.partial(i, rest));
            store_vector<T>(of[2], shift.partial(i, rest));
            store_vector<T>(of[3], k0.partial(i, rest));
            store_vector<T>(of[4], k1.partial(i, rest));
            Block one;
            one.z = zs, one.dy = ds, one.saved = rs, one.out = out, one.out_residual = dr ? out_r : nullptr;
            one.rows = 1, one.len = lanes, one.kept = kept ? kept + i / 8 : nullptr;
            one.lines = block.lines ? block.lines + row + k : nullptr;
            input<T, Act, true, Saved>(one, {of[0], of[1], of[2], nullptr, of[3], of[4]});
            memcpy(static_cast<void *>(to), out, rest * sizeof(T));
            if (dr) memcpy(static_cast<void *>(to_r), out_r, rest * sizeof(T));
        } else {
            const Pack<A> centered = load_partial(from, rest) - mean.partial(i, rest), a = scale.partial(i, rest);
            Pack<A> g = gradient<T, Act, Saved>(load_partial(from_dy, rest), centered, a, shift.partial(i, rest), saved, i, rest);
            Pack<A> x = a * (fma(centered, k1.partial(i, rest), k0.partial(i, rest)) + g);
            const Mask<A> here = mask_of<T>(counted(kept, i, rest));
            x = line(k, only(here, x)), g = line(k, only(here, g));
            store_partial(to, x, rest);
            if (dr) store_partial(to_r, g, rest);
        }
    }
}

template <class T, class Act, bool Columns, bool Saved>
void input(const Block &block, const BackwardCoefficients<typename Element<T>::Acc> &c) {
    size_t row = 0;
    if constexpr (Columns && !Act::heavy)
        for (; !block.kept && block.len < wide_row && row + rows_at_once <= block.rows; row += rows_at_once) input_rows<T, Act, true, Saved, rows_at_once>(block, c, row);
    for (; row < block.rows; ++row) input_rows<T, Act, Columns, Saved, 1>(block, c, row);
}

}  // namespace bn::BN_ISA
