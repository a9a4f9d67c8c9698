"""The bar: geometric means over the ResNet-50 and MobileNetV2 shapes, held against what is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan
from typing import NamedTuple

from rich.table import Table
from scipy.stats import gmean

from batchnorm_lab.bench.contenders import PEERS
from batchnorm_lab.bench.results import Row, latest


class Demand(NamedTuple):
    """What is asked of one kind of call; None where nothing is asked."""

    title: str
    direction: str
    form: str
    dtype: str
    layouts: tuple[str, ...]
    over_eager: float | None
    over_best: float | None
    of_floor: float | None


NCHW, LAST = ("nchw",), ("channels_last",)
BOTH = NCHW + LAST
F32, BF16 = "float32", "bfloat16"
BAR: tuple[Demand, ...] = (
    Demand("training forward BN+ReLU, f32 NCHW", "forward", "relu", F32, NCHW, 5, 3, 1.35),
    Demand("training forward BN+ReLU, f32 channels_last", "forward", "relu", F32, LAST, 3, 2, 1.6),
    Demand("backward BN+ReLU, f32 NCHW", "backward", "relu", F32, NCHW, 3, 2.5, 1.35),
    Demand("backward BN+ReLU, f32 channels_last", "backward", "relu", F32, LAST, 4, 3, 1.6),
    Demand("forward+backward BN+add+ReLU, f32", "forward+backward", "add_relu", F32, BOTH, 4, 3, None),
    Demand("forward+backward BN+add+ReLU, bf16", "forward+backward", "add_relu", BF16, BOTH, 5, 3, None),
)


class Met(NamedTuple):
    """What was reached of one demand: geometric means over ``shapes`` cases."""

    demand: Demand
    threads: int
    shapes: int
    over_eager: float
    over_best: float
    of_floor: float


class Slower(NamedTuple):
    """A case in which torch eager was the quicker one."""

    label: str
    threads: int
    ratio: float


def by_case(found: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Gather medians by case and direction, then by contender.

    Parameters
    ----------
    found : iterable of Row
        Rows of a benchmark.

    Returns
    -------
    dict
        Milliseconds; only cases in which ours was timed.
    """
    table: dict[tuple[str, ...], dict[str, float]] = {}
    for row in latest(found):
        if not row.left_out and row.direction:
            table.setdefault((*row.case_key, row.direction, row.set), {})[row.contender] = row.p50_ms
    return {key: medians for key, medians in table.items() if "ours" in medians}


def held_against(found: Iterable[Row], threads: int) -> list[Met]:
    """Hold rows against the bar.

    Parameters
    ----------
    found : iterable of Row
        Rows of a benchmark.
    threads : int
        The thread budget looked at.

    Returns
    -------
    list of Met
        One a demand that some case speaks to. A peer is the best by case, not over all cases.
    """
    table = by_case(found)
    met: list[Met] = []
    for demand in BAR:
        eager, best, floor = [], [], []
        for (_, layout, dtype, form, mode, budget, direction, name), medians in table.items():
            if (
                (dtype, form, mode, direction) != (demand.dtype, demand.form, "training", demand.direction)
                or layout not in demand.layouts
                or budget != str(threads)
                or name not in ("resnet", "mobilenet")
            ):
                continue
            own = medians["ours"]
            if "eager" in medians:
                eager.append(medians["eager"] / own)
            peers = [medians[peer] for peer in PEERS if peer in medians]
            if peers:
                best.append(min(peers) / own)
            if "floor" in medians:
                floor.append(own / medians["floor"])
        if eager or best or floor:
            means = (float(gmean(ratios)) if ratios else nan for ratios in (eager, best, floor))
            met.append(Met(demand, threads, max(map(len, (eager, best, floor))), *means))
    return met


def slower_than_eager(found: Iterable[Row], tolerance: float = 1.0) -> list[Slower]:
    """List the cases in which torch eager was quicker.

    Parameters
    ----------
    found : iterable of Row
        Rows of a benchmark.
    tolerance : float, optional
        Cases with eager over ours below this are listed.

    Returns
    -------
    list of Slower
        The worst first.
    """
    slow = []
    for (shape, layout, dtype, form, mode, budget, direction, _), medians in by_case(found).items():
        if "eager" in medians and medians["eager"] / medians["ours"] < tolerance:
            label = f"{shape} {layout} {dtype} {form} {mode} {direction}"
            slow.append(Slower(label, int(budget), medians["eager"] / medians["ours"]))
    return sorted(slow, key=lambda one: one.ratio)


def verdict(value: float, asked: float | None, *, at_most: bool = False) -> str:
    """Say whether a figure meets what is asked.

    Parameters
    ----------
    value : float
        What was measured.
    asked : float or None
        What is asked.
    at_most : bool, optional
        Whether less is better.

    Returns
    -------
    str
        The figure, what is asked, and hit or missed.
    """
    if value != value:
        return "-"
    if asked is None:
        return f"{value:.2f}"
    good = value <= asked if at_most else value >= asked
    return f"{value:.2f} ({'<=' if at_most else '>='} {asked:g}: {'hit' if good else 'MISSED'})"


def cells(met: Met) -> tuple[str, ...]:
    """Write one line of the table of the bar.

    Parameters
    ----------
    met : Met
        What was reached.

    Returns
    -------
    tuple of str
        Title, threads, shapes, and three verdicts.
    """
    return (
        met.demand.title,
        str(met.threads),
        str(met.shapes),
        verdict(met.over_eager, met.demand.over_eager),
        verdict(met.over_best, met.demand.over_best),
        verdict(met.of_floor, met.demand.of_floor, at_most=True),
    )


HEADINGS = ("", "threads", "cases", "over torch eager", "over the best peer", "of the copy floor")


def table(found: Iterable[Row], threads: Sequence[int]) -> Table:
    """Draw the bar as a table for the terminal.

    Parameters
    ----------
    found : iterable of Row
        Rows of a benchmark.
    threads : sequence of int
        Thread budgets, each with lines of its own.

    Returns
    -------
    rich.table.Table
        To be printed.
    """
    listed = list(found)
    drawn = Table(*HEADINGS, title="geometric means of ratios of medians")
    for budget in threads:
        for met in held_against(listed, budget):
            drawn.add_row(*cells(met))
    return drawn
