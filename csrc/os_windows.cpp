// Windows. Processes do not know of one another's pools here.
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <vector>

#include "os.h"

namespace bn::os {

void *map(size_t bytes, size_t) noexcept { return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }
void unmap(void *p, size_t) noexcept { VirtualFree(p, 0, MEM_RELEASE); }

size_t memory() {
    MEMORYSTATUSEX status{};
    status.dwLength = sizeof status;
    return GlobalMemoryStatusEx(&status) ? static_cast<size_t>(status.ullTotalPhys) : size_t{4} << 30;
}

size_t cache_size(int level) {
    DWORD bytes = 0;
    GetLogicalProcessorInformation(nullptr, &bytes);
    std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> all(bytes / sizeof(SYSTEM_LOGICAL_PROCESSOR_INFORMATION));
    if (all.empty() || !GetLogicalProcessorInformation(all.data(), &bytes)) return 0;
    for (const auto &one : all)
        if (one.Relationship == RelationCache && one.Cache.Level == level && one.Cache.Type != CacheInstruction)
            return one.Cache.Size;
    return 0;
}

void *symbol(const char *name) {
    for (const char *library : {"libiomp5md.dll", "libomp140.x86_64.dll", "vcomp140.dll", "libgomp-1.dll"})
        if (const HMODULE loaded = GetModuleHandleA(library))
            if (void *found = reinterpret_cast<void *>(GetProcAddress(loaded, name))) return found;
    return nullptr;
}

void at_fork(void (*)(), void (*)(), void (*)()) noexcept {}

WithoutSignals::WithoutSignals() noexcept {}
WithoutSignals::~WithoutSignals() {}

int take_seat() noexcept { return 1; }
void leave_seat() noexcept {}

}  // namespace bn::os
#endif
