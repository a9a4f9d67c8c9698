// Training and inference forward: moments of each channel, its coefficients, and the output.
#include "drivers.h"
#include "statistics.h"

namespace bn {
namespace {

// A value that the channel's own are near: the middle one of three, so that one far value spoils nothing; one of the
// data, so that equal values have no deviation; finite.
template <class A>
A middle(A a, A b, A c) {
    const A m = std::max(std::min(a, b), std::min(std::max(a, b), c));
    return std::isfinite(m) ? m : A{0};
}

template <class A>
class ForwardStep {
  public:
    static constexpr int inputs = 1;
    using Lanes = LaneSums<A>;

    struct Coefficients {  // of the columns
        Spread<A, 4> arrays;
        ForwardCoefficients<A> c{};
        const A *center = nullptr;
    };

    ForwardStep(const ForwardProblem<A> &problem)
        : p(problem), k(table<A>(p.shape.dtype)), element(static_cast<int64_t>(element_size(p.shape.dtype))),
          scale(array<A>(p.shape.c)), center(array<A>(reduces() ? p.shape.c : 0)),
          samples(array<A>(reduces() ? 3 * p.shape.c : 0)) {
        const Shape &x = p.shape;
        const int64_t c = x.c, s = x.s;
        z = view(p.z, x.z_sn * element, x.z_sc * element);
        y = view(p.y, c * s * element, s * element);
        r = view(p.residual, c * s * element, s * element);
        apply_plane = k.plane_apply[static_cast<int>(p.activation)][p.residual != nullptr];
        apply_column = k.column_apply[static_cast<int>(p.activation)][p.residual != nullptr];
        streams = p.y != p.z && should_stream(static_cast<size_t>(x.n * c * s * element));
        if (!(p.parts & statistics))
            for (int64_t i = 0; i < c; ++i) scale[i] = Affine<A>::scale(p.gamma, p.inv_std, i);
        if (in_runs(x, streams, p.mask)) apply_run = k.run_apply[static_cast<int>(p.activation)][p.residual != nullptr];
        if (apply_run) run_lanes = lanes_of_run(s);
        if (!p.beta) {
            zeros.reset(new A[static_cast<size_t>(c)]());
            shift = zeros.get();
        } else {
            shift = p.beta;
        }
    }

    bool reduces() const { return p.parts & statistics; }
    bool maps() const { return p.parts & normalization; }
    // What is given unrounded is summed so too. In float up to 1e-5 of the variance would be lost where the mean is large
    // beside the deviation, for the center may be some deviations off and the sums then cancel. Not under a mask, where
    // local steps ask for unrounded statistics too and have no time for it.
    bool wide() const { return sizeof(A) == 4 && p.exact_mean && !p.keep; }
    void begin() const { begin_tracking(p); }
    void end_of_thread() const {
        if (streams) k.fence();
    }
    bool skipped() const { return skips.load(std::memory_order_relaxed); }

    void finish(int64_t c0, int64_t c1, const Sums *totals) {
        if (finish_channels(p, k, c0, c1, center.get(), totals)) skips.store(true, std::memory_order_relaxed);
        if (p.inv_std)
            for (int64_t c = c0; c < c1; ++c) scale[c] = Affine<A>::scale(p.gamma, p.inv_std, c);
    }

    // --- planes ---

    void look_at(const Planes &g, int64_t c0, int64_t c1) {
        if (p.keep) return look_at_kept(c0, c1);
        const auto sample = [&](int64_t n, int64_t i) { return z.at(n, c0) + i * element; };
        find_centers(c0, c1, z.sc, sample(0, g.s / 4), sample(g.n / 2, g.s / 2), sample(g.n - 1, g.s * 3 / 4));
    }

    void reduce_segment(const Planes &g, int64_t c0, int64_t c1, int64_t segment, Lanes &lanes, Sums *out) {
        const int64_t begin = segment * g.units_per_segment, end = std::min(g.units, begin + g.units_per_segment);
        if (wide()) return wide_planes(g, c0, c1, begin, end, out);
        A *const sums = lanes.clear(c1 - c0);
        for (int64_t u = begin; u < end; ++u) {
            if (u + 1 < g.units) touch(g, u + 1, c0, c1);
            each_kept(g, u, c0, c1, [&](const Block &b, int64_t c) {
                k.plane_moments(b, &center[c], sums + (c - c0) * Lanes::width);
            });
        }
        for (int64_t c = c0; c < c1; ++c) {
            const Sums s = k.lane_sums(sums + (c - c0) * Lanes::width);
            Sums total{s.a, s.b};
            if (sizeof(A) == 4 && !(s.b > 1e-25 && s.b < 1e35) && !(s.a == 0 && s.b == 0)) {  // out of range, or NaN
                total = {};
                for (int64_t u = begin; u < end; ++u)
                    each_kept(g, u, c, c + 1, [&](const Block &b, int64_t) {
                        const Sums wide = k.wide_moments(b.z, b.len, static_cast<double>(center[c]));
                        total += {wide.a, wide.b};
                    });
            }
            out[c - c0] += total;
        }
    }

    void wide_planes(const Planes &g, int64_t c0, int64_t c1, int64_t begin, int64_t end, Sums *out) {
        for (int64_t first = c0; first < c1; first += channels_at_once) {
            const int64_t last = std::min(c1, first + channels_at_once);
            Sums totals[channels_at_once];
            for (int64_t u = begin; u < end; ++u) {
                if (u + 1 < g.units) touch(g, u + 1, first, last);
                const Block b = block(g, u, first, last);
                const char *row = static_cast<const char *>(b.z);
                for (int64_t c = first; c < last; ++c, row += b.z_step)
                    totals[c - first] += k.wide_moments(row, b.len, static_cast<double>(center[c]));
            }
            for (int64_t c = first; c < last; ++c) out[c - c0] += totals[c - first];
        }
    }

    void touch(const Planes &g, int64_t u, int64_t c0, int64_t c1) const {
        const int64_t n = u / g.pieces, at = g.start(u) * element, bytes = g.length(u) * (c1 - c0) * element;
        bn::touch(z.at(n, c0) + at, bytes);
        if (r) bn::touch(r.at(n, c0) + at, bytes);
    }

    void map_unit(const Planes &g, int64_t u, int64_t c0, int64_t c1) {
        Block b = block(g, u, c0, c1);
        const int64_t n = u / g.pieces, at = g.start(u) * element;
        char *const out = y.at(n, c0) + at;
        b.saved = r ? r.at(n, c0) + at : nullptr;
        b.mask = p.mask ? p.mask + (n * g.c + c0) * g.mask_row() + g.start(u) / 8 : nullptr;
        b.step = y.sc;
        b.mask_step = g.mask_row();
        const auto coefficients = [&](int64_t c) {
            return ForwardCoefficients<A>{p.mean + c, &scale[c], shift + c};
        };
        b.out = out;
        b.stream = streams;
        const Kept kept = p.keep ? p.keep->of(u) : Kept::all;
        if (kept == Kept::none) return zero(out, b.step, c1 - c0, g.length(u) * element);
        const bool whole = kept == Kept::all;
        if (whole && apply_run && (!streams || on_vectors(out, 0, 1, element))) {
            b.lanes = run_lanes.get();
            return apply_run(b, coefficients(c0));
        }
        if (whole && (!streams || on_vectors(out, b.step, c1 - c0, element))) return apply_plane(b, coefficients(c0));
        const auto map = [&](int64_t row, int64_t rows, int64_t start, int64_t len, char *to, char *) {
            apply_plane(part(b, row, rows, start, len, to), coefficients(c0 + row));
        };
        const auto scratch = [&](const auto &write) {
            if (g.pieces == 1) return through_scratch(write, out, nullptr, c1 - c0, g.s, element, map);
            for (int64_t c = 0; c < c1 - c0; ++c)
                through_scratch(write, out + c * y.sc, nullptr, 1, g.length(u), element,
                                [&](int64_t, int64_t, int64_t start, int64_t len, char *to, char *none) {
                                    map(c, 1, start, len, to, none);
                                });
        };
        if (whole) return scratch(past_caches(k, element));
        scratch(kept_only(k, element, streams, [&](int64_t start, int64_t) { return p.keep->plane(n, g.start(u) + start); }));
    }

    // --- columns ---

    void before_reduce(const Columns &g, Coefficients &all) {
        if (p.keep) {
            look_at_kept(0, g.c);
            all.center = all.arrays(g, 3, center.get());
            return;
        }
        const auto sample = [&](int64_t row, int64_t i) { return z.p + row * g.z_stride * element + i * element; };
        find_centers(0, g.c, g.s * element, sample(0, g.s / 4), sample(g.rows / 2, g.s / 2),
                     sample(std::max<int64_t>(0, g.rows - 1), g.s * 3 / 4));
        all.center = all.arrays(g, 3, center.get());
    }

    void before_map(const Columns &g, Coefficients &all) {
        all.c = {all.arrays(g, 0, p.mean), all.arrays(g, 1, scale.get()), all.arrays(g, 2, shift)};
    }

    void reduce_block(const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t j1, const Coefficients &all,
                      double *sum, double *square) {
        Block b;
        const auto reduce = [&](const char *from, int64_t step, int64_t count, int64_t j, int64_t len) {
            b.z = from;
            b.z_step = step;
            b.rows = static_cast<size_t>(count);
            b.len = static_cast<size_t>(len);
            if (wide()) return wide_columns(b, all.center + j, sum + (j - j0), square + (j - j0));
            k.column_moments(b, all.center + j, sum + (j - j0), square + (j - j0));
        };
        const auto at = [&](int64_t r, int64_t j) { return z.p + (r * g.z_stride + j) * element; };
        if (!p.keep) return reduce(at(row, j0), g.z_stride * element, rows, j0, j1 - j0);
        alignas(64) char together[rows_together * columns_together * sizeof(A)];
        constexpr int64_t step = columns_together * sizeof(A);
        if (g.repeated()) {  // short lines side by side: rows of kept ones
            const size_t line_bytes = static_cast<size_t>(g.c * element);
            return over_kept_lines(
                *p.keep, g, row, row + rows, j1,
                [&](int64_t r, int64_t line, int64_t slot) {
                    memcpy(together + slot * g.c * element, at(r, line * g.c), line_bytes);
                },
                [&](int64_t first, int64_t count, int64_t len) {
                    reduce(together + first * element, g.cols * element, count, 0, len);
                });
        }
        over_kept_rows(
            *p.keep, g, row, row + rows, j0, j1,
            [&](int64_t r, int64_t count) { reduce(at(r, j0), g.z_stride * element, count, j0, j1 - j0); },
            [&](int64_t r, int64_t j, int64_t count, int64_t slot, const uint8_t *bits) {
                if (bits)
                    k.keep_column(together + slot * step, at(r, j), bits, static_cast<size_t>(count), all.center + j);
                else
                    memcpy(together + slot * step, at(r, j), static_cast<size_t>(count * element));
            },
            [&](int64_t slots, int64_t j, int64_t count) { reduce(together, step, slots, j, count); });
    }

    void wide_columns(const Block &b, const A *from, double *sum, double *square) const {
        constexpr size_t chunk = 256;
        A row[chunk];
        for (size_t j = 0; j < b.len; j += chunk) {
            const size_t count = std::min(chunk, b.len - j);
            const char *z_ = static_cast<const char *>(b.z) + j * static_cast<size_t>(element);
            for (size_t r = 0; r < b.rows; ++r, z_ += b.z_step) {
                k.gather(z_, element, count, row);
                for (size_t i = 0; i < count; ++i) {
                    const double d = static_cast<double>(row[i]) - static_cast<double>(from[j + i]);
                    sum[j + i] += d;
                    square[j + i] += d * d;
                }
            }
        }
    }

    void map_rows(const Columns &g, int64_t row, int64_t rows, int64_t len, const Coefficients &all) {
        if (!p.keep) return map_whole_rows(g, row, rows, len, all);
        // lines of values, each kept or not: what is computed of the others is overwritten
        const auto lines = [&](int64_t r, int64_t count) {
            if (!streams) {
                map_whole_rows(g, r, count, len, all);
                p.keep->zero_lines(g, r, 0, (count - 1) * g.cols + len, y.p + r * g.cols * element, element);
                return;
            }
            rows_through_scratch(
                g, r, count, len, all, [&](char *to, char *from, int64_t first, int64_t some_rows, int64_t start, int64_t some) {
                    p.keep->zero_lines(g, r + first, start, some_rows * some, from, element);
                    k.stream(to, from, static_cast<size_t>(some_rows * some * element));
                });
        };
        if (g.s == 1 && mixed(*p.keep, row, rows)) return lines(row, rows);
        by_kept_rows(
            *p.keep, row, row + rows, [&](int64_t r, int64_t count) { map_whole_rows(g, r, count, len, all); },
            [&](int64_t r, int64_t count) {
                if (g.s == 1) return lines(r, count);
                for (const int64_t end = r + count; r < end; ++r) {
                    uint8_t bits[scratch_bytes / 16 + 16];
                    rows_through_scratch(g, r, 1, len, all, kept_only(k, element, streams, [&](int64_t start, int64_t some) {
                                             p.keep->columns(g, r, start, some, bits);
                                             return bits;
                                         }));
                }
            },
            [&](int64_t r, int64_t count) {
                zero(y.p + r * g.cols * element, g.cols * element, count, len * element);
            });
    }

  private:
    void map_whole_rows(const Columns &g, int64_t row, int64_t rows, int64_t len, const Coefficients &all) {
        const Block b = block(g, row, rows, len);
        if (!streams || on_vectors(b.out, b.step, rows, element)) return apply_column(b, all.c);
        rows_through_scratch(g, row, rows, len, all, past_caches(k, element));
    }

    template <class Write>
    void rows_through_scratch(const Columns &g, int64_t row, int64_t rows, int64_t len, const Coefficients &all, Write write) {
        const Block b = block(g, row, rows, len);
        through_scratch(write, static_cast<char *>(b.out), nullptr, rows, len, element,
                        [&](int64_t first, int64_t count, int64_t start, int64_t some, char *to, char *) {
                            apply_column(part(b, first, count, start, some, to),
                                         {all.c.mean + start, all.c.scale + start, all.c.shift + start});
                        });
    }

    Block block(const Columns &g, int64_t row, int64_t rows, int64_t len) const {
        Block b;
        b.z = z.p + row * g.z_stride * element;
        b.z_step = g.z_stride * element;
        b.step = g.cols * element;
        b.saved = r ? r.p + row * b.step : nullptr;
        b.mask = p.mask ? p.mask + row * g.mask_row() : nullptr;
        b.mask_step = g.mask_row();
        b.out = y.p + row * b.step;
        b.rows = static_cast<size_t>(rows);
        b.len = static_cast<size_t>(len);
        b.stream = streams;
        return b;
    }

    // Calls f(block, first channel) for what a mask keeps of a unit: the unit itself, or copies in a scratch in which
    // the center stands for what it leaves out.
    template <class F>
    void each_kept(const Planes &g, int64_t u, int64_t c0, int64_t c1, F f) {
        const Block b = block(g, u, c0, c1);
        const Kept kept = p.keep ? p.keep->of(u) : Kept::all;
        if (kept == Kept::all) return f(b, c0);
        if (kept == Kept::none) return;
        alignas(64) char scratch[scratch_bytes];
        in_pieces(c1 - c0, g.length(u), element, [&](int64_t row, int64_t rows, int64_t start, int64_t len) {
            const uint8_t *const bits = p.keep->plane(u / g.pieces, g.start(u) + start);
            Block some;
            some.z_step = len * element;
            for (int64_t i = 0; i < rows; ++i)
                k.keep_plane(scratch + i * some.z_step, z.at(u / g.pieces, c0 + row + i) + (g.start(u) + start) * element, bits,
                             static_cast<size_t>(len), &center[c0 + row + i]);
            some.z = scratch;
            some.rows = static_cast<size_t>(rows);
            some.len = static_cast<size_t>(len);
            f(some, c0 + row);
        });
    }

    void look_at_kept(int64_t c0, int64_t c1) {
        if (!p.keep->count) return std::fill(&center[c0], &center[c0] + (c1 - c0), A{0});
        const auto sample = [&](int i) {
            return z.at(p.keep->sample[i] / p.shape.s, c0) + p.keep->sample[i] % p.shape.s * element;
        };
        find_centers(c0, c1, z.sc, sample(0), sample(1), sample(2));
    }

    void find_centers(int64_t c0, int64_t c1, int64_t step, const char *a, const char *b, const char *c) {
        const int64_t count = c1 - c0;
        A *const first = samples.get() + 3 * c0;
        A *const at[3] = {first, first + count, first + 2 * count};
        k.gather(a, step, static_cast<size_t>(count), at[0]);
        k.gather(b, step, static_cast<size_t>(count), at[1]);
        k.gather(c, step, static_cast<size_t>(count), at[2]);
        for (int64_t i = 0; i < count; ++i) center[c0 + i] = middle(at[0][i], at[1][i], at[2][i]);
    }

    Block block(const Planes &g, int64_t u, int64_t c0, int64_t c1) const {
        Block b;
        b.z = z.at(u / g.pieces, c0) + g.start(u) * element;
        b.z_step = z.sc;
        b.rows = static_cast<size_t>(c1 - c0);
        b.len = static_cast<size_t>(g.length(u));
        return b;
    }

    // some rows and elements of a block, computed into a scratch
    Block part(Block b, int64_t row, int64_t rows, int64_t start, int64_t len, char *to) const {
        b.z = static_cast<const char *>(b.z) + row * b.z_step + start * element;
        if (b.saved) b.saved = static_cast<const char *>(b.saved) + row * b.step + start * element;
        if (b.mask) b.mask += row * b.mask_step + start / 8;
        b.out = to;
        b.rows = static_cast<size_t>(rows);
        b.len = static_cast<size_t>(len);
        b.stream = false;
        return b;
    }

    const ForwardProblem<A> &p;
    const Kernels<A> &k;
    int64_t element;
    View z, y, r;
    Array<A> scale, center, samples, zeros;
    const A *shift = nullptr;
    typename Kernels<A>::Apply apply_plane, apply_column, apply_run = nullptr;
    Array<int8_t> run_lanes;
    bool streams = false;
    std::atomic<bool> skips{false};
};

template <class A>
void run(const ForwardProblem<A> &problem) {
    const Shape &x = problem.shape;
    if (x.c == 0 || x.n * x.s == 0) return;
    ForwardStep<A> step(problem);
    const int64_t element = static_cast<int64_t>(element_size(x.dtype));
    if (by_columns(x))
        run_columns(step, Columns(x), element, problem.threads);
    else
        run_planes(step, Planes(x), element, problem.threads);
    if (problem.skipped) *problem.skipped = step.skipped();
}

}  // namespace

void forward(const ForwardProblem<float> &p) { run(p); }
void forward(const ForwardProblem<double> &p) { run(p); }

}  // namespace bn
