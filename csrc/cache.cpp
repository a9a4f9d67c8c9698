#include "cache.h"

#include <algorithm>
#include <unistd.h>

namespace bn {
namespace {

size_t ask([[maybe_unused]] int name) {
    const long bytes = sysconf(name);
    return bytes > 0 ? static_cast<size_t>(bytes) : 0;
}

Cache measure() {
    Cache c{0, 0};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    c.per_core = ask(_SC_LEVEL2_CACHE_SIZE);
    c.last = ask(_SC_LEVEL3_CACHE_SIZE);
#endif
    if (!c.per_core) c.per_core = size_t{512} << 10;
    if (!c.last) c.last = size_t{16} << 20;
    c.last = std::max(c.last, c.per_core);
    return c;
}

}  // namespace

const Cache &cache() {
    static const Cache c = measure();
    return c;
}

}  // namespace bn
