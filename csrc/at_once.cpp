// A whole call of the operator where nothing stands in its way: for a small batch, the questions that Python asks one by
// one, and every call of a function on the way, take longer than the batch.
#include <nanobind/nanobind.h>

#include <initializer_list>

#include "calls.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bn {
namespace {

// Of the framework around us; references that are kept for good.
struct Framework {
    PyObject *tensor = nullptr;        // the type of a plain tensor
    PyObject *questions = nullptr;     // tuple of (callable, its answer where nobody watches)
    PyObject *variables = nullptr;     // tuple of (dict, key, its value where nobody watches)
    PyObject *no_backward = nullptr;   // one such pair: where a backward is under way, it runs a forward again
    PyObject *grad_enabled = nullptr;  // whether gradients are recorded
    PyObject *node = nullptr;          // of (z, gamma, beta, residual, kept, how): y, with its backward
    PyObject *engine = nullptr, *activations = nullptr;
    PyObject *is_neg = PyUnicode_InternFromString("is_neg"), *requires_grad = PyUnicode_InternFromString("requires_grad");
} framework;

bool is_true(nb::object answer) {
    const int found = PyObject_IsTrue(answer.ptr());
    if (found < 0) throw nb::python_error();
    return found;
}

nb::object call(PyObject *function) {
    PyObject *answer = PyObject_CallNoArgs(function);
    if (!answer) throw nb::python_error();
    return nb::steal(answer);
}

// The answers are None, False and small integers, of which there is one object each.
bool as_ever(PyObject *pair) { return call(PyTuple_GET_ITEM(pair, 0)).ptr() == PyTuple_GET_ITEM(pair, 1); }

bool watched() {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(framework.questions); ++i)
        if (!as_ever(PyTuple_GET_ITEM(framework.questions, i))) return true;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(framework.variables); ++i) {
        PyObject *const three = PyTuple_GET_ITEM(framework.variables, i);
        if (PyDict_GetItem(PyTuple_GET_ITEM(three, 0), PyTuple_GET_ITEM(three, 1)) != PyTuple_GET_ITEM(three, 2)) return true;
    }
    return false;
}

using Handles = std::initializer_list<nb::handle>;

// their values in memory have the other sign; or they are no tensors
bool negative(Handles tensors) {
    for (nb::handle t : tensors) {
        if (t.is_none()) continue;
        PyObject *answer = PyObject_CallMethodNoArgs(t.ptr(), framework.is_neg);
        if (!answer) return PyErr_Clear(), true;
        if (is_true(nb::steal(answer))) return true;
    }
    return false;
}

bool gradient_asked(Handles tensors) {
    if (!is_true(call(framework.grad_enabled))) return false;
    for (nb::handle t : tensors) {
        if (t.is_none()) continue;
        PyObject *answer = PyObject_GetAttr(t.ptr(), framework.requires_grad);
        if (!answer) throw nb::python_error();
        if (is_true(nb::steal(answer))) return true;
    }
    return false;
}

// false: not one of those that are known
bool read_activation(nb::handle name, Activation &out) {
    PyObject *code = PyDict_GetItemWithError(framework.activations, name.ptr());
    if (!code) PyErr_Clear();
    if (code) out = static_cast<Activation>(PyLong_AsLong(code));
    return code;
}

// a positive number, or not a number of the plainest kind
bool positive(nb::handle eps) { return PyFloat_CheckExact(eps.ptr()) && PyFloat_AS_DOUBLE(eps.ptr()) > 0; }

// `t`: population.Tracking, a tuple
bool in_range(nb::handle t) {
    const nb::handle momentum = PyTuple_GET_ITEM(t.ptr(), 3), correction = PyTuple_GET_ITEM(t.ptr(), 4);
    if (!PyLong_CheckExact(correction.ptr())) return false;
    const long divisor = PyLong_AsLong(correction.ptr());
    if (divisor != 0 && divisor != 1) return PyErr_Clear(), false;
    if (momentum.is_none()) return true;
    if (!PyFloat_CheckExact(momentum.ptr())) return false;
    const double w = PyFloat_AS_DOUBLE(momentum.ptr());
    return w >= 0 && w <= 1;
}

bool plain(nb::handle z, Handles tensors) {
    return framework.tensor && reinterpret_cast<PyObject *>(Py_TYPE(z.ptr())) == framework.tensor && !watched() && !negative(tensors);
}

nb::object train_at_once(nb::handle z, nb::handle gamma, nb::handle beta, nb::handle residual, nb::object axis,
                         nb::object eps, nb::handle activation, nb::handle tracking) {
    Activation code;
    if (!plain(z, {z, gamma, beta, residual}) || !read_activation(activation, code)) return nb::none();
    if (!positive(eps)) return nb::none();
    if (!tracking.is_none() && (!in_range(tracking) || negative({tracking[0], tracking[1]}))) return nb::none();
    Arguments a(z, nb::cast<int>(axis));
    if (a.declined() || a.at.values < 2) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.shape = a.at.shape;
        p.activation = code;
        p.z = a.begin;
        p.gamma = a.values<A>(gamma);
        p.beta = a.values<A>(beta);
        p.residual = a.packed(residual);
        p.eps = PyFloat_AS_DOUBLE(eps.ptr());
        // what runs again was counted the first time
        if (!tracking.is_none() && as_ever(framework.no_backward)) read(a, tracking, p.tracking);
        if (a.declined()) return nb::none();
        const bool recorded = gradient_asked({z, gamma, beta, residual});
        const nb::object y = a.output(p.y);
        nb::object moments = nb::none(), kept = nb::none();
        if (recorded) {
            moments = a.pair_of_channels(p.mean, p.inv_std);
            if (p.residual && saved_for(code) == Saved::bit_mask) kept = a.sides(p.mask);
            if (p.residual && saved_for(code) == Saved::residual) kept = nb::borrow(residual);
        } else {
            p.mean = a.own<A>(p.shape.c), p.inv_std = a.own<A>(p.shape.c);
        }
        bool skipped = false;
        p.skipped = &skipped;
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        if (skipped) nb::borrow(on_skip)(nb::object(tracking[0]));
        if (!recorded) return y;
        const nb::object forward_gave = nb::make_tuple(y, moments, kept, nb::none());
        const nb::object how = nb::make_tuple(nb::handle(framework.engine), axis, eps, activation, p.residual != nullptr,
                                              nb::none(), false, nb::none());
        PyObject *const arguments[] = {z.ptr(), gamma.ptr(), beta.ptr(), residual.ptr(), forward_gave.ptr(), how.ptr()};
        PyObject *const result = PyObject_Vectorcall(framework.node, arguments, 6, nullptr);
        if (!result) throw nb::python_error();
        return nb::steal(result);
    });
}

// `needs`: which gradients are asked for, of z, gamma, beta, residual, ...: as many come back, or None where it is declined
nb::object backward_at_once(nb::handle dy, nb::handle z, nb::handle gamma, nb::handle beta, nb::handle moments,
                            nb::handle saved, int axis, nb::handle activation, bool added, nb::tuple needs) {
    Activation code;
    const bool ordinary = framework.tensor && reinterpret_cast<PyObject *>(Py_TYPE(dy.ptr())) == framework.tensor &&
                          !watched() && !is_true(call(framework.grad_enabled)) &&
                          !negative({dy});
    if (!ordinary || !read_activation(activation, code)) return nb::none();
    const Saved kind = added ? saved_for(code) : Saved::none;
    if (kind != Saved::none && saved.is_none()) return nb::none();
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        BackwardProblem<A> p;
        p.activation = code;
        p.z = a.begin;
        p.dy = a.packed(dy);
        a.pair(moments, p.mean, p.inv_std);
        p.gamma = static_cast<A *>(a.vector(gamma));  // the gradients have the types of gamma and beta
        p.beta = static_cast<A *>(a.vector(beta));
        if (kind == Saved::bit_mask) p.saved = a.sides(saved);
        if (kind == Saved::residual) p.saved = a.packed(saved);
        if (a.declined()) return nb::none();
        p.shape = a.at.shape;
        const bool with_residual = is_true(nb::borrow(needs[3]));
        const nb::object sum_dy = a.vector_of_channels(p.sum_dy), sum_dy_zhat = a.vector_of_channels(p.sum_dy_zhat);
        const nb::object dz = a.output(p.dz);
        nb::object dresidual = nb::none();
        if (with_residual) dresidual = code == Activation::identity ? nb::borrow(dy) : a.output(p.dresidual);
        p.count = static_cast<double>(a.at.values);
        p.threads = team::threads();
        without_lock(a.at, [&] { backward(p); });
        const nb::object gradients[] = {dz, sum_dy_zhat, sum_dy, dresidual};
        PyObject *const found = PyTuple_New(static_cast<Py_ssize_t>(needs.size()));
        if (!found) throw nb::python_error();
        for (size_t i = 0; i < needs.size(); ++i) {
            const bool given = i < 4 && is_true(nb::borrow(needs[i]));
            PyTuple_SET_ITEM(found, static_cast<Py_ssize_t>(i), nb::object(given ? gradients[i] : nb::none()).release().ptr());
        }
        return nb::steal(found);
    });
}

nb::object infer_at_once(nb::handle z, nb::handle mean, nb::handle var, nb::handle gamma, nb::handle beta,
                         nb::handle residual, int axis, nb::handle eps, nb::handle activation) {
    Activation code;
    if (!plain(z, {z, gamma, beta, residual, mean, var}) || !read_activation(activation, code)) return nb::none();
    if (!positive(eps) || gradient_asked({z, gamma, beta, residual})) return nb::none();
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.shape = a.at.shape;
        p.activation = code;
        p.parts = normalization;
        p.z = a.begin;
        p.mean = const_cast<A *>(a.values<A>(mean));  // normalization alone reads it
        const A *const spread = a.values<A>(var);
        p.gamma = a.values<A>(gamma);
        p.beta = a.values<A>(beta);
        p.residual = a.packed(residual);
        if (a.declined()) return nb::none();
        p.inv_std = a.own<A>(p.shape.c);
        table<A>(p.shape.dtype).inverse_deviations(spread, PyFloat_AS_DOUBLE(eps.ptr()), static_cast<size_t>(p.shape.c), p.inv_std);
        const nb::object y = a.output(p.y);
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        return y;
    });
}

}  // namespace

void bind_at_once(nb::module_ &m) {
    m.def("watch", [](nb::object tensor, nb::object questions, nb::object variables, nb::object no_backward, nb::object grad_enabled, nb::object node,
                      nb::object engine, nb::object activations) {
        framework.tensor = tensor.release().ptr();
        framework.questions = questions.release().ptr();
        framework.variables = variables.release().ptr();
        framework.no_backward = no_backward.release().ptr();
        framework.grad_enabled = grad_enabled.release().ptr();
        framework.node = node.release().ptr();
        framework.engine = engine.release().ptr();
        framework.activations = activations.release().ptr();
    }, "tensor"_a, "questions"_a, "variables"_a, "no_backward"_a, "grad_enabled"_a, "node"_a, "engine"_a, "activations"_a,
          "What the two calls below ask and use; once, before the first of them.");
    m.def("train_at_once", &train_at_once, "z"_a.none(), "gamma"_a.none(), "beta"_a.none(), "residual"_a.none(), "axis"_a, "eps"_a.none(),
          "activation"_a.none(), "tracking"_a.none(),
          "y of a training step, with its backward where a gradient is asked for; or None: declined.");
    m.def("backward_at_once", &backward_at_once, "dy"_a, "z"_a, "gamma"_a.none(), "beta"_a.none(), "moments"_a,
          "saved"_a.none(), "axis"_a, "activation"_a.none(), "added"_a, "needs"_a,
          "The gradients of a training step, as many as there are needs; or None: declined.");
    m.def("infer_at_once", &infer_at_once, "z"_a.none(), "mean"_a, "var"_a, "gamma"_a.none(), "beta"_a.none(), "residual"_a.none(),
          "axis"_a, "eps"_a.none(), "activation"_a.none(),
          "y of inference where no gradient is asked for; or None: declined.");
}

}  // namespace bn
