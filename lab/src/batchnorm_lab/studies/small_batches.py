"""How does training fare with small mini-batches, and what helps? (M8)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from batchnorm import synchronize
from batchnorm.errors import BatchNormError
from batchnorm.modules import BatchNorm1d
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
from batchnorm_lab.studies.figures import figure, legend_below, line
from batchnorm_lab.studies.intervals import mean_interval, paired_difference, verdict
from batchnorm_lab.studies.ranks import on_ranks
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKERS = 4
GROUPS = 8
ARMS = {
    "batch": "batch norm, 1 worker",
    "group": f"group norm, 1 worker ({GROUPS} groups)",
    "ghost": f"batch norm, {WORKERS} workers, each its own (ghost)",
    "pooled": f"batch norm, {WORKERS} workers, pooled (real ranks)",
}


@dataclass(frozen=True)
class Config:
    """Sizes of the study; every run sees ``epochs`` epochs and takes at least ``least_steps`` steps."""

    seeds: int = 5
    epochs: int = 8
    least_steps: int = 150
    width: int = 64
    batches: tuple[int, ...] = (2, 4, 8, 16, 64, 256)
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)


def workers(arm: str) -> int:
    """Return how many workers an arm trains with.

    Parameters
    ----------
    arm : str
        One of `ARMS`.

    Returns
    -------
    int
        1 or `WORKERS`.

    Examples
    --------
    >>> from batchnorm_lab.studies.small_batches import workers
    >>> workers("batch"), workers("pooled")
    (1, 4)
    """
    return WORKERS if arm in ("ghost", "pooled") else 1


def units(config: Config) -> list[Unit]:
    """Return one unit for each arm and mini-batch size; rates and seeds are trained together."""
    work = []
    for arm in ARMS:
        for size in config.batches:
            total = size * workers(arm)
            settings = [
                {
                    "arm": arm,
                    "batch": size,
                    "rate": rate,
                    "seed": seed,
                    "epochs": config.epochs,
                    "least_steps": config.least_steps,
                    "width": config.width,
                    **({"ranks": WORKERS} if arm == "pooled" else {}),
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ]
            work.append(
                Unit(settings, cost=max(config.epochs * 1200 / total, config.least_steps) * (20 + total))
            )
    return work


def normalizer(arm: str, batch: int, runs: int) -> Callable[[int], nn.Module]:
    """Return what makes the normalization layers of an arm.

    Workers that do not pool are parts of a batch that are normalized each by itself: one process computes
    exactly that. Workers that pool are as many processes.

    Parameters
    ----------
    arm : str
        One of `ARMS`.
    batch : int
        Samples of one worker.
    runs : int
        Networks that are trained together.

    Returns
    -------
    callable
        From the number of channels to a layer.

    Examples
    --------
    >>> from batchnorm_lab.studies.small_batches import normalizer
    >>> normalizer("ghost", 8, 1)(16).virtual_batch_size
    8
    """
    if arm == "group":
        return lambda channels: nn.GroupNorm(GROUPS * runs, channels)
    if arm == "ghost":
        return lambda channels: BatchNorm1d(channels, virtual_batch_size=batch)
    return BatchNorm1d


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train, and return the test accuracy with population statistics."""
    if unit[0]["arm"] != "pooled":
        return learn(advance, unit, data)
    results: list[list[Result]] = on_ranks(learn, WORKERS, unit, data, advance=advance)
    if any(result != results[0] for result in results):
        raise BatchNormError(
            "small-batches: the ranks ended with different networks.",
            why="pooled statistics and summed gradients are the same on every rank.",
            mend="this is a fault of pooling; please report it.",
        )
    return results[0]


def learn(advance: Advance, unit: list[Setting], data: ImageData) -> list[Result]:
    """Train in this process, which under the arm "pooled" is one rank of several.

    Parameters
    ----------
    advance : callable
        Called with the share that is done.
    unit : list of dict
        Settings of the same arm.
    data : ImageData
        What to learn from.

    Returns
    -------
    list of dict
        One a setting.
    """
    first, pooled = unit[0], unit[0]["arm"] == "pooled"
    total = first["batch"] * workers(first["arm"])
    networks = MLPEnsemble(
        (data.train_images[0].numel(), first["width"], first["width"], len(data.classes)),
        [setting["seed"] for setting in unit],
        activation="relu",
        gain=2**0.5,
        places={"before"},
        normalizer=normalizer(first["arm"], first["batch"], len(unit)),
    )
    if pooled:
        synchronize(networks, "own")
    steps = max(first["epochs"] * len(data.train_labels) // total, first["least_steps"])
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(networks, optimizer, data, steps=steps, batch=total, advance=advance, over_ranks=pooled)
    networks.eval()
    return [
        {"accuracy": round(a, 4)} for a in accuracy(networks, data.test_images, data.test_labels).tolist()
    ]


def best(records: list[Record], arm: str, batch: int) -> list[float]:
    """Return accuracies in %, one a seed, at the rate that is best on average over seeds.

    Parameters
    ----------
    records : list of dict
        Of this study.
    arm : str
        One of `ARMS`.
    batch : int
        Samples of one worker.

    Returns
    -------
    list of float
        0 to 100.
    """
    rates = sorted({record["setting"]["rate"] for record in select(records, arm=arm, batch=batch)})
    by_rate = [values(records, "accuracy", arm=arm, batch=batch, rate=rate) for rate in rates]
    return [100 * a for a in max(by_rate, key=sum)]


def answer(records: list[Record]) -> Answer:
    """Return what a mini-batch of 2 costs, and what ghost, pooled and group norm give back."""
    sizes = sorted({record["setting"]["batch"] for record in records})
    small = sizes[0]
    middle = min(sizes, key=lambda size: abs(size - 64))
    comparisons = [
        (
            f"a mini-batch of {small} is too small for batch norm",
            best(records, "batch", middle),
            best(records, "batch", small),
            f"1 worker with {middle} samples against {small}",
            0.0,
        ),
        (
            f"with {small} samples group norm is better than batch norm",
            best(records, "group", small),
            best(records, "batch", small),
            "group norm against batch norm, 1 worker",
            0.0,
        ),
        (
            f"with {small} samples a worker, pooled statistics are better than each worker's own",
            best(records, "pooled", small),
            best(records, "ghost", small),
            f"{WORKERS} workers, pooled against ghost",
            0.0,
        ),
        (
            f"with {middle} samples a worker, its own statistics do as well as pooled ones, within 1 point",
            best(records, "ghost", middle),
            best(records, "pooled", middle),
            f"{WORKERS} workers, ghost against pooled",
            -1.0,
        ),
    ]
    findings = []
    for statement, better, other, what, threshold in comparisons:
        gain = paired_difference(better, other)
        findings.append(
            Finding(
                "M8",
                statement,
                gain,
                verdict(gain, above=threshold),
                f"{what}: {mean_interval(better).estimate:.1f} % against {mean_interval(other).estimate:.1f} %, "
                f"{gain.text(2, ' points', signed=True)}",
            )
        )
    return make_answer(findings, ["Every arm at the best of its learning rates, for each size."])


def plot(records: list[Record]) -> Figure:
    """Draw final accuracy over the mini-batch size of a worker."""
    sizes = sorted({record["setting"]["batch"] for record in records})
    fig, axes = figure(1, 1, width=7.5, height=4.4)
    panel = axes[0][0]
    for style, (arm, name) in enumerate(ARMS.items()):
        runs = [best(records, arm, size) for size in sizes]
        line(panel, sizes, list(zip(*runs, strict=True)), style, name)
    panel.set(
        title="each arm at its best learning rate",
        xscale="log",
        xlabel="samples of one worker in a mini-batch (log scale)",
        ylabel="final test accuracy (%)",
    )
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    legend_below(fig, panel, columns=2)
    return fig


STUDY = Study(
    name="small-batches",
    title="Small mini-batches",
    question="How small may a training mini-batch be, and do ghost, pooled or group normalization help?",
    claim="Batch norm works with the mean and variance of each mini-batch, so a mini-batch must be large enough "
    "for them.",
    formula=r"$\mu = \frac{1}{m}\sum_i z^{(i)},\quad "
    r"\mathrm{std}(\mu) = \sigma / \sqrt{m}$: the statistics of m samples are noisy",
    claims=("M8",),
    configs={
        "quick": Config(seeds=2, epochs=1, least_steps=20, width=24, batches=(4, 64), rates=(0.1,)),
        "default": Config(),
        "full": Config(seeds=20, epochs=60, least_steps=1000, batches=(2, 3, 4, 6, 8, 16, 32, 64, 128, 256)),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
