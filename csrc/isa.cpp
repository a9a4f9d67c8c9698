// Which instruction set serves: the best that was built and that this processor has, or the one that was asked for.
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(BN_X86)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace bn {

// From kernels.cpp, once per instruction set and type; CMakeLists.txt says which sets there are.
#define BN_DECLARE(isa)                                                                        \
    namespace isa {                                                                            \
    void fill_f32(KernelSet &), fill_f64(KernelSet &), fill_bf16(KernelSet &), fill_f16(KernelSet &); \
    inline void fill(KernelSet &set) { fill_f32(set), fill_f64(set), fill_bf16(set), fill_f16(set); } \
    }
BN_DECLARE(baseline)
BN_DECLARE(avx2)
BN_DECLARE(avx512)
namespace avx512bf16 {
void fill_bf16(KernelSet &);
[[maybe_unused]] inline void fill(KernelSet &set) { avx512::fill(set), fill_bf16(set); }
}  // namespace avx512bf16

namespace {

#if defined(BN_X86)
struct Processor {
    bool avx2 = false, avx512 = false, avx512bf16 = false;
};

// The processor is asked by cpuid, and whether the system saves the registers by xgetbv. __builtin_cpu_supports reads a
// table of the compiler's run-time library: zig's has none and every answer is no, clang knows "f16c" from 17 on.
[[maybe_unused]] Processor processor() {
    Processor found;
    unsigned a = 0, b = 0, c = 0, d = 0, saved = 0, high = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
    const bool helpers = (c & bit_F16C) && (c & bit_FMA);
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const unsigned ymm = 0x06, zmm = 0xe6;  // bits of XCR0: xmm, upper ymm; opmask, upper zmm, zmm 16 to 31
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    found.avx2 = helpers && (b & bit_AVX2) && (saved & ymm) == ymm;
    found.avx512 = found.avx2 && (b & wide) == wide && (saved & zmm) == zmm;
    found.avx512bf16 = found.avx512 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
    return found;
}
#endif

struct Candidate {
    const char *name;
    bool runs;
    void (*fill)(KernelSet &);
    KernelSet set;
};

Candidate *candidates(int &count) {
    static Candidate all[] = {
#if defined(BN_HAS_BASELINE)
        {"baseline", true, baseline::fill, {}},
#endif
#if defined(BN_HAS_AVX2)
        {"avx2", processor().avx2, avx2::fill, {}},
#endif
#if defined(BN_HAS_AVX512)
        {"avx512", processor().avx512, avx512::fill, {}},
#endif
#if defined(BN_HAS_AVX512BF16)
        {"avx512bf16", processor().avx512bf16, avx512bf16::fill, {}},
#endif
    };
    static const bool filled = [] {
        for (Candidate &c : all)
            if (c.runs) c.set.isa = c.name, c.fill(c.set);
        return true;
    }();
    (void)filled;
    count = static_cast<int>(sizeof all / sizeof *all);
    return all;
}

const KernelSet *chosen = nullptr;

}  // namespace

const KernelSet *kernels_for(const char *isa) {
    int count;
    const Candidate *all = candidates(count);
    for (int i = 0; i < count; ++i)
        if (all[i].runs && !std::strcmp(all[i].name, isa)) return &all[i].set;
    return nullptr;
}

const char *available_isas() {
    static const std::string names = [] {
        int count;
        const Candidate *all = candidates(count);
        std::string s;
        for (int i = 0; i < count; ++i)
            if (all[i].runs) {
                if (!s.empty()) s += ' ';
                s += all[i].name;
            }
        return s;
    }();
    return names.c_str();
}

void select_isa(const char *isa) {
    if (isa && *isa) {
        const KernelSet *set = kernels_for(isa);
        if (!set)
            throw std::runtime_error("instruction set '" + std::string(isa) + "' is not one of: " + available_isas());
        chosen = set;
        return;
    }
    int count;
    const Candidate *all = candidates(count);
    for (int i = 0; i < count; ++i)
        if (all[i].runs) chosen = &all[i].set;
    if (!chosen) throw std::runtime_error("this build of the core has no instruction set that this processor runs");
}

const KernelSet &kernels() {
    if (!chosen) select_isa(nullptr);
    return *chosen;
}

}  // namespace bn
