// Shifted sums of a block: fast in the accumulator type, and once more in double where the squares left its range.
// The shift is a mean over the block's own first values, so the sums do not cancel. Per instruction set, like simd.h.
#pragma once

namespace bn::BN_ISA {

template <class A>
BN_INLINE bool out_of_range(double square) {  // NaN too; a block of equal values too, which costs it a second look
    return sizeof(A) == 4 && !(square > 1e-25 && square < 1e35);
}

template <class T, class A, class Widen>
BN_INLINE void plane_sums(const char *z_, ptrdiff_t stride, size_t planes, size_t len, A center, double &sum,
                          double &square, Widen convert) {
    const Pack<A> m = set1(center);
    Pack<A> s[4], q[4];
    for (int k = 0; k < 4; ++k) s[k] = q[k] = set1<A>(0);
    for (size_t p = 0; p < planes; ++p) {
        const T *z = reinterpret_cast<const T *>(z_ + static_cast<ptrdiff_t>(p) * stride);
        const auto step = [&](size_t i, int k) {
            const Pack<A> d = convert(Element<T>::load(z + i)) - m;
            s[k] = s[k] + d;
            q[k] = fma(d, d, q[k]);
        };
        size_t i = 0;
        for (; i + 4 * lanes <= len; i += 4 * lanes) {
            step(i, 0);
            step(i + lanes, 1);
            step(i + 2 * lanes, 2);
            step(i + 3 * lanes, 3);
        }
        for (int k = 0; i + lanes <= len; i += lanes, ++k) step(i, 0);
        if (const size_t rest = len - i) {
            const Pack<A> d = keep_first(convert(load_partial(z + i, rest)) - m, rest);
            s[3] = s[3] + d;
            q[3] = fma(d, d, q[3]);
        }
    }
    sum = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
    square = sum_lanes((q[0] + q[1]) + (q[2] + q[3]));
}

template <class T>
Moments plane_moments(const void *z_, ptrdiff_t stride, size_t planes, size_t len) {
    using A = typename Element<T>::Acc;
    const char *z = static_cast<const char *>(z_);
    const T *head = static_cast<const T *>(z_);
    A center;
    if (len >= lanes) {
        center = static_cast<A>(sum_lanes(Element<T>::load(head) * set1(static_cast<A>(1.0 / lanes))));
    } else {
        A one[lanes];
        store_acc(one, load_partial(head, 1));
        center = one[0];
    }
    Moments out;
    out.center = static_cast<double>(center);
    plane_sums<T, A>(z, stride, planes, len, center, out.sum, out.square, [](Pack<A> x) { return x; });
    if (out_of_range<A>(out.square))
        plane_sums<T, double>(z, stride, planes, len, out.center, out.sum, out.square,
                              [](Pack<A> x) { return widen(x); });
    return out;
}

// the sums of 16 columns in double
template <class T>
void column_sums_wide(const char *z, ptrdiff_t stride, size_t rows, size_t cols, const double *center, double *sum,
                      double *square) {
    double c[lanes] = {0};
    memcpy(c, center, cols * sizeof(double));
    const Pack<double> m = load_acc(c);
    Pack<double> s = set1(0.0), q = set1(0.0);
    for (size_t r = 0; r < rows; ++r) {
        const T *row = reinterpret_cast<const T *>(z + static_cast<ptrdiff_t>(r) * stride);
        const Pack<double> d = widen(cols == lanes ? Element<T>::load(row) : load_partial(row, cols)) - m;
        s = s + d;
        q = fma(d, d, q);
    }
    double so[lanes], qo[lanes];
    store_acc(so, s);
    store_acc(qo, q);
    memcpy(sum, so, cols * sizeof(double));
    memcpy(square, qo, cols * sizeof(double));
}

// Eight rows per visit of the accumulators, which live in the first-level cache.
template <class T>
void column_moments(const void *z_, ptrdiff_t stride, size_t rows, size_t cols_,
                    const typename Element<T>::Acc *center, double *sum, double *square) {
    using A = typename Element<T>::Acc;
    constexpr size_t chunk = 512, group = 8;
    const char *z = static_cast<const char *>(z_);
    const auto at = [&](size_t row, size_t j) {
        return reinterpret_cast<const T *>(z + static_cast<ptrdiff_t>(row) * stride) + j;
    };
    for (size_t j0 = 0; j0 < cols_; j0 += chunk) {
        const size_t cols = cols_ - j0 < chunk ? cols_ - j0 : chunk;
        A m[chunk], s[chunk], q[chunk];
        for (size_t j = 0; j < chunk; ++j) s[j] = q[j] = 0;
        for (size_t j = 0; j < cols; j += lanes) {
            const size_t rest = cols - j < lanes ? cols - j : lanes;
            Pack<A> v = load_some(at(0, j0 + j), rest);
            if (rows >= group) {
                Pack<A> x[group];
                x[0] = v;
                for (size_t k = 1; k < group; ++k) x[k] = load_some(at(k, j0 + j), rest);
                v = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
                v = v * set1(static_cast<A>(1.0 / group));
            }
            store_acc(m + j, v);
        }
        const auto visit = [&](size_t row, size_t count, size_t j, size_t rest) {
            const Pack<A> mj = load_acc(m + j);
            Pack<A> sj = load_acc(s + j), qj = load_acc(q + j);
            for (size_t k = 0; k < count; ++k) {
                const T *z_k = at(row + k, j0 + j);
                // the next rows, while these are summed
                if (rest == lanes) __builtin_prefetch(reinterpret_cast<const char *>(z_k) + static_cast<ptrdiff_t>(group) * stride);
                const Pack<A> d = load_some(z_k, rest) - mj;
                sj = sj + d;
                qj = fma(d, d, qj);
            }
            store_acc(s + j, sj);
            store_acc(q + j, qj);
        };
        for (size_t row = 0; row < rows; row += group) {
            const size_t count = rows - row < group ? rows - row : group;
            size_t j = 0;
            if (count == group)
                for (; j + lanes <= cols; j += lanes) visit(row, group, j, lanes);
            for (; j < cols; j += lanes) visit(row, count, j, cols - j < lanes ? cols - j : lanes);
        }
        const Pack<double> n = set1(static_cast<double>(rows)), two = set1(2.0);
        for (size_t j = 0; j < cols; j += lanes) {
            const size_t rest = cols - j < lanes ? cols - j : lanes;
            const Pack<double> own = widen(load_acc(m + j));
            Pack<double> sum_j = widen(load_acc(s + j)), square_j = widen(load_acc(q + j));
            if (sizeof(A) == 4) {
                const unsigned in = bits(lt(set1(1e-25), square_j)) & bits(lt(square_j, set1(1e35)));
                if ((in & ((1u << rest) - 1)) != (1u << rest) - 1) {  // squares out of range, NaN, or equal values
                    double o[lanes], s2[lanes] = {0}, q2[lanes] = {0};
                    store_acc(o, own);
                    column_sums_wide<T>(reinterpret_cast<const char *>(at(0, j0 + j)), stride, rows, rest, o, s2, q2);
                    sum_j = load_acc(s2);
                    square_j = load_acc(q2);
                }
            }
            // from the block's own center to the caller's
            double *const sums = sum + j0 + j, *const squares = square + j0 + j;
            const Pack<double> shift = own - widen(load_some(center + j0 + j, rest));
            const Pack<double> add = fma(n, shift, sum_j), add2 = fma(shift, fma(two, sum_j, n * shift), square_j);
            if (rest == lanes) {
                store_acc(sums, load_acc(sums) + add);
                store_acc(squares, load_acc(squares) + add2);
            } else {
                store_partial(sums, load_partial(sums, rest) + add, rest);
                store_partial(squares, load_partial(squares, rest) + add2, rest);
            }
        }
    }
}

template <class T>
double first(const void *z) {
    typename Element<T>::Acc one[lanes];
    store_acc(one, load_partial(static_cast<const T *>(z), 1));
    return static_cast<double>(one[0]);
}

template <class T>
void firsts(const void *z_, size_t cols, typename Element<T>::Acc *out) {
    const T *z = static_cast<const T *>(z_);
    size_t j = 0;
    for (; j + lanes <= cols; j += lanes) store_acc(out + j, Element<T>::load(z + j));
    if (const size_t rest = cols - j) store_partial(out + j, load_partial(z + j, rest), rest);
}

}  // namespace bn::BN_ISA
