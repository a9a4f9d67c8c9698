#include "placement.h"

#include <cstring>

namespace bn {
namespace {

struct Run {
    bool single;  // several axes are one
    int64_t length, step;
};

// axes of length 1 have no say
Run collapse(const dlpack::Tensor &t, int begin, int end, int but = -1) {
    Run run{true, 1, 1};
    for (int a = end; a-- > begin;) {
        if (a == but || t.shape[a] == 1) continue;
        if (run.length == 1)
            run.length = t.shape[a], run.step = t.strides[a];
        else if (t.strides[a] == run.length * run.step)
            run.length *= t.shape[a];
        else
            run.single = false;
    }
    return run;
}

bool has_strides(const dlpack::Tensor &t, const int64_t *strides) {
    for (int a = 0; a < t.ndim; ++a)
        if (t.shape[a] != 1 && t.strides[a] != strides[a]) return false;
    return true;
}

// strides of a packed tensor; `last`: the axis that is innermost, -1 for the order of the axes
void pack(const dlpack::Tensor &t, int last, int64_t *strides) {
    int64_t step = 1;
    const auto next = [&](int a) {
        strides[a] = step;
        step *= std::max<int64_t>(t.shape[a], 1);
    };
    if (last >= 0) next(last);
    for (int a = t.ndim; a-- > 0;)
        if (a != last) next(a);
}

}  // namespace

bool known(dlpack::Type type, DType &out) {
    using namespace dlpack;
    if (type == float32) return out = DType::f32, true;
    if (type == bfloat16) return out = DType::bf16, true;
    if (type == float16) return out = DType::f16, true;
    if (type == float64) return out = DType::f64, true;
    return false;
}

dlpack::Type type_of(DType type) {
    return type == DType::f32    ? dlpack::float32
           : type == DType::f64  ? dlpack::float64
           : type == DType::bf16 ? dlpack::bfloat16
                                 : dlpack::float16;
}

bool Placement::packed(const dlpack::Tensor &t) const {
    if (t.device.type != dlpack::cpu || t.ndim != axes || !(t.type == type_of(shape.dtype))) return false;
    for (int a = 0; a < axes; ++a)
        if (t.shape[a] != sizes[a]) return false;
    return has_strides(t, strides);
}

bool positions(const dlpack::Tensor &mask, int axis, const Placement &at, std::vector<uint8_t> &own, const uint8_t *&out) {
    if (mask.device.type != dlpack::cpu || mask.ndim != at.axes || !(mask.type == dlpack::boolean)) return false;
    int64_t sizes[most_axes], steps[most_axes], number = 1;
    int axes = 0;
    for (int a = 0; a < at.axes; ++a) {
        if (mask.shape[a] != 1 && (a == axis || mask.shape[a] != at.sizes[a])) return false;
        if (a == axis) continue;
        sizes[axes] = at.sizes[a];
        steps[axes++] = mask.shape[a] == 1 ? 0 : mask.strides[a];
        number *= at.sizes[a];
    }
    const uint8_t *from = static_cast<const uint8_t *>(mask.begin());
    int64_t packed = 1;
    bool ready = true;
    for (int a = axes; a-- > 0; packed *= sizes[a]) ready &= sizes[a] == 1 || steps[a] == packed;
    out = from;
    if (ready || !number) return true;
    own.resize(static_cast<size_t>(number));
    const int last = axes - 1;
    int64_t at_axis[most_axes] = {};
    for (uint8_t *to = own.data(), *const end = to + number; to < end; to += sizes[last]) {
        if (steps[last] == 0)
            memset(to, *from, static_cast<size_t>(sizes[last]));
        else
            for (int64_t i = 0; i < sizes[last]; ++i) to[i] = from[i * steps[last]];
        for (int a = last; a-- > 0;) {
            from += steps[a];
            if (++at_axis[a] < sizes[a]) break;
            from -= at_axis[a] * steps[a];
            at_axis[a] = 0;
        }
    }
    out = own.data();
    return true;
}

bool place(const dlpack::Tensor &z, int axis, Placement &out) {
    if (z.device.type != dlpack::cpu || z.ndim < 2 || z.ndim > most_axes || axis < 0 || axis >= z.ndim) return false;
    Shape &x = out.shape;
    if (!known(z.type, x.dtype)) return false;
    out.axes = z.ndim;
    out.count = 1;
    for (int a = 0; a < z.ndim; ++a) out.count *= out.sizes[a] = z.shape[a];
    const int64_t c = z.shape[axis], channel_step = z.strides[axis];
    out.values = c ? out.count / c : 0;
    x.c = c;
    const Run before = collapse(z, 0, axis), after = collapse(z, axis + 1, z.ndim), rows = collapse(z, 0, z.ndim, axis);
    const auto by_rows = [&](int64_t n, int64_t step) {
        x.layout = Layout::rc, x.n = n, x.s = 1, x.z_sn = n == 1 ? c : step, x.z_sc = 1;
    };
    int innermost = -1;
    if (out.count == 0) {
        by_rows(0, c);
    } else if (rows.single && (channel_step == 1 || c == 1) && (rows.step >= c || rows.length == 1)) {
        // channels side by side; where there is one channel, its values may be
        innermost = axis;
        by_rows(rows.length, rows.step);
        if (c == 1 && rows.step == 1) x = {x.dtype, Layout::ncs, 1, 1, rows.length, rows.length, rows.length};
    } else if (before.single && after.single && (after.step == 1 || after.length == 1)) {
        if (after.length == 1) {  // (N, C, 1)
            if (channel_step != 1) return false;
            by_rows(before.length, before.step);
        } else {
            const int64_t n = before.length, s = after.length;
            x = {x.dtype, Layout::ncs, n, c, s, n == 1 ? c * s : before.step, c == 1 ? s : channel_step};
        }
    } else {
        return false;
    }
    x.form = natural_form(x);
    pack(z, -1, out.strides);
    // one channel: both orders are the same memory, and the caller's own is kept
    if (innermost >= 0 && !(c == 1 && has_strides(z, out.strides))) pack(z, innermost, out.strides);
    // z's own strides where they say the same, so that axes of length 1 look as they did
    if (has_strides(z, out.strides)) std::copy(z.strides, z.strides + z.ndim, out.strides);
    return true;
}

}  // namespace bn
