"""How many combinations of hyperparameters work, with and without batch normalization? (M13)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.contract import (
    Advance,
    Answer,
    Finding,
    Record,
    Result,
    Setting,
    Study,
    Unit,
    make_answer,
)
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.figures import figure
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.records import select
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"sgd": "SGD", "momentum": "SGD, momentum 0.9", "adam": "Adam"}
ARMS = {False: "plain", True: "batch norm"}
MARGIN = 0.02  # "works": within 2 points of the best
USUAL: dict[str, float] = {"scale": 0.0, "batch": 60, "decay": 0.0, "width": 50, "momentum": 0.9}
"""What a network has where nothing else is said; the scale of the initial weights is He's, as a power of ten."""
AXES = {
    "batch": "mini-batch",
    "decay": "weight decay",
    "width": "width",
    "momentum": "momentum",
}
"""What is varied beside the learning rate, with the usual initial scale; under SGD with momentum."""


@dataclass(frozen=True)
class Config:
    """The grids and sizes of the study; rates and scales in powers of ten."""

    seeds: int = 6
    steps: int = 500
    rate_exponents: tuple[float, ...] = tuple(k / 2 for k in range(-8, 5))
    scale_exponents: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    batch: tuple[float, ...] = (8, 60, 240)
    decay: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
    width: tuple[float, ...] = (10, 50, 200)
    momentum: tuple[float, ...] = (0.0, 0.5, 0.9, 0.99)


def units(config: Config) -> list[Unit]:
    """Return one unit for each optimizer and arm, with all scales, and one for each other hyperparameter's value."""

    def unit(kind: str, normalized: bool, axis: str, values: Sequence[float], cost: float) -> Unit:
        settings = [
            {
                "optimizer": kind,
                "normalized": normalized,
                "axis": axis,
                **USUAL,
                axis: value,
                "rate_exponent": rate,
                "seed": seed,
                "steps": config.steps,
            }
            for value in values
            for rate in config.rate_exponents
            for seed in range(config.seeds)
        ]
        return Unit(settings, (1.3 if normalized else 1.0) * cost * len(settings))

    grids = [
        unit(kind, normalized, "scale", config.scale_exponents, 1.0) for kind in KINDS for normalized in ARMS
    ]
    costs = {"batch": 1 / 60, "width": 1 / 50}
    grids += [
        unit("momentum", normalized, axis, [value], max(0.5, value * costs.get(axis, 0.0)))
        for axis in AXES
        for value in getattr(config, axis)
        for normalized in ARMS
    ]
    return grids


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train every setting of a unit; return its final accuracies on validation and test images."""
    first = unit[0]
    choose, report = data.with_validation()
    width = int(first["width"])
    networks = MLPEnsemble(
        (data.train_images[0].numel(), width, width, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation="relu",
        gain=2**0.5,
        places={"before"} if first["normalized"] else (),
        weight_scale=[10.0 ** setting["scale"] for setting in unit],
    )
    rates = [10.0 ** setting["rate_exponent"] for setting in unit]
    optimizer = EnsembleOptimizer(
        networks, rates, first["optimizer"], momentum=first["momentum"], decay=first["decay"]
    )
    train(networks, optimizer, report, steps=first["steps"], batch=int(first["batch"]), advance=advance)
    networks.eval()
    parts = [accuracy(networks, part.test_images, part.test_labels).tolist() for part in (choose, report)]
    return [
        {"validation": round(one, 4), "accuracy": round(other, 4)} for one, other in zip(*parts, strict=True)
    ]


def steps_of(records: Sequence[Record], name: str) -> list[float]:
    """Return the values of one axis of the grid, in order.

    Parameters
    ----------
    records : sequence of dict
        Of this study.
    name : str
        Of the settings.

    Returns
    -------
    list of float
        Rates and scales as powers of ten.

    Examples
    --------
    >>> from batchnorm_lab.studies.hyperparameter_robustness import steps_of
    >>> steps_of([{"setting": {"rate_exponent": 1.0}}, {"setting": {"rate_exponent": -1.0}}], "rate_exponent")
    [-1.0, 1.0]
    """
    return sorted({record["setting"][name] for record in records})


def grid(records: Sequence[Record], kind: str, axis: str) -> list[Record]:
    """Return the runs of a grid of learning rates and one other hyperparameter, of both arms.

    Parameters
    ----------
    records : sequence of dict
        Of this study.
    kind : str
        One of `KINDS`.
    axis : str
        "scale" or one of `AXES`.

    Returns
    -------
    list of dict
        In the order of their seeds.
    """
    return select(records, optimizer=kind, axis=axis)


def working(runs: Sequence[Record], axis: str, seed: int) -> dict[bool, set[tuple[float, float]]]:
    """Return, for each arm, the (value, rate) settings of a grid that work with one seed.

    A setting works if its test accuracy is within 2 points of that of the setting which is the best of both arms
    on validation images. So a search that knows validation images alone would be content with it.

    Parameters
    ----------
    runs : sequence of dict
        From `grid`.
    axis : str
        "scale" or one of `AXES`.
    seed : int
        Which runs.

    Returns
    -------
    dict
        From "normalized" to a set of (value, rate_exponent).
    """
    of_seed = select(runs, seed=seed)
    best = max(of_seed, key=lambda record: record["result"]["validation"])["result"]["accuracy"]
    return {
        arm: {
            (record["setting"][axis], record["setting"]["rate_exponent"])
            for record in select(of_seed, normalized=arm)
            if record["result"]["accuracy"] >= best - MARGIN
        }
        for arm in ARMS
    }


def widest_range(works: set[tuple[float, float]], rates: Sequence[float], value: float) -> float:
    """Return how many decades of learning rate work without a gap, at one value of the other hyperparameter.

    Parameters
    ----------
    works : set of (float, float)
        From `working`.
    rates : sequence of float
        The powers of ten that were tried, in order.
    value : float
        Of the other hyperparameter.

    Returns
    -------
    float
        Decades between the first and the last rate of the longest row; 0 for a single rate or none.

    Examples
    --------
    >>> from batchnorm_lab.studies.hyperparameter_robustness import widest_range
    >>> widest_range({(0.0, -2.0), (0.0, -1.0), (0.0, 1.0)}, [-2.0, -1.0, 0.0, 1.0], 0.0)
    1.0
    """
    widest = 0.0
    start: float | None = None
    for rate in rates:
        if (value, rate) not in works:
            start = None
            continue
        start = rate if start is None else start
        widest = max(widest, rate - start)
    return widest


def answer(records: list[Record]) -> Answer:
    """Return the share of settings that work, at the usual initial scale, over all scales, and beside others."""
    rates = steps_of(records, "rate_exponent")
    seeds = steps_of(records, "seed")
    step = min(b - a for a, b in pairwise(rates))
    findings, highest = [], []
    for kind, name in KINDS.items():
        runs = grid(records, kind, "scale")
        scales = steps_of(runs, "scale")
        found = [working(runs, "scale", int(seed)) for seed in seeds]
        usual = [
            {arm: {cell for cell in each[arm] if cell[0] == USUAL["scale"]} for arm in ARMS} for each in found
        ]
        span = {arm: [widest_range(each[arm], rates, USUAL["scale"]) for each in usual] for arm in ARMS}
        findings += [
            _share(f"{name}: more learning rates work, at the usual initial scale", usual, len(rates)),
            _compared(
                f"{name}: a wider range of learning rates works, at the usual initial scale",
                span,
                " decades",
                step,
                (0.0, rates[-1] - rates[0]),
            ),
            _share(
                f"{name}: more pairs of learning rate and initial scale work, from {10 ** scales[0]:g} to "
                f"{10 ** scales[-1]:g} times the usual",
                found,
                len(rates) * len(scales),
            ),
        ]
        if kind == "sgd":
            highest.append(_highest(usual, rates, step))
    for axis, name in AXES.items():
        runs = grid(records, "momentum", axis)
        tried = steps_of(runs, axis)
        found = [working(runs, axis, int(seed)) for seed in seeds]
        cells = len(rates) * len(tried)
        shown = ", ".join(f"{value:g}" for value in tried)
        findings.append(
            _share(f"SGD with momentum: more pairs of learning rate and {name} work ({shown})", found, cells)
        )
    remarks = [
        "A setting works if its test accuracy is within 2 points of that of the setting which is best on "
        f"validation images, of both arms; {len(rates)} learning rates from {10 ** rates[0]:g} to "
        f"{10 ** rates[-1]:g} were tried with each value of the other hyperparameter."
    ]
    return make_answer(findings + highest, remarks)


def _compared(
    statement: str, measured: dict[bool, list[float]], unit: str, step: float, within: tuple[float, float]
) -> Finding:
    more = paired_difference(measured[True], measured[False], resolution=step)
    each = {arm: mean_interval(runs, resolution=step, within=within) for arm, runs in measured.items()}
    text = (
        f"{each[True].text(1, unit)} with batch norm against {each[False].text(1, unit)}, "
        f"{more.text(1, unit, signed=True)}"
    )
    return Finding("M13", statement, more, text, above=0.0)


def _share(statement: str, found: Sequence[dict[bool, set[Any]]], cells: int) -> Finding:
    share = {arm: [100 * len(works[arm]) / cells for works in found] for arm in ARMS}
    return _compared(statement, share, " %", 100 / cells, (0.0, 100.0))


def _highest(
    usual: Sequence[dict[bool, set[tuple[float, float]]]], rates: Sequence[float], step: float
) -> Finding:
    """The largest learning rate that works: what Bjorck and others (2018) take for the reason of all else."""
    highest = {
        arm: [max((rate for _, rate in works[arm]), default=rates[0] - step) for works in usual]
        for arm in ARMS
    }
    more = paired_difference(highest[True], highest[False], resolution=step)
    plain, normed = (10 ** mean_interval(highest[arm]).estimate for arm in (False, True))
    text = (
        f"the largest is {normed:.2g} with batch norm and {plain:.2g} without (geometric means of the seeds), "
        f"{more.text(1, ' decades', signed=True)} (Bjorck et al., 2018, see in this the reason of all else)"
    )
    return Finding(
        "M13", "SGD: larger learning rates still work, at the usual initial scale", more, text, above=0.0
    )


def plot(records: list[Record]) -> Figure:
    """Draw mean accuracy over rates and scales, optimizers by arms; settings that work are marked by a dot."""
    rates, scales = steps_of(records, "rate_exponent"), steps_of(grid(records, "sgd", "scale"), "scale")
    fig, axes = figure(len(ARMS), len(KINDS), width=10, height=5.4, sharex=True, sharey=True)
    image = None
    for column, (kind, name) in enumerate(KINDS.items()):
        runs = grid(records, kind, "scale")
        cells = [(scale, rate) for scale in scales for rate in rates]
        best = max(
            ((arm, *cell) for arm in ARMS for cell in cells), key=lambda c: _mean(runs, "validation", *c)
        )
        for row, (arm, label) in enumerate(ARMS.items()):
            panel = axes[row][column]
            image = panel.pcolormesh(
                rates,
                scales,
                [[100 * _mean(runs, "accuracy", arm, scale, rate) for rate in rates] for scale in scales],
                cmap="gray",
                vmin=0,
                vmax=100,
                shading="nearest",
                edgecolors="face",
                linewidth=0.3,
            )
            least = _mean(runs, "accuracy", *best) - MARGIN
            dots = [
                (rate, scale) for scale, rate in cells if _mean(runs, "accuracy", arm, scale, rate) >= least
            ]
            panel.plot(*zip(*dots, strict=True) if dots else ([], []), "ko", markersize=3)
            panel.set_title(f"{name}\n{label}: {len(dots)} of {len(cells)} work", fontsize=9)
            panel.grid(False)
            panel.set_yticks(scales, [f"$10^{{{scale:g}}}$" for scale in scales])
            whole = [rate for rate in rates if rate == int(rate)]
            panel.set_xticks(whole, [f"$10^{{{rate:g}}}$" for rate in whole])
    for panel in axes[-1]:
        panel.set_xlabel("learning rate")
    for panel in axes[:, 0]:
        panel.set_ylabel("initial weights / He's")
    bar = fig.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("final test accuracy (%), mean over seeds\ndot: within 2 points of the best")
    return fig


def _mean(runs: Sequence[Record], part: str, arm: bool, scale: float, rate: float) -> float:
    chosen = select(runs, normalized=arm, scale=scale, rate_exponent=rate)
    return sum(record["result"][part] for record in chosen) / len(chosen)


STUDY = Study(
    name="hyperparameter-robustness",
    title="More combinations of hyperparameters work",
    question="What share of learning rates works, beside initial scales, optimizers, mini-batches, weight decays, "
    "widths and momenta?",
    claim="Many more combinations of hyperparameters work: the search gets easier.",
    formula=r"$\mathrm{BN}(c\,W a) = \mathrm{BN}(W a)$ for every scale $c > 0$ (with $\epsilon = 0$): "
    r"the initial scale of $W$ cancels",
    claims=("M13",),
    configs={
        "quick": Config(
            seeds=2,
            steps=40,
            rate_exponents=(-4.0, -2.0, -1.0, 0.0, 2.0),
            scale_exponents=(-2.0, 0.0, 2.0),
            batch=(60, 120),
            decay=(0.0, 1e-1),
            width=(10, 50),
            momentum=(0.5, 0.9),
        ),
        "default": Config(),
        "full": Config(
            seeds=12,
            steps=2000,
            rate_exponents=tuple(k / 4 for k in range(-16, 9)),
            scale_exponents=tuple(k / 2 for k in range(-4, 5)),
        ),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)
