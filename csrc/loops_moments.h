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
        Pack<A> s[4] = {load_acc(out), zero, zero, zero}, q[4] = {load_acc(out + lanes), zero, zero, zero};
        const auto add = [&](Pack<A> d, int k) BN_LAMBDA_INLINE {
            s[k] = s[k] + d;
            q[k] = fma(d, d, q[k]);
        };
        four_chains(
            block.len, [&](size_t i, int k) BN_LAMBDA_INLINE { add(Element<T>::load(z + i) - m, k); },
            [&](size_t i, size_t rest) BN_LAMBDA_INLINE { add(keep_first(load_partial(z + i, rest) - m, rest), 3); });
        store_acc(out, (s[0] + s[1]) + (s[2] + s[3]));
        store_acc(out + lanes, (q[0] + q[1]) + (q[2] + q[3]));
    }
}

template <class A>
Sums lane_sums(const A *of) {
    return {sum_lanes(load_acc(of)), sum_lanes(load_acc(of + lanes))};
}

template <class T>
Sums wide_moments(const void *z_, size_t len, double center) {
    const T *z = static_cast<const T *>(z_);
    const Pack<double> m = set1(center);
    Pack<double> s = set1(0.0), q = set1(0.0);
    for (size_t i = 0; i < len; i += lanes) {
        const size_t rest = len - i < lanes ? len - i : lanes;
        const Pack<double> d = keep_first(widen(load_some(z + i, rest)) - m, rest);
        s = s + d;
        q = fma(d, d, q);
    }
    return {sum_lanes(s), sum_lanes(q)};
}

// the sums of 16 columns in double
template <class T>
void column_sums_wide(const char *z, ptrdiff_t stride, size_t rows, size_t cols, Pack<double> center, Pack<double> &s,
                      Pack<double> &q) {
    s = q = set1(0.0);
    for (size_t r = 0; r < rows; ++r) {
        const Pack<double> d = keep_first(widen(load_some(row_of<T>(z, r, stride), cols)) - center, cols);
        s = s + d;
        q = fma(d, d, q);
    }
}

// What is to come, asked for in the order of memory while the rows before it are summed: columns are visited several
// rows at a time, and no hardware takes that for one stream. Where rows are not packed, row by row.
template <class T, size_t group>
struct Ahead {
    static constexpr size_t lines = group * lanes * sizeof(T) / 64;
    const char *next;
    ptrdiff_t stride;
    bool packed;
    BN_INLINE Ahead(const T *rows, ptrdiff_t stride_, size_t len)
        : next(reinterpret_cast<const char *>(rows) + static_cast<ptrdiff_t>(group) * stride_), stride(stride_),
          packed(stride_ == static_cast<ptrdiff_t>(len * sizeof(T))) {}
    BN_INLINE void fetch(size_t j) const {
        if (packed) {
            const char *p = next + j * group * sizeof(T);
            BN_UNROLL for (size_t i = 0; i < lines; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
            if ((j * group * sizeof(T)) % 4096 == 0) __builtin_prefetch(p + 16384, 0, 2);
        } else {
            const char *p = next + j * sizeof(T);
            BN_UNROLL for (size_t k = 0; k < group; ++k) __builtin_prefetch(p + static_cast<ptrdiff_t>(k) * stride);
        }
    }
};

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
        const T *const first = static_cast<const T *>(block.z) + j0;
        for (size_t row = 0; row < block.rows; row += group) {
            const size_t count = block.rows - row < group ? block.rows - row : group;
            const T *const z = row_of<T>(first, row, block.z_step);
            const Ahead<T, group> next(z, block.z_step, block.len);
            const auto visit = [&](size_t count, size_t j, size_t rest) BN_LAMBDA_INLINE {
                const Pack<A> m = load_some(center + j0 + j, rest);
                Pack<A> sj = load_acc(s + j), qj = load_acc(q + j);
                for (size_t k = 0; k < count; ++k) {
                    const Pack<A> d = load_some(row_of<T>(z + j, k, block.z_step), rest) - m;
                    sj = sj + d;
                    qj = fma(d, d, qj);
                }
                store_acc(s + j, sj);
                store_acc(q + j, qj);
            };
            size_t j = 0;
            if (count == group)
                for (; j + lanes <= cols; j += lanes) {
                    next.fetch(j);
                    visit(group, j, lanes);
                }
            for (; j < cols; j += lanes) visit(count, j, cols - j < lanes ? cols - j : lanes);
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
                    column_sums_wide<T>(reinterpret_cast<const char *>(first + j), block.z_step, block.rows, rest,
                                        widen(load_some(center + j0 + j, rest)), sum_j, square_j);
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
            store_partial(out + i, load_some(static_cast<const T *>(z) + i, rest), rest);
        }
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        A one[lanes];
        store_acc(one, load_partial(row_of<T>(z, i, step), 1));
        out[i] = one[0];
    }
}

}  // namespace bn::BN_ISA
