"""What do the traps of batch norm's conventions cost in accuracy? (M8, M11)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.network.statistics.freeze import freeze
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
from batchnorm_lab.studies.figures import figure, legend_below
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.records import values
from batchnorm_lab.studies.sequences import SequenceEnsemble
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, mini_batches, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# trap: (the statement that is tested, the right way, the trap), the ways as they stand in a figure
TRAPS: dict[str, tuple[str, str, str]] = {
    "momentum": (
        "a momentum read the wrong way round (0.9 of the new batch in place of 0.1) costs accuracy",
        "0.1 of the\nnew batch",
        "0.9 of the\nnew batch",
    ),
    "variance": (
        "a biased variance (divisor m, here 4, in place of m - 1) costs accuracy",
        "divisor\nm - 1",
        "divisor\nm",
    ),
    "fine-tuning": (
        "statistics left unfrozen in fine-tuning cost accuracy on the first task",
        "statistics\nfrozen",
        "statistics\nmove",
    ),
    "padding": (
        "padding in the statistics costs accuracy",
        "padding\nmasked",
        "padding\ncounted",
    ),
}
RIGHT, WRONG = "right", "trap"
PADDING = (0, 48)  # positions behind every sequence, drawn anew for each mini-batch


@dataclass(frozen=True)
class Config:
    """Sizes of the study; ``small`` is the mini-batch of the traps that need a small one."""

    seeds: int = 8
    steps: int = 800
    batch: int = 60
    small: int = 4
    rate: float = 0.1
    tuning_steps: int = 200


def units(config: Config) -> list[Unit]:
    """Return one unit for each trap and way."""
    return [
        Unit(
            [
                {
                    "trap": trap,
                    "way": way,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": {"momentum": 16, "variance": config.small}.get(trap, config.batch),
                    "small": config.small,
                    "rate": config.rate,
                    "tuning_steps": config.tuning_steps,
                }
                for seed in range(config.seeds)
            ]
        )
        for trap in TRAPS
        for way in (RIGHT, WRONG)
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train the right way or into the trap, and return the test accuracy."""
    experiment = {"padding": _padding, "fine-tuning": _fine_tuning}.get(unit[0]["trap"], _training)
    found = experiment(unit, data, advance)
    return [{name: round(float(each[run]), 4) for name, each in found.items()} for run in range(len(unit))]


def _mlp(unit: list[Setting], data: ImageData, **norm: Any) -> MLPEnsemble:
    return MLPEnsemble(
        (data.train_images[0].numel(), 64, 64, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation="relu",
        gain=2**0.5,
        places={"before"},
        **norm,
    )


def _training(unit: list[Setting], data: ImageData, advance: Advance) -> dict[str, Tensor]:
    """Train with a momentum, or a divisor of the variance, that is right or that is not."""
    first = unit[0]
    wrong = first["way"] == WRONG
    if first["trap"] == "momentum":
        networks = _mlp(unit, data, momentum=0.9 if wrong else 0.1)
    else:
        networks = _mlp(unit, data, running_var_correction=0 if wrong else 1)
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(networks, optimizer, data, steps=first["steps"], batch=first["batch"], advance=advance)
    networks.eval()
    return {"accuracy": accuracy(networks, data.test_images, data.test_labels)}


def _fine_tuning(unit: list[Setting], data: ImageData, advance: Advance) -> dict[str, Tensor]:
    """Learn one half of the classes, then a new last layer for the other half, on the same hidden layers.

    The hidden weights, gamma and beta stay as they are in both ways, and the last layer of the first task
    is kept. All that differs is whether the running statistics move while the network is in training mode.
    """
    first = unit[0]
    half = len(data.classes) // 2
    old_train, new_train = data.train_labels < half, data.train_labels >= half
    old_test, new_test = data.test_labels < half, data.test_labels >= half
    networks = _mlp(unit, data)
    train(
        networks,
        EnsembleOptimizer(networks, [setting["rate"] for setting in unit]),
        _part(data, old_train),
        steps=first["steps"],
        batch=first["batch"],
        advance=lambda share: advance(0.7 * share),
    )
    networks.eval()
    before = accuracy(networks, data.test_images[old_test], data.test_labels[old_test])
    kept = [networks.weights[-1].detach().clone(), networks.biases[-1].detach().clone()]
    networks.requires_grad_(False)
    networks.weights[-1] = nn.Parameter(torch.zeros_like(kept[0]))
    networks.biases[-1] = nn.Parameter(torch.zeros_like(kept[1]))
    if first["way"] == RIGHT:
        freeze(networks)
    train(
        networks,
        EnsembleOptimizer(networks, [setting["rate"] for setting in unit]),
        _part(data, new_train),
        steps=first["tuning_steps"],
        batch=first["small"],
        advance=lambda share: advance(0.7 + 0.3 * share),
    )
    networks.eval()
    new = accuracy(networks, data.test_images[new_test], data.test_labels[new_test])
    networks.weights[-1], networks.biases[-1] = (nn.Parameter(value) for value in kept)
    old = accuracy(networks, data.test_images[old_test], data.test_labels[old_test])
    return {"accuracy": old, "before": before, "second task": new}


def _part(data: ImageData, train_part: Tensor) -> ImageData:
    return ImageData(
        data.name,
        data.train_images[train_part],
        data.train_labels[train_part],
        data.test_images,
        data.test_labels,
        data.classes,
    )


def _padding(unit: list[Setting], data: ImageData, advance: Advance) -> dict[str, Tensor]:
    """Read images as sequences of rows; each mini-batch is padded to a length of its own."""
    first = unit[0]
    seeds = [setting["seed"] for setting in unit]
    colours, rows, columns = data.image_shape
    networks = SequenceEnsemble(
        rows, colours * columns, 24, len(data.classes), seeds, masked=first["way"] == RIGHT
    )
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    source = mini_batches(len(data.train_labels), first["batch"], seeds)
    lengths = torch.Generator().manual_seed(0)
    networks.train()
    for step in range(first["steps"]):
        index = next(source)
        padding = int(torch.randint(*PADDING, (), generator=lengths))
        logits = networks(networks.images(data.train_images[index]), padding=padding)
        labels = data.train_labels[index].flatten()
        (F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / first["batch"]).backward()
        optimizer.step()
        if step % 10 == 0:
            advance(step / first["steps"])
    networks.eval()
    return {"accuracy": accuracy(networks, data.test_images, data.test_labels)}


def answer(records: list[Record]) -> Answer:
    """Return what each trap costs in test accuracy."""
    findings = []
    for trap, (statement, _, _) in TRAPS.items():
        right, wrong = (_of(records, trap, way) for way in (RIGHT, WRONG))
        cost = paired_difference(right, wrong)
        findings.append(
            Finding(
                {"momentum": "M11", "variance": "M11", "fine-tuning": "M11", "padding": "M8"}[trap],
                statement,
                cost,
                f"{mean_interval(right).estimate:.1f} % the right way, {mean_interval(wrong).estimate:.1f} % in "
                f"the trap: cost {cost.text(2, ' points')}",
                above=0.0,
            )
        )
    second = {way: _of(records, "fine-tuning", way, "second task") for way in (RIGHT, WRONG)}
    gain = paired_difference(second[WRONG], second[RIGHT])
    remark = (
        f"Fine-tuning's second task has {mean_interval(second[RIGHT]).estimate:.1f} % with frozen and "
        f"{mean_interval(second[WRONG]).estimate:.1f} % with moving statistics "
        f"({gain.text(1, ' points', signed=True)} for moving)."
    )
    return make_answer(findings, [remark])


def _of(records: list[Record], trap: str, way: str, name: str = "accuracy") -> list[float]:
    return [100 * a for a in values(records, name, trap=trap, way=way)]


def plot(records: list[Record]) -> Figure:
    """Draw the accuracy the right way and in the trap: a line for each seed, and the means with intervals."""
    fig, axes = figure(1, len(TRAPS), width=10.5, height=3.9)
    for panel, (trap, (_, right, wrong)) in zip(axes[0], TRAPS.items(), strict=True):
        pairs = [_of(records, trap, way) for way in (RIGHT, WRONG)]
        for number, (first, second) in enumerate(zip(*pairs, strict=True)):
            label = "one seed" if number == 0 else None
            panel.plot((0, 1), (first, second), "-", color="#9a9a9a", linewidth=0.9, label=label)
        intervals = [mean_interval(seeds) for seeds in pairs]
        panel.errorbar(
            (0, 1),
            [interval.estimate for interval in intervals],
            yerr=[i.high - i.estimate if i.seeds > 1 else 0.0 for i in intervals],
            color="#000000",
            marker="o",
            linewidth=2,
            capsize=4,
            label="mean of seeds, 95 % interval",
        )
        panel.set_xlim(-0.35, 1.35)
        panel.set_xticks((0, 1), (right, wrong))
        panel.set_title(trap)
        panel.grid(False, axis="x")
    axes[0][0].set_ylabel("test accuracy (%)")
    legend_below(fig, axes[0][0])
    return fig


STUDY = Study(
    name="convention-traps",
    title="The traps of conventions",
    question="What do a momentum the wrong way round, a biased variance, an unfrozen layer, padding cost?",
    claim="Statistics collected or used in a way that training did not mean cost accuracy, and nothing warns.",
    formula=r"$\bar\mu \leftarrow (1-w)\,\bar\mu + w\,\mu$ (torch: w = 0.1; Keras writes 1 - w = 0.99), $\qquad"
    r"\bar\sigma^2:\ \frac{1}{m}$ or $\frac{1}{m-1}$",
    claims=("M8", "M11"),
    configs={
        "quick": Config(seeds=2, steps=80, tuning_steps=30),
        "default": Config(),
        "full": Config(seeds=30, steps=8000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
