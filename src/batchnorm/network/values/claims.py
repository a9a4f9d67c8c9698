"""What a forward hears when it asks a symbol for its type.

A symbol can't claim to be a tensor by ``__class__``: torch's C++ believes that, reads it as one, and the
interpreter crashes. So the question is answered where Python code asks it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def answering(names: Iterable[str], claim: Callable[[Any], type | None]) -> Iterator[None]:
    """Answer ``isinstance`` in some Python files, and ``torch.is_tensor`` everywhere, for symbols.

    Parameters
    ----------
    names : iterable of str
        Names of the modules (files) whose code asks; those that define an ``isinstance`` are passed over.
    claim : callable
        Gives the type that a symbol stands for; None for everything else.

    Yields
    ------
    None
        Inside, the answers are given.
    """

    def ask(value: Any, kinds: Any) -> bool:
        claimed = claim(value)
        return (claimed is not None and issubclass(claimed, kinds)) or isinstance(value, kinds)

    plain = torch.is_tensor
    wanted = {*names, nn.Module.__module__}
    files = [vars(sys.modules[name]) for name in wanted if name in sys.modules]
    files = [file for file in files if "isinstance" not in file]
    for file in files:
        file["isinstance"] = ask
    torch.is_tensor = lambda obj: ask(obj, torch.Tensor)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.is_tensor = plain
        for file in files:
            file.pop("isinstance", None)
