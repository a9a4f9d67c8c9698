#include "cache.h"

#include <algorithm>
#include <cstdio>
#include <unistd.h>

namespace bn {
namespace {

size_t ask([[maybe_unused]] int name) {
    const long bytes = sysconf(name);
    return bytes > 0 ? static_cast<size_t>(bytes) : 0;
}

// What Linux says of the first processor's caches; 0 where it does not.
size_t listed(int wanted) {
    for (int index = 0; index < 8; ++index) {
        const auto read = [index](const char *what, const char *format, auto *value) {
            char path[96];
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
            FILE *f = std::fopen(path, "r");
            if (!f) return false;
            const bool good = std::fscanf(f, format, value) == 1;
            std::fclose(f);
            return good;
        };
        int level = 0;
        unsigned long kib = 0;
        char type = 0;
        if (!read("level", "%d", &level)) return 0;
        if (level == wanted && read("type", "%c", &type) && type != 'I' && read("size", "%luK", &kib)) return kib << 10;
    }
    return 0;
}

Cache measure() {
    Cache c{listed(2), listed(3)};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    // the C library's figure for the last level is not always that of one cache: 320 MiB where there are 32
    if (!c.per_core) c.per_core = ask(_SC_LEVEL2_CACHE_SIZE);
    if (!c.last) c.last = std::min(ask(_SC_LEVEL3_CACHE_SIZE), size_t{32} << 20);
#endif
    if (!c.per_core) c.per_core = size_t{512} << 10;
    if (!c.last) c.last = size_t{16} << 20;
    c.last = std::max(c.last, c.per_core);
    return c;
}

Cache &current() {
    static Cache c = measure();
    return c;
}

}  // namespace

const Cache &cache() { return current(); }

void pretend_cache(size_t per_core, size_t last) { current() = last ? Cache{per_core, last} : measure(); }

}  // namespace bn
