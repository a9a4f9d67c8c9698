// The boundary to Python. Tensors come as the framework's own objects and are looked at through DLPack (tensors.h);
// what the core does not take as it is, it declines with None, before anything is written: the caller then brings it
// into a form it takes, or asks another engine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <utility>

#include "placement.h"
#include "pool.h"
#include "problem.h"
#include "team.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bn {
namespace {

// Takes the arguments of a call one by one; once one of them has been declined, the call is.
class Arguments {
  public:
    Arguments(nb::handle z, int axis) {
        dlpack::Tensor t;
        good = tensors::look(z.ptr(), t) && place(t, axis, at);
        if (!good) return;
        begin = t.begin();
        accumulator = at.shape.dtype == DType::f64 ? dlpack::float64 : dlpack::float32;
    }

    bool declined() const { return !good; }

    // None, or a vector of length C in the accumulator's type
    void *vector(nb::handle v) { return one(v, accumulator, at.shape.c); }
    int64_t *counts(nb::handle v, int64_t length) { return static_cast<int64_t *>(one(v, dlpack::int64, length)); }

    // None, or a tensor that lies like the output
    void *packed(nb::handle v) {
        if (v.is_none() || !good) return nullptr;
        dlpack::Tensor t;
        return (good = tensors::look(v.ptr(), t) && at.packed(t)) ? t.begin() : nullptr;
    }

    void *bit_mask(nb::handle v) { return one(v, dlpack::uint8, mask_bytes(at.shape)); }

    template <class T>
    nb::object output(T *&memory) const {
        return make(type_of(at.shape.dtype), at.axes, at.sizes, at.strides, memory);
    }
    template <class T>
    nb::object vector_of_channels(T *&memory) const {
        const int64_t step = 1;
        return make(accumulator, 1, &at.shape.c, &step, memory);
    }
    nb::object bits(uint8_t *&memory) const {
        const int64_t bytes = mask_bytes(at.shape), step = 1;
        return make(dlpack::uint8, 1, &bytes, &step, memory);
    }

    Placement at;
    void *begin = nullptr;

  private:
    template <class T>
    static nb::object make(dlpack::Type type, int axes, const int64_t *sizes, const int64_t *strides, T *&memory) {
        void *where = nullptr;
        nb::object made = nb::steal<nb::object>(tensors::make(type, axes, sizes, strides, &where));
        memory = static_cast<T *>(where);
        return made;
    }
    void *one(nb::handle v, dlpack::Type type, int64_t length) {
        if (v.is_none() || !good) return nullptr;
        dlpack::Tensor t;
        good = tensors::look(v.ptr(), t) && t.device.type == dlpack::cpu && t.type == type &&
               (t.ndim == 1 ? t.shape[0] == length && (length == 1 || t.strides[0] == 1) : t.ndim == 0 && length == 1);
        return good ? t.begin() : nullptr;
    }

    dlpack::Type accumulator{};
    bool good = true;
};

// f(A{}) with A the accumulator type
template <class F>
auto with_accumulator(DType t, F f) {
    return t == DType::f64 ? f(double{}) : f(float{});
}

// called with the running mean of a batch of which a channel was skipped
PyObject *on_skip = nullptr;

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
    out.correction = nb::cast<int>(t[4]);
    out.skip_nonfinite = nb::cast<bool>(t[5]);
}

nb::object call_forward(nb::handle z, int axis, nb::handle gamma, nb::handle beta, double eps, nb::handle residual,
                        int activation, nb::handle tracking) {
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.shape = a.at.shape;
        p.activation = static_cast<Activation>(activation);
        p.z = a.begin;
        p.gamma = static_cast<A *>(a.vector(gamma));
        p.beta = static_cast<A *>(a.vector(beta));
        p.residual = a.packed(residual);
        p.eps = eps;
        if (!tracking.is_none()) read(a, tracking, p.tracking);
        if (a.declined()) return nb::none();
        const nb::object y = a.output(p.y), mean = a.vector_of_channels(p.mean), var = a.vector_of_channels(p.var),
                         inv_std = a.vector_of_channels(p.inv_std);
        nb::object saved = nb::none();
        if (p.residual && saved_for(p.activation) == Saved::bit_mask)
            saved = a.bits(p.mask);
        else if (p.residual && saved_for(p.activation) == Saved::residual)
            saved = nb::borrow(residual);
        bool skipped = false;
        p.skipped = &skipped;
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        if (skipped) nb::borrow(on_skip)(nb::object(tracking[0]));
        return nb::make_tuple(y, mean, var, inv_std, saved);
    });
}

nb::object call_statistics(nb::handle z, int axis) {
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        const nb::object mean = a.vector_of_channels(p.mean), m2 = a.vector_of_channels(p.m2);
        p.shape = a.at.shape;
        p.parts = statistics;
        p.z = a.begin;
        p.threads = team::threads();
        if (a.at.values == 0)  // of no value: none
            std::fill_n(p.mean, p.shape.c, A{0}), std::fill_n(p.m2, p.shape.c, A{0});
        without_lock(a.at, [&] { forward(p); });
        return nb::make_tuple(a.at.values, mean, m2);
    });
}

// `spread`: 1 / sqrt(var + eps); or var, with an eps of 0 or more
nb::object call_normalize(nb::handle z, int axis, nb::handle mean, nb::handle spread, double eps, nb::handle gamma,
                          nb::handle beta, nb::handle residual, int activation, nb::handle out) {
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.shape = a.at.shape;
        p.activation = static_cast<Activation>(activation);
        p.parts = normalization;
        p.z = a.begin;
        p.mean = static_cast<A *>(a.vector(mean));
        p.inv_std = static_cast<A *>(a.vector(spread));
        p.gamma = static_cast<A *>(a.vector(gamma));
        p.beta = static_cast<A *>(a.vector(beta));
        p.residual = a.packed(residual);
        p.y = a.packed(out);
        if (a.declined()) return nb::none();
        Array<A> own;
        if (eps >= 0) {
            own = array<A>(p.shape.c);
            for (int64_t c = 0; c < p.shape.c; ++c)
                own[c] = static_cast<A>(1.0 / std::sqrt(static_cast<double>(p.inv_std[c]) + eps));
            p.inv_std = own.get();
        }
        const nb::object y = out.is_none() ? a.output(p.y) : nb::borrow(out);
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        return y;
    });
}

nb::object call_backward(unsigned parts, nb::handle dy, nb::handle z, int axis, nb::handle mean, nb::handle inv_std,
                         nb::handle gamma, nb::handle beta, int activation, nb::handle saved, nb::handle sum_dy,
                         nb::handle sum_dy_zhat, double count, bool with_residual) {
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        BackwardProblem<A> p;
        p.shape = a.at.shape;
        p.activation = static_cast<Activation>(activation);
        p.parts = parts;
        p.z = a.begin;
        p.dy = a.packed(dy);
        p.mean = static_cast<A *>(a.vector(mean));
        p.inv_std = static_cast<A *>(a.vector(inv_std));
        p.gamma = static_cast<A *>(a.vector(gamma));
        p.beta = static_cast<A *>(a.vector(beta));
        if (saved_for(p.activation) == Saved::bit_mask)
            p.saved = a.bit_mask(saved);
        else if (saved_for(p.activation) == Saved::residual)
            p.saved = a.packed(saved);
        const bool reduces = parts & reduction, maps = parts & input_gradient;
        const auto sum = [&](nb::handle given) { return reduces ? nb::none() : nb::borrow(given); };
        nb::object first = sum(sum_dy), second = sum(sum_dy_zhat);
        p.sum_dy = static_cast<A *>(a.vector(first));
        p.sum_dy_zhat = static_cast<A *>(a.vector(second));
        if (a.declined()) return nb::none();
        if (reduces) {
            first = a.vector_of_channels(p.sum_dy);
            second = a.vector_of_channels(p.sum_dy_zhat);
        }
        nb::object dz = nb::none(), dresidual = nb::none();
        if (maps) {
            dz = a.output(p.dz);
            if (with_residual && p.activation == Activation::identity) {
                dresidual = nb::borrow(dy);
            } else if (with_residual) {
                dresidual = a.output(p.dresidual);
            }
        }
        p.count = count < 0 ? static_cast<double>(a.at.values) : count;
        p.threads = team::threads();
        without_lock(a.at, [&] { backward(p); });
        return nb::make_tuple(dz, first, second, dresidual);
    });
}

// Whether these go through `forward` as they are: nothing about them needs an error, or a copy.
bool takes(nb::handle z, int axis, nb::handle gamma, nb::handle beta, nb::handle residual, nb::handle running_mean,
           nb::handle running_var) {
    Arguments a(z, axis);
    a.vector(gamma);
    a.vector(beta);
    a.vector(running_mean);
    a.vector(running_var);
    a.packed(residual);
    return !a.declined() && a.at.values >= 2;
}

nb::object packed_strides(nb::handle z, int axis) {
    const Arguments a(z, axis);
    if (a.declined()) return nb::none();
    nb::list strides;
    for (int i = 0; i < a.at.axes; ++i) strides.append(a.at.strides[i]);
    return nb::tuple(strides);
}

}  // namespace
}  // namespace bn

NB_MODULE(_core, m) {
    using namespace bn;
    m.doc() = "The C++ core of batchnorm. Use batchnorm.kernels.cpu.";
    team::resolve();

    m.def("use", [](nb::handle table) { tensors::use(table.ptr()); }, "table"_a,
          "Take and make tensors by this type's `__dlpack_c_exchange_api__`.");
    m.def("call_on_skip", [](nb::object function) { Py_XDECREF(std::exchange(on_skip, function.release().ptr())); },
          "function"_a, "Call this with the running mean whenever a channel of a batch was skipped.");
    m.def("takes", &takes, "z"_a, "axis"_a, "gamma"_a.none(), "beta"_a.none(), "residual"_a.none(),
          "running_mean"_a.none(), "running_var"_a.none(),
          "Whether a forward takes these as they are, two values a channel at least.");
    m.def("packed_strides", &packed_strides, "z"_a, "axis"_a,
          "Strides of what lies beside z; None where z must be copied first.");
    m.def("forward", &call_forward, "z"_a, "axis"_a, "gamma"_a.none(), "beta"_a.none(), "eps"_a, "residual"_a.none(),
          "activation"_a, "tracking"_a.none(), "(y, mean, var, inv_std, saved), or None: declined.");
    m.def("statistics", &call_statistics, "z"_a, "axis"_a, "(count, mean, m2), or None: declined.");
    m.def("normalize", &call_normalize, "z"_a, "axis"_a, "mean"_a, "spread"_a, "eps"_a, "gamma"_a.none(),
          "beta"_a.none(), "residual"_a.none(), "activation"_a, "out"_a.none(),
          "y, or None: declined. `spread` is 1 / sqrt(var + eps), or var with an eps of 0 or more.");
    m.def("backward", &call_backward, "parts"_a, "dy"_a, "z"_a, "axis"_a, "mean"_a, "inv_std"_a, "gamma"_a.none(),
          "beta"_a.none(), "activation"_a, "saved"_a.none(), "sum_dy"_a.none(), "sum_dy_zhat"_a.none(), "count"_a,
          "with_residual"_a,
          "Sums (parts 1), input gradient (2) or both (3), a negative count for z's own: "
          "(dz, sum_dy, sum_dy_zhat, dresidual), or None: declined.");

    m.def("select_isa", [](const std::string &isa) { select_isa(isa.c_str()); }, "isa"_a, "Choose an instruction set; '': the best.");
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("available_isas", [] { return std::string(available_isas()); }, "Instruction sets that this machine runs.");
    m.def("pretend_cache", &pretend_cache, "per_core"_a, "last"_a,
          "For tests: sizes of caches in bytes; 0 and 0 for this machine's own.");
    m.def("compiler", [] { return std::string(BN_COMPILER); }, "What built this module.");
    m.def("runtime", [] { return std::string(team::runtime()); }, "Whose threads are used.");
    m.def("threads", &team::threads, "Threads that a call may use now.");
    m.def("pool_limit", &pool::set_limit, "bytes"_a, "Most bytes that may lie idle; 0 keeps none.");
    m.def("pool_patience", &pool::set_patience, "seconds"_a, "For tests: how long a block may lie idle, 60 s.");
    m.def("pool_trim", &pool::trim, "Give every idle block back to the system.");
    m.def("pool_statistics", [] {
        const pool::Statistics s = pool::statistics();
        nb::dict d;
        d["limit"] = s.limit;
        d["share"] = s.share;
        d["idle_bytes"] = s.idle_bytes;
        d["idle_blocks"] = s.idle_blocks;
        d["used_bytes"] = s.used_bytes;
        d["hits"] = s.hits;
        d["misses"] = s.misses;
        return d;
    }, "What the pool holds.");
}
