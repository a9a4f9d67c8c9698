"""How many batches were left out of running statistics, counted beside the layers and not in them.

A count is kept by the memory of the running mean that was spared: it needs no buffer, so that no tool which
copies, prunes, averages, saves or broadcasts a layer's buffers meets one that torch's layer does not have. It is
made at the first batch left out, on the device of that mean, and never waits for the device. Memory that is let
go takes its count along; a copy of a layer begins at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.compiling import compiling
from batchnorm.written import written_down

# by the address of the storage's header, which is not given out again while the weak reference holds it
_counts: dict[tuple[int, int], tuple[StorageWeakRef, Tensor]] = {}

_library = torch.library.Library("batchnorm", "FRAGMENT")
_library.define("count_skips(Tensor running_mean, Tensor skipped) -> Tensor")


def count(running_mean: Tensor, skipped: Tensor) -> Tensor:
    """Count a batch, if any of its channels was left out.

    Use what comes out, which is ``skipped``: in a graph nothing else is sure to have been counted.
    """
    if written_down():
        return skipped
    if compiling():
        # a captured graph of an accelerator may not touch memory that it does not know
        return torch.ops.batchnorm.count_skips(running_mean, skipped) if running_mean.is_cpu else skipped
    if type(running_mean) is Tensor and not running_mean.is_meta:
        counter(running_mean).add_(skipped.any())
    return skipped


def count_one(running_mean: Tensor) -> None:
    """Count a batch of which an engine found that a channel was left out."""
    counter(running_mean).add_(1)


def counted(running_mean: Tensor | None) -> int:
    """Give the count; this waits for the device."""
    if running_mean is None or running_mean.is_meta:
        return 0
    weak, batches = _counts.get(_key(running_mean), (None, None))
    return 0 if weak is None or weak.expired() else int(batches)  # type: ignore[arg-type]


def forget(running_mean: Tensor | None) -> None:
    """Begin at 0 again: the statistics are others now."""
    if running_mean is not None and _counts:
        _counts.pop(_key(running_mean), None)


def _key(running_mean: Tensor) -> tuple[int, int]:
    # an ensemble's means lie in one memory, and each has a count of its own
    return running_mean.untyped_storage()._cdata, int(running_mean.storage_offset())


def counter(running_mean: Tensor) -> Tensor:
    """Give the count itself, to be raised where the statistics are."""
    key = _key(running_mean)
    if key not in _counts:
        for gone in [k for k, (weak, _) in _counts.items() if weak.expired()]:
            del _counts[gone]
        with torch.inference_mode(False):
            batches = torch.zeros((), dtype=torch.long, device=running_mean.device)
        _counts[key] = (StorageWeakRef(running_mean.untyped_storage()), batches)
    return _counts[key][1]


def _count_skips(running_mean: Tensor, skipped: Tensor) -> Tensor:
    # it does not ask whether something is compiled: another thread's compilation says yes here too
    counter(running_mean).add_(skipped.any())
    return skipped.clone()


_library.impl("count_skips", _count_skips, "CompositeExplicitAutograd")
torch.library.register_fake(
    "batchnorm::count_skips", lambda running_mean, skipped: torch.empty_like(skipped), lib=_library
)
