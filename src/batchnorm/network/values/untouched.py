"""Put back what a forward leaves on its modules while it is followed with symbols."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def same_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that a forward registers while it is looked at.

    A model that registers hooks at its first call, and notes it in an attribute, would have them twice where
    the attribute alone is put back.

    Parameters
    ----------
    model : torch.nn.Module
        Its hooks, and those of every module in it, are on leaving what they were.
    """
    tables = [m.__dict__[name] for m in model.modules() for name in _HOOKS if name in m.__dict__]
    saved = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, before in saved:
            if table != before:
                table.clear()
                table.update(before)


@contextmanager
def untouched(model: nn.Module) -> Iterator[dict[int, str]]:
    """Put back every attribute that a forward sets on a module while it is being followed.

    Parameters
    ----------
    model : torch.nn.Module
        Everything in it is put back on leaving, exceptions or not.

    Yields
    ------
    dict
        Filled on leaving: ids of proxies' nodes that a module kept, with the attribute's name.
    """
    kept: dict[int, str] = {}
    plain = ("_parameters", "_buffers", "_modules")
    modules = list(model.modules())
    saved = [(m, dict(m.__dict__), [dict(m.__dict__[name]) for name in plain]) for m in modules]
    inside = [
        (value, value.copy())
        for _, attributes, _ in saved
        for name, value in attributes.items()
        if type(value) in (list, dict, set) and not name.startswith("_")
    ]

    def note(value: Any, name: str) -> None:
        if issubclass(type(value), fx.Proxy):
            kept[id(value.node)] = name
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                note(item, name)
        elif isinstance(value, dict):
            for item in value.values():
                note(item, name)

    try:
        with same_hooks(model):
            yield kept
    finally:
        for m, attributes, tables in saved:
            for name, value in m.__dict__.items():
                if attributes.get(name) is not value:
                    note(value, name)
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for name, table in zip(plain, tables, strict=True):
                current = m.__dict__[name]
                if (
                    list(current.items()) != list(table.items())
                    if name == "_modules"
                    else any(current.get(k) is not v for k, v in table.items()) or len(current) != len(table)
                ):
                    for value in current.values():
                        note(value, name)
                    current.clear()
                    current.update(table)
        for value, before in inside:
            if len(value) != len(before) or any(issubclass(type(item), fx.Proxy) for item in value):
                note(value, "a list or dictionary")
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)


def snapshot(args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """Copy the lists and dictionaries among arguments, which a forward may append to.

    Parameters
    ----------
    args, kwargs : tuple, dict
        Arguments of a forward.

    Returns
    -------
    list of tuple
        Each container with its copy.
    """
    found: list[tuple[Any, Any]] = []

    def look(tree: Any) -> None:
        if type(tree) is list:
            found.append((tree, list(tree)))
            for item in tree:
                look(item)
        elif isinstance(tree, dict) and type(tree) is dict:
            found.append((tree, dict(tree)))
            for item in tree.values():
                look(item)
        elif type(tree) is tuple:
            for item in tree:
                look(item)

    look(args)
    look(kwargs)
    return found


def put_back(held: list[tuple[Any, Any]]) -> None:
    """Give containers the content that they had.

    Parameters
    ----------
    held : list of tuple
        From :func:`snapshot`.
    """
    for tree, copy in held:
        if isinstance(tree, list):
            tree[:] = copy
        else:
            tree.clear()
            tree.update(copy)
