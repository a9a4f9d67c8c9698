// From a shape to loops. Everything that decides the order of a sum depends on the shape (and on whether z is
// packed) alone, never on the number of threads, the caches or the instruction set.
//
//   planes    N x C x S with long planes: a channel is N pieces of S neighbours, coefficients are scalars
//   columns   R x C, and N x C x S with short planes: every column of a row has its own coefficients;
//             column j belongs to channel (j / s) % c
#pragma once
#include <algorithm>
#include <initializer_list>
#include <numeric>
#include "dtypes.h"

namespace bn {

enum class Layout : int { ncs = 0, rc = 1 };

// How the loops go: over planes; over columns, a row for each n; over columns of several rows side by side.
enum class Form : int { planes = 0, columns, side_by_side };

struct Shape {
    DType dtype;
    Layout layout;
    int64_t n, c, s;        // rc: n rows, s == 1
    int64_t z_sn, z_sc;     // strides of z in elements; every other tensor is packed
    Form form = Form::planes;
};

// Whole vectors whatever the number of channels: so many elements of rows side by side, or 0 where rows are long, few,
// or apart.
inline int64_t side_by_side(const Shape &x) {
    if (x.layout != Layout::rc || x.z_sn != x.c || x.c <= 0 || x.c >= 256) return 0;
    const int64_t unit = x.c / std::gcd(x.c, int64_t{32}) * 32, wide = unit * std::max<int64_t>(1, 512 / unit);
    return x.n * x.c >= wide * 64 ? wide : 0;
}

// short planes waste vectors, so they go by columns, where a row of z holds all channels of an n side by side
inline Form natural_form(const Shape &x) {
    constexpr int64_t short_plane = 32;
    if (x.layout == Layout::rc) return side_by_side(x) ? Form::side_by_side : Form::columns;
    return x.s < short_plane && x.z_sc == x.s ? Form::columns : Form::planes;
}
inline bool by_columns(const Shape &x) { return x.form != Form::planes; }

// Sums of float32 are taken over at most about this many values in 16 or 64 lanes, then go on in double.
constexpr int64_t values_per_segment = 8192;

struct Planes {
    int64_t n, c, s;
    int64_t pieces, piece_len;  // of a plane; the last may be shorter
    int64_t units;              // pieces of a channel: unit u is piece u % pieces of sample u / pieces
    int64_t units_per_segment, segments;

    explicit Planes(const Shape &x) : n(x.n), c(x.c), s(x.s) {
        pieces = (s + values_per_segment - 1) / values_per_segment;
        piece_len = ((s + pieces - 1) / pieces + 15) / 16 * 16;
        pieces = (s + piece_len - 1) / piece_len;
        units = n * pieces;
        units_per_segment = pieces > 1 ? 1 : std::max<int64_t>(1, values_per_segment / s);
        segments = (units + units_per_segment - 1) / units_per_segment;
    }
    int64_t start(int64_t unit) const { return unit % pieces * piece_len; }
    int64_t length(int64_t unit) const { return std::min(piece_len, s - start(unit)); }
    int64_t mask_row() const { return (s + 15) / 16 * 2; }  // bytes of a plane's bit mask
};

struct Columns {
    static constexpr int64_t block_rows = 128;  // summed in float32, then on in double
    int64_t rows, cols;       // whole rows
    int64_t tail;             // columns of one more, shorter row
    int64_t c, s;             // column j is channel (j / s) % c
    int64_t z_stride;         // elements from row to row in z
    int64_t segment_rows, segments;

    explicit Columns(const Shape &x) : rows(x.n), cols(x.c * x.s), tail(0), c(x.c), s(x.s), z_stride(x.z_sn) {
        if (x.form == Form::side_by_side) {
            const int64_t values = rows * cols;
            cols = z_stride = side_by_side(x);
            rows = values / cols;
            tail = values % cols;
        }
        // 64 segments at the most; short ones only where there are few rows, for each has sums of its own
        const int64_t least = std::clamp<int64_t>(32768 / std::max<int64_t>(1, cols), 32, block_rows);
        segment_rows = std::max(std::clamp<int64_t>(rows / 8, least, block_rows), (rows + 63) / 64);
        segment_rows = (segment_rows + 7) / 8 * 8;
        segments = std::max<int64_t>(1, (rows + (tail ? 1 : 0) + segment_rows - 1) / segment_rows);
    }
    bool repeated() const { return cols != c * s; }  // a channel has several columns
    int64_t all_rows() const { return rows + (tail ? 1 : 0); }
    int64_t channel(int64_t column) const { return column / s % c; }
    int64_t mask_row() const { return (cols + 15) / 16 * 2; }
};

// What is kept of the side of a kink, a bit an element. The sizes of its tensor say which form it has, so that it can be
// read beside a z that lies otherwise than the one it was made of.
struct Sides {
    int axes;
    int64_t sizes[3];
    int64_t bytes() const { return sizes[0] * sizes[1] * (axes == 3 ? sizes[2] : 1); }

    explicit Sides(const Shape &x) {
        if (x.layout == Layout::rc) {
            const Columns g(x);
            *this = {2, {g.all_rows(), g.mask_row(), 1}};
        } else if (by_columns(x)) {
            *this = {3, {x.n, 1, Columns(x).mask_row()}};
        } else {
            *this = {3, {x.n, x.c, Planes(x).mask_row()}};
        }
    }
    bool operator==(const Sides &o) const {
        return axes == o.axes && std::equal(sizes, sizes + axes, o.sizes);
    }
    Sides(int axes_, std::initializer_list<int64_t> of) : axes(axes_) { std::copy(of.begin(), of.end(), sizes); }
};

// Chooses the form in which these sides were made; false: z must lie otherwise.
inline bool read_as(Shape &x, const Sides &sides) {
    const auto fits = [&](Form form) {
        Shape other = x;
        other.form = form;
        if (!(Sides(other) == sides)) return false;
        x.form = form;
        return true;
    };
    if (sides.axes == 2) {
        if (x.layout == Layout::ncs && x.n == 1 && x.c == 1) {  // one channel: rows of one value
            x = {x.dtype, Layout::rc, x.s, 1, 1, 1, 1};
        }
        return x.layout == Layout::rc && (fits(Form::columns) || (side_by_side(x) && fits(Form::side_by_side)));
    }
    if (x.layout != Layout::ncs) return false;
    if (x.n == 1 && x.c == 1 && sides.sizes[0] > 1 && x.s % sides.sizes[0] == 0) {
        const int64_t s = x.s / sides.sizes[0];
        x = {x.dtype, Layout::ncs, sides.sizes[0], 1, s, s, s};
    }
    return fits(Form::planes) || (x.z_sc == x.s && fits(Form::columns));
}

}  // namespace bn
