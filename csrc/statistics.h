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

// `sum` and `square` are about `center`
template <class A>
bool finish_channel(const ForwardProblem<A> &p, int64_t c, double center, double sum, double square) {
    const double m = static_cast<double>(p.shape.n * p.shape.s), off = sum / m;
    double m2 = square - sum * off;
    if (m2 < 0) m2 = 0;  // and NaN stays NaN
    const double var = m2 / m;
    p.mean[c] = static_cast<A>(center + off);
    if (p.m2) p.m2[c] = static_cast<A>(m2);
    if (p.var) p.var[c] = static_cast<A>(var);
    if (p.inv_std) p.inv_std[c] = static_cast<A>(1.0 / std::sqrt(var + p.eps));
    const double divisor = m - p.tracking.correction;
    return track(p.tracking, c, p.mean[c], static_cast<A>(var), static_cast<A>(divisor > 0 ? m2 / divisor : var));
}

}  // namespace bn
