// A tensor over a block of the pool, as a DLPack capsule (dmlc/dlpack, the unversioned "dltensor" form that every
// consumer reads). Its deleter may run on any thread, without the interpreter.
#pragma once
#include <Python.h>

#include <new>

#include "dtypes.h"
#include "pool.h"

namespace bn::dlpack {

struct Device {
    int32_t type, id;
};
struct Type {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    Type dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Managed {
    Tensor tensor;
    void *context;
    void (*deleter)(Managed *);
};

struct Owner {
    Managed managed;
    pool::Block block;
    int64_t shape[64], strides[64];
};

inline void destroy(Managed *m) {
    Owner *owner = static_cast<Owner *>(m->context);
    pool::release(owner->block);
    delete owner;
}

inline void capsule_destructor(PyObject *capsule) {
    // a consumer renames the capsule when it takes the tensor over
    if (PyCapsule_IsValid(capsule, "dltensor")) destroy(static_cast<Managed *>(PyCapsule_GetPointer(capsule, "dltensor")));
}

inline PyObject *pooled(DType dtype, PyObject *shape, PyObject *strides) {
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    if (ndim > 64 || PyTuple_GET_SIZE(strides) != ndim) throw std::bad_alloc();
    Owner *owner = new Owner{};
    int64_t count = 1;
    for (Py_ssize_t i = 0; i < ndim; ++i) {
        owner->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
        owner->strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        count *= owner->shape[i];
    }
    try {
        owner->block = pool::acquire(static_cast<size_t>(count) * element_size(dtype));
    } catch (...) {
        delete owner;
        throw;
    }
    constexpr uint8_t is_float = 2, is_bfloat = 4, is_cpu = 1;
    owner->managed.tensor = {owner->block.data,
                             {is_cpu, 0},
                             static_cast<int32_t>(ndim),
                             {dtype == DType::bf16 ? is_bfloat : is_float, static_cast<uint8_t>(8 * element_size(dtype)), 1},
                             owner->shape,
                             owner->strides,
                             0};
    owner->managed.context = owner;
    owner->managed.deleter = destroy;
    PyObject *capsule = PyCapsule_New(&owner->managed, "dltensor", capsule_destructor);
    if (!capsule) destroy(&owner->managed);
    return capsule;
}

}  // namespace bn::dlpack
