// From a shape to loops. Everything that decides the order of a sum depends on the shape (and on whether z is
// packed) alone, never on the number of threads, the caches or the instruction set.
//
//   planes    N x C x S with long planes: a channel is N pieces of S neighbours, coefficients are scalars
//   columns   R x C, and N x C x S with short planes: every column of a row has its own coefficients;
//             column j belongs to channel (j / s) % c
#pragma once
#include <algorithm>
#include <numeric>
#include "dtypes.h"

namespace bn {

enum class Layout : int { ncs = 0, rc = 1 };

struct Shape {
    DType dtype;
    Layout layout;
    int64_t n, c, s;        // rc: n rows, s == 1
    int64_t z_sn, z_sc;     // strides of z in elements; every other tensor is packed
};

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
    int64_t mask_bytes() const { return n * c * mask_row(); }
};

struct Columns {
    static constexpr int64_t block_rows = 128;  // summed in float32, then on in double
    int64_t rows, cols;       // whole rows
    int64_t tail;             // columns of one more, shorter row
    int64_t c, s;             // column j is channel (j / s) % c
    int64_t z_stride;         // elements from row to row in z
    int64_t segment_rows, segments;

    explicit Columns(const Shape &x) : rows(x.n), cols(x.c * x.s), tail(0), c(x.c), s(x.s), z_stride(x.z_sn) {
        if (x.layout == Layout::rc && x.z_sn == x.c && cols > 0 && cols < 256) {
            // several rows side by side: whole vectors whatever the number of channels
            const int64_t unit = cols / std::gcd(cols, int64_t{32}) * 32;
            const int64_t wide = unit * std::max<int64_t>(1, 512 / unit);
            const int64_t values = rows * cols;
            if (values >= wide * 64) {
                rows = values / wide;
                tail = values % wide;
                cols = z_stride = wide;
            }
        }
        // 64 segments at the most; short ones only where there are few rows, for each has sums of its own
        const int64_t least = std::clamp<int64_t>(32768 / std::max<int64_t>(1, cols), 32, block_rows);
        segment_rows = std::max(std::clamp<int64_t>(rows / 8, least, block_rows), (rows + 63) / 64);
        segment_rows = (segment_rows + 7) / 8 * 8;
        segments = std::max<int64_t>(1, (rows + (tail ? 1 : 0) + segment_rows - 1) / segment_rows);
    }
    bool repeated() const { return cols != c * s; }  // rows side by side: a channel has several columns
    int64_t all_rows() const { return rows + (tail ? 1 : 0); }
    int64_t channel(int64_t column) const { return column / s % c; }
    int64_t mask_row() const { return (cols + 15) / 16 * 2; }
    int64_t mask_bytes() const { return all_rows() * mask_row(); }
};

// short planes waste vectors, so they go by columns, where a row of z holds all channels of an n side by side
inline bool by_columns(const Shape &x) {
    constexpr int64_t short_plane = 32;
    return x.layout == Layout::rc || (x.s < short_plane && x.z_sc == x.s);
}

inline int64_t mask_bytes(const Shape &x) { return by_columns(x) ? Columns(x).mask_bytes() : Planes(x).mask_bytes(); }

}  // namespace bn
