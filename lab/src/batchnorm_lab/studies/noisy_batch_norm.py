"""Is it the steadier distribution that makes batch normalization help? Noise after it takes that away. (M3, M12)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
from batchnorm_lab.studies.curves import at_best_rate, over_training
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.figures import figure, legend_below, line
from batchnorm_lab.studies.intervals import mean_interval, paired_difference, ratio_interval
from batchnorm_lab.studies.records import at_edges
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, batch_statistics, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "plain": "plain",
    "batch norm": "batch norm",
    "noisy": "batch norm, then noise of another mean and scale in every step",
}
SHIFT, SCALE = 1.0, 0.5


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates``."""

    seeds: int = 8
    steps: int = 1000
    batch: int = 60
    every: int = 20
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Noise(nn.Module):
    """Scale and shift each channel by random amounts, which are drawn anew for every sample from moving bounds.

    In every step each channel draws the bounds of its shift and scale, and each sample then its own within them.
    So the distribution of what comes out moves from step to step as it would not without. In inference it is the
    identity. After S. Santurkar and others, How Does Batch Normalization Help Optimization?, 2018,
    arXiv:1805.11604, appendix.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.noisy_batch_norm import Noise
    >>> z = torch.ones(5, 3)
    >>> bool((Noise()(z) == z).any()), bool((Noise().eval()(z) == z).all())
    (False, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, z: Tensor) -> Tensor:
        """Return z with noise.

        Parameters
        ----------
        z : Tensor, shape (N, C)
            Normalized.

        Returns
        -------
        Tensor, shape (N, C)
            Of another distribution in every step.
        """
        if not self.training:
            return z

        def drawn(*shape: int) -> Tensor:
            return torch.rand(shape, generator=self.generator).mul(2).sub(1)

        channels = z.shape[1]
        shift = SHIFT * (drawn(channels) + drawn(*z.shape))
        scale = 1 + SCALE * (drawn(channels) + drawn(*z.shape)) / 2
        return z * scale + shift


def units(config: Config) -> list[Unit]:
    """Return one unit for each arm; rates and seeds are trained together."""
    return [
        Unit(
            [
                {
                    "arm": arm,
                    "rate": rate,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "every": config.every,
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ]
        )
        for arm in ARMS
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train; return accuracies over the steps, and how far the input of the last hidden layer moves by step."""
    first = unit[0]
    choose, report = data.with_validation()
    arm = first["arm"]
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 100, 100, 100, len(data.classes)),
        [setting["seed"] for setting in unit],
        places=() if arm == "plain" else {"before"},
        normalizer=(lambda channels: nn.Sequential(BatchNorm1d(channels), Noise()))
        if arm == "noisy"
        else None,
    )
    validation: list[list[float]] = []
    test: list[list[float]] = []
    moments: list[tuple[Tensor, Tensor]] = []

    def observe(step: int) -> None:
        networks.eval()
        validation.append(accuracy(networks, choose.test_images, choose.test_labels).tolist())
        test.append(accuracy(networks, report.test_images, report.test_labels).tolist())
        kept: list[Tensor] = []
        # the same images at every look, normalized as in training, noise included
        with torch.no_grad(), batch_statistics(networks):
            networks(networks.images(report.train_images[: first["batch"]]), keep=kept)
        moments.append((kept[-1].mean(1), kept[-1].std(1)))

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
    means = torch.stack([mean for mean, _ in moments])  # (looks, R, C)
    widths = torch.stack([std for _, std in moments]).mean(0)
    moved = (means[1:] - means[:-1]).abs().mean(0)
    relative = moved / widths.clamp_min(1e-12)
    return [
        {
            "validation": [round(a, 4) for a in one],
            "accuracy": [round(a, 4) for a in other],
            "moved": round(float(moved[run].mean()), 5),
            "relative": round(float(relative[run].mean()), 5),
        }
        for run, (one, other) in enumerate(
            zip(zip(*validation, strict=True), zip(*test, strict=True), strict=True)
        )
    ]


def answer(records: list[Record]) -> Answer:
    """Return how steady the distributions are, and how well the networks learn."""
    runs = {arm: at_best_rate(records, over_training, arm=arm) for arm in ARMS}
    learned = {arm: [over_training(run["result"]) for run in found] for arm, found in runs.items()}
    moved, relative = (
        {arm: [run["result"][name] for run in found] for arm, found in runs.items()}
        for name in ("moved", "relative")
    )
    unsteady = ratio_interval(moved["noisy"], moved["plain"])
    findings = [
        Finding(
            "M3",
            "With noise after it, batch norm's distribution is less steady than without batch norm",
            unsteady,
            f"between two looks the mean of a unit moves by {_each(moved)}: {unsteady.text(2)} times as far with "
            f"noise as without batch norm; in units of its own standard deviation by {_each(relative)}",
            above=1.0,
        )
    ]
    for better, other, statement in (
        ("noisy", "plain", "Batch norm with this noise learns better than no batch norm all the same"),
        ("batch norm", "noisy", "The noise costs something"),
    ):
        gain = paired_difference(learned[better], learned[other])
        findings.append(
            Finding(
                "M12",
                statement,
                gain,
                f"mean accuracy over training {mean_interval(learned[better]).estimate:.1f} % against "
                f"{mean_interval(learned[other]).estimate:.1f} %, {gain.text(1, ' points', signed=True)}",
                above=0.0,
                margin=0.5,
            )
        )
    remarks = [
        "Santurkar et al. (2018) found the same on CIFAR-10, and concluded that a steadier distribution is not "
        "why batch normalization helps.",
        at_edges(records, [run[0]["setting"]["rate"] for run in runs.values()]),
    ]
    return make_answer(findings, remarks)


def _each(moved: dict[str, list[float]]) -> str:
    means = {arm: mean_interval(found).estimate for arm, found in moved.items()}
    return (
        f"{means['noisy']:.2f} with noise, {means['batch norm']:.2f} with batch norm alone and "
        f"{means['plain']:.2f} without"
    )


def plot(records: list[Record]) -> Figure:
    """Draw test accuracy over the steps of every arm at its best rate."""
    fig, axes = figure(1, 1, width=7.5, height=4.4)
    panel = axes[0][0]
    for style, (arm, name) in enumerate(ARMS.items()):
        runs = at_best_rate(records, over_training, arm=arm)
        curves = [[100 * a for a in run["result"]["accuracy"][1:]] for run in runs]
        every = runs[0]["setting"]["every"]
        line(panel, [every * (index + 1) for index in range(len(curves[0]))], curves, style, name)
    panel.set(
        title="3 x 100 sigmoids, each arm at its best learning rate",
        xlabel="training steps",
        ylabel="test accuracy (%)",
        ylim=(0, 101),
    )
    legend_below(fig, panel, columns=1)
    return fig


STUDY = Study(
    name="noisy-batch-norm",
    title="Noise after batch norm",
    question="Does batch normalization still help when noise makes its distributions less steady than without it?",
    claim="A steadier distribution of a hidden unit's input is what makes learning faster: later work doubts it.",
    formula=r"$\tilde z' = s\,\tilde z + t$ with $s, t$ drawn anew in every step",
    claims=("M3", "M12"),
    configs={
        "quick": Config(seeds=2, steps=60, every=10, rates=(0.3, 1.0)),
        "default": Config(),
        "full": Config(seeds=20, steps=6000, every=50),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
