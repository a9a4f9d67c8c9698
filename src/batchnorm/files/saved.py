"""A changed network into a file: a state dict, an exported program, or ONNX."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, TraceError
from batchnorm.files.opened import Opened, inputs_of, quiet
from batchnorm.network.inputs import copied, run
from batchnorm.network.layers.convert import convert
from batchnorm.network.made_up_inputs import guesses

PROGRAM, ONNX = ".pt2", ".onnx"
_ONNX_NEEDS = ("onnx", "onnxscript")


def check_kind(path: Path) -> None:
    """Make sure, before the work begins, that a file of this kind can be written.

    Parameters
    ----------
    path : Path
        Its suffix says the kind.

    Raises
    ------
    ArgumentError
        ``.onnx``, and a package that it needs is missing.
    """
    missing = [name for name in _ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if path.suffix.lower() == ONNX and missing:
        raise ArgumentError(
            f"{path}: ONNX is written with {' and '.join(missing)}, which are not installed.",
            mend=f"pip install {' '.join(missing)}; or a name that ends in .pt2 for an exported program.",
        )


def save_network(opened: Opened, model: nn.Module, path: Path) -> str:
    """Write a changed network: a program in eval mode, ONNX, or a state dict, as the suffix says.

    Parameters
    ----------
    opened : Opened
        What it was made from.
    model : Module
        The changed network.
    path : Path
        Where to; ``.pt2`` is a program, ``.onnx`` ONNX, anything else a state dict.

    Returns
    -------
    str
        What was written, for the reader; and the input that was made up, where one was.

    Raises
    ------
    ArgumentError
        A program or ONNX is asked for, and no input of the network is known.
    TraceError
        torch cannot export the network.
    """
    suffix = path.suffix.lower()
    if suffix not in (PROGRAM, ONNX):
        _write(path, lambda file: torch.save(model.state_dict(), file))
        return "state dict"
    args, kwargs, dynamic, note = opened.args, opened.kwargs or {}, opened.dynamic, ""
    # with torch's own norms, so that whoever loads it needs nothing else
    plain = convert(copied(model), "torch").eval()
    if not args and not kwargs:
        made = _made_up(plain)
        if made is None:
            raise ArgumentError(
                "a program can be written only with an input of the network, and none is known.",
                mend="--shape 1,3,224,224, or a name that ends in neither .pt2 nor .onnx for a state dict.",
            )
        args, kwargs = ((), dict(made)) if isinstance(made, dict) else ((made,), {})
        dynamic = _open_batch(args, kwargs)
        note = f"; without --shape an input of shape {_shapes(args, kwargs)} was made up"
    with quiet("torch.export", "torch.onnx", "onnxscript"):
        try:
            program = torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic)
            if suffix == ONNX:
                _save_onnx(program, path)
            else:
                _write(path, lambda file: torch.export.save(program, file))
        except OSError:
            raise
        except Exception as error:
            # torch raises a kind of its own for each thing that cannot be exported
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TraceError(
                f"torch cannot export {type(model).__name__} as {suffix}: {type(error).__name__}.",
                why=reason.strip()[:200],
                mend="a name that ends in neither .pt2 nor .onnx, for a state dict.",
            ) from error
    if note:
        note += ", and the size of the batch is " + ("open" if _batch_is_open(program) else "fixed by it")
    return f"{'ONNX' if suffix == ONNX else 'exported program'}{note}"


def _made_up(model: nn.Module) -> Any:
    """An input that a network in eval mode accepts; None where none is found."""
    for guess in guesses(model):
        with contextlib.suppress(Exception), torch.no_grad():
            run(model, guess, "batchnorm")
            return guess
    return None


def _open_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask for a batch of any size, where the network allows it; every other size is as in the input."""

    def first_axis(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None

    if kwargs:
        return {name: first_axis(value) for name, value in kwargs.items()}
    return tuple(first_axis(value) for value in args)


def _batch_is_open(program: torch.export.ExportedProgram) -> bool:
    tensors = [v for v in inputs_of(program) if isinstance(v, Tensor) and v.ndim]
    return bool(tensors) and all(isinstance(v.shape[0], torch.SymInt) for v in tensors)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    values = [*args, *kwargs.values()]
    return " and ".join(str(tuple(v.shape)) for v in values if isinstance(v, Tensor))


def _save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    import onnx

    made = torch.onnx.export(program, dynamo=True, verbose=False)
    if made is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    onnx.checker.check_model(made.model_proto)
    _write(path, lambda file: onnx.save_model(made.model_proto, file))


def _write(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Save into memory, then into the file: torch's own writer ends the process when a disk is full."""
    file = io.BytesIO()
    save(file)
    path.write_bytes(file.getbuffer())
