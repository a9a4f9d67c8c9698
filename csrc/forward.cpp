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
    // beside the deviation, for the center may be some deviations off and the sums then cancel.
    bool wide() const { return sizeof(A) == 4 && p.exact_mean; }
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
            Block b = block(g, u, c0, c1);
            if (keeps(g, u, b)) k.plane_moments(b, &center[c0], sums);
        }
        for (int64_t c = c0; c < c1; ++c) {
            const Sums s = k.lane_sums(sums + (c - c0) * Lanes::width);
            Sums total{s.a, s.b};
            if (sizeof(A) == 4 && !(s.b > 1e-25 && s.b < 1e35) && !(s.a == 0 && s.b == 0)) {  // out of range, or NaN
                total = {};
                for (int64_t u = begin; u < end; ++u) {
                    Block b = block(g, u, c, c + 1);
                    if (!keeps(g, u, b)) continue;
                    const Sums wide = k.wide_moments(b.z, b.len, static_cast<double>(center[c]), b.kept);
                    total += {wide.a, wide.b};
                }
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
                Block b = block(g, u, first, last);
                if (!keeps(g, u, b)) continue;
                const char *row = static_cast<const char *>(b.z);
                for (int64_t c = first; c < last; ++c, row += b.z_step)
                    totals[c - first] += k.wide_moments(row, b.len, static_cast<double>(center[c]), b.kept);
            }
            for (int64_t c = first; c < last; ++c) out[c - c0] += totals[c - first];
        }
    }

    void touch(const Planes &g, int64_t u, int64_t c0, int64_t c1) const {
        const int64_t n = u / g.pieces, at = g.start(u) * element, bytes = g.length(u) * (c1 - c0) * element;
        bn::touch(z.at(n, c0) + at, bytes);
        if (r) bn::touch(r.at(n, c0) + at, bytes, 4096);
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
        if (!keeps(g, u, b)) return zero(out, b.step, c1 - c0, g.length(u) * element);
        if (!b.kept && apply_run && (!streams || on_vectors(out, 0, 1, element))) {
            b.lanes = run_lanes.get();
            return apply_run(b, coefficients(c0));
        }
        if (!streams || on_vectors(out, b.step, c1 - c0, element)) return apply_plane(b, coefficients(c0));
        const auto map = [&](int64_t row, int64_t rows, int64_t start, int64_t len, char *to, char *) {
            apply_plane(part(b, row, rows, start, len, to), coefficients(c0 + row));
        };
        if (g.pieces == 1) return through_scratch(past_caches(k, element), out, nullptr, c1 - c0, g.s, element, map);
        for (int64_t c = 0; c < c1 - c0; ++c)
            through_scratch(past_caches(k, element), out + c * y.sc, nullptr, 1, g.length(u), element,
                            [&](int64_t, int64_t, int64_t start, int64_t len, char *to, char *none) {
                                map(c, 1, start, len, to, none);
                            });
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
        const auto reduce = [&](int64_t first, int64_t count, int64_t j, int64_t len, const uint8_t *lines, const uint8_t *bits) {
            Block b;
            b.z = z.p + (first * g.z_stride + j) * element;
            b.z_step = g.z_stride * element;
            b.rows = static_cast<size_t>(count);
            b.len = static_cast<size_t>(len);
            b.lines = lines;
            b.kept = bits;
            b.kept_step = kept_bytes;
            if (wide()) return wide_columns(b, all.center + j, sum + (j - j0), square + (j - j0));
            k.column_moments(b, all.center + j, sum + (j - j0), square + (j - j0));
        };
        if (!p.keep) return reduce(row, rows, j0, j1 - j0, nullptr, nullptr);
        over_kept_rows(*p.keep, g, row, rows, j0, j1, reduce);
    }

    void wide_columns(const Block &b, const A *from, double *sum, double *square) const {
        constexpr size_t chunk = 256;
        A row[chunk];
        for (size_t j = 0; j < b.len; j += chunk) {
            const size_t count = std::min(chunk, b.len - j);
            const char *z_ = static_cast<const char *>(b.z) + j * static_cast<size_t>(element);
            for (size_t r = 0; r < b.rows; ++r, z_ += b.z_step) {
                if (b.lines && !b.lines[r]) continue;
                k.gather(z_, element, count, row);
                if (b.kept) {  // what is left out may be NaN: the center stands in its place, whose deviation is 0
                    const uint8_t *const bits = b.kept + static_cast<ptrdiff_t>(r) * b.kept_step + j / 8;
                    for (size_t i = 0; i < count; ++i) row[i] = bits[i / 8] >> (i % 8) & 1 ? row[i] : from[j + i];
                }
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
        if (mixed(*p.keep, g, row, rows)) {
            Block b = block(g, row, rows, len);
            b.lines = p.keep->lines(g, row);
            return map_block(b, all.c);
        }
        by_kept_rows(
            *p.keep, row, row + rows, [&](int64_t r, int64_t count) { map_whole_rows(g, r, count, len, all); },
            [&](int64_t r, int64_t count) {
                for (const int64_t end = r + count; r < end; ++r) map_some(g, r, len, all);
            },
            [&](int64_t r, int64_t count) {
                zero(y.p + r * g.cols * element, g.cols * element, count, len * element);
            });
    }

  private:
    // what a mask keeps of a unit; false: nothing
    bool keeps(const Planes &g, int64_t u, Block &b) const {
        const Kept kept = p.keep ? p.keep->of(u) : Kept::all;
        if (kept == Kept::some) b.kept = p.keep->plane(u / g.pieces, g.start(u));
        return kept != Kept::none;
    }

    void map_whole_rows(const Columns &g, int64_t row, int64_t rows, int64_t len, const Coefficients &all) {
        map_block(block(g, row, rows, len), all.c);
    }

    void map_block(const Block &b, const ForwardCoefficients<A> &c) {
        if (!streams || on_vectors(b.out, b.step, static_cast<int64_t>(b.rows), element)) return apply_column(b, c);
        through_scratch(past_caches(k, element), static_cast<char *>(b.out), nullptr, static_cast<int64_t>(b.rows), static_cast<int64_t>(b.len),
                        element, [&](int64_t first, int64_t count, int64_t start, int64_t some, char *to, char *) {
                            apply_column(part(b, first, count, start, some, to), shifted(c, start));
                        });
    }

    // a row of which a mask keeps some elements
    void map_some(const Columns &g, int64_t row, int64_t len, const Coefficients &all) {
        const Block b = block(g, row, 1, len);
        for (int64_t j = 0; j < len; j += columns_together) {
            uint8_t bits[kept_bytes];
            const int64_t some = std::min(columns_together, len - j);
            p.keep->row(g, row, j, some, bits);
            Block piece = part(b, 0, 1, j, some, static_cast<char *>(b.out) + j * element);
            piece.kept = bits;
            piece.stream = streams;
            map_block(piece, shifted(all.c, j));
        }
    }

    static ForwardCoefficients<A> shifted(const ForwardCoefficients<A> &c, int64_t j) {
        return {c.mean + j, c.scale + j, c.shift + j};
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
        if (b.kept) b.kept += row * b.kept_step + start / 8;
        if (b.lines) b.lines += row;
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
