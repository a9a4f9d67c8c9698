"""How many combinations of hyperparameters work, with and without batch normalization? (M13)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from batchnorm_lab.studies.intervals import Interval, mean_interval, paired_difference, verdict
from batchnorm_lab.studies.records import select
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"sgd": "SGD", "momentum": "SGD, momentum 0.9", "adam": "Adam"}
ARMS = {False: "plain", True: "batch norm"}
MARGIN = 0.02  # "works": within 2 points of the best


@dataclass(frozen=True)
class Config:
    """The grid, in powers of ten, and sizes of the study."""

    seeds: int = 5
    steps: int = 500
    batch: int = 60
    rate_exponents: tuple[float, ...] = tuple(k / 2 for k in range(-8, 5))
    scale_exponents: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)


def units(config: Config) -> list[Unit]:
    """Return one unit for each optimizer and arm; the whole grid of it is trained together."""
    return [
        Unit(
            [
                {
                    "optimizer": kind,
                    "normalized": normalized,
                    "rate_exponent": rate,
                    "scale_exponent": scale,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                }
                for scale in config.scale_exponents
                for rate in config.rate_exponents
                for seed in range(config.seeds)
            ],
            cost=1.3 if normalized else 1.0,
        )
        for kind in KINDS
        for normalized in ARMS
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train every setting of the grid and return its final test accuracy."""
    first = unit[0]
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 50, 50, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation="relu",
        gain=2**0.5,
        places={"before"} if first["normalized"] else (),
        weight_scale=[10.0 ** setting["scale_exponent"] for setting in unit],
    )
    rates = [10.0 ** setting["rate_exponent"] for setting in unit]
    optimizer = EnsembleOptimizer(networks, rates, first["optimizer"])
    train(networks, optimizer, data, steps=first["steps"], batch=first["batch"], advance=advance)
    networks.eval()
    return [
        {"accuracy": round(a, 4)} for a in accuracy(networks, data.test_images, data.test_labels).tolist()
    ]


def axis(records: Sequence[Record], name: str) -> list[float]:
    """Return the values of one axis of the grid, in order.

    Parameters
    ----------
    records : sequence of dict
        Of this study.
    name : {"rate_exponent", "scale_exponent"}
        The axis.

    Returns
    -------
    list of float
        Powers of ten.

    Examples
    --------
    >>> from batchnorm_lab.studies.hyperparameter_robustness import axis
    >>> axis([{"setting": {"rate_exponent": 1.0}}, {"setting": {"rate_exponent": -1.0}}], "rate_exponent")
    [-1.0, 1.0]
    """
    return sorted({record["setting"][name] for record in records})


def working(records: Sequence[Record], seed: int) -> dict[tuple[str, bool], set[tuple[float, float]]]:
    """Return, for each optimizer and arm, the (scale, rate) settings that work with one seed.

    A setting works if its accuracy is within 2 points of the best that any setting of the same
    optimizer reached with this seed, in either arm.

    Parameters
    ----------
    records : sequence of dict
        Of this study.
    seed : int
        Which runs.

    Returns
    -------
    dict
        From (optimizer, normalized) to a set of (scale_exponent, rate_exponent).
    """
    found = {}
    for kind in KINDS:
        best = max(record["result"]["accuracy"] for record in select(records, optimizer=kind, seed=seed))
        for normalized in ARMS:
            found[kind, normalized] = {
                (record["setting"]["scale_exponent"], record["setting"]["rate_exponent"])
                for record in select(records, optimizer=kind, normalized=normalized, seed=seed)
                if record["result"]["accuracy"] >= best - MARGIN
            }
    return found


def widest_range(works: set[tuple[float, float]], rates: Sequence[float], scales: Sequence[float]) -> float:
    """Return how many decades of learning rate work without a gap, at the initial weight scale that is best for it.

    Parameters
    ----------
    works : set of (float, float)
        From `working`.
    rates, scales : sequence of float
        The axes of the grid, in order.

    Returns
    -------
    float
        Decades between the first and the last rate of the longest row; 0 for a single rate or none.

    Examples
    --------
    >>> from batchnorm_lab.studies.hyperparameter_robustness import widest_range
    >>> widest_range({(0.0, -2.0), (0.0, -1.0), (0.0, 1.0)}, [-2.0, -1.0, 0.0, 1.0], [0.0])
    1.0
    """
    widest = 0.0
    for scale in scales:
        start: float | None = None
        for rate in rates:
            if (scale, rate) not in works:
                start = None
                continue
            start = rate if start is None else start
            widest = max(widest, rate - start)
    return widest


def answer(records: list[Record]) -> Answer:
    """Return the share of settings that work, and the widest range of learning rates."""
    rates, scales = axis(records, "rate_exponent"), axis(records, "scale_exponent")
    seeds = sorted({record["setting"]["seed"] for record in records})
    by_seed = [working(records, seed) for seed in seeds]
    cells = len(rates) * len(scales)
    findings = []
    for kind, name in KINDS.items():
        share = {arm: [100 * len(works[kind, arm]) / cells for works in by_seed] for arm in ARMS}
        span = {arm: [widest_range(works[kind, arm], rates, scales) for works in by_seed] for arm in ARMS}
        more = paired_difference(share[True], share[False])
        wider = paired_difference(span[True], span[False])
        findings += [
            Finding(
                "M13",
                f"{name}: more combinations work with batch normalization",
                more,
                verdict(more, above=0.0),
                f"{_each(share, ' % of the settings')}, {more.text(1, ' points', signed=True)}",
            ),
            Finding(
                "M13",
                f"{name}: a wider range of learning rates works",
                wider,
                verdict(wider, above=0.0),
                f"{_each(span, ' decades')}, {wider.text(1, ' decades', signed=True)}",
            ),
        ]
    return make_answer(findings, [f"A setting works if it is within 2 points of the best of {2 * cells}."])


def _each(measured: dict[bool, list[float]], unit: str) -> str:
    intervals: dict[bool, Interval] = {arm: mean_interval(seeds) for arm, seeds in measured.items()}
    return f"{intervals[True].text(1, unit)} against {intervals[False].text(1, unit)}"


def plot(records: list[Record]) -> Figure:
    """Draw mean accuracy over the grid, optimizers by arms; settings that work are marked by a dot."""
    rates, scales = axis(records, "rate_exponent"), axis(records, "scale_exponent")
    fig, axes = figure(len(ARMS), len(KINDS), width=10, height=5.4, sharex=True, sharey=True)
    best = {
        kind: max(
            _mean(records, kind, arm, rate, scale) for arm in ARMS for rate in rates for scale in scales
        )
        for kind in KINDS
    }
    image = None
    for column, (kind, name) in enumerate(KINDS.items()):
        for row, (arm, label) in enumerate(ARMS.items()):
            panel = axes[row][column]
            grid = [[100 * _mean(records, kind, arm, rate, scale) for rate in rates] for scale in scales]
            image = panel.pcolormesh(
                rates,
                scales,
                grid,
                cmap="gray",
                vmin=0,
                vmax=100,
                shading="nearest",
                edgecolors="face",
                linewidth=0.3,
            )
            dots = [
                (rate, scale)
                for scale in scales
                for rate in rates
                if _mean(records, kind, arm, rate, scale) >= best[kind] - MARGIN
            ]
            panel.plot(*zip(*dots, strict=True) if dots else ([], []), "ko", markersize=3)
            panel.set_title(f"{name}\n{label}: {len(dots)} of {len(rates) * len(scales)} work", fontsize=9)
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


def _mean(records: Sequence[Record], kind: str, arm: bool, rate: float, scale: float) -> float:
    chosen = select(records, optimizer=kind, normalized=arm, rate_exponent=rate, scale_exponent=scale)
    return sum(record["result"]["accuracy"] for record in chosen) / len(chosen)


STUDY = Study(
    name="hyperparameter-robustness",
    title="More combinations of hyperparameters work",
    question="What share of learning rates, initial weight scales and optimizers gives a good network?",
    claim="Many more combinations of hyperparameters work: the search gets easier.",
    formula=r"$\mathrm{BN}(c\,W a) = \mathrm{BN}(W a)$ for every scale $c > 0$ (with $\epsilon = 0$): "
    r"the initial scale of $W$ cancels",
    claims=("M13",),
    configs={
        "quick": Config(
            seeds=2, steps=60, rate_exponents=(-4.0, -2.0, -1.0, 0.0, 2.0), scale_exponents=(-2.0, 0.0, 2.0)
        ),
        "default": Config(),
        "full": Config(
            seeds=10,
            steps=2000,
            rate_exponents=tuple(k / 4 for k in range(-16, 9)),
            scale_exponents=tuple(k / 2 for k in range(-4, 5)),
        ),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
