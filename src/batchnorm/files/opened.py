"""Networks in files, opened; no code of a file is run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, DataError
from batchnorm.files.program import raised

_PT2 = ".pt2"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


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
    values, tensors = inputs_of(program), [*args, *kwargs.values()]
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


def inputs_of(program: torch.export.ExportedProgram) -> list[Any]:
    """Give the fake tensors that stand for a program's inputs.

    Parameters
    ----------
    program : ExportedProgram
        Any.

    Returns
    -------
    list
        In order.
    """
    names = set(program.graph_signature.user_inputs)
    return [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]


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
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with quiet("torch.export"):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep what torch's exporters say to their developers from the terminal.

    Parameters
    ----------
    *names : str
        Of loggers.
    """
    loud = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
