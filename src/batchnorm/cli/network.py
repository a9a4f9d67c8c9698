"""Commands that change a network: arguments only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_TOOLS = {
    "fold": "Fold the batch norms of a trained network into its layers, and check the answers.",
    "insert": "Put batch norms between the hidden layers of a network and their nonlinearities.",
}
_SOURCE = "module:factory, which is imported and called, or an exported program (.pt2)."
_OUT = "A program where the name ends in .pt2, ONNX for .onnx, else a state dict."
_WEIGHTS = "State dict for the factory's network; nothing but tensors is read from it."
_SHAPE = "Shape of one input, with commas: 1,3,224,224."


def register(app: typer.Typer) -> None:
    """Add the commands to the command line.

    Parameters
    ----------
    app : typer.Typer
        The command line.
    """
    for tool, what in _TOOLS.items():
        app.command(tool, help=what)(_command(tool))


def _command(tool: str) -> Callable[..., None]:
    def change(
        source: Annotated[str, typer.Argument(help=_SOURCE)],
        out: Annotated[Path, typer.Argument(help=_OUT)],
        weights: Annotated[Path | None, typer.Option(help=_WEIGHTS)] = None,
        shape: Annotated[str, typer.Option(help=_SHAPE)] = "",
    ) -> None:
        _change(tool, source, out, weights, shape)

    return change


def _change(tool: str, source: str, out: Path, weights: Path | None, shape: str) -> None:
    # imported here: --help is not to wait for torch
    import batchnorm
    from batchnorm.cli.outputs import check_file, whole
    from batchnorm.errors import ArgumentError
    from batchnorm.files.opened import open_network
    from batchnorm.files.saved import check_kind, save_network

    try:
        sizes = tuple(int(n) for n in shape.split(",")) if shape else ()
    except ValueError:
        raise ArgumentError(f"--shape {shape!r} is no list of numbers.", mend="e.g. 1,3,224,224.") from None
    if any(size < 1 for size in sizes):
        raise ArgumentError(f"--shape {shape!r} has a size below 1.", mend="e.g. 1,3,224,224.")
    check_kind(out)
    check_file(out)
    opened = open_network(source, weights=weights, shape=sizes)
    changed = getattr(batchnorm, tool)(opened.model, opened.example)
    typer.echo(batchnorm.record(changed))
    with whole(out) as part:
        what = save_network(opened, changed, part)
    typer.echo(f"{out}: {what}")
