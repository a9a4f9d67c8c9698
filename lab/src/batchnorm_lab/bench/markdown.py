"""Tables of results as Markdown, for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan

import pandas as pd

from batchnorm_lab.bench.bar import HEADINGS, by_case, cells, held_against, slower_than_eager, verdict
from batchnorm_lab.bench.contenders import PEERS
from batchnorm_lab.bench.results import CASE, latest

STEP_BAR = {"resnet50": 1.2, "mobilenet_v2": 1.6}
SHARE_BAR = 0.85
SHARE_NOTE = (
    "A training step (forward, loss, backward, SGD) of networks of timm: as given, after `accelerate`, and with a "
    "floor in which every norm is a copy and activations vanish; medians. "
    "The share is (before - after) / (before - floor). "
    "Where the floor allocates what our pool has at hand, it is above 1. `python -m batchnorm_lab.bench.shares`."
)
SHOWN_SLOWER = 40


def lines_of(headings: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Write a table.

    Parameters
    ----------
    headings : sequence of str
        Of the columns.
    body : iterable of sequence of str
        Rows of cells.

    Returns
    -------
    list of str
        Lines of Markdown, an empty one after them.
    """
    written = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    written += ["| " + " | ".join(row) + " |" for row in body]
    return [*written, ""]


def where(found: pd.DataFrame) -> list[str]:
    """Say where and with what rows were measured.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.

    Returns
    -------
    list of str
        One line a machine and set of versions.
    """
    written = []
    about = ["cpu", "isa", "engine", "batchnorm", "commit", "torch", "jax", "python"]
    for key, times in found.groupby(about, sort=False)["timestamp"]:
        cpu, isa, engine, own, commit, torch, jax, python = key
        versions = (
            f"batchnorm {own or 'from source'} at {commit}, torch {torch}{f', JAX {jax}' if jax else ''}"
        )
        text = f"- {cpu}, {isa or 'no'} instruction set, engine {engine}; {versions}, Python {python}"
        written.append(f"{text}; {times.min()} to {times.max()}.")
    return [*written, ""]


def the_bar(found: pd.DataFrame, threads: Sequence[int]) -> list[str]:
    """Write the table of the bar.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.
    threads : sequence of int
        Thread budgets.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    body = [cells(met) for budget in threads for met in held_against(found, budget)]
    return lines_of(HEADINGS, body) if body else []


def steps(found: pd.DataFrame) -> list[str]:
    """Write the table of whole training steps.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    body = []
    table = by_case(found)
    for row in table[(table["set"] == "step") & table["eager"].notna()].to_dict("records"):
        name, eager, own, other = (row[key] for key in ("form", "eager", "ours", "accelerated"))
        cell = [name, row["shape"], row["layout"], str(row["threads"]), f"{eager:.0f} ms", f"{own:.0f} ms"]
        asked = STEP_BAR.get(name) if row["layout"] == "nchw" else None
        cell.append(verdict(eager / own, asked))
        cell.append("-" if isnan(other) else f"{other:.0f} ms, {eager / other:.2f}")
        body.append(cell)
    headings = ("model", "input", "layout", "threads", "torch.nn", "ours", "torch.nn over ours")
    return lines_of((*headings, "`accelerate(model)`, and torch.nn over it"), body) if body else []


def shares(found: pd.DataFrame) -> list[str]:
    """Write the table of what of the possible gain ``accelerate`` gains in whole training steps.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    rounds = {tuple(row[key] for key in CASE): row["rounds"] for row in found.to_dict("records")}
    table, body = by_case(found), []
    for row in table[table["set"] == "share"].to_dict("records"):
        before, after, floor = (row[contender] for contender in ("eager", "ours", "floor"))
        cell = [row["form"], row["shape"], row["layout"], str(row["threads"])]
        cell += [
            str(rounds[tuple(row[key] for key in CASE)]),
            f"{before:.0f}",
            f"{after:.0f}",
            f"{floor:.0f}",
        ]
        cell += [f"{before / after:.2f}", verdict((before - after) / (before - floor), SHARE_BAR)]
        body.append(cell)
    headings = ("network", "input", "layout", "threads", "rounds", "before, ms", "after, ms", "floor, ms")
    return lines_of((*headings, "faster", "share"), body) if body else []


def by_shape(found: pd.DataFrame, threads: int) -> list[str]:
    """Write one table for each form, dtype, layout and direction: ours in milliseconds, peers over ours.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.
    threads : int
        Thread budget.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    written: list[str] = []
    table = by_case(found)
    table = table[(table["threads"] == threads) & ~table["set"].isin(["step", "share"])]
    for key, group in table.groupby(["mode", "direction", "form", "dtype", "layout"], sort=False):
        mode, direction, form, dtype, layout = key
        what = "inference" if mode == "inference" else f"training, {direction}"
        written += [f"### {what}, {form}, {dtype}, {layout}, {threads} threads", ""]
        headings = ["set", "shape", "ours, ms", *(f"{peer} / ours" for peer in PEERS), "ours / floor"]
        body = []
        for row in group.to_dict("records"):
            ratios = [*(row[peer] / row["ours"] for peer in PEERS), row["ours"] / row["floor"]]
            shown = ["-" if isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
            body.append([row["set"], row["shape"], f"{row['ours']:.3g}", *shown])
        written += lines_of(headings, body)
    return written


def document(found: pd.DataFrame) -> str:
    """Write everything that a CSV says.

    Parameters
    ----------
    found : DataFrame
        Rows of a benchmark.

    Returns
    -------
    str
        Markdown.
    """
    rows = latest(found)
    threads = sorted(rows["threads"].unique(), reverse=True)
    slow = slower_than_eager(rows)
    written = ["## Where it was measured", "", *where(rows)]
    bar = the_bar(rows, threads)
    if bar:
        written += [
            "## The bar",
            "",
            "Geometric means of ratios of medians; the best peer is the best by case.",
            "",
        ]
        written += bar
    whole = steps(rows)
    if whole:
        written += ["## Whole training steps", "", *whole]
    gained = shares(rows)
    if gained:
        written += ["## The share of what can be gained", "", SHARE_NOTE, "", *gained]
    written += ["## Slower than torch eager", ""]
    if slow:
        body = [(one.label, str(one.threads), f"{one.ratio:.2f}") for one in slow[:SHOWN_SLOWER]]
        written += [f"{len(slow)} of {len(by_case(rows))} measurements.", ""]
        written += lines_of(("case", "threads", "eager / ours"), body)
    else:
        written += [f"None of {len(by_case(rows))} measurements.", ""]
    written += ["## By shape", "", "Peers as their time over ours: above 1, ours is the quicker one.", ""]
    for budget in threads:
        written += by_shape(rows, budget)
    return "\n".join(written).rstrip() + "\n"
