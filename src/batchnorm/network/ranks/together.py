"""Loaders of different lengths: a rank that ran out goes on with empty batches until all have run out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from batchnorm.distributed.calls import Call
from batchnorm.distributed.conversation import Conversation, conversation
from batchnorm.distributed.groups import find, initialised, names_of
from batchnorm.errors import ArgumentError, PoolingError

_STEP, _LENGTH, _EXAMPLE = (Call("together", step, 0, "") for step in ("step", "length", "example"))
_MORE, _OVER, _FAILED = 1.0, 0.0, -1.0


class together:
    """Iterate over a loader for as many steps as the longest loader of all ranks has.

    A rank whose loader has ended gets batches without samples, cut from its last one, so that it still takes
    part in every message: of the batch norms, of DDP, of the optimizer. One small message a step says who has
    more.

    The mean of a loss over no samples is NaN. Under ``DistributedDataParallel``, which averages gradients over
    ranks, write the loss as a sum: ``loss = loss_sum * steps.ranks / steps.samples``.

    Parameters
    ----------
    loader : iterable of batches
        This rank's. A batch is a tensor, or a tuple, list or mapping of tensors whose first axis is the sample.
    group : None, str, ProcessGroup
        The ranks; None is all of them.

    Attributes
    ----------
    samples : int
        Samples of all ranks in the step at hand.
    ranks : int
        How many ranks there are.

    Raises
    ------
    PoolingError
        Another rank's loader raised, or a rank left the loop.

    Examples
    --------
    >>> import torch, batchnorm
    >>> steps = batchnorm.together([torch.ones(3, 2), torch.ones(1, 2)])
    >>> [(len(x), steps.samples, steps.ranks) for x in steps]
    [(3, 3, 1), (1, 1, 1)]
    """

    def __init__(self, loader: Iterable[Any], group: Any = None) -> None:
        self._loader, self._names = loader, names_of(group)
        if len(self._names) > 1:
            raise ArgumentError(
                f"together: {len(self._names)} groups were given.",
                why="whether anybody has more is asked in one.",
                mend="give the group of all ranks that train together.",
            )
        self.samples, self.ranks = 0, 1

    def __iter__(self) -> Iterator[Any]:
        group = find(self._names[0]) if initialised() else None
        if group is None or group.size() == 1:
            for batch in self._loader:
                self.samples = samples_of(batch)
                yield batch
            return
        talk, self.ranks = conversation(group), group.size()
        device = _device(group)
        batches, empty, begun = iter(self._loader), None, False
        while True:
            batch, state, failure = None, _OVER, None
            try:
                batch = next(batches)
                state = _MORE
            except StopIteration:
                pass
            except BaseException as error:
                # the others are told before it goes up
                state, failure = _FAILED, error
            count = samples_of(batch) if state == _MORE else 0
            word = torch.tensor([state, count], dtype=torch.float64, device=device)
            rows = talk.rows(_STEP, word).tolist()
            if failure is not None:
                raise failure
            failed = [talk.rank(r) for r, row in enumerate(rows) if row[0] == _FAILED]
            if failed:
                raise PoolingError(
                    f"together: the loader of {', '.join(f'rank {r}' for r in failed)} raised.",
                    why="the loop goes on on all ranks, or on none.",
                    mend="look at that rank's own error.",
                )
            going = [r for r, row in enumerate(rows) if row[0] == _MORE]
            if not going:
                return
            self.samples = int(sum(row[1] for row in rows))
            if not begun and len(going) < len(rows):
                # a rank without any batch does not know what one looks like
                mine = pickle.dumps(empty_like(batch)) if group.rank() == going[0] else b""
                empty = pickle.loads(_told(talk, going[0], mine, device))
            begun = True
            if state == _MORE:
                empty = empty_like(batch)
            yield batch if state == _MORE else empty


class Joining(Joinable):
    """For ``torch.distributed.algorithms.Join``: a rank that has joined runs steps on empty batches.

    ``DistributedDataParallel.join()`` by itself repeats the messages of DDP for a rank that ran out, and knows
    of no others. Here the joined rank runs the step itself, and so sends all of them.

    Parameters
    ----------
    model : Module
        The network, wrapped or not; a forward of it opens a step.
    step : callable
        ``step(batch)``: forward, backward and update on a batch.
    example : batch
        Any batch; what a joined rank gets has no samples.
    group : None, str, ProcessGroup
        The ranks; None is all of them.

    Examples
    --------
    ::

        with Join([batchnorm.Joining(model, step, example)]):
            for batch in loader:
                step(batch)
    """

    def __init__(self, model: nn.Module, step: Callable[[Any], Any], example: Any, group: Any = None) -> None:
        super().__init__()
        self._step, self._empty, self._group = step, empty_like(example), group
        self._model, self._shadowing = model, False
        model.register_forward_pre_hook(self._opens)

    def _opens(self, *_: Any) -> None:
        if self._join_config.enable and not self._shadowing and torch.is_grad_enabled():
            Join.notify_join_context(self)

    def join_hook(self, **options: Any) -> JoinHook:
        """Give what a joined rank does.

        Parameters
        ----------
        **options
            Passed by ``Join``; none is used.

        Returns
        -------
        JoinHook
            Runs a step on an empty batch while others have more.
        """
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """Where ``Join`` counts who has joined."""
        return _device(self.join_process_group)

    @property
    def join_process_group(self) -> Any:
        """The ranks."""
        return find(names_of(self._group)[0])


class _Hook(JoinHook):
    def __init__(self, joining: Joining) -> None:
        self._joining = joining

    def main_hook(self) -> None:
        self._joining._shadowing = True
        try:
            self._joining._step(self._joining._empty)
        finally:
            self._joining._shadowing = False


def _told(talk: Conversation, member: int, mine: bytes, device: torch.device) -> bytes:
    """Give what one member has to say; ``mine`` is empty on the others."""
    length = talk.rows(_LENGTH, torch.tensor([len(mine)], dtype=torch.float64, device=device))[member]
    letters = torch.zeros(int(length), dtype=torch.float64, device=device)
    if mine:
        letters.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    return bytes(talk.rows(_EXAMPLE, letters)[member].to(torch.uint8).tolist())


def samples_of(batch: Any) -> int:
    """Count the samples of a batch.

    Parameters
    ----------
    batch : Tensor, mapping, tuple or list
        Its first tensor has a sample along axis 0.

    Returns
    -------
    int
        0 where there is no tensor.
    """
    first = next(_tensors(batch), None)
    return 0 if first is None else len(first)


def empty_like(batch: Any) -> Any:
    """Give a batch of the same structure without samples.

    Parameters
    ----------
    batch : Tensor, mapping, tuple or list
        What is not one of these, and a tensor without axes, stays as it is.

    Returns
    -------
    object
        Every tensor of it has no row.
    """
    if isinstance(batch, Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return type(batch)((name, empty_like(value)) for name, value in batch.items())  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(empty_like, batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(empty_like, batch))
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _device(group: Any) -> torch.device:
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
