"""Tables of results as Markdown, for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchnorm_lab.bench.bar import HEADINGS, by_case, cells, held_against, slower_than_eager, verdict
from batchnorm_lab.bench.contenders import PEERS
from batchnorm_lab.bench.results import Row, latest

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


def where(found: Sequence[Row]) -> list[str]:
    """Say where and with what rows were measured.

    Parameters
    ----------
    found : sequence of Row
        Rows of a benchmark.

    Returns
    -------
    list of str
        One line a machine and set of versions.
    """
    told: dict[str, tuple[str, str]] = {}
    for row in found:
        versions = f"batchnorm {row.batchnorm or 'from source'} at {row.commit}, torch {row.torch}"
        versions += f", JAX {row.jax}" if row.jax else ""
        text = f"- {row.cpu}, {row.isa or 'no'} instruction set, engine {row.engine}; {versions}, "
        text += f"Python {row.python}"
        first, last = told.get(text, (row.timestamp, row.timestamp))
        told[text] = (min(first, row.timestamp), max(last, row.timestamp))
    return [f"{text}; {first} to {last}." for text, (first, last) in told.items()] + [""]


def the_bar(found: Sequence[Row], threads: Sequence[int]) -> list[str]:
    """Write the table of the bar.

    Parameters
    ----------
    found : sequence of Row
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


def steps(found: Sequence[Row]) -> list[str]:
    """Write the table of whole training steps.

    Parameters
    ----------
    found : sequence of Row
        Rows of a benchmark.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    body = []
    for (shape, layout, _, name, _, budget, _, kind), medians in by_case(found).items():
        if kind != "step" or "eager" not in medians:
            continue
        cell = [name, shape, layout, budget, f"{medians['eager']:.0f} ms", f"{medians['ours']:.0f} ms"]
        asked = STEP_BAR.get(name) if layout == "nchw" else None
        cell.append(verdict(medians["eager"] / medians["ours"], asked))
        other = medians.get("accelerated")
        cell.append("-" if other is None else f"{other:.0f} ms, {medians['eager'] / other:.2f}")
        body.append(cell)
    headings = ("model", "input", "layout", "threads", "torch.nn", "ours", "torch.nn over ours")
    return lines_of((*headings, "`accelerate(model)`, and torch.nn over it"), body) if body else []


def shares(found: Sequence[Row]) -> list[str]:
    """Write the table of what of the possible gain ``accelerate`` gains in whole training steps.

    Parameters
    ----------
    found : sequence of Row
        Rows of a benchmark.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    rounds = {row.case_key: row.rounds for row in found}
    body = []
    for (shape, layout, dtype, name, mode, budget, _, kind), medians in by_case(found).items():
        if kind != "share":
            continue
        before, after, floor = (medians[contender] for contender in ("eager", "ours", "floor"))
        cell = [name, shape, layout, budget, str(rounds[shape, layout, dtype, name, mode, budget])]
        cell += [f"{before:.0f}", f"{after:.0f}", f"{floor:.0f}", f"{before / after:.2f}"]
        body.append([*cell, verdict((before - after) / (before - floor), SHARE_BAR)])
    headings = ("network", "input", "layout", "threads", "rounds", "before, ms", "after, ms", "floor, ms")
    return lines_of((*headings, "faster", "share"), body) if body else []


def by_shape(found: Sequence[Row], threads: int) -> list[str]:
    """Write one table for each form, dtype, layout and direction: ours in milliseconds, peers over ours.

    Parameters
    ----------
    found : sequence of Row
        Rows of a benchmark.
    threads : int
        Thread budget.

    Returns
    -------
    list of str
        Lines of Markdown.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for (shape, layout, dtype, form, mode, budget, direction, name), medians in by_case(found).items():
        if budget != str(threads) or name in ("step", "share"):
            continue
        own = medians["ours"]
        cell = [name, shape, f"{own:.3g}"]
        cell += [f"{medians[peer] / own:.2f}" if peer in medians else "-" for peer in PEERS]
        cell.append(f"{own / medians['floor']:.2f}" if "floor" in medians else "-")
        groups.setdefault((mode, direction, form, dtype, layout), []).append(cell)
    written: list[str] = []
    for (mode, direction, form, dtype, layout), body in groups.items():
        what = "inference" if mode == "inference" else f"training, {direction}"
        written += [f"### {what}, {form}, {dtype}, {layout}, {threads} threads", ""]
        headings = ["set", "shape", "ours, ms", *(f"{peer} / ours" for peer in PEERS), "ours / floor"]
        written += lines_of(headings, body)
    return written


def document(found: Iterable[Row]) -> str:
    """Write everything that a CSV says.

    Parameters
    ----------
    found : iterable of Row
        Rows of a benchmark.

    Returns
    -------
    str
        Markdown.
    """
    rows = latest(found)
    threads = sorted({row.threads for row in rows}, reverse=True)
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
