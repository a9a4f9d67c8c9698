"""Runs the demonstration and tells it on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from batchnorm.cli.outputs import check_folder
from batchnorm_lab.data import load
from batchnorm_lab.demo import report
from batchnorm_lab.demo.measure import STEPS, Story, measure


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: layers this small lose more than they gain from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    figures_apart: bool = False,
    language: str = "en",
    console: Console | None = None,
) -> Path:
    """Run the demonstration, print what it measured, and write the report.

    Parameters
    ----------
    folder : Path
        Where ``report.html`` goes.
    seed : int, optional
        Of weights and order of samples.
    steps : int, optional
        Of each training run.
    figures_apart : bool, optional
        Write each figure as an SVG file as well.
    language : {"en", "ko"}, default "en"
        Of the report.
    console : rich.console.Console, optional
        Where to print; the terminal if None.

    Returns
    -------
    Path
        Of the report.
    """
    console = console or Console()
    check_folder(folder)
    started = time.perf_counter()
    data = load("digits").standardized()
    with Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as bars:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, of: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=of)
            bars.update(tasks[label], completed=done, total=of)

        with one_thread():
            story = measure(data, seed=seed, steps=steps, advance=advance)
    seconds = time.perf_counter() - started
    tell(story, console)
    path = report.write(story, folder, seconds, figures_apart=figures_apart, language=language)
    console.print(f"\n{seconds:.0f} s. Report with figures: [bold]{escape(str(path.resolve()))}[/bold]")
    return path


def tell(story: Story, console: Console) -> None:
    """Print what was measured.

    Parameters
    ----------
    story : Story
        Of this run.
    console : rich.console.Console
        Where to.
    """
    console.rule("1. normalized")
    # as text: rich would show a dataclass field by field
    console.print(str(story.insertion.record), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Inserted into a trained network with its data, answers change by {story.insertion.jump:.1e} at most "
        f"(the largest is {story.insertion.largest_answer:.1f})."
    )
    console.rule("2. trained")
    curves = Table("learning rate", "network", "steps to 95 %", f"accuracy after {story.steps} steps")
    for curve in story.curves:
        reached = str(curve.steps_to_target or "never")
        curves.add_row(
            f"{curve.learning_rate:g} ({curve.factor}x)", curve.name, reached, f"{100 * curve.final:.1f} %"
        )
    console.print(curves)
    console.rule("3. one sample at a time")
    one = story.one_sample
    console.print(
        f"With mini-batch statistics: {100 * one.accuracy_batch:.1f} % of the test samples right, "
        f"{one.different_answers_batch} different answer(s) to {len(story.folded.logits)} samples.\n"
        f"With population statistics: {100 * one.accuracy_population:.1f} % right."
    )
    console.rule("4. folded")
    before, after = story.folded.before, story.folded.after
    costs = Table("one sample", "normalized", "folded")
    costs.add_row("layers with weights", str(before.layers), str(after.layers))
    costs.add_row("stored numbers", f"{before.numbers:,}", f"{after.numbers:,}")
    costs.add_row("multiplications and additions", f"{before.operations:,}", f"{after.operations:,}")
    costs.add_row("median time of an answer", f"{before.milliseconds:.3f} ms", f"{after.milliseconds:.3f} ms")
    console.print(costs)
    console.print(
        f"The same class for {story.folded.same_answers} of {len(story.folded.logits)} test samples; "
        f"logits differ by {story.folded.difference:.1e} at most."
    )
