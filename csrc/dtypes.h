// Element types and activations, as numbers that cross the boundary to Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bn {

using f32 = float;
using f64 = double;
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

enum class Activation : int {
    identity = 0,
    relu,
    relu6,
    leaky_relu,
    silu,
    hardswish,
    sigmoid,
    tanh,
    gelu,
    count
};

constexpr int activation_count = static_cast<int>(Activation::count);

constexpr size_t element_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// With a residual the pre-activation cannot be recomputed from z alone, so the backward is given one of these.
enum class Saved : int { none = 0, bit_mask, residual };

constexpr bool piecewise_linear(Activation a) {
    return a == Activation::relu || a == Activation::relu6 || a == Activation::leaky_relu;
}

constexpr Saved saved_for(Activation a) {
    return a == Activation::identity ? Saved::none : piecewise_linear(a) ? Saved::bit_mask : Saved::residual;
}

}  // namespace bn
