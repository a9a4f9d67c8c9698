"""Whether operations are being written down: by a tracer, an exporter, or whoever else makes a graph to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from batchnorm.compiling import compiling


def written_down() -> bool:
    """Whether what runs now is recorded for use elsewhere, so that it must be torch's own operations.

    True inside ``torch.jit.trace``, both ONNX exporters, ``torch.export`` and ``make_fx``; False under
    ``torch.compile``, whose graph runs where it was made, and where ``make_fx`` records a derivative or ``vmap``,
    which torch's operator does not go through.
    """
    if compiling():
        return torch.compiler.is_exporting()
    if torch._C._get_tracing_state() is not None:
        return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        and get_proxy_mode() is not None
        and (
            not torch._C._are_functorch_transforms_active()
            or peek_interpreter_stack().key() == TransformType.Functionalize
        )
    )


@contextmanager
def unwritten() -> Iterator[None]:
    """Run a ``with`` block unseen by ``torch.jit.trace``, for questions that are no part of the computation."""
    tracer = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracer)  # type: ignore[attr-defined]


def plain_shape(z: Tensor) -> tuple[int, ...]:
    """Give the shape in numbers; to ``torch.jit.trace`` it would be tensors, and to compare them a warning."""
    if torch._C._get_tracing_state() is None:
        return z.shape
    with unwritten():
        return z.shape
