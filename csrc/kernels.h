// The innermost loops, as a table of functions: one table per element type, one set of tables per instruction set.
// Everything above (blocking, threads, merging) is compiled once and knows no instruction set.
#pragma once
#include "dtypes.h"

namespace bn {

// Coefficients of a channel (plane kernels: pointers to one value) or of every column (column kernels: arrays).
// A is the accumulator type: float, or double for float64.
template <class A>
struct ForwardCoefficients {
    const A *mean, *scale, *shift;  // u = (z - mean) * scale + shift
};

template <class A>
struct BackwardCoefficients {
    const A *mean, *scale, *shift;  // as in the forward: the pre-activation is recomputed bit for bit
    const A *inv_std;               // z_hat = (z - mean) * inv_std
    const A *k0, *k1;               // dz = scale * (g + k0 + z_hat * k1)
};

struct Moments {
    double center;  // any value close to the data
    double sum;     // sum of (z - center)
    double square;  // sum of (z - center)^2
};

struct Sums {
    double dy;       // sum of g, g = dy * activation'(u)
    double dy_zhat;  // sum of g * z_hat
};

// Where a block of `planes` pieces of `len` elements lies; `saved` is a bit mask or the residual.
struct PlaneBlock {
    const void *dy, *z, *saved;
    ptrdiff_t dy_stride, z_stride, saved_stride;  // bytes from plane to plane
    size_t planes, len;
};

struct ColumnBlock {
    const void *dy, *z, *saved;
    ptrdiff_t dy_stride, z_stride, saved_stride;  // bytes from row to row
    size_t rows, cols;
};

template <class A>
struct Kernels {
    using Apply = void (*)(void *y, const void *z, const void *residual, uint8_t *mask, size_t len,
                           const ForwardCoefficients<A> &);
    using PlaneReduce = Sums (*)(const PlaneBlock &, const BackwardCoefficients<A> &);
    using ColumnReduce = void (*)(const ColumnBlock &, const BackwardCoefficients<A> &, double *sum_dy,
                                  double *sum_dy_zhat);
    using Input = void (*)(void *dz, void *dresidual, const void *dy, const void *z, const void *saved, size_t len,
                           const BackwardCoefficients<A> &);

    Moments (*plane_moments)(const void *z, ptrdiff_t stride, size_t planes, size_t len);
    // adds the moments of the rows, about `center`, to sum and square
    void (*column_moments)(const void *z, ptrdiff_t stride, size_t rows, size_t cols, const A *center, double *sum,
                           double *square);
    Apply plane_apply[activation_count][2];           // [activation][with residual]
    Apply column_apply[activation_count][2];
    PlaneReduce plane_reduce[activation_count][2];    // [activation][with saved]
    ColumnReduce column_reduce[activation_count][2];
    Input plane_input[activation_count][2];
    Input column_input[activation_count][2];
    // copies with stores that go past the caches on whole aligned lines; call fence() before another thread reads
    void (*stream)(void *to, const void *from, size_t bytes);
    void (*fence)();
    // first value of z, for the center of a channel
    double (*first)(const void *z);
    void (*firsts)(const void *z, size_t cols, A *out);
};

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
