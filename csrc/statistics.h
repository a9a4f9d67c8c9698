// From the two sums of a channel to mean, variance and 1 / sqrt(var + eps), and on to its running statistics.
#pragma once
#include "problem.h"

namespace bn {

template <class A>
void begin_tracking(const ForwardProblem<A> &p) {
    if ((p.parts & statistics) && p.tracking.num_batches_tracked) ++*p.tracking.num_batches_tracked;
}

// moves the running statistics of one channel; true: it was skipped
template <class A>
bool track(const Tracking<A> &t, int64_t c, A mean, A var, A corrected) {
    if (!t.running_mean) return false;
    if (t.skip_nonfinite && !(std::isfinite(mean) && std::isfinite(var))) return true;
    double w = t.momentum;
    if (t.average) {
        // as it began: there is no average yet
        const bool begun = t.running_mean[c] != 0 || t.running_var[c] != 1;
        w = begun && t.num_batches_tracked ? 1.0 / static_cast<double>(std::max<int64_t>(*t.num_batches_tracked, 1)) : 1.0;
    }
    const auto move = [w](A &running, A batch) {
        running = static_cast<A>((1.0 - w) * static_cast<double>(running) + w * static_cast<double>(batch));
    };
    move(t.running_mean[c], mean);
    move(t.running_var[c], corrected);
    return false;
}

// of the channels [c0, c1), whose sums are about `center`; true: running statistics of one of them were spared
template <class A>
bool finish_channels(const ForwardProblem<A> &p, const Kernels<A> &k, int64_t c0, int64_t c1, const A *center, const Sums *sums) {
    const double m = static_cast<double>(p.keep ? p.keep->count : p.shape.n * p.shape.s);
    const double divisor = m > p.tracking.correction ? m - p.tracking.correction : m;
    const auto at = [](A *v, int64_t c) { return v ? v + c : nullptr; };
    bool skipped = false;
    for (int64_t c = c0; c < c1; c += channels_at_once) {
        const int64_t count = std::min(channels_at_once, c1 - c);
        double mean[channels_at_once], m2[channels_at_once];
        const ChannelMoments<A> out{mean, m2, p.mean + c, at(p.var, c), at(p.inv_std, c)};
        k.channel_moments(sums + (c - c0), center + c, static_cast<size_t>(count), m, p.eps, out);
        if (p.m2)
            for (int64_t i = 0; i < count; ++i) p.m2[c + i] = static_cast<A>(m2[i]);
        if (p.exact_mean) std::copy(mean, mean + count, p.exact_mean + c), std::copy(m2, m2 + count, p.exact_m2 + c);
        const Tracking<A> &t = p.tracking;
        if (!t.running_mean || m == 0) continue;
        if (!t.average && k.move(p.mean + c, m2, static_cast<size_t>(count), divisor, t.momentum, t.skip_nonfinite,
                                 t.running_mean + c, t.running_var + c))
            continue;
        for (int64_t i = 0; i < count; ++i)  // one by one: an average, or a channel that is not finite
            skipped |= track(t, c + i, p.mean[c + i], static_cast<A>(m2[i] / m), static_cast<A>(m2[i] / divisor));
    }
    return skipped;
}

}  // namespace bn
