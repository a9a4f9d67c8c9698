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

struct Planes {
    static constexpr int64_t block_values = 2048;  // 8 KB of float32: swept twice, read from memory once
    static constexpr int64_t blocks_per_segment = 32;
    int64_t n, c, s;
    int64_t per_plane;       // blocks in a plane, or
    int64_t planes_per_block;  // planes in a block
    int64_t block_len;       // elements of a plane in a block (the last of a plane may be shorter)
    int64_t blocks, segments;

    explicit Planes(const Shape &x) : n(x.n), c(x.c), s(x.s) {
        if (s >= block_values / 2) {
            planes_per_block = 1;
            per_plane = (s + block_values - 1) / block_values;
            block_len = ((s + per_plane - 1) / per_plane + 15) / 16 * 16;
            per_plane = (s + block_len - 1) / block_len;
            blocks = n * per_plane;
        } else {
            per_plane = 1;
            planes_per_block = (block_values / 2 + s - 1) / s;
            block_len = s;
            blocks = (n + planes_per_block - 1) / planes_per_block;
        }
        segments = (blocks + blocks_per_segment - 1) / blocks_per_segment;
    }
    int64_t mask_row() const { return (s + 15) / 16 * 2; }  // bytes of a plane's bit mask
    int64_t mask_bytes() const { return n * c * mask_row(); }
};

struct Columns {
    static constexpr int64_t block_rows = 128;
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
        segment_rows = 64 * std::max<int64_t>(1, (rows + 64 * 64 - 1) / (64 * 64));
        segments = std::max<int64_t>(1, (rows + (tail ? 1 : 0) + segment_rows - 1) / segment_rows);
    }
    int64_t all_rows() const { return rows + (tail ? 1 : 0); }
    int64_t width(int64_t row) const { return row < rows ? cols : tail; }
    int64_t channel(int64_t column) const { return column / s % c; }
    int64_t mask_row() const { return (cols + 15) / 16 * 2; }
    int64_t mask_bytes() const { return all_rows() * mask_row(); }
};

// short planes waste vectors, so they go by columns, where a row of z holds all channels of an n side by side
inline bool by_columns(const Shape &x) {
    constexpr int64_t short_plane = 64;
    return x.layout == Layout::rc || (x.s <= short_plane && x.z_sc == x.s);
}

inline int64_t mask_bytes(const Shape &x) { return by_columns(x) ? Columns(x).mask_bytes() : Planes(x).mask_bytes(); }

}  // namespace bn
