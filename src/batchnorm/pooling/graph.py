"""What stands between the halves of a step where ranks pool, also where a compiler looks on.

The operator of a graph is that of `batchnorm.operators`, which takes a text in place of what pools, and a ticket.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._guards import TracingContext

from batchnorm import operators
from batchnorm.kernels.contract import Norm
from batchnorm.pooling.ranks import RankPooling, pools
from batchnorm.steps import Constants


class _Chain:
    """The last ticket of the graph that is being traced."""

    ticket: Tensor | None = None


_chain = _Chain()
_traced: list[Any] = [lambda: None]


def _begins() -> bool:
    """Whether this is the first pooled step of the graph that is being traced; asked while it is."""
    context = TracingContext.try_get()
    if context is not None and _traced[0]() is context:
        return False
    _traced[0] = (lambda: None) if context is None else ref(context)
    return True


# asked while the Python is followed: torch.compiler.assume_constant_result, which imports the compiler, and triton
_begins._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _between(text: str, eps: float, momentum: float | None) -> Pooling | None:
    # a graph runs: what it left behind holds its saved tensors
    _chain.ticket = None
    made = Pooling.load(text, eps, momentum)
    return made if pools(made.groups) else None


operators.between_of = _between


class Pooling(RankPooling):
    """What stands between the two halves of a step where ranks pool, also where a compiler looks on."""

    def operator(
        self, z: Tensor, norm: Norm, mask: Tensor | None, fallback: Constants | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalize with the statistics of all ranks, as one operator in a graph.

        Parameters
        ----------
        z, norm, mask, fallback
            As for `batchnorm.autograd.normalize_batch`.

        Returns
        -------
        y : Tensor
            Of the shape of ``z``.
        count : Tensor of int64, shape ()
            Values per channel of all ranks; -1 where a checkpoint re-runs the graph, so that nothing moves twice.
        mean, var : Tensor, shape (C,)
            Of all ranks, divisor m.
        """
        # asked in every trace: it takes note of the graph
        begins = _begins()
        ticket = torch.zeros((), device=z.device) if begins else _chain.ticket
        y, count, mean, var, _chain.ticket = operators.training(
            z, norm, mask, fallback, ticket, self.dump(), self.settings.momentum
        )
        return y, count, mean, var
