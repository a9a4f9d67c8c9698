"""The methods that Dynamo has read, on their classes: it guards instances, and takes classes for final."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from itertools import repeat
from operator import attrgetter
from typing import Any

from torch import nn
from torch._guards import TracingContext

_CODE = attrgetter("__code__")


class Methods:
    """Methods that were read while some models were compiled: of their modules, and of objects that modules hold."""

    def __init__(self) -> None:
        self._read: set[types.CodeType] = set()
        # class, name and what it named; what that runs, and its code (a notebook's autoreload changes that alone)
        self._watched: tuple[tuple[Any, ...], ...] = ((), (), (), (), ())

    def note(self, models: Iterable[nn.Module]) -> None:
        """Watch what has been read; called while a graph is compiled.

        Parameters
        ----------
        models : iterable of Module
            Whose classes are looked at.
        """
        self._read.update(TracingContext.get_traced_code() or ())
        found = []
        modules = [module for model in list(models) for module in model.modules()]
        held = (value for module in modules for value in list(vars(module).values()))
        for kind in {type(one) for one in (*modules, *held)}:
            seen: set[str] = set()
            for base in kind.__mro__:
                if base is nn.Module:
                    break
                for name, member in vars(base).items():
                    function = _function(member)
                    if name not in seen and function is not None and function.__code__ in self._read:
                        found.append((kind, name, getattr(kind, name, None), function, function.__code__))
                    seen.add(name)
        self._watched = tuple(zip(*found, strict=True)) if found else ((), (), (), (), ())

    def changed(self) -> bool:
        """Whether a class has another method by now than the one that was read."""
        kinds, names, members, functions, codes = self._watched
        return (
            tuple(map(getattr, kinds, names, repeat(None))) != members
            or tuple(map(_CODE, functions)) != codes
        )


def _function(member: Any) -> types.FunctionType | None:
    """What a method, a property or a decorated one runs in the end."""
    member = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if not isinstance(member, types.FunctionType):
        return None
    found = inspect.unwrap(member)
    return found if isinstance(found, types.FunctionType) else None
