"""Are gamma and beta worth learning, against leaving them at 1 and 0? (M4)"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

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
from batchnorm_lab.studies.curves import at_best_rate, final, over_training
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.figures import bars, figure, legend_below
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.records import at_edges
from batchnorm_lab.studies.shifted_inputs import noise
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, tuple[str, ...]] = {  # which of the two are learned
    "both learned": ("weight", "bias"),
    "gamma alone": ("weight",),
    "beta alone": ("bias",),
    "both fixed": (),
}
ACTIVATIONS = ("sigmoid", "relu")
MARGIN = 0.5  # points of accuracy that are as good as none
NOISE = 3
"""Severity of the noise on every image, training and test: the digits as they are tell nothing apart."""


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates`` on validation images."""

    seeds: int = 8
    steps: int = 600
    batch: int = 60
    every: int = 20
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)


def units(config: Config) -> list[Unit]:
    """Return one unit for each activation and arm; rates and seeds are trained together."""
    return [
        Unit(
            [
                {
                    "activation": activation,
                    "arm": arm,
                    "rate": rate,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "every": config.every,
                    "noise": NOISE,
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ]
        )
        for activation in ACTIVATIONS
        for arm in ARMS
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train on noisy images; return accuracies over the steps, and how far gamma and beta have moved."""
    first = unit[0]
    noisy = replace(
        data,
        train_images=noise(data.train_images, first["noise"]),
        # other noise than that of the training images, which is drawn from the same seed
        test_images=noise(data.test_images.flip(0), first["noise"]).flip(0),
    )
    choose, report = noisy.with_validation()
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 100, 100, 100, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation=first["activation"],
        gain=2**0.5 if first["activation"] == "relu" else 1.0,
        places={"before"},
    )
    affine = [
        (norm.weight, norm.bias)
        for norm in networks.norms.values()
        if isinstance(norm, BatchNorm1d) and norm.weight is not None and norm.bias is not None
    ]
    for gamma, beta in affine:
        gamma.requires_grad_("weight" in ARMS[first["arm"]])
        beta.requires_grad_("bias" in ARMS[first["arm"]])
    validation: list[list[float]] = []
    test: list[list[float]] = []

    def observe(step: int) -> None:
        networks.eval()
        validation.append(accuracy(networks, choose.test_images, choose.test_labels).tolist())
        test.append(accuracy(networks, report.test_images, report.test_labels).tolist())

    train(
        networks,
        EnsembleOptimizer(networks, [setting["rate"] for setting in unit]),
        report,
        steps=first["steps"],
        batch=first["batch"],
        every=first["every"],
        observe=observe,
        advance=advance,
    )
    with torch.no_grad():
        gammas = [(gamma - 1).abs().view(networks.runs, -1).mean(1) for gamma, _ in affine]
        betas = [beta.abs().view(networks.runs, -1).mean(1) for _, beta in affine]
    moved = [
        {"gamma": round(scale, 4), "beta": round(shift, 4)}
        for scale, shift in zip(
            torch.stack(gammas).mean(0).tolist(), torch.stack(betas).mean(0).tolist(), strict=True
        )
    ]
    return [
        {"validation": [round(a, 4) for a in one], "accuracy": [round(a, 4) for a in other], "moved": far}
        for one, other, far in zip(zip(*validation, strict=True), zip(*test, strict=True), moved, strict=True)
    ]


def answer(records: list[Record]) -> Answer:
    """Return what learning gamma and beta gains, and how far they move."""
    findings, remarks = [], []
    for activation in ACTIVATIONS:
        for measured, name in ((over_training, "mean accuracy over training"), (final, "final accuracy")):
            learned, fixed = (
                [
                    measured(run["result"])
                    for run in at_best_rate(records, measured, activation=activation, arm=arm)
                ]
                for arm in ("both learned", "both fixed")
            )
            gain = paired_difference(learned, fixed)
            findings.append(
                Finding(
                    "M4",
                    f"{activation}: learning gamma and beta is better than leaving them at 1 and 0, {name}",
                    gain,
                    f"{mean_interval(learned).estimate:.1f} % against {mean_interval(fixed).estimate:.1f} %, "
                    f"{gain.text(2, ' points', signed=True)}",
                    above=0.0,
                    margin=MARGIN,
                )
            )
        moved = [
            run["result"]["moved"]
            for run in at_best_rate(records, final, activation=activation, arm="both learned")
        ]
        gamma, beta = (mean_interval(far[name] for far in moved) for name in ("gamma", "beta"))
        remarks.append(
            f"With {activation}, learned gammas end {gamma.estimate:.2f} away from 1 and betas "
            f"{beta.estimate:.2f} away from 0 (means over units)."
        )
    rates = [
        at_best_rate(records, measured, activation=activation, arm=arm)[0]["setting"]["rate"]
        for measured in (over_training, final)
        for activation in ACTIVATIONS
        for arm in ("both learned", "both fixed")
    ]
    remarks.append(at_edges(records, rates))
    return make_answer(findings, remarks)


def plot(records: list[Record]) -> Figure:
    """Draw the final accuracy and that over training of every arm at its best rate."""
    fig, axes = figure(1, 2, height=3.8)
    for panel, (measured, name) in zip(
        axes[0], ((over_training, "mean over training"), (final, "at the end")), strict=True
    ):
        series = {
            arm: [
                [measured(run["result"]) for run in at_best_rate(records, measured, activation=a, arm=arm)]
                for a in ACTIVATIONS
            ]
            for arm in ARMS
        }
        bars(panel, [f"3 x 100 {a}" for a in ACTIVATIONS], series)
        lowest = min(min(runs) for groups in series.values() for runs in groups)
        panel.set(title=name, ylabel="test accuracy, noisy digits (%)", ylim=(max(0, lowest - 5), 100))
    legend_below(fig, axes[0][0], columns=4)
    return fig


STUDY = Study(
    name="gamma-and-beta",
    title="gamma and beta are learned",
    question="What is lost if gamma and beta stay at 1 and 0?",
    claim="gamma and beta are learned with W: mean 0 and variance 1 need not be the best, so the network finds its "
    "own.",
    formula=r"$\tilde z = \gamma\,\hat z + \beta$",
    claims=("M4",),
    configs={
        "quick": Config(seeds=2, steps=60, every=10, rates=(0.3, 1.0)),
        "default": Config(),
        "full": Config(seeds=20, steps=5000, every=50, rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
