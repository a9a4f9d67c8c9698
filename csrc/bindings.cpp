// The boundary to Python. Tensors come as the framework's own objects and are looked at through DLPack (tensors.h);
// what the core does not take as it is, it declines with None, before anything is written: the caller then brings it
// into a form it takes, or asks another engine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <utility>

#include "calls.h"
#include "placement.h"
#include "memory_pool.h"
#include "problem.h"
#include "team.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bn {
namespace {

nb::object call_forward(nb::handle z, nb::handle norm_, int activation, nb::handle tracking, nb::handle mask) {
    const Norm norm(norm_);
    Arguments a(z, norm.axis());
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.keep = a.mask(mask);
        if (a.kept >= 0 && a.kept < 2) return nb::none();
        p.shape = a.at.shape;
        p.activation = static_cast<Activation>(activation);
        p.z = a.begin;
        p.gamma = a.values<A>(norm.gamma());
        p.beta = a.values<A>(norm.beta());
        p.residual = a.packed(norm.residual());
        p.eps = norm.eps();
        if (!tracking.is_none()) read(a, tracking, p.tracking);
        if (a.declined()) return nb::none();
        const nb::object y = a.output(p.y), mean = a.vector_of_channels(p.mean), var = a.vector_of_channels(p.var),
                         inv_std = a.vector_of_channels(p.inv_std), kept = saved(a, norm, p);
        bool skipped = false;
        p.skipped = &skipped;
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        if (skipped) nb::borrow(on_skip)(nb::object(tracking[0]));
        return nb::make_tuple(y, mean, var, inv_std, kept);
    });
}

nb::object call_statistics(nb::handle z, int axis, nb::handle mask, bool exact) {
    Arguments a(z, axis);
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.keep = a.mask(mask);
        if (a.declined()) return nb::none();
        p.shape = a.at.shape;
        nb::object mean, m2;
        if (exact) {
            mean = a.vector_of_channels(p.exact_mean), m2 = a.vector_of_channels(p.exact_m2);
            std::fill_n(p.exact_mean, p.shape.c, 0.0), std::fill_n(p.exact_m2, p.shape.c, 0.0);
            p.mean = a.own<A>(p.shape.c);
        } else {
            mean = a.vector_of_channels(p.mean), m2 = a.vector_of_channels(p.m2);
            std::fill_n(p.mean, p.shape.c, A{0}), std::fill_n(p.m2, p.shape.c, A{0});  // of no value
        }
        p.parts = statistics;
        p.z = a.begin;
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        return nb::make_tuple(a.kept < 0 ? a.at.values : a.kept, mean, m2);
    });
}

// `spread`: var, or 1 / sqrt(var + eps)
nb::object call_normalize(nb::handle z, nb::handle norm_, int activation, nb::handle mean, nb::handle spread, bool is_var,
                          nb::handle mask, nb::handle out, bool save) {
    const Norm norm(norm_);
    Arguments a(z, norm.axis());
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        ForwardProblem<A> p;
        p.keep = a.mask(mask);
        p.shape = a.at.shape;
        p.activation = static_cast<Activation>(activation);
        p.parts = normalization;
        p.z = a.begin;
        // normalization alone reads them
        p.mean = const_cast<A *>(a.values<A>(mean));
        p.inv_std = const_cast<A *>(is_var ? nullptr : a.values<A>(spread));
        const A *const var = is_var ? a.values<A>(spread) : nullptr;
        p.gamma = a.values<A>(norm.gamma());
        p.beta = a.values<A>(norm.beta());
        p.residual = a.packed(norm.residual());
        p.y = a.packed(out);
        if (a.declined()) return nb::none();
        if (is_var) {
            p.inv_std = a.own<A>(p.shape.c);
            table<A>(p.shape.dtype).inverse_deviations(var, norm.eps(), static_cast<size_t>(p.shape.c), p.inv_std);
        }
        const nb::object y = out.is_none() ? a.output(p.y) : nb::borrow(out);
        const nb::object kept = save ? saved(a, norm, p) : nb::none();
        p.threads = team::threads();
        without_lock(a.at, [&] { forward(p); });
        return nb::make_tuple(y, kept);
    });
}

nb::object call_backward(unsigned parts, nb::handle dy, nb::handle z, nb::handle norm_, int activation, nb::handle mean,
                         nb::handle inv_std, nb::handle saved, nb::handle sum_dy, nb::handle sum_dy_zhat,
                         nb::handle count, bool with_residual, nb::handle mask, bool exact) {
    const Norm norm(norm_);
    Arguments a(z, norm.axis());
    if (a.declined()) return nb::none();
    return with_accumulator(a.at.shape.dtype, [&](auto zero) -> nb::object {
        using A = decltype(zero);
        BackwardProblem<A> p;
        p.activation = static_cast<Activation>(activation);
        p.parts = parts;
        p.z = a.begin;
        p.dy = a.packed(dy);
        p.mean = a.values<A>(mean);
        p.inv_std = a.values<A>(inv_std);
        p.gamma = a.values<A>(norm.gamma());
        p.beta = a.values<A>(norm.beta());
        if (saved_for(p.activation) == Saved::bit_mask)
            p.saved = a.sides(saved);
        else if (saved_for(p.activation) == Saved::residual)
            p.saved = a.packed(saved);
        p.keep = a.mask(mask);
        p.shape = a.at.shape;
        const bool reduces = parts & reduction, maps = parts & input_gradient;
        nb::object first = nb::none(), second = nb::none();
        if (!reduces) {  // the input gradient alone reads them
            p.sum_dy = const_cast<A *>(a.values<A>(sum_dy));
            p.sum_dy_zhat = const_cast<A *>(a.values<A>(sum_dy_zhat));
        }
        if (a.declined()) return nb::none();
        if (reduces && exact) {
            first = a.vector_of_channels(p.exact_dy), second = a.vector_of_channels(p.exact_dy_zhat);
            std::fill_n(p.exact_dy, p.shape.c, 0.0), std::fill_n(p.exact_dy_zhat, p.shape.c, 0.0);
            p.sum_dy = a.own<A>(p.shape.c), p.sum_dy_zhat = a.own<A>(p.shape.c);
        } else if (reduces) {
            first = a.vector_of_channels(p.sum_dy), second = a.vector_of_channels(p.sum_dy_zhat);
        }
        nb::object dz = nb::none(), dresidual = nb::none();
        if (maps) {
            dz = a.output(p.dz);
            if (with_residual && p.activation == Activation::identity && !p.keep) {
                dresidual = nb::borrow(dy);
            } else if (with_residual) {
                dresidual = a.output(p.dresidual);
            }
        }
        p.count = count.is_none() ? static_cast<double>(a.kept < 0 ? a.at.values : a.kept) : nb::cast<double>(count);
        p.threads = team::threads();
        without_lock(a.at, [&] { backward(p); });
        return nb::make_tuple(dz, first, second, dresidual);
    });
}

// Whether these go through `forward` as they are: nothing about them needs an error, or a copy.
bool takes(nb::handle z, nb::handle norm_, nb::handle running_mean, nb::handle running_var) {
    const Norm norm(norm_);
    Arguments a(z, norm.axis());
    a.vector(norm.gamma());
    a.vector(norm.beta());
    a.vector(running_mean);
    a.vector(running_var);
    a.packed(norm.residual());
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
    m.attr("interface") = 3;
    team::resolve();

    m.def("use", [](nb::handle table) { tensors::use(table.ptr()); }, "table"_a,
          "Take and make tensors by this type's `__dlpack_c_exchange_api__`.");
    m.def("call_on_skip", [](nb::object function) { Py_XDECREF(std::exchange(on_skip, function.release().ptr())); },
          "function"_a, "Call this with the running mean whenever a channel of a batch was skipped.");
    m.def("takes", &takes, "z"_a, "norm"_a, "running_mean"_a.none(), "running_var"_a.none(),
          "Whether a forward takes these as they are, two values a channel at least.");
    m.def("packed_strides", &packed_strides, "z"_a, "axis"_a,
          "Strides of what lies beside z; None where z must be copied first.");
    m.def("forward", &call_forward, "z"_a, "norm"_a, "activation"_a, "tracking"_a.none(), "mask"_a.none(),
          "(y, mean, var, inv_std, saved), or None: declined, as a mask is that keeps fewer than two values.");
    m.def("statistics", &call_statistics, "z"_a, "axis"_a, "mask"_a.none(), "exact"_a,
          "(count, mean, m2), in float64 where they are to be exact, or None: declined.");
    m.def("normalize", &call_normalize, "z"_a, "norm"_a, "activation"_a, "mean"_a, "spread"_a, "is_var"_a, "mask"_a.none(),
          "out"_a.none(), "save"_a,
          "(y, saved), or None: declined. `spread` is var where `is_var`, else 1 / sqrt(var + eps).");
    m.def("backward", &call_backward, "parts"_a, "dy"_a, "z"_a, "norm"_a, "activation"_a, "mean"_a, "inv_std"_a,
          "saved"_a.none(), "sum_dy"_a.none(), "sum_dy_zhat"_a.none(), "count"_a.none(), "with_residual"_a,
          "mask"_a.none(), "exact"_a,
          "Sums (parts 1), input gradient (2) or both (3), count None for z's own: "
          "(dz, sum_dy, sum_dy_zhat, dresidual), or None: declined.");

    bind_at_once(m);

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
