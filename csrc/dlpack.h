// What frameworks share of their tensors: the binary interface of DLPack 1.3 (github.com/dmlc/dlpack, dlpack.h), with
// the table of functions that a tensor type carries as `__dlpack_c_exchange_api__`. Names shortened, layout as there.
#pragma once
#include <cstdint>

namespace bn::dlpack {

constexpr uint32_t major_version = 1, minor_version = 3;
constexpr int32_t cpu = 1;

struct Device {
    int32_t type, id;
};
struct Type {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const Type &o) const { return code == o.code && bits == o.bits && lanes == o.lanes; }
};
constexpr Type int64{0, 64, 1}, uint8{1, 8, 1}, float16{2, 16, 1}, float32{2, 32, 1}, float64{2, 64, 1}, bfloat16{4, 16, 1},
    boolean{6, 8, 1};

struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    Type type;
    int64_t *shape, *strides;  // strides in elements
    uint64_t byte_offset;

    void *begin() const { return static_cast<char *>(data) + byte_offset; }
};

struct Version {
    uint32_t major, minor;
};

struct Managed {
    Version version;
    void *context;
    void (*deleter)(Managed *);
    uint64_t flags;
    Tensor tensor;
};

struct Exchange {
    Version version;
    Exchange *previous;
    int (*allocate)(Tensor *like, Managed **out, void *context, void (*error)(void *, const char *, const char *));
    int (*manage)(void *object, Managed **out);
    int (*adopt)(Managed *tensor, void **object);  // a new tensor of the framework's own type
    int (*look)(void *object, Tensor *out);        // borrowed: as long as the object lives
    int (*current_stream)(int32_t device_type, int32_t device, void **out);
};

}  // namespace bn::dlpack
