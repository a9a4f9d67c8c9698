// One call, as raw pointers and sizes. A is the accumulator type: float, or double for float64.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include "cache_sizes.h"
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

// asked for while others are worked on: every line, or one of each page
inline void touch(const char *p, int64_t bytes, int64_t step = 64) {
    for (int64_t i = 0; i < bytes; i += step) __builtin_prefetch(p + i, 0, 2);
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

// 0 in `rows` rows of `bytes` bytes
inline void zero(char *out, int64_t step, int64_t rows, int64_t bytes) {
    if (step == bytes) bytes *= rows, rows = 1;
    for (; out && rows--; out += step) memset(out, 0, static_cast<size_t>(bytes));
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

// Whether rows that a mask keeps and rows that it does not change so often that they are better taken together, as lines.
inline bool mixed(const Keep &keep, const Columns &g, int64_t row, int64_t rows) {
    if (g.s != 1 || g.repeated()) return false;
    const uint8_t *const kept = keep.lines(g, row);
    int64_t changes = 0, some = 0;
    for (int64_t r = 0; r < rows; ++r) some += kept[r];
    for (int64_t r = 1; r < rows; ++r) changes += kept[r] != kept[r - 1];
    return changes * 16 > rows && (some * 4 > rows || g.cols <= 256);  // of long rows those that are left out are not read
}

// Rows of columns of which a mask keeps some, to be summed: reduce(row, rows, j, len, lines, bits), where not all is kept
// with the rows that are, or with bits, some rows and columns at a time then.
constexpr int64_t columns_together = 2048, rows_together = 32, kept_bytes = columns_together / 8 + 8;
template <class Reduce>
void over_kept_rows(const Keep &keep, const Columns &g, int64_t row, int64_t rows, int64_t j0, int64_t j1, Reduce reduce) {
    if (mixed(keep, g, row, rows)) return reduce(row, rows, j0, j1 - j0, keep.lines(g, row), nullptr);
    const auto some = [&](int64_t first, int64_t count) {
        uint8_t bits[rows_together * kept_bytes];
        for (int64_t j = j0; j < j1; j += columns_together)
            for (int64_t i = 0; i < count; i += rows_together) {
                const int64_t len = std::min(columns_together, j1 - j), together = std::min(rows_together, count - i);
                for (int64_t k = 0; k < together; ++k) keep.row(g, first + i + k, j, len, bits + k * kept_bytes);
                reduce(first + i, together, j, len, nullptr, bits);
            }
    };
    by_kept_rows(
        keep, row, row + rows, [&](int64_t r, int64_t count) { reduce(r, count, j0, j1 - j0, nullptr, nullptr); }, some,
        [](int64_t, int64_t) {});
}

}  // namespace bn
