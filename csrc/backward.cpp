// Backward: the two sums of each channel, and the gradients of the input and of the residual.
#include "drivers.h"

#include <cmath>

namespace bn {
namespace {

template <class A>
class BackwardStep {
  public:
    static constexpr int inputs = 2;
    using Lanes = LaneSums<A>;

    struct Coefficients {  // of the columns
        Spread<A, 6> arrays;
        BackwardCoefficients<A> c{};
    };

    BackwardStep(const BackwardProblem<A> &problem)
        : p(problem), k(table<A>(p.shape.dtype)), element(static_cast<int64_t>(element_size(p.shape.dtype))),
          scale(array<A>(p.shape.c)), k0(array<A>(p.shape.c)), k1(array<A>(p.shape.c)) {
        const Shape &x = p.shape;
        const int64_t c = x.c, s = x.s;
        z = view(p.z, x.z_sn * element, x.z_sc * element);
        dy = view(p.dy, c * s * element, s * element);
        dz = view(p.dz, c * s * element, s * element);
        dr = view(p.dresidual, c * s * element, s * element);
        const int a = static_cast<int>(p.activation), with_saved = p.saved != nullptr;
        plane_reduce = k.plane_reduce[a][with_saved];
        column_reduce = k.column_reduce[a][with_saved];
        plane_input = k.plane_input[a][with_saved];
        column_input = k.column_input[a][with_saved];
        bits = with_saved && piecewise_linear(p.activation);
        streams = should_stream(static_cast<size_t>(x.n * c * s * element));
        if (in_runs(x, streams, bits)) run_input = k.run_input[a][with_saved];
        if (run_input) run_lanes = lanes_of_run(s);
        if (!p.beta) zeros.reset(new A[static_cast<size_t>(c)]());
        shift = p.beta ? p.beta : zeros.get();
        for (int64_t i = 0; i < c; ++i) {
            scale[i] = Affine<A>::scale(p.gamma, p.inv_std, i);
        }
        for (int64_t i = 0; i < c && !reduces(); ++i) {
            const Sums given{static_cast<double>(p.sum_dy[i]), static_cast<double>(p.sum_dy_zhat[i])};
            k.input_constants(&given, p.inv_std + i, 1, p.count, &k0[i], &k1[i]);
        }
    }

    bool reduces() const { return p.parts & reduction; }
    bool maps() const { return p.parts & input_gradient; }
    void begin() const {}
    void end_of_thread() const {
        if (streams) k.fence();
    }

    void finish(int64_t c0, int64_t c1, const Sums *totals) {
        for (int64_t c = c0; c < c1; ++c) {
            const Sums &total = totals[c - c0];
            p.sum_dy[c] = static_cast<A>(total.a);
            p.sum_dy_zhat[c] = static_cast<A>(total.b);
            if (p.exact_dy) p.exact_dy[c] = total.a, p.exact_dy_zhat[c] = total.b;
        }
        if (maps()) k.input_constants(totals, p.inv_std + c0, static_cast<size_t>(c1 - c0), p.count, &k0[c0], &k1[c0]);
    }

    // --- planes ---

    void look_at(const Planes &, int64_t, int64_t) {}

    void reduce_segment(const Planes &g, int64_t c0, int64_t c1, int64_t segment, Lanes &lanes, Sums *out) {
        A *const sums = lanes.clear(c1 - c0);
        const int64_t begin = segment * g.units_per_segment, end = std::min(g.units, begin + g.units_per_segment);
        for (int64_t u = begin; u < end; ++u) {
            if (u + 1 < g.units) touch(g, u + 1, c0, c1);
            Block b = block(g, u, c0, c1);
            if (keeps(g, u, b)) plane_reduce(b, of_channel(c0), sums);
        }
        for (int64_t c = c0; c < c1; ++c) {
            const Sums s = k.lane_sums(sums + (c - c0) * Lanes::width);
            out[c - c0] += {s.a, s.b};
        }
    }

    void touch(const Planes &g, int64_t u, int64_t c0, int64_t c1) const {
        const int64_t n = u / g.pieces, at = g.start(u) * element, bytes = g.length(u) * (c1 - c0) * element;
        bn::touch(z.at(n, c0) + at, bytes);
        bn::touch(dy.at(n, c0) + at, bytes);
    }

    void map_unit(const Planes &g, int64_t u, int64_t c0, int64_t c1) {
        Block b = block(g, u, c0, c1);
        const int64_t n = u / g.pieces, at = g.start(u) * element;
        char *const out = dz.at(n, c0) + at, *const out_r = dr ? dr.at(n, c0) + at : nullptr;
        b.out = out;
        b.out_residual = out_r;
        b.stream = streams;
        if (!keeps(g, u, b)) {
            zero(out, b.step, c1 - c0, g.length(u) * element);
            return zero(out_r, b.step, c1 - c0, g.length(u) * element);
        }
        if (!b.kept && run_input && (!streams || (on_vectors(out, 0, 1, element) && on_vectors(out_r, 0, 1, element)))) {
            b.lanes = run_lanes.get();
            return run_input(b, of_channel(c0));
        }
        if (!streams || (on_vectors(out, b.step, c1 - c0, element) && on_vectors(out_r, b.step, c1 - c0, element)))
            return plane_input(b, of_channel(c0));
        const auto map = [&](int64_t row, int64_t rows, int64_t start, int64_t len, char *to, char *to_r) {
            plane_input(part(b, row, rows, start, len, to, to_r), of_channel(c0 + row));
        };
        const auto write = past_caches(k, element);
        if (g.pieces == 1) return through_scratch(write, out, out_r, c1 - c0, g.s, element, map);
        for (int64_t c = 0; c < c1 - c0; ++c)
            through_scratch(write, out + c * dz.sc, out_r ? out_r + c * dz.sc : nullptr, 1, g.length(u), element,
                            [&](int64_t, int64_t, int64_t start, int64_t len, char *to, char *to_r) {
                                map(c, 1, start, len, to, to_r);
                            });
    }

    // --- columns ---

    void before_reduce(const Columns &g, Coefficients &all) {
        all.c.mean = all.arrays(g, 0, p.mean);
        all.c.scale = all.arrays(g, 1, scale.get());
        all.c.shift = all.arrays(g, 2, shift);
        all.c.inv_std = all.arrays(g, 3, p.inv_std);
    }

    void before_map(const Columns &g, Coefficients &all) {
        if (!reduces()) before_reduce(g, all);
        all.c.k0 = all.arrays(g, 4, k0.get());
        all.c.k1 = all.arrays(g, 5, k1.get());
    }

    void reduce_block(const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t j1, const Coefficients &all,
                      double *sum, double *product) {
        const auto reduce = [&](int64_t first, int64_t count, int64_t j, int64_t len, const uint8_t *lines, const uint8_t *bits) {
            Block b = block(g, first, count, j, len);
            b.lines = lines;
            b.kept = bits;
            b.kept_step = kept_bytes;
            column_reduce(b, shifted(all.c, j), sum + (j - j0), product + (j - j0));
        };
        if (!p.keep) return reduce(row, rows, j0, j1 - j0, nullptr, nullptr);
        over_kept_rows(*p.keep, g, row, rows, j0, j1, reduce);
    }

    void map_rows(const Columns &g, int64_t row, int64_t rows, int64_t len, const Coefficients &all) {
        if (!p.keep) return map_whole_rows(g, row, rows, len, all);
        if (mixed(*p.keep, g, row, rows)) {
            Block b = to_outputs(g, row, rows, len);
            b.lines = p.keep->lines(g, row);
            return map_block(b, all.c);
        }
        by_kept_rows(
            *p.keep, row, row + rows, [&](int64_t r, int64_t count) { map_whole_rows(g, r, count, len, all); },
            [&](int64_t r, int64_t count) {
                for (const int64_t end = r + count; r < end; ++r) map_some(g, r, len, all);
            },
            [&](int64_t r, int64_t count) {
                const int64_t step = g.cols * element;
                zero(dz.p + r * step, step, count, len * element);
                if (dr) zero(dr.p + r * step, step, count, len * element);
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
        map_block(to_outputs(g, row, rows, len), all.c);
    }

    void map_block(const Block &b, const BackwardCoefficients<A> &c) {
        const int64_t rows = static_cast<int64_t>(b.rows);
        if (!streams || (on_vectors(b.out, b.step, rows, element) && on_vectors(b.out_residual, b.step, rows, element)))
            return column_input(b, c);
        through_scratch(past_caches(k, element), static_cast<char *>(b.out), static_cast<char *>(b.out_residual), rows,
                        static_cast<int64_t>(b.len), element,
                        [&](int64_t first, int64_t count, int64_t start, int64_t some, char *to, char *to_r) {
                            column_input(part(b, first, count, start, some, to, to_r), shifted(c, start));
                        });
    }

    // a row of which a mask keeps some elements
    void map_some(const Columns &g, int64_t row, int64_t len, const Coefficients &all) {
        const Block b = to_outputs(g, row, 1, len);
        const auto at = [&](void *p, int64_t j) { return p ? static_cast<char *>(p) + j * element : nullptr; };
        for (int64_t j = 0; j < len; j += columns_together) {
            uint8_t bits[kept_bytes];
            const int64_t some = std::min(columns_together, len - j);
            p.keep->row(g, row, j, some, bits);
            Block piece = part(b, 0, 1, j, some, at(b.out, j), at(b.out_residual, j));
            piece.kept = bits;
            piece.stream = streams;
            map_block(piece, shifted(all.c, j));
        }
    }

    Block to_outputs(const Columns &g, int64_t row, int64_t rows, int64_t len) const {
        Block b = block(g, row, rows, 0, len);
        b.out = dz.p + row * b.step;
        b.out_residual = dr ? dr.p + row * b.step : nullptr;
        b.stream = streams;
        return b;
    }

    BackwardCoefficients<A> of_channel(int64_t c) const {
        return {p.mean + c, &scale[c], shift + c, p.inv_std + c, &k0[c], &k1[c]};
    }
    static BackwardCoefficients<A> shifted(const BackwardCoefficients<A> &c, int64_t j) {
        const auto by = [j](const A *v) { return v ? v + j : nullptr; };
        return {by(c.mean), by(c.scale), by(c.shift), by(c.inv_std), by(c.k0), by(c.k1)};
    }

    Block block(const Planes &g, int64_t u, int64_t c0, int64_t c1) const {
        const int64_t n = u / g.pieces, start = g.start(u), at = start * element;
        Block b;
        b.z = z.at(n, c0) + at;
        b.dy = dy.at(n, c0) + at;
        b.saved = saved((n * g.c + c0) * g.mask_row() + start / 8, (n * g.c + c0) * g.s + start);
        b.z_step = z.sc;
        b.step = dy.sc;
        b.mask_step = g.mask_row();
        b.rows = static_cast<size_t>(c1 - c0);
        b.len = static_cast<size_t>(g.length(u));
        return b;
    }
    Block block(const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t len) const {
        Block b;
        b.z_step = g.z_stride * element;
        b.step = g.cols * element;
        b.mask_step = g.mask_row();
        b.z = z.p + row * b.z_step + j0 * element;
        b.dy = dy.p + row * b.step + j0 * element;
        b.saved = saved(row * g.mask_row() + j0 / 8, row * g.cols + j0);
        b.rows = static_cast<size_t>(rows);
        b.len = static_cast<size_t>(len);
        return b;
    }
    const char *saved(int64_t byte_of_mask, int64_t element_of_residual) const {
        if (!p.saved) return nullptr;
        return static_cast<const char *>(p.saved) + (bits ? byte_of_mask : element_of_residual * element);
    }

    // some rows and elements of a block, computed into scratches
    Block part(Block b, int64_t row, int64_t rows, int64_t start, int64_t len, char *to, char *to_r) const {
        b.z = static_cast<const char *>(b.z) + row * b.z_step + start * element;
        b.dy = static_cast<const char *>(b.dy) + row * b.step + start * element;
        if (b.saved)
            b.saved = static_cast<const char *>(b.saved) +
                      (bits ? row * b.mask_step + start / 8 : row * b.step + start * element);
        if (b.kept) b.kept += row * b.kept_step + start / 8;
        if (b.lines) b.lines += row;
        b.out = to;
        b.out_residual = to_r;
        b.rows = static_cast<size_t>(rows);
        b.len = static_cast<size_t>(len);
        b.stream = false;
        return b;
    }

    const BackwardProblem<A> &p;
    const Kernels<A> &k;
    int64_t element;
    View z, dy, dz, dr;
    Array<A> scale, k0, k1, zeros;
    const A *shift = nullptr;
    typename Kernels<A>::PlaneReduce plane_reduce;
    typename Kernels<A>::ColumnReduce column_reduce;
    typename Kernels<A>::Input plane_input, column_input, run_input = nullptr;
    Array<int8_t> run_lanes;
    bool bits = false, streams = false;
};

template <class A>
void run(const BackwardProblem<A> &problem) {
    const Shape &x = problem.shape;
    if (x.c == 0) return;
    if (x.n * x.s == 0) {
        if (problem.parts & reduction) {
            std::fill(problem.sum_dy, problem.sum_dy + x.c, A{0});
            std::fill(problem.sum_dy_zhat, problem.sum_dy_zhat + x.c, A{0});
        }
        return;
    }
    BackwardStep<A> step(problem);
    const int64_t element = static_cast<int64_t>(element_size(x.dtype));
    if (by_columns(x))
        run_columns(step, Columns(x), element, problem.threads);
    else
        run_planes(step, Planes(x), element, problem.threads);
}

}  // namespace

void backward(const BackwardProblem<float> &p) { run(p); }
void backward(const BackwardProblem<double> &p) { run(p); }

}  // namespace bn
