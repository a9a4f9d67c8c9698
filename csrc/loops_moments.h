// Sums about a center that lies among the data, so that they do not cancel: fast in the accumulator type over a
// bounded number of values, once more in double where the squares left its range. Per instruction set, like simd/pack.h.
#pragma once

namespace bn::BN_ISA {

// Calls step(i, k) for every whole pack of a row, k the chain of additions it belongs to, and rest(i, count).
template <class Step, class Rest>
BN_INLINE void four_chains(size_t len, Step step, Rest rest) {
    size_t i = 0;
    for (; i + 4 * lanes <= len; i += 4 * lanes) {
        step(i, 0);
        step(i + lanes, 1);
        step(i + 2 * lanes, 2);
        step(i + 3 * lanes, 3);
    }
    if (i + 2 * lanes <= len) {
        step(i, 0);
        step(i + lanes, 1);
        i += 2 * lanes;
    }
    if (i + lanes <= len) {
        step(i, 2);
        i += lanes;
    }
    if (i < len) rest(i, len - i);
}

template <class T>
void plane_moments(const Block &block, const typename Element<T>::Acc *center, typename Element<T>::Acc *out) {
    using A = typename Element<T>::Acc;
    for (size_t row = 0; row < block.rows; ++row, out += 2 * lanes) {
        const T *z = row_of<T>(block.z, row, block.z_step);
        const Pack<A> m = set1(center[row]), zero = set1<A>(0);
        Pack<A> s[4] = {vector_of<T>(out), zero, zero, zero}, q[4] = {vector_of<T>(out + lanes), zero, zero, zero};
        const auto add = [&](Pack<A> d, int k) BN_LAMBDA_INLINE {
            s[k] = s[k] + d;
            q[k] = fma(d, d, q[k]);
        };
        const uint8_t *const kept = block.kept ? block.kept + static_cast<ptrdiff_t>(row) * block.kept_step : nullptr;
        const auto some = [&](size_t i, size_t rest, int k) BN_LAMBDA_INLINE {
            add(only(mask_of<T>(counted(kept, i, rest)), load_some(z + i, rest) - m), k);
        };
        if (kept)
            for (size_t i = 0; i < block.len; i += lanes) some(i, block.len - i < lanes ? block.len - i : lanes, 0);
        else
            four_chains(
                block.len, [&](size_t i, int k) BN_LAMBDA_INLINE { add(Element<T>::load(z + i) - m, k); },
                [&](size_t i, size_t rest) BN_LAMBDA_INLINE { some(i, rest, 3); });
        store_vector<T>(out, (s[0] + s[1]) + (s[2] + s[3]));
        store_vector<T>(out + lanes, (q[0] + q[1]) + (q[2] + q[3]));
    }
}

template <class A>
Sums lane_sums(const A *of) {
    return {sum_lanes(load_acc(of)), sum_lanes(load_acc(of + lanes))};
}

template <class T>
Sums wide_moments(const void *z_, size_t len, double center, const uint8_t *kept) {
    const T *z = static_cast<const T *>(z_);
    const Pack<double> m = set1(center);
    Pack<double> s = set1(0.0), q = set1(0.0);
    for (size_t i = 0; i < len; i += lanes) {
        const size_t rest = len - i < lanes ? len - i : lanes;
        const Pack<double> d = only(mask_of<double>(counted(kept, i, rest)), widen(load_in_order(z + i, rest)) - m);
        s = s + d;
        q = fma(d, d, q);
    }
    return {sum_lanes(s), sum_lanes(q)};
}

// sums by columns: what a mask keeps of the i-th row
BN_INLINE const uint8_t *kept_row(const Block &block, size_t i) {
    return block.kept ? block.kept + static_cast<ptrdiff_t>(i) * block.kept_step : nullptr;
}

// the sums of 16 columns in double
template <class T>
void column_sums_wide(const Block &block, size_t j, size_t cols, Pack<double> center, Pack<double> &s, Pack<double> &q) {
    s = q = set1(0.0);
    for (size_t r = 0; r < block.rows; ++r) {
        if (block.lines && !block.lines[r]) continue;
        const T *const z = row_of<const T>(block.z, r, block.z_step) + j;
        const Mask<double> here = mask_of<double>(counted(kept_row(block, r), j, cols));
        const Pack<double> d = only(here, widen(load_in_order(z, cols)) - center);
        s = s + d;
        q = fma(d, d, q);
    }
}

// Eight rows per visit of the accumulators, which live in the first-level cache.
template <class T>
void column_moments(const Block &block, const typename Element<T>::Acc *center, double *sum, double *square) {
    using A = typename Element<T>::Acc;
    constexpr size_t chunk = 8192 / sizeof(A), group = 8;
    for (size_t j0 = 0; j0 < block.len; j0 += chunk) {
        const size_t cols = block.len - j0 < chunk ? block.len - j0 : chunk, padded = (cols + lanes - 1) / lanes * lanes;
        A s[chunk], q[chunk];
        memset(s, 0, padded * sizeof(A));
        memset(q, 0, padded * sizeof(A));
        for (size_t row = 0; row < block.rows; row += group) {
            const size_t count = block.rows - row < group ? block.rows - row : group;
            const T *const zs = row_of<T>(block.z, row, block.z_step) + j0;
            const Ahead<T, group> next(zs, block.z_step, block.len);
            const Lines<T, group> line(block.lines, row, count);
            const auto visit = [&](size_t count, size_t j, size_t rest, bool all) BN_LAMBDA_INLINE {
                const Pack<A> m = vector_of<T>(center + j0 + j, rest);
                Pack<A> sj = vector_of<T>(s + j), qj = vector_of<T>(q + j);
                for (size_t k = 0; k < count; ++k) {
                    Pack<A> d = line(k, load_some(row_of<T>(zs, k, block.z_step) + j, rest) - m);
                    if (!all) d = only(mask_of<T>(counted(kept_row(block, row + k), j0 + j, rest)), d);
                    sj = sj + d;
                    qj = fma(d, d, qj);
                }
                store_vector<T>(s + j, sj);
                store_vector<T>(q + j, qj);
            };
            size_t j = 0;
            const auto whole = [&](bool all) BN_LAMBDA_INLINE {
                for (; j + lanes <= cols; j += lanes) {
                    next.fetch(j);
                    visit(group, j, lanes, all);
                }
            };
            if (count == group) block.kept ? whole(false) : whole(true);
            for (; j < cols; j += lanes) visit(count, j, cols - j < lanes ? cols - j : lanes, false);
        }
        for (size_t j = 0; j < cols; j += lanes) {
            const size_t rest = cols - j < lanes ? cols - j : lanes;
            Pack<double> sum_j = widen(load_acc(s + j)), square_j = widen(load_acc(q + j));
            if (sizeof(A) == 4) {
                const Pack<double> zero = set1(0.0);
                const unsigned good = bits(lt(set1(1e-25), square_j)) & bits(lt(square_j, set1(1e35)));
                const unsigned equal = bits(le(square_j, zero)) & bits(le(sum_j, zero)) & bits(le(zero, sum_j));
                const unsigned all = (1u << rest) - 1;
                if (((good | equal) & all) != all)  // squares out of range, or NaN
                    column_sums_wide<T>(block, j0 + j, rest, widen(load_some(center + j0 + j, rest)), sum_j, square_j);
            }
            double *const sums = sum + j0 + j, *const squares = square + j0 + j;
            store_partial(sums, load_some(sums, rest) + sum_j, rest);
            store_partial(squares, load_some(squares, rest) + square_j, rest);
        }
    }
}

template <class T>
void gather(const void *z, ptrdiff_t step, size_t count, typename Element<T>::Acc *out) {
    using A = typename Element<T>::Acc;
    if (step == static_cast<ptrdiff_t>(sizeof(T))) {
        for (size_t i = 0; i < count; i += lanes) {
            const size_t rest = count - i < lanes ? count - i : lanes;
            store_partial(out + i, load_in_order(static_cast<const T *>(z) + i, rest), rest);
        }
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        A one[lanes];
        store_vector<T>(one, load_partial(row_of<T>(z, i, step), 1));
        out[i] = one[0];
    }
}

}  // namespace bn::BN_ISA
