"""Starts one worker process a thread budget, with that many processors and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm_lab.bench import bar
from batchnorm_lab.bench.contenders import CONTENDERS
from batchnorm_lab.bench.results import read
from batchnorm_lab.bench.shapes import bar_cases, cases
from batchnorm_lab.bench.worker import Order

SHOWN = 20


def processors() -> list[int]:
    """List the processors this process may run on.

    Returns
    -------
    list of int
        Their numbers.
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def run(order: Order, threads: Sequence[int]) -> Path:
    """Time what is ordered under each thread budget, every one in a process of its own.

    A process is given as many processors as it has threads: that holds runtimes which know nothing of
    ``torch.set_num_threads`` to the same budget.

    Parameters
    ----------
    order : Order
        What to time; its own ``threads`` is not used.
    threads : sequence of int
        Thread budgets.

    Returns
    -------
    Path
        The CSV the rows were added to.

    Raises
    ------
    ArgumentError
        A budget is below 1 or above the number of processors.
    BatchNormError
        A worker stopped with an error; what it had done is kept.
    """
    every = processors()
    for budget in threads:
        if not 1 <= budget <= len(every):
            raise ArgumentError(
                f"bench: {budget} threads asked for, on {len(every)} processors.",
                why="threads that share a processor are timed by the scheduler's mood.",
                mend=f"give 1 to {len(every)}.",
            )
    for budget in threads:
        mine = replace(order, threads=budget)
        environment = dict(os.environ, OMP_NUM_THREADS=str(budget), MKL_NUM_THREADS=str(budget))
        held = hasattr(os, "sched_setaffinity")
        try:
            if held:  # inherited by the worker
                os.sched_setaffinity(0, every[:budget])
            done = subprocess.run(
                [sys.executable, "-m", "batchnorm_lab.bench.worker"],
                input=mine.to_json(),
                text=True,
                env=environment,
                check=False,
            )
        finally:
            if held:
                os.sched_setaffinity(0, every)
        if done.returncode:
            raise BatchNormError(
                f"bench: the worker with {budget} threads stopped with status {done.returncode}.",
                why="what it had timed before is kept.",
                mend="see its own message above; run again with --resume to go on.",
            )
    return Path(order.path)


def plan(
    *,
    path: Path,
    sets: str = "resnet",
    layouts: str = "nchw,channels_last",
    dtypes: str = "float32,bfloat16",
    forms: str = "plain,relu,add_relu",
    modes: str = "training,inference",
    contenders: str = "ours,eager,compile,onednn,jax",
    rounds: int | None = None,
    seconds: float | None = None,
    quick: bool = False,
    the_bar: bool = False,
    small: bool = False,
    prepare: bool = False,
    resume: bool = False,
    stop_after: float = float("inf"),
) -> Order:
    """Make an order from names separated by commas.

    Parameters
    ----------
    path : Path
        CSV to which rows are added.
    sets, layouts, dtypes, forms, modes, contenders : str, optional
        Names, separated by commas.
    rounds : int, optional
        Readings of the clock for each contender; 11 if None, 5 for the bar.
    seconds : float, optional
        Start no round of a case after this long, once there were 3; 20 if None, 2 for the bar.
    quick : bool, optional
        5 rounds and 3 seconds a case at most, against torch eager alone.
    the_bar : bool, optional
        The cases of the bar, whatever the names say.
    small : bool, optional
        The latency of small inputs as well; alone where ``sets`` is empty.
    prepare : bool, optional
        Fill the compilers' caches and time nothing.
    resume : bool, optional
        Pass over what ``path`` already has.
    stop_after : float, optional
        Seconds after which no case is begun.

    Returns
    -------
    Order
        For ``run``.

    Raises
    ------
    ArgumentError
        A name is not known, or fewer than 1 round.
    """
    rounds = (5 if the_bar else 11) if rounds is None else rounds
    seconds = (2.0 if the_bar else 20.0) if seconds is None else seconds
    if rounds < 1:
        raise ArgumentError(f"bench: {rounds} rounds.", mend="give 1 or more; 11 is the default.")
    names = split(contenders)
    for name in names:
        if name not in CONTENDERS:
            raise ArgumentError(
                f"bench: no contender is called {name!r}.", mend=f"choose from {', '.join(CONTENDERS)}."
            )
    if quick:
        rounds, seconds = min(rounds, 5), min(seconds, 3.0)
        names = [name for name in names if name in ("ours", "engine", "eager")]
    wanted = (
        bar_cases()
        if the_bar
        else cases(
            split(sets),
            layouts=split(layouts),
            dtypes=split(dtypes),
            forms=split(forms),
            modes=split(modes),
        )
    )
    return Order(
        path=str(path),
        threads=1,
        cases=wanted,
        contenders=names,
        rounds=rounds,
        seconds=seconds,
        small=small,
        prepare=prepare,
        resume=resume,
        stop_after=stop_after,
    )


def split(names: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def budgets(text: str) -> list[int]:
    """Read thread budgets separated by commas.

    Parameters
    ----------
    text : str
        ``""`` for one budget of every processor.

    Returns
    -------
    list of int
        At least one.

    Raises
    ------
    ArgumentError
        Something in it is no whole number.
    """
    try:
        found = [int(part) for part in split(text)]
    except ValueError as error:
        raise ArgumentError(f"bench: --threads {text!r}: {error}.", mend="give e.g. --threads 1,2.") from None
    return found or [len(processors())]


def summarize(path: Path, threads: Sequence[int], console: Console) -> None:
    """Print what a CSV says of the bar, and where torch eager was the quicker one.

    Parameters
    ----------
    path : Path
        The CSV.
    threads : sequence of int
        Thread budgets to speak of.
    console : rich.console.Console
        Where to print.
    """
    found = read(path)
    drawn = bar.table(found, threads)
    if drawn.row_count:
        console.print(drawn)
    slow = [one for one in bar.slower_than_eager(found) if one.threads in threads]
    if slow:
        listing = Table("slower than torch eager", "threads", "eager over ours")
        for one in slow[:SHOWN]:
            listing.add_row(one.label, str(one.threads), f"{one.ratio:.2f}")
        console.print(listing, f"{len(slow)} in all")
    else:
        console.print("No case timed here was slower than torch eager.")
    console.print(f"rows: {path}")
