// What the calls from Python share.
#pragma once
#include <nanobind/nanobind.h>

#include "arguments.h"

namespace bn {

// called with the running mean of a batch of which a channel was skipped
inline PyObject *on_skip = nullptr;

// f(A{}) with A the accumulator type
template <class F>
auto with_accumulator(DType t, F f) {
    return t == DType::f64 ? f(double{}) : f(float{});
}

// a short call would spend longer on handing the interpreter's lock over than on its work
template <class F>
void without_lock(const Placement &at, F work) {
    if (at.count < 65536) return work();
    nb::gil_scoped_release release;
    work();
}

// `t`: population.Tracking, a tuple
template <class A>
void read(Arguments &a, nb::handle t, Tracking<A> &out) {
    out.running_mean = static_cast<A *>(a.vector(t[0]));
    out.running_var = static_cast<A *>(a.vector(t[1]));
    out.num_batches_tracked = a.counts(t[2], 1);
    out.average = nb::object(t[3]).is_none();
    if (!out.average) out.momentum = nb::cast<double>(t[3]);
    out.correction = nb::cast<bool>(nb::bool_(nb::object(t[4])));
    out.skip_nonfinite = nb::cast<bool>(t[5]);
}

// what the forward keeps for the backward of z and a residual
template <class A>
nb::object saved(const Arguments &a, const Norm &norm, ForwardProblem<A> &p) {
    const Saved kind = p.residual ? saved_for(p.activation) : Saved::none;
    if (kind == Saved::bit_mask) return a.sides(p.mask);
    return kind == Saved::residual ? nb::borrow(norm.residual()) : nb::none();
}

// at_once.cpp
void bind_at_once(nb::module_ &m);

}  // namespace bn
