// Sizes of this machine's caches. They choose how work is cut and which stores are used, never the order of a sum.
#pragma once
#include <cstddef>

namespace bn {

struct Cache {
    size_t per_core;  // second level
    size_t last;      // last level, shared
};

const Cache &cache();

// For tests: with small caches small tensors go the ways of large ones. A last level of 0: this machine's own again.
void pretend_cache(size_t per_core, size_t last);

// An output this large would push its own input out of the last level, and with all else that a step touches it is not
// there any more when it is read; and a store into a cache reads the line from memory first.
inline bool should_stream(size_t bytes) { return bytes > cache().last / 8; }

}  // namespace bn
