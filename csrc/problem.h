// One call, as raw pointers and sizes. A is the accumulator type: float, or double for float64.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include "cache.h"
#include "geometry.h"
#include "keep.h"
#include "kernels.h"

namespace bn {

template <class A>
struct Tracking {
    A *running_mean = nullptr, *running_var = nullptr;  // nullptr: nothing is tracked
    int64_t *num_batches_tracked = nullptr;
    double momentum = 0.1;
    bool average = false;  // momentum None: weight 1 / batches counted
    int correction = 1;
    bool skip_nonfinite = true;
};

enum ForwardParts : unsigned { statistics = 1, normalization = 2 };
enum BackwardParts : unsigned { reduction = 1, input_gradient = 2 };

template <class A>
struct ForwardProblem {
    Shape shape;
    Activation activation = Activation::identity;
    unsigned parts = statistics | normalization;
    const void *z = nullptr, *residual = nullptr;
    void *y = nullptr;
    uint8_t *mask = nullptr;     // sides of the kink, written where wanted
    const Keep *keep = nullptr;  // nullptr: every value counts
    const A *gamma = nullptr, *beta = nullptr;
    A *mean = nullptr, *var = nullptr, *inv_std = nullptr;  // written by statistics, read by normalization alone
    A *m2 = nullptr;
    double *exact_mean = nullptr, *exact_m2 = nullptr;  // the same unrounded
    double eps = 0;
    Tracking<A> tracking;
    bool *skipped = nullptr;  // set where a channel's running statistics were spared
    int threads = 1;
};

template <class A>
struct BackwardProblem {
    Shape shape;
    Activation activation = Activation::identity;
    unsigned parts = reduction | input_gradient;
    const void *dy = nullptr, *z = nullptr, *saved = nullptr;  // saved: bit mask or residual
    void *dz = nullptr, *dresidual = nullptr;
    const A *gamma = nullptr, *beta = nullptr, *mean = nullptr, *inv_std = nullptr;
    A *sum_dy = nullptr, *sum_dy_zhat = nullptr;  // written by the reduction, read by the input gradient alone
    double *exact_dy = nullptr, *exact_dy_zhat = nullptr;  // the same unrounded, written
    const Keep *keep = nullptr;                   // nullptr: every value counts
    double count = 0;                             // values per channel; infinite: the statistics are constants
    int threads = 1;
};

void forward(const ForwardProblem<float> &);
void forward(const ForwardProblem<double> &);
void backward(const BackwardProblem<float> &);
void backward(const BackwardProblem<double> &);

// --- shared by forward and backward ---

template <class A>
const Kernels<A> &table(DType t) {
    const KernelSet &k = kernels();
    if constexpr (sizeof(A) == 8)
        return k.f64;
    else
        return t == DType::f32 ? k.f32 : t == DType::bf16 ? k.bf16 : k.f16;
}

// a tensor's bytes, and its strides in bytes
struct View {
    char *p;
    int64_t sn, sc;
    char *at(int64_t n, int64_t c = 0) const { return p + n * sn + c * sc; }
    explicit operator bool() const { return p != nullptr; }
};

inline View view(const void *p, int64_t sn, int64_t sc) {
    return {static_cast<char *>(const_cast<void *>(p)), sn, sc};
}

template <class A>
struct Affine {  // scale and shift of a channel, the one way in forward and backward
    static A scale(const A *gamma, const A *inv_std, int64_t c) { return gamma ? gamma[c] * inv_std[c] : inv_std[c]; }
    static A shift(const A *beta, int64_t c) { return beta ? beta[c] : A{0}; }
};

template <class T>
using Array = std::unique_ptr<T[]>;

template <class T>
Array<T> array(int64_t count) {
    return Array<T>(new T[static_cast<size_t>(count)]);
}

// One more thread for every 32,768 values: a thread normalizes those in 4 us, and to wake another takes longer.
inline int useful_threads(int threads, int64_t values) {
    return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, values / 32768)));
}

inline void touch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(p + i, 0, 2);
}

constexpr int64_t scratch_bytes = 8192;      // a piece of output on its way to memory, in the first-level cache
constexpr int64_t chunk_bytes = 128 << 10;   // rows that are mapped in the order of memory before those ahead of them

// Sums on their way, a pack of lanes each: two for each of some channels.
template <class A>
class LaneSums {
  public:
    explicit LaneSums(int64_t channels) : storage(array<A>(channels * width + 16)) {
        const size_t off = reinterpret_cast<uintptr_t>(storage.get()) / sizeof(A) % 16;
        begin = storage.get() + (16 - off) % 16;
    }
    A *clear(int64_t channels) {
        std::fill(begin, begin + channels * width, A{0});
        return begin;
    }
    static constexpr int64_t width = 2 * lane_count;

  private:
    Array<A> storage;
    A *begin;
};

// Packed planes that are no whole vectors are better written across their borders: where every vector must lie on its
// own boundary to go past the caches, and where a plane is so short that its last vector counts. To move bit masks
// across the borders too costs more than it saves, but for wide elements on their way to memory.
inline bool in_runs(const Shape &x, bool streams, bool with_bits) {
    constexpr int64_t short_plane = 128;
    if (by_columns(x) || x.z_sc != x.s || x.s % 16 == 0 || x.s > longest_of_run) return false;
    return with_bits ? streams && element_size(x.dtype) >= 4 : streams || x.s < short_plane;
}

// Which plane each element is in, of so many planes as are whole vectors together.
inline Array<int8_t> lanes_of_run(int64_t s) {
    const int64_t count = std::lcm(s, int64_t{16});
    Array<int8_t> lanes = array<int8_t>(count);
    for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<int8_t>(i / s);
    return lanes;
}

// Whether a kernel may write a block past the caches itself: whole vectors on their own boundaries.
inline bool on_vectors(const void *out, int64_t step, int64_t rows, int64_t element) {
    const uintptr_t vector = static_cast<uintptr_t>(std::min<int64_t>(64, 16 * element));
    return (reinterpret_cast<uintptr_t>(out) | (rows > 1 ? static_cast<uintptr_t>(step) : 0)) % vector == 0;
}

// Maps rows of `len` elements one behind the other by way of a scratch in the first-level cache, several at a time:
// whole lines can then go past the caches wherever the rows begin. `map` computes the elements [start, start + count) of
// the rows [row, row + rows) into the scratches; outputs that are null have none. `write` brings a scratch to its place.
template <class Write, class Map>
void through_scratch(Write write, char *out, char *out_residual, int64_t rows, int64_t len, int64_t element, Map map) {
    alignas(64) char scratch[2][scratch_bytes];
    const int64_t bytes = len * element, fit = scratch_bytes / std::max<int64_t>(1, bytes);
    const int64_t aligned = 64 / std::gcd(bytes, int64_t{64});
    const int64_t batch = fit >= aligned ? fit / aligned * aligned : std::max<int64_t>(1, fit);
    const int64_t piece = fit ? len : scratch_bytes / element;
    for (int64_t row = 0; row < rows; row += batch) {
        const int64_t count = std::min(batch, rows - row);
        for (int64_t start = 0; start < len; start += piece) {
            const int64_t some = std::min(piece, len - start), at = row * bytes + start * element;
            map(row, count, start, some, scratch[0], out_residual ? scratch[1] : nullptr);
            write(out + at, scratch[0], row, count, start, some);
            if (out_residual) write(out_residual + at, scratch[1], row, count, start, some);
        }
    }
}

// how a scratch is written past the caches
template <class A>
auto past_caches(const Kernels<A> &k, int64_t element) {
    return [&k, element](char *to, const char *from, int64_t, int64_t rows, int64_t, int64_t some) {
        k.stream(to, from, static_cast<size_t>(rows * some * element));
    };
}

// How a scratch is written where a mask leaves out some of its elements: 0 in their place. `bits_of(start, some)` gives
// the mask of these elements of a row, the same for all rows.
template <class A, class BitsOf>
auto kept_only(const Kernels<A> &k, int64_t element, bool streams, BitsOf bits_of) {
    return [&k, element, streams, bits_of](char *to, char *from, int64_t, int64_t rows, int64_t start, int64_t some) {
        const uint8_t *const bits = bits_of(start, some);
        const A zero = 0;
        const int64_t row_bytes = some * element;
        for (int64_t r = 0; r < rows; ++r)
            k.keep_plane((streams ? from : to) + r * row_bytes, from + r * row_bytes, bits, static_cast<size_t>(some), &zero);
        if (streams) k.stream(to, from, static_cast<size_t>(rows * row_bytes));
    };
}

// 0 in `rows` rows of `bytes` bytes
inline void zero(char *out, int64_t step, int64_t rows, int64_t bytes) {
    if (step == bytes) bytes *= rows, rows = 1;
    for (; out && rows--; out += step) memset(out, 0, static_cast<size_t>(bytes));
}

// A block's rows, in pieces of which `inputs` copies fit a scratch: f(row, rows, start, len).
template <class F>
void in_pieces(int64_t rows, int64_t len, int64_t element, F f) {
    const int64_t piece = std::min(len, scratch_bytes / element), batch = std::max<int64_t>(1, scratch_bytes / (piece * element));
    for (int64_t row = 0; row < rows; row += batch)
        for (int64_t start = 0; start < len; start += piece)
            f(row, std::min(batch, rows - row), start, std::min(piece, len - start));
}

// Rows of columns of which a mask keeps some. Where the kept ones of these lie together and are kept whole, they are
// reduced where they are: direct(row, rows). Else they are brought together, some columns at a time:
// copy(row, j, count, slot, bits) for each, with no bits where the row is kept whole, then reduce(slots, j, count).
constexpr int64_t columns_together = 256, rows_together = 32;
template <class Direct, class Copy, class Reduce>
void over_kept_rows(const Keep &keep, const Columns &g, int64_t row, int64_t end, int64_t j0, int64_t j1, Direct direct,
                    Copy copy, Reduce reduce) {
    while (row < end && keep.of(row) == Kept::none) ++row;
    while (end > row && keep.of(end - 1) == Kept::none) --end;
    int64_t whole = row;
    while (whole < end && keep.of(whole) == Kept::all) ++whole;
    if (whole == end) return row < end ? direct(row, end - row) : void();
    for (int64_t j = j0; j < j1; j += columns_together) {
        const int64_t count = std::min(columns_together, j1 - j);
        int64_t slots = 0;
        for (int64_t r = row; r < end; ++r) {
            const Kept kept = keep.of(r);
            if (kept == Kept::none) continue;
            uint8_t bits[columns_together / 8 + 16];
            if (kept == Kept::some) keep.columns(g, r, j, count, bits);
            copy(r, j, count, slots, kept == Kept::some ? bits : nullptr);
            if (++slots == rows_together) reduce(slots, j, count), slots = 0;
        }
        if (slots) reduce(slots, j, count);
    }
}

// The same for rows of several lines of values, a line kept or not: the kept ones one behind the other make rows of
// their own. copy(row, line, slot), then reduce(first element, rows, count) for those that are full, and for the last.
template <class Copy, class Reduce>
void over_kept_lines(const Keep &keep, const Columns &g, int64_t row, int64_t end, int64_t j1, Copy copy, Reduce reduce) {
    const int64_t lines = g.cols / g.c, room = columns_together * rows_together / g.cols * lines;
    int64_t slot = 0;
    const auto empty = [&] {
        const int64_t rows = slot / lines, last = slot % lines;
        if (rows) reduce(0, rows, g.cols);
        if (last) reduce(rows * g.cols, 1, last * g.c);
        slot = 0;
    };
    for (; row < end; ++row) {
        if (keep.of(row) == Kept::none) continue;
        const uint8_t *const kept = keep.lines(g, row);
        for (int64_t line = 0; line < j1 / g.c; ++line) {
            if (!kept[line]) continue;
            copy(row, line, slot);
            if (++slot == room) empty();
        }
    }
    empty();
}

// Rows of columns in the order that a map takes them: whole(row, rows), some(row, rows), none(row, rows).
template <class Whole, class Some, class None>
void by_kept_rows(const Keep &keep, int64_t row, int64_t end, Whole whole, Some some, None none) {
    while (row < end) {
        const Kept kept = keep.of(row);
        int64_t next = row + 1;
        while (next < end && keep.of(next) == kept) ++next;
        if (kept == Kept::all)
            whole(row, next - row);
        else if (kept == Kept::some)
            some(row, next - row);
        else
            none(row, next - row);
        row = next;
    }
}

// Whether rows that a mask keeps and rows that it does not change so often that they are better mapped together.
inline bool mixed(const Keep &keep, int64_t row, int64_t rows) {
    int64_t changes = 0, none = 0;
    for (int64_t r = row; r < row + rows; ++r) {
        none += keep.of(r) == Kept::none;
        changes += r > row && keep.of(r) != keep.of(r - 1);
    }
    return changes * 16 > rows && none * 4 < rows * 3;
}

}  // namespace bn
