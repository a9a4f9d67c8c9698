"""Validate the docstring of every public object with numpydoc; a part of ``make lint``.

Public is what a user can reach without an underscore and without going into the engine room: the names of
`batchnorm.__all__`, and those of the modules listed here. Inside, a summary is enough, and must be there.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

from numpydoc.validate import validate

import batchnorm
import batchnorm_lab

PUBLIC = (
    "batchnorm",
    "batchnorm_lab.data",
    "batchnorm.functional",
    "batchnorm.layout",
    "batchnorm.population",
    "batchnorm.reference",
)
# An extended summary (ES01), a "See Also" (SA01) and an example (EX01) for every last function; the summary
# on the second line (GL01), on one line (SS06); names for several returned values in one row (RT02) and
# descriptions that begin with a symbol of a formula (RT04, PR08). The errors inherit what they take.
BESIDE = {".jax_peer.": "jax", ".triton.": "triton", ".lightning.": "lightning"}
LEFT_OUT = {"ES01", "SA01", "EX01", "GL01", "SS06", "RT02", "RT04", "PR08"}


def named(module: ModuleType) -> Iterator[tuple[str, object]]:
    """What a module offers, with the name to find it by."""
    listed = getattr(module, "__all__", None)
    for key, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        offered = (key in listed) if listed is not None else (own and not key.startswith("_"))
        if offered and (inspect.isclass(value) or inspect.isfunction(value)):
            yield f"{value.__module__}.{value.__qualname__}", value


def public_objects() -> Iterator[str]:
    """Dotted names to validate in full."""
    for name in PUBLIC:
        for dotted, value in named(importlib.import_module(name)):
            if inspect.isclass(value) and issubclass(value, batchnorm.BatchNormError) and value.__bases__[1:]:
                continue
            yield dotted
            if inspect.isclass(value):
                for member, function in vars(value).items():
                    if not member.startswith("_") and inspect.isfunction(function):
                        yield f"{dotted}.{member}"


def without_summary() -> Iterator[str]:
    """Modules, and public names in them, that do not say what they are."""
    walks = (pkgutil.walk_packages(p.__path__, f"{p.__name__}.") for p in (batchnorm, batchnorm_lab))
    for info in itertools.chain(*walks):
        if info.name.endswith(("._core", "__main__")):
            continue  # compiled, or run when imported
        if any(part in f"{info.name}." and not find_spec(need) for part, need in BESIDE.items()):
            continue  # beside a package that need not be installed
        module = importlib.import_module(info.name)
        if not module.__doc__:
            yield info.name
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == info.name and not key.startswith("_")
            if own and (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__:
                yield f"{info.name}.{key}"


def main() -> int:
    """Print what is wrong, and give its number."""
    wrong = [f"{name}: no docstring" for name in without_summary()]
    for dotted in dict.fromkeys(public_objects()):
        errors = [e for e in validate(dotted)["errors"] if e[0] not in LEFT_OUT]
        wrong += [f"{dotted}: {code} {message}" for code, message in errors]
    print("\n".join(wrong) or "docstrings: all valid")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
