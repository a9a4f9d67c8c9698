// Which values count: a mask over positions, the same for every channel. A position is a sample's and a place's number
// in the order of the axes other than the channel's.
#pragma once
#include <cstring>
#include <memory>
#include "geometry.h"

namespace bn {

enum class Kept : uint8_t { none, some, all };

class Keep {
  public:
    // `bytes`: 0 or 1 for each position, of which `count` are 1; they must outlive this
    Keep(const Shape &x, const uint8_t *bytes_, int64_t count_) : count(count_), bytes(bytes_), positions(x.n * x.s) {
        // kept positions near those whose values a plain reduction takes its center from
        for (int i = 0; i < 3 && count; ++i) {
            const int64_t wanted = positions * (2 * i + 1) / 6;
            const void *next = memchr(bytes + wanted, 1, static_cast<size_t>(positions - wanted));
            if (!next) next = memchr(bytes, 1, static_cast<size_t>(positions));
            sample[i] = static_cast<const uint8_t *>(next) - bytes;
        }
        by_columns(x) ? look_at_rows(Columns(x)) : look_at_planes(Planes(x));
    }

    // of a unit of planes, or of a row of columns
    Kept of(int64_t i) const { return kept[i]; }

    // a bit for each value of a plane of sample n from `start` on, a multiple of 8
    const uint8_t *plane(int64_t n, int64_t start) const { return bits.get() + n * bits_row + start / 8; }

    // The rest is for columns. Whether each position is kept of those whose values make a row of NC, one after the other.
    const uint8_t *lines(const Columns &g, int64_t row) const { return bytes + row * (g.cols / (g.c * g.s)) * g.s; }

    // A bit for each of `number` elements of a row, from element j on, a multiple of 8; `out` has room for 8 bytes more.
    void row(const Columns &g, int64_t r, int64_t j, int64_t number, uint8_t *out) const {
        if (of(r) == Kept::all) return void(memset(out, 0xff, static_cast<size_t>((number + 7) / 8)));
        g.repeated() ? of_lines(g, r, j, number, out) : of_planes(g, r, j, number, out);
    }

    const int64_t count;  // values of a channel that are kept
    int64_t sample[3] = {};

  private:
    // lines of c values, each kept or not; without a branch on that, for masks are random, and by way of a register: a word
    // that is read from memory again right behind where it was written waits
    void of_lines(const Columns &g, int64_t r, int64_t j, int64_t number, uint8_t *out) const {
        const uint8_t *line = lines(g, r) + j / g.c;
        uint64_t word = 0;
        int64_t full = 0;  // bits of it
        for (int64_t left = g.c - j % g.c; number > 0;) {
            const int64_t some = std::min({left, number, int64_t{32}});
            const uint64_t these = -static_cast<uint64_t>(*line) & ((uint64_t{1} << some) - 1);
            word |= these << full;
            full += some, number -= some, left -= some;
            if (full >= 64) {
                memcpy(out, &word, 8);
                out += 8, full -= 64;
                word = these >> (some - full);
            }
            if (!left) left = g.c, ++line;
        }
        memcpy(out, &word, 8);
    }

    // short planes, every channel's the same
    void of_planes(const Columns &g, int64_t r, int64_t j, int64_t number, uint8_t *out) const {
        const uint8_t *const at = lines(g, r);
        // a plane's bits again and again, as far as a word at any place of a plane reaches
        uint64_t low = 0, high = 0;
        for (int64_t i = 0; i < g.s; ++i) low |= static_cast<uint64_t>(at[i]) << i;
        for (int64_t have = g.s; have < 64; have *= 2) low |= low << have;
        const int64_t behind = 64 % g.s;  // where in a plane the next word begins
        high = behind ? low >> behind | low << (g.s - behind) : low;
        int64_t phase = j % g.s;
        for (; number > 0; number -= 64, out += 8) {
            const uint64_t word = phase ? low >> phase | high << (64 - phase) : low;
            memcpy(out, &word, 8);
            phase = (phase + 64) % g.s;
        }
    }

    int64_t ones(int64_t from, int64_t number) const {
        int64_t total = 0;
        for (int64_t i = from; i < from + number; ++i) total += bytes[i];
        return total;
    }
    Kept look(int64_t from, int64_t number) const {
        const int64_t found = ones(from, number);
        return found == number ? Kept::all : found ? Kept::some : Kept::none;
    }

    void look_at_rows(const Columns &g) {
        kept.reset(new Kept[static_cast<size_t>(g.all_rows())]);
        const int64_t each = g.cols / (g.c * g.s) * g.s;
        if (each == 1) {
            for (int64_t r = 0; r < positions; ++r) kept[r] = bytes[r] ? Kept::all : Kept::none;
            return;
        }
        for (int64_t r = 0; r < g.all_rows(); ++r) kept[r] = look(r * each, std::min(each, positions - r * each));
    }

    void look_at_planes(const Planes &g) {
        bits_row = g.mask_row();
        kept.reset(new Kept[static_cast<size_t>(g.units)]);
        bits.reset(new uint8_t[static_cast<size_t>(g.n * bits_row)]());
        for (int64_t u = 0; u < g.units; ++u) kept[u] = look(u / g.pieces * g.s + g.start(u), g.length(u));
        for (int64_t n = 0; n < g.n; ++n) {
            const uint8_t *const from = bytes + n * g.s;
            uint8_t *const to = bits.get() + n * bits_row;
            int64_t i = 0;
            for (; i + 8 <= g.s; i += 8) {
                uint64_t eight;
                memcpy(&eight, from + i, 8);
                to[i / 8] = static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);  // byte k becomes bit k
            }
            for (; i < g.s; ++i) to[i / 8] = static_cast<uint8_t>(to[i / 8] | from[i] << (i % 8));
        }
    }

    const uint8_t *bytes;
    int64_t positions, bits_row = 0;
    std::unique_ptr<Kept[]> kept;
    std::unique_ptr<uint8_t[]> bits;
};

}  // namespace bn
