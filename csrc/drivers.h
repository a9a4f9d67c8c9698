// The order of the work: reduce every channel to two sums, finish it, map its elements; with as much of the data as
// possible still in a cache when it is mapped. `Step` says what is computed (forward.cpp, backward.cpp), these say
// when and by whom. Sums are taken by segments fixed by the shape and added in the order of the segments.
#pragma once
#include <vector>
#include "problem.h"
#include "team.h"

namespace bn {

struct Pair {
    double a = 0, b = 0;
    void operator+=(const Pair &o) {
        a += o.a;
        b += o.b;
    }
};

// Vectors of length C, spread out to the columns of a strip; where columns are channels, the vectors themselves.
template <class A, int slots>
class Spread {
  public:
    const A *operator()(const Columns &g, int64_t j0, int64_t j1, int slot, const A *of_channel) {
        if (g.s == 1 && g.cols == g.c) return of_channel + j0;
        const int64_t count = j1 - j0;
        if (width < count) {
            storage = array<A>(slots * count);
            width = count;
        }
        A *out = storage.get() + slot * width;
        for (int64_t j = 0, c = g.channel(j0); j < count; c = c + 1 == g.c ? 0 : c + 1)
            for (const int64_t end = std::min(count, j + g.s); j < end; ++j) out[j] = of_channel[c];
        return out;
    }

  private:
    Array<A> storage;
    int64_t width = 0;
};

template <class Step>
void run_planes(Step &step, const Planes &g, int64_t element, int threads) {
    const int64_t plane_bytes = g.s * element, channel_bytes = g.n * plane_bytes * Step::inputs;
    threads = useful_threads(threads, g.n * g.c * g.s);
    // neighbouring channels are neighbours in memory: enough of them to fill whole lines and long runs
    const int64_t aligned = 64 / std::gcd(plane_bytes, int64_t{64});
    int64_t group = aligned;
    while (group < g.c && group * plane_bytes < 4096 && group * channel_bytes < int64_t(cache().per_core / 4)) group *= 2;
    if (group * channel_bytes > int64_t(cache().per_core / 2)) group = 1;
    group = std::min(group, g.c);
    const int64_t groups = (g.c + group - 1) / group;
    const int64_t last = static_cast<int64_t>(cache().last);

    if (threads == 1 || (groups >= 2 * threads && channel_bytes * threads <= last / 2)) {
        const bool ahead = 2 * group * channel_bytes <= int64_t(cache().per_core);
        std::atomic<int64_t> next{0};
        const int64_t workers = std::min<int64_t>(threads, groups);
        team::parallel(static_cast<int>(workers), [&](int, int) {
            int64_t i = next.fetch_add(1, std::memory_order_relaxed);
            while (i < groups) {
                const int64_t following = next.fetch_add(1, std::memory_order_relaxed);
                const int64_t c0 = i * group, c1 = std::min(g.c, c0 + group);
                if (step.reduces())
                    for (int64_t c = c0; c < c1; ++c) {
                        Pair total;
                        for (int64_t k = 0; k < g.segments; ++k) total += step.reduce_segment(g, c, k);
                        step.finish(c, total);
                    }
                const bool warm = ahead && following < groups && step.reduces();
                if (step.maps())
                    for (int64_t n = 0; n < g.n; ++n)
                        step.map_run(g, n, c0, c1, warm ? (following - i) * group : 0);
                i = following;
            }
            step.end_of_thread();
        });
        return;
    }

    // few or large channels: the whole team on as many of them as the last-level cache holds
    const int64_t together = std::clamp<int64_t>(last / 2 / std::max<int64_t>(1, channel_bytes), 1, g.c);
    std::vector<Pair> partial(static_cast<size_t>(together * g.segments));
    for (int64_t c0 = 0; c0 < g.c; c0 += together) {
        const int64_t count = std::min(g.c - c0, together), work = count * g.segments;
        if (step.reduces()) {
            team::tasks(threads, work, [&](int64_t i) {
                partial[static_cast<size_t>(i)] = step.reduce_segment(g, c0 + i / g.segments, i % g.segments);
            });
            for (int64_t c = 0; c < count; ++c) {
                Pair total;
                for (int64_t k = 0; k < g.segments; ++k) total += partial[static_cast<size_t>(c * g.segments + k)];
                step.finish(c0 + c, total);
            }
        }
        if (step.maps()) {
            std::atomic<int64_t> left{work};
            team::parallel(threads, [&](int, int) {  // backwards: what was read last is still near
                for (int64_t i; (i = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
                    step.map_segment(g, c0 + i / g.segments, i % g.segments);
                step.end_of_thread();
            });
        }
    }
}

// sums of columns to sums of channels; columns [j0, j1) hold channels c0 and on
inline void fold(const Columns &g, const double *sum, const double *square, int64_t j0, int64_t j1, int64_t c0,
                 Pair *out) {
    if (g.s == 1) {
        for (int64_t j = j0, c = g.channel(j0) - c0; j < j1; ++j, ++c) {
            if (c + c0 == g.c) c = -c0;
            out[c] += {sum[j - j0], square[j - j0]};
        }
        return;
    }
    for (int64_t j = j0; j < j1; j += g.s) {
        Pair four[4];  // four chains of additions instead of one
        const double *a = sum + (j - j0), *b = square + (j - j0);
        for (int64_t k = 0; k < g.s; ++k) four[k & 3] += {a[k], b[k]};
        four[0] += four[1];
        four[2] += four[3];
        four[0] += four[2];
        out[g.channel(j) - c0] += four[0];
    }
}

template <class Step>
void reduce_rows(Step &step, const Columns &g, const typename Step::Coefficients &strip, int64_t segment, int64_t j0, int64_t j1, int64_t c0, double *sums,
                 Pair *out) {
    const int64_t begin = segment * g.segment_rows, end = std::min(g.rows, begin + g.segment_rows), width = j1 - j0;
    std::fill(sums, sums + 2 * width, 0.0);
    for (int64_t row = begin; row < end; row += g.block_rows)
        step.reduce_block(g, row, std::min(end - row, g.block_rows), j0, j1, strip, sums, sums + width);
    if (segment + 1 == g.segments && g.tail) 
        step.reduce_block(g, g.rows, 1, j0, std::min(j1, g.tail), strip, sums, sums + width);
    fold(g, sums, sums + width, j0, j1, c0, out);
}

template <class Step>
void run_columns(Step &step, const Columns &g, int64_t element, int threads) {
    threads = useful_threads(threads, g.rows * g.cols + g.tail);
    const int64_t row_bytes = g.cols * element, total = g.all_rows() * row_bytes * Step::inputs;
    const int64_t near = static_cast<int64_t>(cache().per_core);

    // strips of columns, all rows at once, where a strip stays in a core's own cache
    const bool repeated = g.cols != g.c * g.s;  // rows side by side: a channel is in every strip
    const int64_t unit = g.s * (32 / std::gcd(g.s, int64_t{32})), column_bytes = g.all_rows() * element * Step::inputs;
    const bool whole = !repeated && (threads == 1 && total <= near / 2);
    if (whole || (!repeated && unit * column_bytes <= near / 2 && (g.s > 1 || g.segments == 1) &&
                  g.cols >= unit * 2 * threads)) {
        int64_t width = whole ? g.cols : unit;
        while (!whole && width * 2 * column_bytes <= near / 4 && width * 4 * threads <= g.cols) width *= 2;
        const int64_t strips = (g.cols + width - 1) / width;
        std::atomic<int64_t> next{0};
        team::parallel(static_cast<int>(std::min<int64_t>(threads, strips)), [&](int, int) {
            typename Step::Coefficients local;
            std::vector<double> sums(static_cast<size_t>(2 * width));
            std::vector<Pair> channels(static_cast<size_t>(width / g.s + 1));
            int64_t i = next.fetch_add(1, std::memory_order_relaxed);
            while (i < strips) {
                const int64_t following = next.fetch_add(1, std::memory_order_relaxed);
                const int64_t j0 = i * width, j1 = std::min(g.cols, j0 + width);
                const int64_t c0 = j0 / g.s, c1 = j1 / g.s;
                if (step.reduces()) {
                    step.before_reduce(g, j0, j1, local);
                    std::fill(channels.begin(), channels.end(), Pair{});
                    for (int64_t k = 0; k < g.segments; ++k) {
                        std::vector<Pair> part(static_cast<size_t>(c1 - c0));
                        reduce_rows(step, g, local, k, j0, j1, c0, sums.data(), part.data());
                        for (int64_t c = c0; c < c1; ++c)
                            channels[static_cast<size_t>(c - c0)] += part[static_cast<size_t>(c - c0)];
                    }
                    for (int64_t c = c0; c < c1; ++c) step.finish(c, channels[static_cast<size_t>(c - c0)]);
                }
                if (step.maps()) {
                    step.before_map(g, j0, j1, local);
                    const int64_t warm = step.reduces() && following < strips ? (following - i) * width : 0;
                    for (int64_t row = 0; row < g.rows; ++row) step.map_row(g, row, j0, j1, local, j0, warm);
                }
                i = following;
            }
            step.end_of_thread();
        });
        return;
    }

    // two sweeps over all columns, the second one backwards, so that it begins with what is still in a cache
    typename Step::Coefficients all;
    if (step.reduces()) {
        step.before_reduce(g, 0, g.cols, all);
        std::vector<Pair> partial(static_cast<size_t>(g.segments * g.c));
        team::parallel(static_cast<int>(std::min<int64_t>(threads, g.segments)), [&](int thread, int count) {
            std::vector<double> sums(static_cast<size_t>(2 * g.cols));
            const team::Range mine = team::share(g.segments, thread, count);
            for (int64_t k = mine.begin; k < mine.end; ++k)
                reduce_rows(step, g, all, k, 0, g.cols, 0, sums.data(), &partial[static_cast<size_t>(k * g.c)]);
        });
        team::parallel(useful_threads(threads, g.segments * g.c), [&](int thread, int count) {
            const team::Range mine = team::share(g.c, thread, count);
            for (int64_t c = mine.begin; c < mine.end; ++c) {
                Pair total_c;
                for (int64_t k = 0; k < g.segments; ++k) total_c += partial[static_cast<size_t>(k * g.c + c)];
                step.finish(c, total_c);
            }
        });
    }
    if (!step.maps()) return;
    step.before_map(g, 0, g.cols, all);
    constexpr int64_t tile_rows = 16, tile_cols = 1024;
    team::parallel(threads, [&](int thread, int count) {
        const team::Range mine = team::share(g.all_rows(), thread, count);
        for (int64_t end = mine.end; end > mine.begin; end -= tile_rows) {
            const int64_t begin = std::max(mine.begin, end - tile_rows);
            for (int64_t j0 = 0; j0 < g.cols; j0 += tile_cols)
                for (int64_t row = begin; row < end; ++row) {
                    const int64_t j1 = std::min({g.cols, j0 + tile_cols, g.width(row)});
                    if (j0 < j1) step.map_row(g, row, j0, j1, all, 0, 0);
                }
        }
        step.end_of_thread();
    });
}

}  // namespace bn
