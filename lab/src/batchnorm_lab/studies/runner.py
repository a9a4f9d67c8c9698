"""Run studies by name: records, figures and answers into a folder, progress and answers to the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from batchnorm.cli.outputs import check_file, check_folder
from batchnorm.errors import ArgumentError, DataError
from batchnorm_lab.data import ImageData, load
from batchnorm_lab.studies import figures, page
from batchnorm_lab.studies.contract import Outcome, Record, Study
from batchnorm_lab.studies.records import RecordFile
from batchnorm_lab.studies.registry import choose

__all__ = ["Outcome", "outcome_of_folder", "run_studies"]

# Test images that are looked at; accuracies of larger data sets are known well enough from so many.
TEST_IMAGES: dict[str, int | None] = {"quick": 600, "default": 2000, "full": None}


def run_studies(
    names: Iterable[str],
    *,
    quick: bool = False,
    full: bool = False,
    data: str = "digits",
    data_dir: str | Path | None = None,
    html: str | Path | None = None,
    out: str | Path = "studies",
    markdown: str | Path | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Run studies, write what they found, and print their answers.

    Parameters
    ----------
    names : iterable of str
        Names of `batchnorm_lab.studies.STUDIES`, or "all".
    quick, full : bool, default False
        Seconds, to see that all works; or long. Neither is the default, minutes a study.
    data : {"digits", "mnist", "mnist-sample", "cifar10"}, default "digits"
        What to learn from.
    data_dir : path or None, default None
        Where the files of "mnist" or "cifar10" are.
    html : path or None, default None
        Write one self-contained report of these studies there.
    out : path, default "studies"
        Folder of records (``NAME.jsonl``) and figures (``NAME.svg``, ``NAME.png``). Runs that are
        recorded there already, with the same settings and data, are not run again.
    markdown : path or None, default None
        Write the report as Markdown there, which links to the figures in ``out``.
    console : rich.console.Console or None
        Where to print; None is the terminal.

    Returns
    -------
    list of Outcome
        One a study, in the order of `batchnorm_lab.studies.STUDIES`.

    Raises
    ------
    ArgumentError
        An unknown study, quick and full at once, or a data set that can't be.
    DataError
        Files of data or of records that can't be read.

    Examples
    --------
    >>> from batchnorm_lab.studies import run_studies
    >>> outcomes = run_studies(["identity-recovery"], quick=True, out="studies")  # doctest: +SKIP
    """
    if quick and full:
        raise ArgumentError(
            "run_studies: quick and full were both given.",
            why="one is seconds, the other is hours.",
            mend="give one of them, or none for the default.",
        )
    studies = choose(names)
    level = "quick" if quick else "full" if full else "default"
    images = load(data, data_dir)
    images = images.subset(test=TEST_IMAGES[level])
    console = console or Console()
    folder = Path(out)
    check_folder(folder)
    for report_file in (html, markdown):
        if report_file is not None:
            check_file(Path(report_file))
    outcomes = []
    with _progress(console) as progress:
        whole = progress.add_task("all studies", total=len(studies), visible=len(studies) > 1)
        for done, study in enumerate(studies):
            task = progress.add_task(study.name, total=1.0)

            def report(share: float, task: Any = task, done: int = done) -> None:
                progress.update(task, completed=share)
                progress.update(whole, completed=done + share)

            outcomes.append(_run(study, level, images, folder, report))
            progress.update(task, completed=1.0)
            _say(console, outcomes[-1])
    if html is not None:
        page.write_html(outcomes, Path(html))
        console.print(f"report: {html}", highlight=False)
    if markdown is not None:
        page.write_markdown(outcomes, Path(markdown))
        console.print(f"report: {markdown}", highlight=False)
    console.print(f"records and figures: {folder}", highlight=False)
    return outcomes


def outcome_of_folder(study: Study, folder: Path) -> Outcome:
    """Return the outcome of a study from its records alone, with its figure drawn again.

    Parameters
    ----------
    study : Study
        Which.
    folder : path
        Holds ``NAME.jsonl``.

    Returns
    -------
    Outcome
        As `run_studies` gave it, of the longest level whose runs are all there.

    Raises
    ------
    DataError
        No level is complete.
    """
    path = folder / f"{study.name}.jsonl"
    stored = RecordFile(path)
    sources = {json.dumps(record["data"]): record["data"] for record in stored.all()}
    for level in ("full", "default", "quick"):
        settings = [setting for unit in study.units(study.config(level)) for setting in unit.settings]
        for about in sources.values():
            keys = [study.key(setting, about) for setting in settings]
            if all(key in stored for key in keys):
                return _outcome(study, level, [stored[key] for key in keys], folder)
    raise DataError(
        f"{path} holds no complete set of records ({len(stored)} runs).",
        why="figures and answers are made of all runs of a level.",
        mend=f"batchnorm study {study.name} --out {folder}",
    )


def _run(study: Study, level: str, data: ImageData, folder: Path, report: Any) -> Outcome:
    path = folder / f"{study.name}.jsonl"
    records = study.run(study.config(level), data=data, path=path, progress=report)
    return _outcome(study, level, records, folder)


def _outcome(study: Study, level: str, records: list[Record], folder: Path) -> Outcome:
    svg, png = figures.save(study.plot(records), folder / study.name)
    return Outcome(study, level, records, study.answer(records), folder / f"{study.name}.jsonl", svg, png)


def _say(console: Console, outcome: Outcome) -> None:
    """Print an answer, one line for each of its statements."""
    console.print(f"\n[bold]{outcome.study.name}[/bold]: {outcome.study.question}", highlight=False)
    for finding in outcome.answer.findings:
        outcome_text = f"[bold]{finding.verdict}[/bold]; " if finding.verdict else ""
        text = escape(f"{finding.text} ({finding.claim})" if finding.claim else finding.text)
        console.print(f"  {escape(finding.statement)}: {outcome_text}{text}", highlight=False)
    console.print(f"  {escape(page.remarks(outcome.answer))}", highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<27}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
