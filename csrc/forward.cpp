// Training and inference forward: moments of each channel, its coefficients, and the output.
#include "drivers.h"
#include "statistics.h"

namespace bn {
namespace {

template <class A>
class ForwardStep {
  public:
    static constexpr int inputs = 1;

    struct Coefficients {  // of the columns [j0, j1) of a strip
        Spread<A, 4> arrays;
        ForwardCoefficients<A> c{};
        const A *center = nullptr;
    };

    ForwardStep(const ForwardProblem<A> &problem)
        : p(problem), k(table<A>(p.shape.dtype)), element(static_cast<int64_t>(element_size(p.shape.dtype))),
          scale(array<A>(p.shape.c)), center(array<A>((p.parts & statistics) ? p.shape.c : 0)) {
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
        if (!p.beta) {
            zeros.reset(new A[static_cast<size_t>(c)]());
            shift = zeros.get();
        } else {
            shift = p.beta;
        }
    }

    bool reduces() const { return p.parts & statistics; }
    bool maps() const { return p.parts & normalization; }
    void end_of_thread() const {
        if (streams) k.fence();
    }
    int64_t skipped() const { return skips.load(std::memory_order_relaxed); }

    void finish(int64_t c, const Pair &total) {
        if (finish_channel(p, c, static_cast<double>(center[c]), total.a, total.b))
            skips.fetch_add(1, std::memory_order_relaxed);
        if (p.inv_std) scale[c] = Affine<A>::scale(p.gamma, p.inv_std, c);
    }

    // --- planes ---

    Pair reduce_segment(const Planes &g, int64_t c, int64_t segment) {
        if (segment == 0) center[c] = static_cast<A>(k.first(z.at(0, c)));
        const double about = k.first(z.at(0, c));
        Pair out;
        const int64_t end = std::min(g.blocks, (segment + 1) * g.blocks_per_segment);
        for (int64_t b = segment * g.blocks_per_segment; b < end; ++b) {
            const int64_t n = b / g.per_plane * g.planes_per_block, start = b % g.per_plane * g.block_len;
            const int64_t planes = std::min(g.planes_per_block, g.n - n), len = std::min(g.block_len, g.s - start);
            const Moments m = k.plane_moments(z.at(n, c) + start * element, z.sn, static_cast<size_t>(planes),
                                              static_cast<size_t>(len));
            const double count = static_cast<double>(planes * len), off = m.center - about;
            out += {m.sum + count * off, m.square + off * (2.0 * m.sum + count * off)};
        }
        return out;
    }

    void map_run(const Planes &g, int64_t n, int64_t c0, int64_t c1, int64_t warm) {
        const int64_t plane_bytes = g.s * element;
        if (!streams || plane_bytes > scratch_bytes / 2) {
            for (int64_t c = c0; c < c1; ++c) {
                if (warm && c + warm < g.c) prefetch(z.at(n, c + warm), plane_bytes);
                map_piece(g, n, c, 0, g.s);
            }
            return;
        }
        alignas(64) char scratch[scratch_bytes];
        const int64_t aligned = 64 / std::gcd(plane_bytes, int64_t{64});
        const int64_t fit = scratch_bytes / plane_bytes, batch = std::max<int64_t>(1, fit / aligned * aligned);
        for (int64_t c = c0; c < c1; c += batch) {
            const int64_t count = std::min(batch, c1 - c);
            if (warm) prefetch(z.at(n, c + warm), std::min(count, g.c - c - warm) * plane_bytes);
            for (int64_t i = 0; i < count; ++i) plane(g, scratch + i * plane_bytes, n, c + i, 0, g.s);
            k.stream(y.at(n, c), scratch, static_cast<size_t>(count * plane_bytes));
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
        // one center for a channel, the first of its values: its columns then add up as they are
        const int64_t width = std::min(j1, g.c * g.s) - j0;
        Array<A> row = array<A>(width);
        k.firsts(z.at(0) + j0 * element, static_cast<size_t>(width), row.get());
        for (int64_t j = 0; j < width; j += g.s) center[(j0 + j) / g.s] = row[j];
        local.center = local.arrays(g, j0, j1, 3, center.get());
    }

    void before_map(const Columns &g, int64_t j0, int64_t j1, Coefficients &local) {
        local.c = {local.arrays(g, j0, j1, 0, p.mean), local.arrays(g, j0, j1, 1, scale.get()),
                   local.arrays(g, j0, j1, 2, shift)};
    }

    void reduce_block(const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t j1, const Coefficients &strip,
                      double *sum, double *square) {
        if (j1 > j0)
            k.column_moments(z.p + (row * g.z_stride + j0) * element, g.z_stride * element, static_cast<size_t>(rows),
                             static_cast<size_t>(j1 - j0), strip.center, sum, square);
    }

    void map_row(const Columns &g, int64_t row, int64_t j0, int64_t j1, const Coefficients &strip, int64_t base,
                 int64_t warm) {
        const int64_t out_row = g.cols * element, piece = streams ? scratch_bytes / element : j1 - j0;
        alignas(64) char scratch[scratch_bytes];
        for (int64_t j = j0; j < j1; j += piece) {
            const int64_t len = std::min(piece, j1 - j), at = j * element, o = j - base;
            if (warm) prefetch(z.p + row * g.z_stride * element + at + warm * element, std::min(len, g.cols - j - warm) * element);
            char *out = y.p + row * out_row + at;
            apply_column(streams ? scratch : out, z.p + row * g.z_stride * element + at,
                         r ? r.p + row * out_row + at : nullptr, p.mask ? p.mask + row * g.mask_row() + j / 8 : nullptr,
                         static_cast<size_t>(len), {strip.c.mean + o, strip.c.scale + o, strip.c.shift + o});
            if (streams) k.stream(out, scratch, static_cast<size_t>(len * element));
        }
    }

  private:
    void plane(const Planes &g, char *to, int64_t n, int64_t c, int64_t start, int64_t len) {
        const int64_t at = start * element;
        apply_plane(to, z.at(n, c) + at, r ? r.at(n, c) + at : nullptr,
                    p.mask ? p.mask + (n * g.c + c) * g.mask_row() + start / 8 : nullptr, static_cast<size_t>(len),
                    {p.mean + c, &scale[c], shift + c});
    }

    void map_piece(const Planes &g, int64_t n, int64_t c, int64_t start, int64_t len) {
        if (!streams) return plane(g, y.at(n, c) + start * element, n, c, start, len);
        alignas(64) char scratch[scratch_bytes];
        const int64_t piece = scratch_bytes / 2 / element;
        for (int64_t end = start + len; start < end; start += piece) {
            const int64_t count = std::min(piece, end - start);
            plane(g, scratch, n, c, start, count);
            k.stream(y.at(n, c) + start * element, scratch, static_cast<size_t>(count * element));
        }
    }

    const ForwardProblem<A> &p;
    const Kernels<A> &k;
    int64_t element;
    View z, y, r;
    Array<A> scale, center, zeros;
    const A *shift = nullptr;
    typename Kernels<A>::Apply apply_plane, apply_column;
    bool streams = false;
    std::atomic<int64_t> skips{0};
};

template <class A>
void run(const ForwardProblem<A> &problem) {
    const Shape &x = problem.shape;
    if (x.c == 0 || x.n * x.s == 0) return;
    ForwardStep<A> step(problem);
    const int64_t element = static_cast<int64_t>(element_size(x.dtype));
    begin_tracking(problem);
    if (by_columns(x))
        run_columns(step, Columns(x), element, problem.threads);
    else
        run_planes(step, Planes(x), element, problem.threads);
    end_tracking(problem, step.skipped());
}

}  // namespace

void forward(const ForwardProblem<float> &p) { run(p); }
void forward(const ForwardProblem<double> &p) { run(p); }

}  // namespace bn
