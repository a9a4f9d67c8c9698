// Backward: the two sums of each channel, and the gradients of the input and of the residual.
#include "drivers.h"

#include <cmath>

namespace bn {
namespace {

template <class A>
class BackwardStep {
  public:
    static constexpr int inputs = 2;

    struct Coefficients {  // of the columns [j0, j1) of a strip
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
        if (!p.beta) zeros.reset(new A[static_cast<size_t>(c)]());
        shift = p.beta ? p.beta : zeros.get();
        for (int64_t i = 0; i < c; ++i) {
            scale[i] = Affine<A>::scale(p.gamma, p.inv_std, i);
            if (!reduces()) constants(i, static_cast<double>(p.sum_dy[i]), static_cast<double>(p.sum_dy_zhat[i]));
        }
    }

    bool reduces() const { return p.parts & reduction; }
    bool maps() const { return p.parts & input_gradient; }
    void end_of_thread() const {
        if (streams) k.fence();
    }

    void finish(int64_t c, const Pair &total) {
        p.sum_dy[c] = static_cast<A>(total.a);
        p.sum_dy_zhat[c] = static_cast<A>(total.b);
        constants(c, total.a, total.b);
    }

    // --- planes ---

    Pair reduce_segment(const Planes &g, int64_t c, int64_t segment) {
        const BackwardCoefficients<A> one = of_channel(c);
        Pair out;
        const int64_t end = std::min(g.blocks, (segment + 1) * g.blocks_per_segment);
        for (int64_t b = segment * g.blocks_per_segment; b < end; ++b) {
            const int64_t n = b / g.per_plane * g.planes_per_block, start = b % g.per_plane * g.block_len;
            const int64_t at = start * element;
            PlaneBlock block{};
            block.dy = dy.at(n, c) + at;
            block.z = z.at(n, c) + at;
            block.saved = saved(g, n, c, start);
            block.dy_stride = dy.sn;
            block.z_stride = z.sn;
            block.saved_stride = bits ? g.c * g.mask_row() : dy.sn;
            block.planes = static_cast<size_t>(std::min(g.planes_per_block, g.n - n));
            block.len = static_cast<size_t>(std::min(g.block_len, g.s - start));
            const Sums s = plane_reduce(block, one);
            out += {s.dy, s.dy_zhat};
        }
        return out;
    }

    void map_run(const Planes &g, int64_t n, int64_t c0, int64_t c1, int64_t warm) {
        const int64_t plane_bytes = g.s * element;
        if (!streams || plane_bytes > scratch_bytes / 2) {
            for (int64_t c = c0; c < c1; ++c) {
                if (warm && c + warm < g.c) prefetch_both(n, c + warm, plane_bytes);
                map_piece(g, n, c, 0, g.s);
            }
            return;
        }
        alignas(64) char scratch[2][scratch_bytes];
        const int64_t aligned = 64 / std::gcd(plane_bytes, int64_t{64});
        const int64_t fit = scratch_bytes / plane_bytes, batch = std::max<int64_t>(1, fit / aligned * aligned);
        for (int64_t c = c0; c < c1; c += batch) {
            const int64_t count = std::min(batch, c1 - c);
            if (warm) prefetch_both(n, c + warm, std::min(count, g.c - c - warm) * plane_bytes);
            for (int64_t i = 0; i < count; ++i)
                plane(g, scratch[0] + i * plane_bytes, dr ? scratch[1] + i * plane_bytes : nullptr, n, c + i, 0, g.s);
            k.stream(dz.at(n, c), scratch[0], static_cast<size_t>(count * plane_bytes));
            if (dr) k.stream(dr.at(n, c), scratch[1], static_cast<size_t>(count * plane_bytes));
        }
    }

    void map_segment(const Planes &g, int64_t c, int64_t segment) {
        const int64_t end = std::min(g.blocks, (segment + 1) * g.blocks_per_segment);
        for (int64_t b = segment * g.blocks_per_segment; b < end; ++b) {
            const int64_t n = b / g.per_plane * g.planes_per_block, start = b % g.per_plane * g.block_len;
            const int64_t planes = std::min(g.planes_per_block, g.n - n);
            for (int64_t i = 0; i < planes; ++i) map_piece(g, n + i, c, start, std::min(g.block_len, g.s - start));
        }
    }

    // --- columns ---

    void before_reduce(const Columns &g, int64_t j0, int64_t j1, Coefficients &local) {
        local.c.mean = local.arrays(g, j0, j1, 0, p.mean);
        local.c.scale = local.arrays(g, j0, j1, 1, scale.get());
        local.c.shift = local.arrays(g, j0, j1, 2, shift);
        local.c.inv_std = local.arrays(g, j0, j1, 3, p.inv_std);
    }

    void before_map(const Columns &g, int64_t j0, int64_t j1, Coefficients &local) {
        if (!reduces()) before_reduce(g, j0, j1, local);
        local.c.k0 = local.arrays(g, j0, j1, 4, k0.get());
        local.c.k1 = local.arrays(g, j0, j1, 5, k1.get());
    }

    void reduce_block(const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t j1, const Coefficients &strip,
                      double *sum, double *product) {
        if (j1 <= j0) return;
        const int64_t packed = g.cols * element, at = j0 * element;
        ColumnBlock block{};
        block.dy = dy.p + row * packed + at;
        block.z = z.p + row * g.z_stride * element + at;
        block.saved = saved(g, row, j0);
        block.dy_stride = packed;
        block.z_stride = g.z_stride * element;
        block.saved_stride = bits ? g.mask_row() : packed;
        block.rows = static_cast<size_t>(rows);
        block.cols = static_cast<size_t>(j1 - j0);
        column_reduce(block, strip.c, sum, product);
    }

    void map_row(const Columns &g, int64_t row, int64_t j0, int64_t j1, const Coefficients &strip, int64_t base,
                 int64_t warm) {
        const int64_t packed = row * g.cols * element, piece = streams ? scratch_bytes / 2 / element : j1 - j0;
        alignas(64) char scratch[2][scratch_bytes / 2];
        for (int64_t j = j0; j < j1; j += piece) {
            const int64_t len = std::min(piece, j1 - j), at = j * element, o = j - base;
            const char *zp = z.p + row * g.z_stride * element + at, *dp = dy.p + packed + at;
            if (warm) {
                const int64_t bytes = std::min(len, g.cols - j - warm) * element;
                prefetch(zp + warm * element, bytes);
                prefetch(dp + warm * element, bytes);
            }
            char *out = dz.p + packed + at, *out_r = dr ? dr.p + packed + at : nullptr;
            const BackwardCoefficients<A> c{strip.c.mean + o,    strip.c.scale + o, strip.c.shift + o,
                                            strip.c.inv_std + o, strip.c.k0 + o,    strip.c.k1 + o};
            column_input(streams ? scratch[0] : out, streams && dr ? scratch[1] : out_r, dp, zp, saved(g, row, j),
                         static_cast<size_t>(len), c);
            if (!streams) continue;
            k.stream(out, scratch[0], static_cast<size_t>(len * element));
            if (dr) k.stream(out_r, scratch[1], static_cast<size_t>(len * element));
        }
    }

  private:
    void constants(int64_t c, double sum_dy, double sum_dy_zhat) {
        // an infinite count: the statistics are constants, and a NaN in the sums must not spread through them
        const bool constant = std::isinf(p.count);
        k0[c] = constant ? A{0} : static_cast<A>(-sum_dy / p.count);
        k1[c] = constant ? A{0} : static_cast<A>(-sum_dy_zhat / p.count);
    }

    BackwardCoefficients<A> of_channel(int64_t c) const {
        return {p.mean + c, &scale[c], shift + c, p.inv_std + c, &k0[c], &k1[c]};
    }

    const char *saved(const Planes &g, int64_t n, int64_t c, int64_t start) const {
        if (!p.saved) return nullptr;
        const char *s = static_cast<const char *>(p.saved);
        return bits ? s + (n * g.c + c) * g.mask_row() + start / 8 : s + ((n * g.c + c) * g.s + start) * element;
    }
    const char *saved(const Columns &g, int64_t row, int64_t j) const {
        if (!p.saved) return nullptr;
        const char *s = static_cast<const char *>(p.saved);
        return bits ? s + row * g.mask_row() + j / 8 : s + (row * g.cols + j) * element;
    }

    void prefetch_both(int64_t n, int64_t c, int64_t bytes) const {
        prefetch(z.at(n, c), bytes);
        prefetch(dy.at(n, c), bytes);
    }

    void plane(const Planes &g, char *to, char *to_r, int64_t n, int64_t c, int64_t start, int64_t len) {
        const int64_t at = start * element;
        plane_input(to, to_r, dy.at(n, c) + at, z.at(n, c) + at, saved(g, n, c, start), static_cast<size_t>(len),
                    of_channel(c));
    }

    void map_piece(const Planes &g, int64_t n, int64_t c, int64_t start, int64_t len) {
        const auto out = [&](const View &v) { return v ? v.at(n, c) + start * element : nullptr; };
        if (!streams) return plane(g, out(dz), out(dr), n, c, start, len);
        alignas(64) char scratch[2][scratch_bytes / 2];
        const int64_t piece = scratch_bytes / 2 / element;
        for (const int64_t end = start + len; start < end; start += piece) {
            const int64_t count = std::min(piece, end - start);
            plane(g, scratch[0], dr ? scratch[1] : nullptr, n, c, start, count);
            k.stream(out(dz), scratch[0], static_cast<size_t>(count * element));
            if (dr) k.stream(out(dr), scratch[1], static_cast<size_t>(count * element));
        }
    }

    const BackwardProblem<A> &p;
    const Kernels<A> &k;
    int64_t element;
    View z, dy, dz, dr;
    Array<A> scale, k0, k1, zeros;
    const A *shift = nullptr;
    typename Kernels<A>::PlaneReduce plane_reduce;
    typename Kernels<A>::ColumnReduce column_reduce;
    typename Kernels<A>::Input plane_input, column_input;
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
