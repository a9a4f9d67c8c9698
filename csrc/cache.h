// Sizes of this machine's caches. They choose how work is cut and which stores are used, never the order of a sum.
#pragma once
#include <cstddef>

namespace bn {

struct Cache {
    size_t per_core;  // second level
    size_t last;      // last level, shared
};

const Cache &cache();

// an output this large would push everything else out, and not be there any more when it is read
inline bool should_stream(size_t bytes) { return bytes > cache().last / 2; }

}  // namespace bn
