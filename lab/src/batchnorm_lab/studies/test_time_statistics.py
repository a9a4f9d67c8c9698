"""Which mean and variance should be used at test time? (M9, M10, M11)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from batchnorm.network.statistics.calibrate import calibrate
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
from batchnorm_lab.studies.figures import bars, figure, legend_below, line
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, batch_statistics, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The estimators of M11 that a layer keeps while it trains: the weight of the new batch; None is the plain average.
MOMENTA = {"moving, 0.9": 0.9, "moving, 0.1": 0.1, "moving, 0.01": 0.01, "plain average": None}
POOLED, MINI_BATCH, WITHOUT = "pooled", "mini-batch", "without"
PHASES = ("early", "late")
TEST_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SAMPLES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Config:
    """Sizes of the study: looks are taken after ``early`` and after ``late`` steps of one training."""

    seeds: int = 8
    early: int = 20
    late: int = 1200
    batch: int = 60
    rate: float = 0.3


def units(config: Config) -> list[Unit]:
    """Return one unit for each estimator that needs a training of its own, and one for the rest."""
    return [
        Unit(
            [
                {
                    "estimator": estimator,
                    "seed": seed,
                    "early": config.early,
                    "late": config.late,
                    "batch": config.batch,
                    "rate": config.rate,
                }
                for seed in range(config.seeds)
            ]
        )
        for estimator in (*MOMENTA, POOLED)
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train, and look at the test accuracy early and late; the training is the same for all estimators."""
    first = unit[0]
    estimator = first["estimator"]
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 100, 100, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation="relu",
        gain=2**0.5,
        places={"before"},
        momentum=MOMENTA.get(estimator, 0.1),
    )
    results: list[Result] = [{} for _ in unit]

    def observe(step: int) -> None:
        if step == 0:
            return
        phase = "early" if step < first["late"] else "late"
        found = pooled(networks, data, first["batch"]) if estimator == POOLED else {}
        networks.eval()
        found["population"] = accuracy(networks, data.test_images, data.test_labels).tolist()
        if estimator == POOLED:
            found |= mini_batch_accuracies(networks, data)
            found[WITHOUT] = without(networks, data)
        for run, result in enumerate(results):
            result[phase] = {name: round(each[run], 4) for name, each in found.items()}

    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    steps = {"batch": first["batch"], "advance": advance, "observe": observe}
    train(networks, optimizer, data, steps=first["early"], every=first["early"], **steps)
    train(networks, optimizer, data, steps=first["late"], every=first["late"], **steps)
    return results


def pooled(networks: MLPEnsemble, data: ImageData, batch: int) -> dict[str, list[float]]:
    """Return test accuracies by the number of calibration samples; the networks are left calibrated on all.

    Parameters
    ----------
    networks : MLPEnsemble
        Trained.
    data : ImageData
        Its training images calibrate, its test images are looked at.
    batch : int
        Samples in a mini-batch of calibration.

    Returns
    -------
    dict of str to list of float
        From "samples N" to one accuracy a network.
    """
    found = {}
    total = len(data.train_images)
    for count in (*(n for n in SAMPLES if n < total), min(total, 4096)):
        images = data.train_images[:count]
        # Mini-batches as in training, as equal as can be: a rest of one sample has no variance.
        parts = images.tensor_split(max(1, round(count / batch)))
        calibrate(networks, [networks.images(part) for part in parts], progress=False)
        networks.eval()
        found[f"samples {count}"] = accuracy(networks, data.test_images, data.test_labels).tolist()
    return found


def mini_batch_accuracies(networks: MLPEnsemble, data: ImageData) -> dict[str, list[float]]:
    """Return test accuracies with the statistics of the test mini-batch, by its size.

    A mini-batch of one is given as two copies of the sample: the formula's mean is then the sample and its
    variance 0, as for one, which training mode refuses.

    Parameters
    ----------
    networks : MLPEnsemble
        Trained; their running statistics are left as they were.
    data : ImageData
        Its test images are looked at.

    Returns
    -------
    dict of str to list of float
        From "batch N" to one accuracy a network.
    """
    images, labels = data.test_images, data.test_labels
    twice, twice_labels = images.repeat_interleave(2, dim=0)[:400], labels.repeat_interleave(2)[:400]
    found = {}
    with batch_statistics(networks):
        for size in TEST_BATCHES:
            if size == 1:
                found["batch 1"] = accuracy(networks, twice, twice_labels, chunk=2).tolist()
            elif size <= len(images):
                found[f"batch {size}"] = accuracy(networks, images, labels, chunk=size).tolist()
    return found


def without(networks: MLPEnsemble, data: ImageData) -> list[float]:
    """Return test accuracies of the trained weights with the batch norms left out.

    Parameters
    ----------
    networks : MLPEnsemble
        Trained; left as they were.
    data : ImageData
        Its test images are looked at.

    Returns
    -------
    list of float
        One a network.
    """
    norms = networks.norms
    networks.norms = nn.ModuleDict({name: nn.Identity() for name in norms})
    try:
        return accuracy(networks, data.test_images, data.test_labels).tolist()
    finally:
        networks.norms = norms


def answer(records: list[Record]) -> Answer:
    """Return what each way to the statistics costs or gains."""

    def of(estimator: str, phase: str, name: str = "population") -> list[float]:
        return [100 * a for a in values(records, lambda r: r[phase][name], estimator=estimator)]

    findings = []
    whole = of("plain average", "late")
    comparisons = [
        (
            "M9",
            "what was trained with batch normalization needs it at test time",
            of(POOLED, "late"),
            of(POOLED, "late", WITHOUT),
            "pooled statistics against the same weights without the normalization",
        ),
        (
            "M10",
            "one test sample is too few for statistics of its own",
            whole,
            of(POOLED, "late", "batch 1"),
            "plain average against the statistics of a single sample",
        ),
        (
            "M10",
            "four test samples are too few",
            whole,
            of(POOLED, "late", "batch 4"),
            "plain average against mini-batches of 4",
        ),
        (
            "M11",
            "early in training, the plain average serves better than a slow moving average",
            of("plain average", "early"),
            of("moving, 0.01", "early"),
            "plain average against momentum 0.01",
        ),
        (
            "M11",
            "late in training, a moving average serves better than the plain average over all of it",
            of("moving, 0.1", "late"),
            whole,
            "momentum 0.1 against plain average",
        ),
        (
            "M11",
            "late in training, averaging over mini-batches serves better than keeping almost the last one",
            of("moving, 0.1", "late"),
            of("moving, 0.9", "late"),
            "momentum 0.1 against 0.9",
        ),
    ]
    for claim, statement, better, other, what in comparisons:
        gain = paired_difference(better, other)
        findings.append(
            Finding(
                claim,
                statement,
                gain,
                f"{what}: {mean_interval(better).estimate:.1f} % against {mean_interval(other).estimate:.1f} %, "
                f"{gain.text(2, ' points', signed=True)}",
                above=0.0,
            )
        )
    means = {n: mean_interval(of(POOLED, "late", f"samples {n}")).estimate for n in _samples(records)}
    last = means[max(means)]
    enough = min(n for n, mean in means.items() if mean >= last - 1)
    remark = (
        f"Pooled over {enough} training samples the accuracy is within 1 point of that over {max(means)}."
    )
    return make_answer(findings, [remark])


def _samples(records: list[Record]) -> list[int]:
    names = values(records, lambda r: list(r["late"]), estimator=POOLED)[0]
    return sorted(int(name.split()[1]) for name in names if name.startswith("samples"))


def plot(records: list[Record]) -> Figure:
    """Draw accuracy by test mini-batch, by estimator and by the number of calibration samples."""
    fig, axes = figure(1, 3, width=11.5, height=4.1, width_ratios=[1, 1.15, 1])
    names = values(records, lambda r: list(r["late"]), estimator=POOLED)[0]
    sizes = sorted(int(name.split()[1]) for name in names if name.startswith("batch"))
    left, middle, right = axes[0]
    for style, phase in enumerate(PHASES):
        steps = records[0]["setting"][phase]
        for panel, word, places in ((left, "batch", sizes), (right, "samples", _samples(records))):
            runs = [
                [100 * record["result"][phase][f"{word} {n}"] for n in places]
                for record in select(records, estimator=POOLED)
            ]
            line(panel, places, runs, style, f"{phase}: after {steps} steps")
    left.set(title="statistics of the test mini-batch", xlabel="test mini-batch size (log scale)")
    right.set(title="pooled over training samples", xlabel="calibration samples (log scale)")
    for panel, places in ((left, sizes), (right, _samples(records)[::2])):
        panel.set(xscale="log", ylabel="test accuracy (%)", ylim=(0, 101))
        panel.set_xticks(places, [str(n) for n in places])
        panel.minorticks_off()
    estimators = [*MOMENTA, POOLED]
    measured = {
        phase: [
            [100 * record["result"][phase]["population"] for record in select(records, estimator=e)]
            for e in estimators
        ]
        for phase in PHASES
    }
    bars(middle, [name.replace(", ", "\n").replace(" ", "\n") for name in estimators], measured)
    middle.set(
        title="population statistics (weight of the new batch)", ylabel="test accuracy (%)", ylim=(0, 118)
    )
    middle.set_yticks(range(0, 101, 20))
    middle.legend(loc="upper left", ncols=2)
    legend_below(fig, left)
    return fig


STUDY = Study(
    name="test-time-statistics",
    title="Statistics at test time",
    question="How accurate is a network with the test mini-batch's statistics, moving averages, pooled ones?",
    claim="What was trained with batch norm needs it at test time; too few samples have no statistics of their "
    "own; those of training are collected and used.",
    formula=r"test: $\hat z = (z - \bar\mu)\,/\,\sqrt{\bar\sigma^2 + \epsilon},\qquad "
    r"\bar\mu \leftarrow (1-w)\,\bar\mu + w\,\mu$",
    claims=("M9", "M10", "M11"),
    configs={
        "quick": Config(seeds=2, early=10, late=80),
        "default": Config(),
        "full": Config(seeds=30, late=10000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
