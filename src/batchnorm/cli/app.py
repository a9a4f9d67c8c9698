"""The commands: those of this package, and those that other packages add."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from batchnorm.cli import network
from batchnorm.errors import BatchNormError

GROUP = "batchnorm.commands"
"""Entry points of this group are commands: the name, and a function whose parameters typer reads."""

LABORATORY = {
    "demo": "A network normalized, trained, used one sample at a time, and folded.",
    "bench": "Time the operator against its peers.",
    "study": "Measure what is claimed of batch normalization.",
}
"""Commands of the package ``batchnorm-lab``, which say how to get it where it is missing."""


def info(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Print versions, engines and threads."""
    from batchnorm.info import sections

    if as_json:
        typer.echo(json.dumps({title: dict(lines) for title, lines in sections().items()}, indent=2))
        return
    drawn = Table("", "", title="batchnorm", show_header=False)
    for title, lines in sections().items():
        drawn.add_section()
        drawn.add_row(f"[bold]{title}[/bold]", "")
        for name, value in lines:
            drawn.add_row(f"  {name}", value)
    Console().print(drawn)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchnorm {metadata.version('batchnorm')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command line itself."""


def build() -> typer.Typer:
    """Gather the commands.

    Returns
    -------
    typer.Typer
        The command line.
    """
    app = typer.Typer(
        name="batchnorm",
        help="Batch normalization for PyTorch: demo, studies, benchmarks, and networks changed by tools.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_show_locals=False,
    )
    app.callback(help=app.info.help)(_options)
    added = {point.name: point for point in metadata.entry_points(group=GROUP)}
    for name in sorted({*LABORATORY, *added}):
        if name in added:
            app.command(name)(added[name].load())
        else:
            _say_how_to_get(app, name)
    app.command()(info)
    network.register(app)
    return app


def _say_how_to_get(app: typer.Typer, name: str) -> None:
    mend = "pip install batchnorm-lab; from a clone of the repository: pip install ./lab"

    def absent(context: typer.Context) -> None:
        typer.echo(f"batchnorm {name} is in the package batchnorm-lab.\n  mend: {mend}", err=True)
        raise typer.Exit(2)

    app.command(
        name,
        help=f"{LABORATORY[name]} In the package batchnorm-lab: {mend}.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(absent)


def run() -> None:
    """Run the command line; an error of ours, or of the system's files, is printed without a traceback."""
    try:
        build()(prog_name="batchnorm")
    except BatchNormError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"{where}{error.strerror or error}", err=True)
        raise SystemExit(2) from None
