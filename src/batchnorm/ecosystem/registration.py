"""Our classes are entered in other libraries' registries: at once, or when the library is imported.

Nothing is imported for it. A registry gets entries for classes that it does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from weakref import WeakSet

from batchnorm.ecosystem.registries import REGISTRIES

_classes: WeakSet[type] = WeakSet()


def announce(cls: type) -> None:
    """Make a class of ours known to every library that is there, and to those that come.

    Parameters
    ----------
    cls : type
        A batch norm of this package, or a class derived from one.
    """
    _classes.add(cls)
    for name, enter in REGISTRIES.items():
        module = sys.modules.get(name)
        if module is not None:
            enter(module, cls)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds what the others find, and enters our classes when a registry has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in REGISTRIES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader, REGISTRIES[name])
                return spec
        return None


class _Then(Loader):
    """Loads as the given loader does, and takes itself away again."""

    def __init__(self, loader: Any, enter: Callable[[ModuleType, type], None]) -> None:
        self._loader, self._enter = loader, enter

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for cls in list(_classes):
            self._enter(module, cls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
