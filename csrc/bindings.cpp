// The boundary to Python: raw addresses and sizes in, nothing of torch. Tensors enter as numbers; large outputs leave
// as DLPack capsules over memory of the pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>

#include "dlpack_tensor.h"
#include "pool.h"
#include "problem.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bn {
namespace {

template <class T>
T *at(uint64_t address) {
    return reinterpret_cast<T *>(static_cast<uintptr_t>(address));
}

Shape shape_of(int dtype, int layout, int64_t n, int64_t c, int64_t s, int64_t z_sn, int64_t z_sc) {
    return {static_cast<DType>(dtype), static_cast<Layout>(layout), n, c, s, z_sn, z_sc};
}

// a short call would spend longer on handing the interpreter's lock over than on its work
template <class F>
void without_lock(const Shape &x, F &&work) {
    if (x.n * x.c * x.s < 65536) {
        work();
    } else {
        nb::gil_scoped_release release;
        work();
    }
}

template <class A>
void run_forward(const Shape &x, int activation, unsigned parts, uint64_t z, uint64_t residual, uint64_t y, uint64_t mask,
                 uint64_t gamma, uint64_t beta, uint64_t mean, uint64_t var, uint64_t inv_std, uint64_t m2, double eps,
                 const uint64_t (&running)[5], double momentum, int correction, bool skip_nonfinite) {
    ForwardProblem<A> p;
    p.shape = x;
    p.activation = static_cast<Activation>(activation);
    p.parts = parts;
    p.z = at<void>(z);
    p.residual = at<void>(residual);
    p.y = at<void>(y);
    p.mask = at<uint8_t>(mask);
    p.gamma = at<A>(gamma);
    p.beta = at<A>(beta);
    p.mean = at<A>(mean);
    p.var = at<A>(var);
    p.inv_std = at<A>(inv_std);
    p.m2 = at<A>(m2);
    p.eps = eps;
    p.tracking.running_mean = at<A>(running[0]);
    p.tracking.running_var = at<A>(running[1]);
    p.tracking.num_batches_tracked = at<int64_t>(running[2]);
    p.tracking.num_batches_skipped = at<int64_t>(running[3]);
    p.tracking.skipped_channels = at<int64_t>(running[4]);
    p.tracking.average = std::isnan(momentum);
    p.tracking.momentum = momentum;
    p.tracking.correction = correction;
    p.tracking.skip_nonfinite = skip_nonfinite;
    p.threads = team::threads();
    without_lock(x, [&] { forward(p); });
}

template <class A>
void run_backward(const Shape &x, int activation, unsigned parts, uint64_t dy, uint64_t z, uint64_t saved, uint64_t dz,
                  uint64_t dresidual, uint64_t gamma, uint64_t beta, uint64_t mean, uint64_t inv_std, uint64_t sum_dy,
                  uint64_t sum_dy_zhat, double count) {
    BackwardProblem<A> p;
    p.shape = x;
    p.activation = static_cast<Activation>(activation);
    p.parts = parts;
    p.dy = at<void>(dy);
    p.z = at<void>(z);
    p.saved = at<void>(saved);
    p.dz = at<void>(dz);
    p.dresidual = at<void>(dresidual);
    p.gamma = at<A>(gamma);
    p.beta = at<A>(beta);
    p.mean = at<A>(mean);
    p.inv_std = at<A>(inv_std);
    p.sum_dy = at<A>(sum_dy);
    p.sum_dy_zhat = at<A>(sum_dy_zhat);
    p.count = count;
    p.threads = team::threads();
    without_lock(x, [&] { backward(p); });
}

}  // namespace
}  // namespace bn

NB_MODULE(_core, m) {
    using namespace bn;
    m.doc() = "The C++ core of batchnorm: kernels over raw addresses. Use batchnorm.kernels.cpu.";
    team::resolve();

    m.def(
        "forward",
        [](int dtype, int layout, int64_t n, int64_t c, int64_t s, int64_t z_sn, int64_t z_sc, int activation,
           unsigned parts, uint64_t z, uint64_t residual, uint64_t y, uint64_t mask, uint64_t gamma, uint64_t beta,
           uint64_t mean, uint64_t var, uint64_t inv_std, uint64_t m2, double eps, uint64_t running_mean,
           uint64_t running_var, uint64_t num_batches_tracked, uint64_t num_batches_skipped, uint64_t skipped_channels,
           double momentum, int correction, bool skip_nonfinite) {
            const Shape x = shape_of(dtype, layout, n, c, s, z_sn, z_sc);
            const uint64_t running[5] = {running_mean, running_var, num_batches_tracked, num_batches_skipped,
                                         skipped_channels};
            const auto run = x.dtype == DType::f64 ? run_forward<double> : run_forward<float>;
            run(x, activation, parts, z, residual, y, mask, gamma, beta, mean, var, inv_std, m2, eps, running, momentum,
                correction, skip_nonfinite);
        },
        "dtype"_a, "layout"_a, "n"_a, "c"_a, "s"_a, "z_sn"_a, "z_sc"_a, "activation"_a, "parts"_a, "z"_a, "residual"_a,
        "y"_a, "mask"_a, "gamma"_a, "beta"_a, "mean"_a, "var"_a, "inv_std"_a, "m2"_a, "eps"_a, "running_mean"_a,
        "running_var"_a, "num_batches_tracked"_a, "num_batches_skipped"_a, "skipped_channels"_a, "momentum"_a,
        "correction"_a, "skip_nonfinite"_a, "Statistics (parts 1), normalization (2) or both (3); addresses, 0 for none.");

    m.def(
        "backward",
        [](int dtype, int layout, int64_t n, int64_t c, int64_t s, int64_t z_sn, int64_t z_sc, int activation,
           unsigned parts, uint64_t dy, uint64_t z, uint64_t saved, uint64_t dz, uint64_t dresidual, uint64_t gamma,
           uint64_t beta, uint64_t mean, uint64_t inv_std, uint64_t sum_dy, uint64_t sum_dy_zhat, double count) {
            const Shape x = shape_of(dtype, layout, n, c, s, z_sn, z_sc);
            const auto run = x.dtype == DType::f64 ? run_backward<double> : run_backward<float>;
            run(x, activation, parts, dy, z, saved, dz, dresidual, gamma, beta, mean, inv_std, sum_dy, sum_dy_zhat, count);
        },
        "dtype"_a, "layout"_a, "n"_a, "c"_a, "s"_a, "z_sn"_a, "z_sc"_a, "activation"_a, "parts"_a, "dy"_a, "z"_a,
        "saved"_a, "dz"_a, "dresidual"_a, "gamma"_a, "beta"_a, "mean"_a, "inv_std"_a, "sum_dy"_a, "sum_dy_zhat"_a,
        "count"_a, "Sums (parts 1), input gradient (2) or both (3); addresses, 0 for none.");

    m.def(
        "mask_bytes",
        [](int dtype, int layout, int64_t n, int64_t c, int64_t s, int64_t z_sn, int64_t z_sc) {
            return mask_bytes(shape_of(dtype, layout, n, c, s, z_sn, z_sc));
        },
        "dtype"_a, "layout"_a, "n"_a, "c"_a, "s"_a, "z_sn"_a, "z_sc"_a, "Bytes of the bit mask of a residual forward.");

    m.def(
        "allocate",
        [](int dtype, nb::tuple shape, nb::tuple strides) {
            return nb::steal<nb::object>(dlpack::pooled(static_cast<DType>(dtype), shape.ptr(), strides.ptr()));
        },
        "dtype"_a, "shape"_a, "strides"_a, "A DLPack capsule over memory of the pool.");

    m.def("select_isa", [](const std::string &isa) { select_isa(isa.c_str()); }, "isa"_a, "Choose an instruction set; '': the best.");
    m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
    m.def("available_isas", [] { return std::string(available_isas()); }, "Instruction sets that this machine runs.");
    m.def("compiler", [] { return std::string(BN_COMPILER); }, "What built this module.");
    m.def("runtime", [] { return std::string(team::runtime()); }, "Whose threads are used.");
    m.def("threads", &team::threads, "Threads that a call may use now.");
    m.def("pool_limit", &pool::set_limit, "bytes"_a, "Most bytes that may lie idle; 0 keeps none.");
    m.def("pool_trim", &pool::trim, "Give every idle block back to the system.");
    m.def("pool_statistics", [] {
        const pool::Statistics s = pool::statistics();
        nb::dict d;
        d["limit"] = s.limit;
        d["idle_bytes"] = s.idle_bytes;
        d["idle_blocks"] = s.idle_blocks;
        d["used_bytes"] = s.used_bytes;
        d["hits"] = s.hits;
        d["misses"] = s.misses;
        return d;
    }, "What the pool holds.");
}
