"""Training and eval mode of every module of a network, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.network.undo import Undo, set_modes


@contextmanager
def modes(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Set every module's mode, and put each one back on leaving.

    Parameters
    ----------
    model : torch.nn.Module
        The flags are set directly: overridden ``train()`` methods are not called.
    training : bool or None
        The mode; None leaves every module as it is.

    Yields
    ------
    None
        Inside, the mode holds.
    """
    end = Undo(always=True)
    with end, end:
        set_modes(end, model, training)
        yield
