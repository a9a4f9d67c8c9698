"""The bar: geometric means over the ResNet-50 and MobileNetV2 shapes, held against what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import pandas as pd
from rich.table import Table
from scipy.stats import gmean

from batchnorm_lab.bench.contenders import PEERS
from batchnorm_lab.bench.results import CASE, latest


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


def by_case(found: pd.DataFrame) -> pd.DataFrame:
    """Gather medians by case and direction.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.

    Returns
    -------
    DataFrame
        A row a case, direction and set in which ours was timed, and a column a contender: milliseconds.
    """
    timed = latest(found)
    timed = timed[(timed["left_out"] == "") & (timed["direction"] != "")]
    keys = [*CASE, "direction", "set"]
    table = timed.pivot_table("p50_ms", keys, "contender", aggfunc="last", sort=False)
    everyone = dict.fromkeys([*table.columns, *PEERS, "ours", "eager", "accelerated", "floor"])
    return table.reindex(columns=list(everyone)).dropna(subset="ours").reset_index()


def held_against(found: pd.DataFrame, threads: int) -> list[Met]:
    """Hold rows against the bar.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.
    threads : int
        The thread budget looked at.

    Returns
    -------
    list of Met
        One a demand that some case speaks to. A peer is the best by case, not over all cases.
    """
    table = by_case(found)
    networks = table["set"].isin(["resnet", "mobilenet"])
    table = table[networks & (table["mode"] == "training") & (table["threads"] == threads)]
    met: list[Met] = []
    for demand in BAR:
        asked = table[["dtype", "direction", "form"]] == [demand.dtype, demand.direction, demand.form]
        part = table[asked.all(axis=1) & table["layout"].isin(demand.layouts)]
        own = part["ours"]
        ratios = (part["eager"] / own, part[list(PEERS)].min(axis=1) / own, own / part["floor"])
        shapes = max(int(ratio.count()) for ratio in ratios)
        if shapes:
            means = (float(gmean(ratio.dropna())) if ratio.count() else nan for ratio in ratios)
            met.append(Met(demand, threads, shapes, *means))
    return met


def slower_than_eager(found: pd.DataFrame, tolerance: float = 1.0) -> list[Slower]:
    """List the cases in which torch eager was quicker.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.
    tolerance : float, optional
        Cases with eager over ours below this are listed.

    Returns
    -------
    list of Slower
        The worst first.
    """
    table = by_case(found)
    table["ratio"] = table["eager"] / table["ours"]
    slow = table[table["ratio"] < tolerance].sort_values("ratio", kind="stable")
    words = ["shape", "layout", "dtype", "form", "mode", "direction"]
    return [
        Slower(" ".join(row[word] for word in words), row["threads"], row["ratio"])
        for row in slow.to_dict("records")
    ]


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


def table(found: pd.DataFrame, threads: Sequence[int]) -> Table:
    """Draw the bar as a table for the terminal.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.
    threads : sequence of int
        Thread budgets, each with lines of its own.

    Returns
    -------
    rich.table.Table
        To be printed.
    """
    drawn = Table(*HEADINGS, title="geometric means of ratios of medians")
    for budget in threads:
        for met in held_against(found, budget):
            drawn.add_row(*cells(met))
    return drawn
