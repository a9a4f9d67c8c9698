// Activations as functors on packs: value, and gradient dy * activation'(u). The piecewise linear ones can also
// say on which side of the kink u lies, one bit a value, and give the gradient from that bit. NaN passes through.
// Per instruction set, like simd/pack.h.
#pragma once
#include "functions.h"

namespace bn::BN_ISA {

template <class Act>
struct Saves {
    using WithSaved = Act;  // what a backward that is given the residual or the sides computes
    static constexpr bool needs_saved = true;
};

struct Smooth {
    static constexpr bool has_side = false;
    static constexpr bool heavy = true;  // arithmetic enough that loops around it need no care
};

struct Identity {
    using WithSaved = Identity;
    static constexpr bool has_side = false, heavy = false, needs_saved = false;
    template <class P>
    static BN_INLINE P value(P u) {
        return u;
    }
    template <class P>
    static BN_INLINE P gradient(P, P dy) {
        return dy;
    }
};

struct Relu : Saves<Relu> {
    static constexpr bool has_side = true, heavy = false;
    template <class A>
    static BN_INLINE Pack<A> value(Pack<A> u) {
        return max(set1<A>(0), u);
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        return without(le(u, set1<A>(0)), dy);
    }
    template <class Order, class A>
    static BN_INLINE unsigned side(Pack<A> u) {
        return ~Order::bits(le(u, set1<A>(0))) & 0xffffu;
    }
    template <class Order, class A>
    static BN_INLINE Pack<A> from_side(unsigned b, Pack<A> dy) {
        return only(Order::mask(b), dy);
    }
};

struct Relu6 : Relu {
    template <class A>
    static BN_INLINE Pack<A> value(Pack<A> u) {
        return min(set1<A>(6), Relu::value(u));
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        return without(le(set1<A>(6), u), Relu::gradient(u, dy));
    }
    template <class Order, class A>
    static BN_INLINE unsigned side(Pack<A> u) {
        return Relu::side<Order>(u) & ~Order::bits(le(set1<A>(6), u));
    }
};

struct LeakyRelu : Saves<LeakyRelu> {
    static constexpr bool has_side = true, heavy = false;
    static constexpr double slope = 0.01;
    template <class A>
    static BN_INLINE Pack<A> value(Pack<A> u) {
        return select(lt(set1<A>(0), u), u, u * set1<A>(static_cast<A>(slope)));
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        return value_from(lt(set1<A>(0), u), dy);
    }
    template <class Order, class A>
    static BN_INLINE unsigned side(Pack<A> u) {
        return Order::bits(lt(set1<A>(0), u));
    }
    template <class Order, class A>
    static BN_INLINE Pack<A> from_side(unsigned b, Pack<A> dy) {
        return value_from(Order::mask(b), dy);
    }

  private:
    template <class A>
    static BN_INLINE Pack<A> value_from(Mask<A> positive, Pack<A> dy) {
        return select(positive, dy, dy * set1<A>(static_cast<A>(slope)));
    }
};

struct Silu : Smooth, Saves<Silu> {
    template <class P>
    static BN_INLINE P value(P u) {
        return u * sigmoid(u);
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        const Pack<A> s = sigmoid(u);
        return dy * s * fma(u, set1<A>(1) - s, set1<A>(1));
    }
};

struct Hardswish : Smooth, Saves<Hardswish> {
    template <class A>
    static BN_INLINE Pack<A> value(Pack<A> u) {
        return u * Relu6::value(u + set1<A>(3)) * set1<A>(static_cast<A>(1.0 / 6));
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        const Pack<A> inside = dy * fma(u, set1<A>(static_cast<A>(1.0 / 3)), set1<A>(static_cast<A>(0.5)));
        const Pack<A> right = select(lt(u, set1<A>(3)), inside, dy);
        return without(le(u, set1<A>(-3)), right);
    }
};

struct Sigmoid : Smooth, Saves<Sigmoid> {
    template <class P>
    static BN_INLINE P value(P u) {
        return sigmoid(u);
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        const Pack<A> s = sigmoid(u);
        return dy * s * (set1<A>(1) - s);
    }
};

struct Tanh : Smooth, Saves<Tanh> {
    template <class P>
    static BN_INLINE P value(P u) {
        return tanh(u);
    }
    template <class A>
    static BN_INLINE Pack<A> gradient(Pack<A> u, Pack<A> dy) {
        const Pack<A> t = tanh(u);
        return dy * (set1<A>(1) - t * t);
    }
};

struct Gelu : Smooth, Saves<Gelu> {
    template <class P>
    static BN_INLINE P value(P u) {
        P cdf, pdf;
        normal(u, cdf, pdf);
        return u * cdf;
    }
    template <class P>
    static BN_INLINE P gradient(P u, P dy) {
        P cdf, pdf;
        normal(u, cdf, pdf);
        return dy * fma(u, pdf, cdf);
    }
};

}  // namespace bn::BN_ISA
