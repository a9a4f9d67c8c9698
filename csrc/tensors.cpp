#include "tensors.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <new>
#include <stdexcept>

#include "placement.h"
#include "memory_pool.h"

namespace bn::tensors {
namespace {

const dlpack::Exchange *exchange = nullptr;

constexpr size_t large = size_t{1} << 20;  // from here on the pool: below, the allocator has pages at hand
constexpr std::align_val_t line{64};

// A tensor's memory and what describes it. Small ones are one piece: the values follow on the next cache line.
struct Owner {
    dlpack::Managed managed{};
    pool::Block *block = nullptr;
    bool *gone = nullptr;  // told when it is destroyed
    int64_t sizes[most_axes], strides[most_axes];
};
constexpr size_t header = (sizeof(Owner) + 63) / 64 * 64;

void destroy(dlpack::Managed *m) {
    Owner *owner = static_cast<Owner *>(m->context);
    if (owner->gone) *owner->gone = true;
    if (owner->block) pool::release(owner->block);
    owner->~Owner();
    ::operator delete(static_cast<void *>(owner), line);
}

}  // namespace

void use(PyObject *table) {
    const auto *found = static_cast<dlpack::Exchange *>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
    if (!found) PyErr_Clear();
    while (found && found->version.major != dlpack::major_version) found = found->previous;
    if (!found || !found->look || !found->adopt)
        throw std::runtime_error("this framework's tensors have no DLPack exchange table of version 1");
    exchange = found;
}

bool look(PyObject *tensor, dlpack::Tensor &out) {
    if (!exchange) throw std::runtime_error("no tensor type is known: call use() first");
    if (exchange->look(tensor, &out)) {
        PyErr_Clear();
        return false;
    }
    if (out.data) return true;
    for (int32_t a = 0; a < out.ndim; ++a)
        if (out.shape[a] == 0) return true;
    return false;
}

PyObject *make(dlpack::Type type, int axes, const int64_t *sizes, const int64_t *strides, void **where) {
    size_t bytes = type.bits / 8;
    for (int a = 0; a < axes; ++a) bytes *= static_cast<size_t>(sizes[a]);
    const bool pooled = bytes >= large && pool::keeps();
    void *memory = ::operator new(header + (pooled ? 0 : std::max<size_t>(bytes, 64)), line);
    Owner *owner = new (memory) Owner;
    void *data = static_cast<char *>(memory) + header;
    dlpack::Managed &m = owner->managed;
    m = {{dlpack::major_version, dlpack::minor_version}, owner, destroy, 0, {}};
    if (pooled) {
        try {
            owner->block = pool::acquire(bytes);
        } catch (...) {
            destroy(&m);
            throw;
        }
        data = owner->block->data;
    }
    std::copy(sizes, sizes + axes, owner->sizes);
    std::copy(strides, strides + axes, owner->strides);
    m.tensor = {data, {dlpack::cpu, 0}, axes, type, owner->sizes, owner->strides, 0};
    *where = data;
    void *object = nullptr;
    bool gone = false;
    owner->gone = &gone;
    if (exchange->adopt(&m, &object)) {
        // how far it came is not told: the memory may or may not have been taken over, and given back
        if (!gone) destroy(&m);
        throw nanobind::python_error();
    }
    owner->gone = nullptr;
    return static_cast<PyObject *>(object);
}

}  // namespace bn::tensors
