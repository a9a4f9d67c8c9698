// The arguments of a call from Python, looked at one by one: what the core takes of them, and the tensors it makes beside.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "keep.h"
#include "kernels.h"
#include "placement.h"
#include "problem.h"
#include "tensors.h"

namespace bn {
namespace nb = nanobind;

// kernels/contract.py: Norm, a tuple
struct Norm {
    explicit Norm(nb::handle t) : items(t) {}
    nb::handle at(int i) const { return PyTuple_GET_ITEM(items.ptr(), i); }
    int axis() const { return nb::cast<int>(at(0)); }
    double eps() const { return nb::cast<double>(at(1)); }
    nb::handle gamma() const { return at(2); }
    nb::handle beta() const { return at(3); }
    nb::handle residual() const { return at(4); }

  private:
    nb::handle items;
};

// Takes the arguments of a call one by one; once one of them has been declined, the call is.
class Arguments {
  public:
    Arguments(nb::handle z, int axis_) : axis(axis_) {
        dlpack::Tensor t;
        good = tensors::look(z.ptr(), t) && place(t, axis, at);
        if (!good) return;
        begin = t.begin();
        accumulator = at.shape.dtype == DType::f64 ? dlpack::float64 : dlpack::float32;
    }

    bool declined() const { return !good; }

    // None, or a vector of length C in the accumulator's type, to be written to as well
    void *vector(nb::handle v) { return one(v, accumulator, at.shape.c); }
    int64_t *counts(nb::handle v, int64_t length) { return static_cast<int64_t *>(one(v, dlpack::int64, length)); }

    // two vectors of length C in one piece, as `pair_of_channels` gives them
    template <class A>
    void pair(nb::handle v, A *&first, A *&second) {
        dlpack::Tensor t;
        good = good && tensors::look(v.ptr(), t) && t.device.type == dlpack::cpu && t.type == accumulator && t.ndim == 2 &&
               t.shape[0] == 2 && t.shape[1] == at.shape.c && t.strides[0] == at.shape.c && (at.shape.c == 1 || t.strides[1] == 1);
        if (good) first = static_cast<A *>(t.begin()), second = first + at.shape.c;
    }

    // None, or a vector of length C of any floating type, as accumulators
    template <class A>
    const A *values(nb::handle v) {
        dlpack::Tensor t;
        if (v.is_none() || !good || !vector_of(v, at.shape.c, t)) return nullptr;
        if (t.type == accumulator && (t.ndim == 0 || t.shape[0] == 1 || t.strides[0] == 1)) return static_cast<A *>(t.begin());
        DType type;
        if (!known(t.type, type)) return good = false, nullptr;
        const int64_t step = t.ndim ? t.strides[0] * static_cast<int64_t>(element_size(type)) : 0;
        const size_t c = static_cast<size_t>(at.shape.c);
        if (sizeof(A) == (type == DType::f64 ? 8 : 4)) {
            A *const out = own<A>(at.shape.c);
            table<A>(type).gather(t.begin(), step, c, out);
            return out;
        }
        using Other = std::conditional_t<sizeof(A) == 8, float, double>;
        const Array<Other> given = array<Other>(at.shape.c);
        table<Other>(type).gather(t.begin(), step, c, given.get());
        A *const out = own<A>(at.shape.c);
        for (size_t i = 0; i < c; ++i) out[i] = static_cast<A>(given[i]);
        return out;
    }

    // a vector of length C that lives as long as the call
    template <class A>
    A *own(int64_t length) {
        owned.push_back(array<double>(length));
        return reinterpret_cast<A *>(owned.back().get());
    }

    // None, or a tensor that lies like the output
    void *packed(nb::handle v) {
        if (v.is_none() || !good) return nullptr;
        dlpack::Tensor t;
        return (good = tensors::look(v.ptr(), t) && at.packed(t)) ? t.begin() : nullptr;
    }

    // None, or the sides of the kink; their form decides how z is read
    void *sides(nb::handle v) {
        if (v.is_none() || !good) return nullptr;
        dlpack::Tensor t;
        good = tensors::look(v.ptr(), t) && t.device.type == dlpack::cpu && t.type == dlpack::uint8 && (t.ndim == 2 || t.ndim == 3);
        if (!good) return nullptr;
        int64_t step = 1;
        for (int a = t.ndim; a-- > 0; step *= t.shape[a]) good &= t.shape[a] == 1 || t.strides[a] == step;
        Sides given(t.ndim, {});
        std::copy(t.shape, t.shape + t.ndim, given.sizes);
        good = form_is_given = good && read_as(at.shape, given);
        return good ? t.begin() : nullptr;
    }

    // None, or a mask; nullptr where it keeps everything, which is as if there were none. After `sides`.
    const Keep *mask(nb::handle v) {
        if (v.is_none() || !good) return nullptr;
        dlpack::Tensor t;
        const uint8_t *bytes = nullptr;
        good = tensors::look(v.ptr(), t) && positions(t, axis, at, mask_values, bytes);
        if (!good || at.count == 0) return nullptr;
        kept = 0;
        for (int64_t i = 0; i < at.values; ++i) kept += bytes[i];
        if (kept == at.values) return nullptr;
        // rows that are kept or not are better not side by side, but where they are short
        if (at.shape.form == Form::side_by_side && (at.shape.c >= 32 || at.shape.c % 16 == 0) && !form_is_given) at.shape.form = Form::columns;
        keep = std::make_unique<Keep>(at.shape, bytes, kept);
        return keep.get();
    }

    template <class T>
    nb::object output(T *&memory) const {
        return make(type_of(at.shape.dtype), at.axes, at.sizes, at.strides, memory);
    }
    template <class T>
    nb::object vector_of_channels(T *&memory) const {
        const int64_t step = 1;
        return make(sizeof(T) == 8 ? dlpack::float64 : dlpack::float32, 1, &at.shape.c, &step, memory);
    }
    template <class T>
    nb::object pair_of_channels(T *&first, T *&second) const {
        const int64_t sizes[] = {2, at.shape.c}, steps[] = {at.shape.c, 1};
        nb::object made = make(sizeof(T) == 8 ? dlpack::float64 : dlpack::float32, 2, sizes, steps, first);
        second = first + at.shape.c;
        return made;
    }
    nb::object sides(uint8_t *&memory) const {
        const Sides s(at.shape);
        const int64_t steps[] = {s.bytes() / std::max<int64_t>(1, s.sizes[0]), s.axes == 3 ? s.sizes[2] : 1, 1};
        return make(dlpack::uint8, s.axes, s.sizes, steps, memory);
    }

    Placement at;
    void *begin = nullptr;
    int64_t kept = -1;  // values of a channel that a mask keeps; negative: there is none

  private:
    template <class T>
    static nb::object make(dlpack::Type type, int axes, const int64_t *sizes, const int64_t *strides, T *&memory) {
        void *where = nullptr;
        nb::object made = nb::steal<nb::object>(tensors::make(type, axes, sizes, strides, &where));
        memory = static_cast<T *>(where);
        return made;
    }
    bool vector_of(nb::handle v, int64_t length, dlpack::Tensor &t) {
        return good = tensors::look(v.ptr(), t) && t.device.type == dlpack::cpu &&
                      (t.ndim == 1 ? t.shape[0] == length : t.ndim == 0 && length == 1);
    }
    void *one(nb::handle v, dlpack::Type type, int64_t length) {
        dlpack::Tensor t;
        if (v.is_none() || !good || !vector_of(v, length, t)) return nullptr;
        good = t.type == type && (t.ndim == 0 || length == 1 || t.strides[0] == 1);
        return good ? t.begin() : nullptr;
    }

    int axis;
    dlpack::Type accumulator{};
    bool good = true, form_is_given = false;
    std::vector<Array<double>> owned;
    std::vector<uint8_t> mask_values;
    std::unique_ptr<Keep> keep;
};

}  // namespace bn
