// Which instruction set serves: the best that was built and that this processor has, or the one that was asked for.
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bn {

namespace baseline {
void fill_set(KernelSet &);
}
#if defined(BN_X86)
namespace avx2 {
void fill_set(KernelSet &);
}
namespace avx512 {
void fill_set(KernelSet &);
}
namespace avx512bf16 {
void fill_set(KernelSet &);
}
#endif

namespace {

#if defined(BN_X86)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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
        {"baseline", true, baseline::fill_set, {}},
#if defined(BN_X86)
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
         avx2::fill_set, {}},
        {"avx512", has_avx512(), avx512::fill_set, {}},
        {"avx512bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512bf16::fill_set, {}},
#endif
    };
    static const bool filled = [] {
        for (Candidate &c : all)
            if (c.runs) c.fill(c.set);
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
            if (all[i].runs) s += (s.empty() ? "" : " ") + std::string(all[i].name);
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
}

const KernelSet &kernels() {
    if (!chosen) select_isa(nullptr);
    return *chosen;
}

}  // namespace bn
