"""Networks in files, opened: an exported program as a network of modules; no code of a file is run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.errors import ArgumentError, DataError

_PT2 = ".pt2"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_CONVOLUTIONS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: dict[str, Any] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass
class Opened:
    """A network from a file or a factory, with an input for it.

    Parameters
    ----------
    model : Module
        The network.
    args, kwargs : tuple, dict
        An input; empty where none is known.
    dynamic : object
        Sizes of the inputs that may vary, as ``torch.export.export`` takes them.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    dynamic: Any = None

    @property
    def example(self) -> Any:
        """The input as the tools of this package take it; None where none is known."""
        return self.kwargs or self.args or None


def open_network(source: str, *, weights: Path | None = None, shape: tuple[int, ...] = ()) -> Opened:
    """Open a network for a tool.

    Parameters
    ----------
    source : str
        ``module:factory``, a function or class to be called without arguments, importable from the current
        folder; or an exported program (``.pt2``).
    weights : Path, optional
        A state dict for the factory's network, read with ``weights_only=True``.
    shape : tuple of int, optional
        Shape of one input, when the tool needs one and the file has none.

    Returns
    -------
    Opened
        The network, and an input where one is known.

    Raises
    ------
    ArgumentError
        ``source`` is neither of the two, or the factory makes no network.
    DataError
        A file that cannot be read, or that could be read only by running code that it holds.
    """
    if source.endswith(_PT2):
        if weights is not None:
            raise ArgumentError("a .pt2 file brings its weights.", mend="leave --weights out.")
        return _open_program(Path(source))
    model = _made(source)
    if weights is not None:
        state = _read(weights)
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise DataError(f"{weights} does not fit the network of {source}: {error}") from error
    if shape:
        return Opened(model, (torch.randn(shape),))
    return Opened(model)


def raised(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a network whose layers are modules, so that the tools can change them.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        As ``torch.export`` makes it; not changed.

    Returns
    -------
    torch.fx.GraphModule
        Convolutions, linear maps and batch norms of the program are modules of ``torch.nn``, at the paths of
        their weights; everything else is as it was.
    """
    # the checks of sizes that a program brings are code made from text in the file
    options = (
        {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    )
    network = program.module(**options)
    for node in list(network.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.removeprefix("aten::")
            bound = _bound(node)
            made, data = _module_for(network, name, bound)
            if made is not None:
                path = _at(bound["weight"] if bound.get("weight") is not None else bound["running_mean"])
                _call_module(network, node, path, made, data)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _open_program(path: Path) -> Opened:
    _there(path)
    with _no_code():
        try:
            program = torch.export.load(path)
        except Exception as error:
            # whatever a damaged or hostile file brings about
            raise DataError(
                f"{path}: no exported program that can be read without running code from it.",
                why=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            ) from error
    args, kwargs = program.example_inputs or ((), {})
    return Opened(raised(program), tuple(args), dict(kwargs), _dynamic(program, args, kwargs))


def _dynamic(program: torch.export.ExportedProgram, args: Any, kwargs: Any) -> Any:
    """Which sizes of the inputs were left open."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    tensors = [*args, *kwargs.values()]
    if len(values) != len(tensors) or not all(isinstance(v, Tensor) for v in tensors):
        return None
    sizes = [
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(v.shape)
            if isinstance(size, torch.SymInt)
        }
        for v in values
    ]
    if not any(sizes):
        return None
    return (*sizes[: len(args)], *sizes[len(args) :])


def _bound(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def _at(node: Any) -> str:
    return str(node.target).rpartition(".")[0]


def _module_for(network: fx.GraphModule, name: str, given: dict[str, Any]) -> tuple[nn.Module | None, Any]:
    """The module that computes what an operation does, and its input; None for any other."""

    names = ("weight", "bias", "running_mean", "running_var")
    vectors = {k: _tensor(network, given[k]) for k in names if k in given}
    if any(given.get(k) is not None and v is None for k, v in vectors.items()):
        return None, None
    weight, bias = vectors.get("weight"), vectors.get("bias")
    made: nn.Module
    if name == "linear" and weight is not None:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif name in _CONVOLUTIONS and weight is not None and not isinstance(given["padding"], str):
        made = _CONVOLUTIONS[name](
            weight.shape[1] * given["groups"],
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=_wide(given["stride"], weight),
            padding=_wide(given["padding"], weight),
            dilation=_wide(given["dilation"], weight),
            groups=given["groups"],
            bias=bias is not None,
            device="meta",
        )
    elif name in _TRANSPOSED and weight is not None:
        made = _TRANSPOSED[name](
            weight.shape[0],
            weight.shape[1] * given["groups"],
            tuple(weight.shape[2:]),
            stride=_wide(given["stride"], weight),
            padding=_wide(given["padding"], weight),
            output_padding=_wide(given["output_padding"], weight),
            groups=given["groups"],
            bias=bias is not None,
            dilation=_wide(given["dilation"], weight),
            device="meta",
        )
    elif name == "batch_norm" and vectors["running_mean"] is not None and not given["training"]:
        value = given["input"].meta.get("val")
        kind = _NORMS.get(value.ndim) if value is not None else None
        if kind is None:
            return None, None
        mean = vectors["running_mean"]
        made = kind(mean.numel(), given["eps"], given["momentum"], weight is not None, device="meta")
        made._buffers.update(running_mean=mean, running_var=vectors["running_var"])
        made.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    else:
        return None, None
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            made._parameters[key] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            )
        else:
            made._parameters[key] = None
    return made.eval(), given["input"]


def _wide(value: Any, weight: Tensor) -> tuple[int, ...]:
    values = tuple(value)
    return values * (weight.ndim - 2) if len(values) == 1 else values


def _tensor(network: fx.GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    holder, _, name = str(node.target).rpartition(".")
    found = getattr(network.get_submodule(holder), name, None)
    return found if isinstance(found, Tensor) else None


def _call_module(network: fx.GraphModule, node: fx.Node, path: str, made: nn.Module, data: Any) -> None:
    parent, _, name = path.rpartition(".")
    holder = network.get_submodule(parent)
    before = holder._modules.get(name)
    if before is not None and type(before) is type(made) and repr(before) == repr(made):
        pass  # the same layer, called once more
    elif before is not None and type(before) is not nn.Module:
        return  # one weight under two operations: the second stays as it is
    else:
        for child, module in (before._modules if before is not None else {}).items():
            made.add_module(child, module)
        made.training = False
        setattr(holder, name, made)
    with network.graph.inserting_before(node):
        call = network.graph.call_module(path, (data,))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    network.graph.erase_node(node)


def _made(source: str) -> nn.Module:
    home, _, factory = source.partition(":")
    if not factory:
        raise ArgumentError(
            f"{source!r} is neither module:factory nor a .pt2 file.",
            mend="e.g. models:resnet18 for the function resnet18 in models.py; it is imported, and so runs.",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(home), factory)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"{source!r} cannot be imported: {error}") from error
    except Exception as error:
        raise _theirs(f"importing {home}", error) from error
    if not callable(function):
        raise ArgumentError(
            f"{source!r} is a {type(function).__name__}, and nothing that can be called.",
            mend="name a function or class that makes the network.",
        )
    needed = _needed(function)
    if needed:
        raise ArgumentError(
            f"{source!r} needs arguments: {', '.join(needed)}.",
            why="a factory is called without any.",
            mend=f"write a function without arguments that calls {factory} with them, and name that.",
        )
    try:
        made = function()
    except Exception as error:
        raise _theirs(source, error) from error
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{source!r} makes a {type(made).__name__}, and no torch.nn.Module.")
    return made


def _needed(function: Any) -> list[str]:
    """Names of the parameters without which a function cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it will say so itself
        return []
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _theirs(what: str, error: Exception) -> ArgumentError:
    """An error of the user's own code, with the line it was raised at."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ArgumentError(f"{what} raised {type(error).__name__}: {error}", at=at)


def _there(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'not there'}.", mend="check the name.")


def _read(path: Path) -> Any:
    _there(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{path}: no state dict that can be read without running code from it.",
            why=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            mend="save model.state_dict() rather than the model.",
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise DataError(
            f"{path} holds a {type(state).__name__}, and no state dict.",
            why="a state dict maps names to tensors.",
            mend="torch.save(model.state_dict(), path).",
        )
    return state


@contextlib.contextmanager
def _no_code() -> Iterator[None]:
    """Let ``torch.load`` read tensors and plain data alone, whatever its caller asks for."""
    before, loud = os.environ.get(_FORCE), logging.getLogger("torch.export")
    level = loud.level
    os.environ[_FORCE] = "1"
    loud.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loud.setLevel(level)
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
