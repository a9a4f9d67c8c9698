// The order of the work: reduce every channel to two sums, finish it, map its elements; with as much of the data as
// possible still in a cache when it is mapped. `Step` says what is computed (forward.cpp, backward.cpp), these say
// when and by whom. Sums are taken by segments fixed by the shape and added in the order of the segments.
//
// All memory is taken before `step.begin()`: from there on nothing throws, and a call that fails has changed nothing.
#pragma once
#include <vector>
#include "problem.h"
#include "team.h"

namespace bn {

inline void operator+=(Sums &to, const Sums &o) {
    to.a += o.a;
    to.b += o.b;
}

// Vectors of length C, spread out to the columns; where columns are channels, the vectors themselves.
template <class A, int slots>
class Spread {
  public:
    const A *operator()(const Columns &g, int slot, const A *of_channel) {
        if (g.cols == g.c) return of_channel;
        if (!storage) storage = array<A>(slots * g.cols);
        A *out = storage.get() + slot * g.cols;
        for (int64_t j = 0; j < g.cols;)
            for (int64_t c = 0; c < g.c && j < g.cols; ++c)
                for (const int64_t end = std::min(g.cols, j + g.s); j < end; ++j) out[j] = of_channel[c];
        return out;
    }

  private:
    Array<A> storage;
};

// Channels that a thread takes at a time. Planes of neighbouring channels are neighbours in memory, and a long run of
// them is what memory and the hardware's prefetching are good at; but all samples of a group should still be near when
// it is mapped. Groups begin on whole cache lines where they can.
inline int64_t channels_together(const Planes &g, int64_t element, int inputs, int threads) {
    const int64_t plane = g.s * element, channel = g.n * plane * inputs;
    const int64_t near = static_cast<int64_t>(cache().per_core), last = static_cast<int64_t>(cache().last);
    const bool fits = g.c * channel <= last / 2;  // read from the last level, short runs do; from memory they do not
    const int64_t wanted = fits ? 98304 : 131072, budget = std::max(2 * near, last / 4 / threads);
    const auto shared = [&](int64_t channels) {  // evenly, or in enough groups that it does not matter
        const int64_t groups = (g.c + channels - 1) / channels;
        return groups >= 4 * threads || (groups >= threads && groups % threads == 0);
    };
    int64_t group = 64 / std::gcd(plane, int64_t{64});
    while (group * plane < wanted && 2 * group * channel <= budget && 2 * group <= 1024 && shared(2 * group)) group *= 2;
    return std::min(group * channel <= budget ? group : 1, g.c);
}

template <class Step>
std::vector<typename Step::Lanes> lanes_for(int threads, int64_t channels) {
    std::vector<typename Step::Lanes> all;
    all.reserve(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) all.emplace_back(channels);
    return all;
}

template <class Step>
void run_planes(Step &step, const Planes &g, int64_t element, int threads) {
    const int64_t channel_bytes = g.n * g.s * element * Step::inputs, last = static_cast<int64_t>(cache().last);
    threads = useful_threads(threads, g.n * g.c * g.s);

    if (threads == 1 || (g.c >= 2 * threads && channel_bytes * threads <= last / 2)) {
        const int64_t group = channels_together(g, element, Step::inputs, threads), groups = (g.c + group - 1) / group;
        const int team = static_cast<int>(std::min<int64_t>(threads, groups));
        auto all_lanes = lanes_for<Step>(step.reduces() ? team : 0, group);
        const Array<Sums> totals = array<Sums>(step.reduces() ? team * group : 0);
        step.begin();
        const auto work = [&](int thread, const auto &take) {
            Sums *const total = totals.get() + thread * group;
            for (int64_t i; (i = take()) < groups;) {
                const int64_t c0 = i * group, c1 = std::min(g.c, c0 + group);
                if (step.reduces()) {
                    step.look_at(g, c0, c1);
                    std::fill(total, total + group, Sums{});
                    for (int64_t k = 0; k < g.segments; ++k)
                        step.reduce_segment(g, c0, c1, k, all_lanes[static_cast<size_t>(thread)], total);
                    step.finish(c0, c1, total);
                }
                if (step.maps())  // backwards: what was read last is still near
                    for (int64_t u = g.units; u-- > 0;) {
                        if (u) step.touch(g, u - 1, c0, c1);
                        step.map_unit(g, u, c0, c1);
                    }
            }
            step.end_of_thread();
        };
        std::atomic<int64_t> next{0};
        team::parallel(team, [&](int thread, int) {
            work(thread, [&] { return next.fetch_add(1, std::memory_order_relaxed); });
        });
        return;
    }

    // few or large channels: the whole team on as many of them as the last-level cache holds
    const int64_t together = std::clamp<int64_t>(last / 2 / std::max<int64_t>(1, channel_bytes), 1, g.c);
    const Array<Sums> partial = array<Sums>(step.reduces() ? together * g.segments : 0);
    auto all_lanes = lanes_for<Step>(step.reduces() ? threads : 0, 1);
    step.begin();
    for (int64_t c0 = 0; c0 < g.c; c0 += together) {
        const int64_t count = std::min(g.c - c0, together), work = count * g.segments;
        if (step.reduces()) {
            step.look_at(g, c0, c0 + count);
            std::fill(partial.get(), partial.get() + together * g.segments, Sums{});
            std::atomic<int64_t> next{0};
            team::parallel(threads, [&](int thread, int) {
                typename Step::Lanes &lanes = all_lanes[static_cast<size_t>(thread)];
                for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < work;) {
                    const int64_t c = c0 + i / g.segments;
                    step.reduce_segment(g, c, c + 1, i % g.segments, lanes, &partial[i]);
                }
            });
            for (int64_t c = 0; c < count; ++c) {
                Sums total;
                for (int64_t k = 0; k < g.segments; ++k) total += partial[c * g.segments + k];
                partial[c] = total;  // of segments that have been added
            }
            step.finish(c0, c0 + count, partial.get());
        }
        if (step.maps()) {
            std::atomic<int64_t> left{work};
            team::parallel(threads, [&](int, int) {
                for (int64_t i; (i = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;) {
                    const int64_t c = c0 + i / g.segments, k = i % g.segments;
                    for (int64_t u = std::min(g.units, (k + 1) * g.units_per_segment); u-- > k * g.units_per_segment;)
                        step.map_unit(g, u, c, c + 1);
                }
                step.end_of_thread();
            });
        }
    }
}

// sums of the columns [j0, j1) to sums of channels
inline void fold(const Columns &g, const double *sum, const double *square, int64_t j0, int64_t j1, Sums *out) {
    if (g.s == 1) {
        for (int64_t j = j0, c = g.channel(j0); j < j1; ++j, ++c) {
            if (c == g.c) c = 0;
            out[c] += {sum[j - j0], square[j - j0]};
        }
        return;
    }
    for (int64_t j = j0; j < j1; j += g.s) {
        Sums one;
        for (int64_t k = 0; k < g.s; ++k) one += {sum[j - j0 + k], square[j - j0 + k]};
        out[g.channel(j)] += one;
    }
}

template <class Step>
void reduce_rows(Step &step, const Columns &g, const typename Step::Coefficients &all, int64_t segment, int64_t j0,
                 int64_t j1, double *sums, Sums *out) {
    const int64_t begin = segment * g.segment_rows, end = std::min(g.rows, begin + g.segment_rows), width = j1 - j0;
    std::fill(sums, sums + 2 * width, 0.0);
    for (int64_t row = begin; row < end; row += g.block_rows)
        step.reduce_block(g, row, std::min(end - row, g.block_rows), j0, j1, all, sums, sums + width);
    if (segment + 1 == g.segments && g.tail > j0)
        step.reduce_block(g, g.rows, 1, j0, std::min(j1, g.tail), all, sums, sums + width);
    fold(g, sums, sums + width, j0, j1, out);
}

// Two sweeps in the order of memory, the second from the back, so that it begins with what is still in a cache.
template <class Step>
void run_columns(Step &step, const Columns &g, int64_t element, int threads) {
    threads = useful_threads(threads, g.rows * g.cols + g.tail);
    typename Step::Coefficients all;
    if (step.reduces()) {
        step.before_reduce(g, all);
        // few rows: the columns are shared out as well, in whole vectors and whole channels
        const int64_t unit = std::lcm(g.s, int64_t{16}), units = (g.cols + unit - 1) / unit;
        const int64_t parts = g.repeated() ? 1 : std::clamp<int64_t>(threads / g.segments, 1, units);
        const int64_t width = (units + parts - 1) / parts * unit;
        const int team = static_cast<int>(std::min<int64_t>(threads, g.segments * parts));
        const int64_t sums_each = 2 * std::min(width, g.cols);
        const Array<Sums> partial = array<Sums>(g.segments * g.c);
        const Array<double> all_sums = array<double>(team * sums_each);
        step.begin();
        team::parallel(team, [&](int thread, int count) {
            double *const sums = all_sums.get() + thread * sums_each;
            const team::Range mine = team::share(g.segments * parts, thread, count);
            for (int64_t i = mine.begin; i < mine.end; ++i) {
                const int64_t k = i / parts, j0 = i % parts * width, j1 = std::min(g.cols, j0 + width);
                if (j0 < j1) reduce_rows(step, g, all, k, j0, j1, sums, &partial[k * g.c]);
            }
        });
        team::parallel(useful_threads(threads, g.segments * g.c), [&](int thread, int count) {
            const team::Range mine = team::share(g.c, thread, count);
            for (int64_t k = 1; k < g.segments; ++k)
                for (int64_t c = mine.begin; c < mine.end; ++c) partial[c] += partial[k * g.c + c];
            if (mine.begin < mine.end) step.finish(mine.begin, mine.end, &partial[mine.begin]);
        });
    }
    if (!step.maps()) return;
    step.before_map(g, all);
    const int64_t chunk = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, g.cols * element));
    team::parallel(threads, [&](int thread, int count) {
        const team::Range mine = team::share(g.rows, thread, count);
        if (g.tail && thread + 1 == count) step.map_rows(g, g.rows, 1, g.tail, all);
        for (int64_t end = mine.end; end > mine.begin; end -= chunk) {
            const int64_t begin = std::max(mine.begin, end - chunk);
            step.map_rows(g, begin, end - begin, g.cols, all);
        }
        step.end_of_thread();
    });
}

}  // namespace bn
