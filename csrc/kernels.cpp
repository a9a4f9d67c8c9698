// Compiled once per instruction set and element type, with BN_ISA naming the namespace and BN_DTYPE the type. Nothing
// from the C++ library that could be emitted out of line may be used here: the linker would keep one copy for every
// instruction set.
#include "kernels.h"
#include "activations.h"
#include "elements.h"

#include "loops_forward.h"
#include "loops_moments.h"
#include "loops_backward.h"
#include "loops_channels.h"
#include "loops_runs.h"

namespace bn::BN_ISA {

// Where a backward is given what was saved, relu and relu6 differ no more, for the sides were, and the identity has no use
// for it: one function serves.
template <class T, class Act>
void fill_activation(Kernels<typename Element<T>::Acc> &k, Activation which) {
    using Given = typename Act::WithSaved;
    constexpr bool saved = Act::needs_saved;
    const int a = static_cast<int>(which);
    k.plane_apply[a][0] = apply<T, Act, false, false>;
    k.plane_apply[a][1] = apply<T, Act, false, true>;
    k.column_apply[a][0] = apply<T, Act, true, false>;
    k.column_apply[a][1] = apply<T, Act, true, true>;
    k.plane_reduce[a][0] = plane_reduce<T, Act, false>;
    k.plane_reduce[a][1] = plane_reduce<T, Given, saved>;
    k.column_reduce[a][0] = column_reduce<T, Act, false>;
    k.column_reduce[a][1] = column_reduce<T, Given, saved>;
    k.plane_input[a][0] = input<T, Act, false, false>;
    k.plane_input[a][1] = input<T, Given, false, saved>;
    k.column_input[a][0] = input<T, Act, true, false>;
    k.column_input[a][1] = input<T, Given, true, saved>;
    k.run_apply[a][0] = k.run_apply[a][1] = nullptr;
    k.run_input[a][0] = k.run_input[a][1] = nullptr;
#if defined(BN_PERMUTES)
    if constexpr (sizeof(typename Element<T>::Acc) == 4) {
        k.run_apply[a][0] = run_apply<T, Act, false>;
        k.run_apply[a][1] = run_apply<T, Act, true>;
        k.run_input[a][0] = run_input<T, Act, false>;
        k.run_input[a][1] = run_input<T, Given, saved>;
    }
#endif
}

template <class T>
void fill(Kernels<typename Element<T>::Acc> &k) {
    using A = typename Element<T>::Acc;
    k.plane_moments = plane_moments<T>;
    k.column_moments = column_moments<T>;
    k.wide_moments = wide_moments<T>;
    k.lane_sums = lane_sums<typename Element<T>::Acc>;
    k.stream = stream_bytes;
    k.fence = fence;
    k.gather = gather<T>;
    k.inverse_deviations = inverse_deviations<A>;
    k.channel_moments = channel_moments<A>;
    k.move = move<A>;
    k.input_constants = input_constants<A>;
    fill_activation<T, Identity>(k, Activation::identity);
    fill_activation<T, Relu>(k, Activation::relu);
    fill_activation<T, Relu6>(k, Activation::relu6);
    fill_activation<T, LeakyRelu>(k, Activation::leaky_relu);
    fill_activation<T, Silu>(k, Activation::silu);
    fill_activation<T, Hardswish>(k, Activation::hardswish);
    fill_activation<T, Sigmoid>(k, Activation::sigmoid);
    fill_activation<T, Tanh>(k, Activation::tanh);
    fill_activation<T, Gelu>(k, Activation::gelu);
}

#define BN_JOIN_(a, b) a##b
#define BN_JOIN(a, b) BN_JOIN_(a, b)

void BN_JOIN(fill_, BN_DTYPE)(KernelSet &set) { fill<BN_DTYPE>(set.BN_DTYPE); }

}  // namespace bn::BN_ISA
