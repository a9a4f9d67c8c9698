// The innermost loops, as a table of functions: one table per element type, one set of tables per instruction set.
// Everything above (blocking, threads, merging) is compiled once and knows no instruction set.
#pragma once
#include "dtypes.h"

namespace bn {

// One coefficient a row of a block (plane kernels), or one a column (column kernels).
// A is the accumulator type: float, or double for float64.
template <class A>
struct ForwardCoefficients {
    const A *mean, *scale, *shift;  // u = (z - mean) * scale + shift
};

template <class A>
struct BackwardCoefficients {
    const A *mean, *scale, *shift;  // as in the forward: the pre-activation is recomputed bit for bit
    const A *inv_std;               // z_hat = (z - mean) * inv_std
    const A *k0, *k1;               // dz = scale * (g + k0 + (z - mean) * k1)
};

struct Sums {
    double a = 0, b = 0;  // of the moments: sum (z - center), sum (z - center)^2; of the gradients: sum g, sum g * z_hat
};

constexpr int64_t channels_at_once = 64;

// where the moments of some channels go; nullptr: not wanted
template <class A>
struct ChannelMoments {
    double *exact_mean, *exact_m2;  // always
    A *mean, *var, *inv_std;        // mean always
};

// Rows of `len` elements. To a plane kernel a row is (a piece of) a channel's plane, and the next row the next
// channel's; to a column kernel it is a row of z. z has strides of its own; every other tensor is packed alike.
struct Block {
    const void *z = nullptr, *dy = nullptr;
    const void *saved = nullptr;  // the residual; in the backward of a piecewise linear activation its bit mask
    void *out = nullptr, *out_residual = nullptr;
    uint8_t *mask = nullptr;                          // written by the forward
    ptrdiff_t z_step = 0, step = 0, mask_step = 0;    // bytes from row to row: of z, of packed tensors, of bit masks
    size_t rows = 0, len = 0;
    bool stream = false;  // stores go past the caches: `out` and `step` are multiples of a vector
    const uint8_t *kept = nullptr;  // what a mask keeps of a row's elements, bits; the others are no part of a sum, and 0 in an output
    ptrdiff_t kept_step = 0;        // bytes from row to row: 0 where it is the same for all
    const uint8_t *lines = nullptr; // the same of whole rows to a column kernel, a byte each: 0, or 1 where it is kept
    const int8_t *lanes = nullptr;  // run kernels: which of 16 / gcd(len, 16) rows each element of so many rows is in
};

template <class A>
struct Kernels {
    using Apply = void (*)(const Block &, const ForwardCoefficients<A> &);
    // adds to two packs of lanes a row
    using PlaneReduce = void (*)(const Block &, const BackwardCoefficients<A> &, A *lanes);
    using ColumnReduce = void (*)(const Block &, const BackwardCoefficients<A> &, double *sum_dy, double *sum_dy_zhat);
    using Input = void (*)(const Block &, const BackwardCoefficients<A> &);

    // moments about `center` (one a row, one a column), added to lanes and to sums
    void (*plane_moments)(const Block &, const A *center, A *lanes);
    void (*column_moments)(const Block &, const A *center, double *sum, double *square);
    // the same of one row in double, for squares that leave the range of A
    Sums (*wide_moments)(const void *z, size_t len, double center, const uint8_t *kept);
    Sums (*lane_sums)(const A *lanes);
    Apply plane_apply[activation_count][2];           // [activation][with residual]
    Apply column_apply[activation_count][2];
    PlaneReduce plane_reduce[activation_count][2];    // [activation][with saved]
    ColumnReduce column_reduce[activation_count][2];
    Input plane_input[activation_count][2];
    Input column_input[activation_count][2];
    // plane kernels for short rows one behind the other, in vectors that know nothing of where a row begins; nullptr
    // where this instruction set, or this type, has nothing to gain
    Apply run_apply[activation_count][2];
    Input run_input[activation_count][2];
    // copies with stores that go past the caches on whole aligned lines; call fence() before another thread reads
    void (*stream)(void *to, const void *from, size_t bytes);
    void (*fence)();
    // once a channel, for some of them (moments and move: up to channels_at_once)
    void (*inverse_deviations)(const A *var, double eps, size_t count, A *out);
    void (*channel_moments)(const Sums *, const A *center, size_t count, double m, double eps, const ChannelMoments<A> &);
    bool (*move)(const A *mean, const double *m2, size_t count, double divisor, double weight, bool only_finite,
                 A *running_mean, A *running_var);
    void (*input_constants)(const Sums *, const A *inv_std, size_t count, double m, A *k0, A *k1);
    // `count` values, `step` bytes apart, as accumulators
    void (*gather)(const void *z, ptrdiff_t step, size_t count, A *out);
};

constexpr int64_t lane_count = 16;
constexpr int64_t longest_of_run = 256;  // elements of a row in a run

struct KernelSet {
    const char *isa;
    Kernels<float> f32, bf16, f16;
    Kernels<double> f64;
};

const KernelSet &kernels();              // the set chosen when the module was loaded
const KernelSet *kernels_for(const char *isa);  // nullptr: not built, or this processor cannot run it
const char *available_isas();            // space separated, best last
void select_isa(const char *isa);        // nullptr or "": the best; throws std::runtime_error on an unknown one

}  // namespace bn
