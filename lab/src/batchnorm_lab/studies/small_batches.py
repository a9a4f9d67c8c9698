"""How does training fare with small mini-batches, and what helps? (M8)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from batchnorm import calibrate, synchronize
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
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.ranks import on_ranks
from batchnorm_lab.studies.records import at_edges, best, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, mean_loss, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 0.5  # points of accuracy that are as good as none
PRECISE = 60
"""Training images in each of the mini-batches from which statistics are taken anew."""
WORKERS = 4
GROUPS = 8
ARMS = {
    "batch": "batch norm, 1 worker",
    "group": f"group norm, 1 worker ({GROUPS} groups)",
    "ghost": f"{WORKERS} workers, each its own (ghost)",
    "pooled": f"{WORKERS} workers, pooled (real ranks)",
}


@dataclass(frozen=True)
class Config:
    """Sizes of the study; every run sees ``epochs`` epochs and takes at least ``least_steps`` steps."""

    seeds: int = 6
    epochs: int = 8
    least_steps: int = 150
    width: int = 64
    batches: tuple[int, ...] = (2, 4, 8, 16, 64, 128)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


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
    choose, report = data.with_validation()
    if pooled:
        synchronize(networks, "own")
    steps = max(first["epochs"] * len(report.train_labels) // total, first["least_steps"])
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(networks, optimizer, report, steps=steps, batch=total, advance=advance, over_ranks=pooled)
    networks.eval()
    found = {
        "validation": accuracy(networks, choose.test_images, choose.test_labels),
        "accuracy": accuracy(networks, report.test_images, report.test_labels),
    }
    if first["arm"] == "batch":
        found["train loss"] = mean_loss(networks, report.train_images, report.train_labels)
        found["test loss"] = mean_loss(networks, report.test_images, report.test_labels)
        images = report.train_images
        parts = images.tensor_split(max(1, round(len(images) / max(PRECISE, total))))
        calibrate(networks, [networks.images(part) for part in parts], progress=False)
        networks.eval()
        found["precise"] = accuracy(networks, report.test_images, report.test_labels)
    return [{name: round(float(each[run]), 4) for name, each in found.items()} for run in range(len(unit))]


def of_arm(records: list[Record], arm: str, batch: int, name: str = "accuracy") -> list[float]:
    """Return a result of an arm's runs, one a seed, at the rate that is best on validation images.

    Parameters
    ----------
    records : list of dict
        Of this study.
    arm : str
        One of `ARMS`.
    batch : int
        Samples of one worker.
    name : str, default "accuracy"
        Of the result.

    Returns
    -------
    list of float
        Accuracies from 0 to 100; losses in nats.
    """
    rate = best(records, arm=arm, batch=batch)
    factor = 1 if name.endswith("loss") else 100
    return [factor * found for found in values(records, name, arm=arm, batch=batch, rate=rate)]


def answer(records: list[Record]) -> Answer:
    """Return what a mini-batch of 2 costs, and what ghost, pooled, group norm and precise statistics give back."""
    sizes = sorted({record["setting"]["batch"] for record in records})
    small = sizes[0]
    middle = min(sizes, key=lambda size: abs(size - 64))
    comparisons = [
        (
            f"a mini-batch of {small} is too small for batch norm",
            of_arm(records, "batch", middle),
            of_arm(records, "batch", small),
            f"1 worker with {middle} samples against {small}",
        ),
        (
            f"with {small} samples group norm is better than batch norm",
            of_arm(records, "group", small),
            of_arm(records, "batch", small),
            "group norm against batch norm, 1 worker",
        ),
        (
            f"with {small} samples a worker, pooled statistics are better than each worker's own",
            of_arm(records, "pooled", small),
            of_arm(records, "ghost", small),
            f"{WORKERS} workers, pooled against ghost",
        ),
        (
            f"with {middle} samples a worker, pooled statistics are still better than each worker's own",
            of_arm(records, "pooled", middle),
            of_arm(records, "ghost", middle),
            f"{WORKERS} workers, pooled against ghost",
        ),
        (
            f"after mini-batches of {small}, statistics taken anew from larger ones are better at test time than the "
            "moving average (Wu and Johnson, 2021)",
            of_arm(records, "batch", small, "precise"),
            of_arm(records, "batch", small),
            f"statistics of mini-batches of {PRECISE} training images against the moving average",
        ),
    ]
    findings = []
    for statement, better, other, what in comparisons:
        gain = paired_difference(better, other)
        findings.append(
            Finding(
                "M8",
                statement,
                gain,
                f"{what}: {mean_interval(better).estimate:.1f} % against {mean_interval(other).estimate:.1f} %, "
                f"{gain.text(2, ' points', signed=True)}",
                above=0.0,
                margin=MARGIN,
            )
        )
    findings.append(_gap(records, sizes))
    chosen = [best(records, arm=arm, batch=size) for arm in ARMS for size in sizes]
    return make_answer(findings, [at_edges(records, chosen)])


def _gap(records: list[Record], sizes: list[int]) -> Finding:
    """Whether what batch norm adds to the training loss keeps test from training loss apart, by the mini-batch."""

    def gap(size: int) -> list[float]:
        losses = (of_arm(records, "batch", size, f"{part} loss") for part in ("test", "train"))
        return [test - training for test, training in zip(*losses, strict=True)]

    one, other = min(sizes, key=lambda size: abs(size - 16)), sizes[-1]
    more = paired_difference(gap(other), gap(one))
    gaps = ", ".join(f"{mean_interval(gap(size)).estimate:.3f} with {size}" for size in sizes)
    return Finding(
        "",
        f"with {other} samples test loss is further from training loss than with {one}: smaller mini-batches "
        "regularize (Luo et al., 2019)",
        more,
        f"test minus training loss, in nats: {gaps}; {more.text(3, ' nats', signed=True)}",
        above=0.0,
        margin=0.01,
    )


def plot(records: list[Record]) -> Figure:
    """Draw final accuracy over the mini-batch size of a worker."""
    sizes = sorted({record["setting"]["batch"] for record in records})
    fig, axes = figure(1, 1, width=7.5, height=4.4)
    panel = axes[0][0]
    for style, (arm, name) in enumerate(ARMS.items()):
        runs = [of_arm(records, arm, size) for size in sizes]
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
        "full": Config(seeds=20, epochs=60, least_steps=1000, batches=(2, 3, 4, 6, 8, 16, 32, 64, 128, 192)),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)
