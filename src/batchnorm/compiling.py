"""Whether Python is being followed by a compiler, and what our own is shown of our operator: one step to join.

Every other compiler, exporter and tracer is shown torch operations. Dynamo keeps what it makes for one backend apart
from what it makes for another, so the answer given while it follows the Python holds for all that comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MARK = "_batchnorm_backend"
"""Attribute of a backend that wants to be shown one step."""


def compiling() -> bool:
    """Whether what runs here is being followed by ``torch.compile`` or ``torch.export``.

    ``torch.compiler.is_compiling`` says yes in every thread while any of them compiles (torch 2.13). Whoever
    compiles without following Python itself runs it under dispatch modes, and these belong to a thread.
    """
    return torch.compiler.is_compiling() and (
        torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    )


def by_our_backend() -> bool:
    """Whether the Python that asks is being followed by Dynamo for our backend."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except (AttributeError, ImportError):  # another torch: it is shown torch operations
        return False
    while backend is not None and not hasattr(backend, MARK):
        # torch wraps it, in one way for each of its own entrances
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return backend is not None


# asked while the Python is followed, and a constant from then on (torch.compiler.assume_constant_result,
# which imports the compiler)
by_our_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def one_step(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function one step of a graph.

    Parameters
    ----------
    run : callable
        Of z, gamma, beta, residual and others; gives a tensor like z.

    Returns
    -------
    callable
        The same; where a compiler asks for the shape alone, a tensor like z that depends on the four.
    """

    def step(
        z: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, *rest: Any
    ) -> Tensor:
        if not _is_fake(z):
            return run(z, gamma, beta, residual, *rest)
        y = torch.empty_like(z) * z
        for term in (gamma, beta, residual):
            y = y if term is None else y + term.sum().to(y.dtype)
        return y

    return step


def _is_fake(z: Tensor) -> bool:
    if type(z) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses import FakeTensor

    return isinstance(z, FakeTensor)
