"""What a batch told about itself under ``torch.func``, as plain tensors outside every transform.

Under ``grad``, ``jvp`` or ``vmap`` a tensor is a stack of wrappers, and torch forbids writing such a value
into a buffer that the transform has not seen. The values themselves lie under the wrappers: a derivative
does not change them, and ``vmap`` only adds an axis. So statistics are taken out of the wrappers and move
the running ones outside the transform, example by example, as a loop over the examples would; a batch that
is the same for every example counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from batchnorm.population import Tracking


class _Bare(NamedTuple):
    """A tensor without wrappers, and the axis that each level of vmap added to it."""

    value: Tensor
    axes: dict[int, int]

    def at(self, example: dict[int, int]) -> Tensor:
        value = self.value
        # from the last axis to the first, so that what is left keeps its place
        for level, axis in sorted(self.axes.items(), key=lambda item: -item[1]):
            value = value.select(axis, example[level])
        return value


def transforming(mean: Tensor) -> bool:
    """Whether a transform of ``torch.func`` is in force that forbids writing to buffers it has not seen.

    Parameters
    ----------
    mean : Tensor
        A statistic of the batch.

    Returns
    -------
    bool
        True in ``grad``, ``vjp``, ``jvp``, ``vmap`` and what is made of them; False in ``functionalize``,
        which follows writes.
    """
    return torch._C._are_functorch_transforms_active() and not _functorch.is_functionaltensor(mean)


def examples(
    tracking: Any, told: list[tuple[int | Tensor, Tensor, Tensor]]
) -> Iterator[tuple[Any, list[tuple[int | Tensor, Tensor, Tensor]]]]:
    """Give, for each example of every ``vmap`` in force, what it told, and the buffers it is to move.

    To be used up inside `outside`.

    Parameters
    ----------
    tracking : Tracking or object
        Buffers that may themselves be wrapped, as those of an ensemble are; anything else is passed on.
    told : list of (count, mean, var)
        Statistics, wrapped.

    Yields
    ------
    tracking : Tracking or object
        Views of the buffers of one example.
    told : list of (count, mean, var)
        Plain tensors.
    """
    buffers = [t for t in tracking if isinstance(t, Tensor)] if isinstance(tracking, Tracking) else []
    everything = [t for part in told for t in part if isinstance(t, Tensor)] + buffers
    bare = {id(t): _bare(t) for t in everything}
    sizes = {level: b.value.shape[axis] for b in bare.values() for level, axis in b.axes.items()}
    levels = sorted(sizes)
    for indices in product(*(range(sizes[level]) for level in levels)):
        example = dict(zip(levels, indices, strict=True))

        def plain(value: Any, example: dict[int, int] = example) -> Any:
            return bare[id(value)].at(example) if isinstance(value, Tensor) else value

        parts = [(plain(count), plain(mean), plain(var)) for count, mean, var in told]
        yield Tracking(*map(plain, tracking)) if buffers else tracking, parts


@contextmanager
def outside() -> Iterator[None]:
    """Run a ``with`` block outside every transform of ``torch.func``, and record no derivative in it.

    Yields
    ------
    None
        Nothing.
    """
    with temporarily_clear_interpreter_stack(), torch.no_grad(), _set_fwd_grad_enabled(False):
        yield


def bare(tensor: Tensor) -> Tensor:
    """Give a tensor without the wrappers that transforms put around it.

    Parameters
    ----------
    tensor : Tensor
        Wrapped or not.

    Returns
    -------
    Tensor
        What lies under the wrappers; ``vmap`` has added an axis to it.
    """
    return _bare(tensor).value


def _bare(tensor: Tensor) -> _Bare:
    axes: dict[int, int] = {}
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            added = _functorch.maybe_get_bdim(tensor)
            axes = {level: axis + (axis >= added) for level, axis in axes.items()}
            axes[_functorch.maybe_get_level(tensor)] = added
        tensor = _functorch.get_unwrapped(tensor)
    return _Bare(tensor.detach(), axes)
