"""Is what a tool was given a network that it can work on; if not, what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import nn

from batchnorm.errors import ArgumentError

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel", "FullyShardedDataParallel")
_PARAMETERS_ONLY = (nn.ParameterList, nn.ParameterDict)


def check_model(model: Any, tool: str, *, at: str = "") -> None:
    """Raise `ArgumentError` unless a tool can look into ``model``.

    Parameters
    ----------
    model : object
        What the tool was given.
    tool : str
        Its name, for the message.
    at : str, optional
        Where ``model`` stands, for the message.

    Raises
    ------
    ArgumentError
        It is no ``torch.nn.Module``, a class rather than an object, holds parameters and no layers, or is
        scripted or traced, or has a scripted or traced part with batch norms.
    """
    if not isinstance(model, nn.Module):
        what, mend = _stranger(model)
        raise ArgumentError(
            f"{tool}: expected a torch.nn.Module, and got {what}.",
            why="a network is looked at through its modules.",
            mend=mend,
            at=at,
        )
    if isinstance(model, _PARAMETERS_ONLY):
        raise ArgumentError(
            f"{tool}: a {type(model).__name__} holds parameters and no layers.",
            why="there is nothing to do, and you expected that there is.",
            mend="give the module that uses these parameters.",
            at=at,
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (path == "" or _has_batch_norms(module)):
            raise ArgumentError(
                f"{tool}: {'the network' if path == '' else 'a part of it'} is scripted or traced.",
                why="its layers are compiled code, which can be run and not be changed or measured.",
                mend=f"call {tool} on the module that it was made from, and script or trace after that.",
                at=path or at,
            )


def check_runs(model: nn.Module, tool: str, forward: Any = None) -> None:
    """Raise `ArgumentError` unless a model can be run for the numbers that it gives.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    tool : str
        Who wants to run it, for the message.
    forward : object, optional
        What the caller gave to run it with.

    Raises
    ------
    ArgumentError
        It has no forward, or Parameters or buffers without values, on the meta device or before a lazy
        layer's first batch.
    """
    if forward is None and type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise ArgumentError(
            f"{tool}: a {type(model).__name__} has no forward.",
            why="the statistics are those of what flows through the network.",
            mend="give the network that holds it; or forward=lambda model, batch: ..., where the tool takes one.",
        )
    check_sized(model, tool)
    for path, module in model.named_modules():
        if any(
            t is not None and t.is_meta for t in (*module._parameters.values(), *module._buffers.values())
        ):
            raise ArgumentError(
                f"{tool}: a layer is on the meta device and has no values yet.",
                why="the network can't be run for numbers.",
                mend="model.to_empty(device=...), then load its values.",
                at=path,
            )


def check_sized(model: nn.Module, tool: str) -> None:
    """Raise `ArgumentError` where a layer waits for its first batch.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    tool : str
        Who asks, for the message.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise ArgumentError(
                f"{tool}: a layer is lazy and has no values yet.",
                why="its sizes are not known before its first batch.",
                mend="run the network on one batch first.",
                at=path,
            )


def _has_batch_norms(scripted: nn.Module) -> bool:
    return any(
        "BatchNorm" in str(getattr(module, "original_name", "")) and hasattr(module, "running_mean")
        for module in scripted.modules()
    )


def _stranger(model: Any) -> tuple[str, str]:
    """What was given in place of a module, and what to give."""
    if isinstance(model, type):
        return f"the class {model.__name__}", f"an object of it: {model.__name__}(...)."
    if model is None:
        return "None", "a network. A function that builds one must return it."
    if isinstance(model, torch.export.ExportedProgram):
        return "an exported program", "program.module(), the module in it."
    if isinstance(model, torch.Tensor):
        return "a Tensor", "the network first, then its input."
    if isinstance(model, (list, tuple, set, dict)):
        return (
            f"a {type(model).__name__}",
            "one call for each network; or torch.nn.Sequential, ModuleList or ModuleDict around the layers.",
        )
    if isinstance(model, str):
        return f"the text {model[:40]!r}", "the network itself; torch.load or a factory gives one."
    if callable(model):
        return f"a {type(model).__name__}", "the module whose forward it calls, or what it returns."
    return f"a {type(model).__name__}", "a network."


def check_number(
    tool: str, name: str, value: Any, wanted: str, good: Callable[[Any], bool], why: str = "", mend: str = ""
) -> None:
    """Raise `ArgumentError` unless an argument is a number in its range.

    Parameters
    ----------
    tool, name : str
        The function and its argument, for the message.
    value : object
        What was given; a bool is no number here.
    wanted : str
        What it must be, for the message, e.g. ``"positive"``.
    good : callable
        Whether a number is in range. NaN should not be.
    why, mend : str, optional
        For the message.

    Raises
    ------
    ArgumentError
        It is no number, or outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not good(value):
        raise ArgumentError(f"{tool}: {name} must be {wanted}, and is {value!r}.", why=why, mend=mend)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of what compiles, distributes or averages it.

    Parameters
    ----------
    model : torch.nn.Module
        Any module.

    Returns
    -------
    torch.nn.Module
        Of a module of ``torch.compile``, DistributedDataParallel, DataParallel, AveragedModel or
        FullyShardedDataParallel the one it holds; any other as it is.
    """
    if hasattr(model, "_orig_mod") and hasattr(model, "dynamo_ctx"):
        return unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if any(kind.__name__ in _WRAPPERS for kind in type(model).__mro__):
        return unwrapped(model.module)  # type: ignore[arg-type]
    return model


def to_change(model: Any, tool: str, inplace: bool) -> nn.Module:
    """The network whose layers a tool is to replace: checked, and out of what is around it.

    Parameters
    ----------
    model : object
        As given.
    tool : str
        Who asks.
    inplace : bool
        As given.

    Returns
    -------
    torch.nn.Module
        The network itself, not copied.

    Raises
    ------
    ArgumentError
        It is no network that can be changed, has lazy layers, or is not whole in this process.
    """
    check_model(model, tool)
    check_whole(model, tool, f"{tool} it before it is sharded")
    inside = unwrapped(model)
    if inplace and inside is not model:
        raise ArgumentError(
            f"{tool}: inplace=True of a {type(model).__name__}.",
            why="what was made of the network, a graph or buckets of gradients, would go on as before.",
            mend="change the network inside, then compile or wrap it again.",
        )
    check_sized(inside, tool)
    return inside


def check_whole(model: nn.Module, tool: str, first: str) -> None:
    """Raise `ArgumentError` where each process holds a part of the network's weights (FSDP).

    Parameters
    ----------
    model : torch.nn.Module
        As given, with what is around it.
    tool : str
        Who asks.
    first : str
        What to do instead, for the message.
    """
    for path, module in model.named_modules():
        if any("FSDP" in kind.__name__ or "FullySharded" in kind.__name__ for kind in type(module).__mro__):
            raise ArgumentError(
                f"{tool}: the network is sharded, and each process holds a part of its weights.",
                why="a layer is copied and changed as a whole.",
                mend=f"{first}, or load its full state dict into a plain one.",
                at=path,
            )


Where = str | Callable[[str, nn.Module], bool] | None
"""Which modules a tool may touch: a pattern for names (``"layer4.*"``), or a predicate on name and module."""


def chooser(where: Where, tool: str) -> Callable[[str, nn.Module], bool]:
    """Give the predicate that ``where=`` stands for.

    Parameters
    ----------
    where : str, callable or None
        A pattern as in a shell; ``where(name, module)``; or None, which is everything.
    tool : str
        Who asks, for the message.

    Returns
    -------
    callable
        Of name and module.

    Raises
    ------
    ArgumentError
        It is none of these.
    """
    if where is None:
        return lambda name, module: True
    if isinstance(where, str):
        pattern = where
        return lambda name, module: fnmatchcase(name, pattern)
    if callable(where):
        return where
    raise ArgumentError(
        f"{tool}: where={where!r} says of no module whether it is meant.",
        mend='where="layer4.*", or where=lambda name, module: ...',
    )
