// From the shape and strides of a tensor to one of the two layouts, and the strides of the tensors that go with it.
#pragma once
#include <vector>

#include "dlpack.h"
#include "geometry.h"

namespace bn {

constexpr int most_axes = 16;

struct Placement {
    Shape shape{};
    int axes = 0;
    int64_t sizes[most_axes], strides[most_axes];  // of every packed tensor beside z
    int64_t count = 0, values = 0;                 // all values; values per channel

    // whether another tensor lies like the packed ones
    bool packed(const dlpack::Tensor &t) const;
};

// False: z is none of the core's (device, type), or it must be copied first.
bool place(const dlpack::Tensor &z, int axis, Placement &out);

// A mask's values in the order of the axes other than the channel's, in its own memory or in `own`; false: it does not
// broadcast against z, or is no tensor of booleans.
bool positions(const dlpack::Tensor &mask, int axis, const Placement &at, std::vector<uint8_t> &own, const uint8_t *&out);

bool known(dlpack::Type type, DType &out);
dlpack::Type type_of(DType type);

}  // namespace bn
