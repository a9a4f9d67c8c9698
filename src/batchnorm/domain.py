"""Statistics kept apart by domain, under one set of gamma and beta."""

from __future__ import annotations

from functools import partial
from threading import Lock
from types import MethodType
from typing import Any
from weakref import ref

from torch import nn

from batchnorm.compiling import compiling
from batchnorm.errors import ArgumentError

# one for the process, not one a thread: a checkpoint on an accelerator runs forwards again in torch's
# backward thread, and they must see the domain that the first run saw
_active: dict[int, str] = {}
# what takes a domain out of force when the lock of its block is gone
_ties: dict[int, ref[Any]] = {}

_TAKEN = frozenset(dir(nn.ModuleDict()))


def domain(name: str) -> Any:
    """Let every batch norm inside a ``with`` block keep and use the statistics of a named domain.

    Where two kinds of data go through one network (real and generated images, two languages, two image
    sizes), the average of their statistics fits neither. Each domain gets running statistics of its own;
    gamma and beta stay common. Outside any ``with domain`` the layer's own buffers are used, which are
    those that torch.nn would load.

    A domain's statistics begin at mean 0 and variance 1 when a layer first trains in it. They are saved
    with the layer's state, under ``domains.<name>.``. Blocks nest; the innermost counts. The domain in force
    is that of the process: threads that run different domains at the same time disturb each other.
    Ctrl-C, at whatever instant, leaves none in force.

    Parameters
    ----------
    name : str
        The domain; a Python identifier that torch's modules do not use.

    Returns
    -------
    context manager
        For one ``with`` block at a time.

    Raises
    ------
    ArgumentError
        The name is not an identifier, or one like ``train`` that a module has a method of.

    References
    ----------
    Li et al. 2016, arXiv:1603.04779 (adaptive batch normalization); Xie et al. 2020, arXiv:1911.09665
    (auxiliary batch norm).

    Examples
    --------
    >>> import torch, batchnorm
    >>> layer = batchnorm.BatchNorm1d(2, momentum=1.0)
    >>> with batchnorm.domain("fake"):
    ...     _ = layer(torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
    >>> layer.running_mean, layer.domains["fake"].running_mean
    (tensor([0., 0.]), tensor([2., 6.]))
    """
    check_name(name)
    return _Traced(name) if compiling() else _Block(name)


class _Leaving:
    """Gives a ``with`` block its exit, which the block asks for before it begins.

    An exit in Python can be interrupted before its first instruction, and the domain would stay in force. This one is
    the exit of a lock, in C. The block is alone to hold it; with the lock goes the entry in `_active`, in C too.
    """

    def __get__(self, block: _Block | None, kind: type) -> Any:
        if block is None:
            return _leave
        if block.by_hand:
            return MethodType(_leave, block)
        block.lock = Lock()
        block.lock.acquire()
        return block.lock.__exit__


class _Block:
    __exit__ = _Leaving()

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock: Any = None
        self.by_hand: list[Any] = []

    def __enter__(self) -> _Block:
        lock, self.lock = self.lock, None
        if lock is None:  # no `with` asked for an exit: an ExitStack, or who calls the two by hand
            lock = Lock()
            self.by_hand.append(lock)
        place = max(_active, default=-1) + 1
        _ties[place] = ref(lock, partial(_active.pop, place))
        del lock
        _active[place] = self.name
        return self


def _leave(block: _Block, *error: Any) -> None:
    block.by_hand.pop()


class _Traced:
    """A block that compilers and exporters can follow."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> _Traced:
        self.place = len(_active)
        while self.place in _active:
            self.place += 1
        _active[self.place] = self.name
        return self

    def __exit__(self, *error: Any) -> None:
        del _active[self.place]


def active_domain() -> str | None:
    """Give the innermost domain in force.

    Returns
    -------
    str or None
        Its name; None outside every ``with domain``.
    """
    return list(_active.values())[-1] if _active else None


def check_name(name: str) -> None:
    """Raise `ArgumentError` unless a domain can have this name.

    Parameters
    ----------
    name : str
        The domain.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ArgumentError(
            f"domain: {name!r} is not a name.",
            why="it becomes part of the keys in the state dict.",
            mend='letters, digits and underscores, e.g. "fake".',
        )
    if name in _TAKEN:
        raise ArgumentError(
            f"domain: {name!r} is something that every torch module has already.",
            why="the statistics are a module of that name, and torch would find the other.",
            mend=f'another name, e.g. "{name}_data".',
        )
