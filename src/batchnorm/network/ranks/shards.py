"""Calibration over ranks: each has a shard of the data, and all end with the statistics of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm.distributed.calls import Call
from batchnorm.distributed.conversation import Conversation, conversation
from batchnorm.distributed.groups import Names, find, initialised, members, names_of
from batchnorm.distributed.merge import add_up, merge_statistics
from batchnorm.errors import ArgumentError, PoolingError
from batchnorm.network.ranks.together import together


class Meter(Protocol):
    """What a layer saw on this rank; `batchnorm.network.statistics.calibrate` has them."""

    path: str
    estimator: str
    groups: Names | None
    calls: int
    count: Tensor
    mean: Tensor
    spread: Tensor
    var_weight: Tensor
    skipped: Tensor


class Shards:
    """The ranks that calibrate together.

    Layers that pool are measured step by step on what all ranks have, for that is what they normalize with.
    The others are measured by each rank on its own, and merged in one message at the end.

    Parameters
    ----------
    meters : sequence of Meter
        Of the layers that are measured; the same on every rank.
    group : None, str, ProcessGroup
        The ranks; None takes those of the layers that pool, and nobody where none does.
    """

    def __init__(self, meters: Sequence[Meter], group: Any) -> None:
        pooling = [meter for meter in meters if meter.groups is not None]
        names = names_of(group) if group is not None else pooling[0].groups if pooling else None
        self._meters, self._in_step, self._told = meters, bool(pooling), False
        self._names: Names = names or ()
        self._talk: Conversation | None = None
        self.first = True
        if not names or not initialised():
            return
        if len(names) > 1:
            raise ArgumentError(
                f"calibrate: {len(names)} groups, one level after the other.",
                why="who has data, and who failed, is asked in one.",
                mend="group=: the group of all ranks that calibrate together.",
            )
        whole = find(names[0])
        if whole.size() == 1:
            return
        self._talk, self.first = conversation(whole), whole.rank() == 0
        apart = [meter.path for meter in meters if meter.groups is None and meter.estimator == "moving"]
        if apart:
            raise ArgumentError(
                "calibrate: estimator='moving' over ranks, for a layer that does not pool.",
                why="a moving average has an order, and the batches of different ranks have none.",
                mend="estimator='pooled' or 'average'; or synchronize(model) first: then ranks step together.",
                at=apart[0],
            )

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Give this rank's batches; and empty ones, while others have more and layers pool.

        Parameters
        ----------
        batches : iterable
            Of this rank.

        Yields
        ------
        object
            Batches.
        """
        if self._talk is None or not self._in_step:
            yield from batches
            return
        try:
            yield from together(batches, self._names[0])
        except Exception:
            # it has told the others
            self._told = True
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on.

        Parameters
        ----------
        error : BaseException
            Why.
        """
        if self._talk is not None and not self._told and isinstance(error, Exception):
            if not isinstance(error, PoolingError):
                self._talk.refuse(Call("calibrate", "failed", 0, ""), f"{type(error).__name__}: {error}")
            self._told = True

    def merge(self, batches: int) -> int:
        """Merge what the ranks saw into every rank's meters, exactly, and with the same bits.

        Parameters
        ----------
        batches : int
            How many this rank had.

        Returns
        -------
        int
            How many all ranks had.
        """
        if self._talk is None:
            return batches
        apart = [meter for meter in self._meters if meter.groups is None]
        where = apart[0].mean.device if apart else torch.device("cpu")
        numbers = [torch.tensor([batches, *(m.calls for m in apart)], dtype=torch.float64, device=where)]
        for m in apart:
            numbers += [
                v.to(where, torch.float64) for v in (m.count, m.mean, m.spread, m.var_weight, m.skipped)
            ]
        paths = ", ".join(f"{m.path}:{len(m.mean)}" for m in apart)
        call = Call("calibrate", f"end, {apart[0].estimator if apart else ''}, {paths}", 0, "")
        rows = self._talk.rows(call, torch.cat(numbers))
        counts = add_up(rows[:, : 1 + len(apart)]).tolist()
        at = 1 + len(apart)
        for m, calls in zip(apart, counts[1:], strict=True):
            c = len(m.mean)
            parts = rows[:, at : at + 5 * c].to(m.mean.device).view(-1, 5, c)
            at += 5 * c
            _merge(m, *(parts[:, i] for i in range(5)))
            m.calls = int(calls)
        return int(counts[0])


def _merge(
    meter: Meter, count: Tensor, mean: Tensor, spread: Tensor, var_weight: Tensor, skipped: Tensor
) -> None:
    meter.skipped = add_up(skipped).to(meter.skipped.dtype)
    if meter.estimator == "pooled":
        meter.count, meter.mean, meter.spread = merge_statistics(count, mean, spread)
        return
    tiny = torch.finfo(torch.float64).tiny
    meter.count, meter.var_weight = add_up(count), add_up(var_weight)
    meter.mean = add_up(count * mean) / meter.count.clamp(min=tiny)
    meter.spread = add_up(var_weight * spread) / meter.var_weight.clamp(min=tiny)


def pool(groups: Names, path: str, count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge what one layer sees in one step on all ranks.

    Parameters
    ----------
    groups : tuple of str
        Of the layer.
    path : str
        Its path in the model.
    count, mean, m2 : Tensor, shape (C,)
        Of this rank, float64.

    Returns
    -------
    count, mean, m2 : Tensor, shape (C,)
        Of all ranks.
    """
    total, none = count[0], torch.zeros((), dtype=torch.float64, device=mean.device)
    call = Call(path, "calibrate", len(mean), "float64")
    for group in members(groups):
        total, mean, m2, _, _ = conversation(group).statistics(call, total, mean, m2, none)
    return total.expand_as(mean), mean, m2
