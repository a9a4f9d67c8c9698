// Tensors of the framework around us, by the table of functions that their type carries: looked at without a copy, and
// made over memory of our own. Nothing here knows which framework it is.
#pragma once
#include <Python.h>

#include "dlpack.h"

namespace bn::tensors {

void use(PyObject *table);                           // the capsule `__dlpack_c_exchange_api__`; throws std::runtime_error
bool look(PyObject *tensor, dlpack::Tensor &out);    // false: it has no memory to look at
// a new reference, and where its values lie
PyObject *make(dlpack::Type type, int axes, const int64_t *sizes, const int64_t *strides, void **memory);

}  // namespace bn::tensors
