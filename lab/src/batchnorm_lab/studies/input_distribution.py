"""How does the distribution of a hidden unit's input move during training, with and without? (M3)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
from batchnorm_lab.studies.intervals import ratio_interval
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, batch_statistics, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (15, 50, 85)
ARMS = {False: "plain", True: "batch norm"}


@dataclass(frozen=True)
class Config:
    """Sizes of the study; ``looks`` is how often the distribution is looked at."""

    seeds: int = 5
    steps: int = 6000
    batch: int = 60
    rate: float = 0.3
    looks: int = 60


def units(config: Config) -> list[Unit]:
    """Return one unit for each arm."""
    return [
        Unit(
            [
                {
                    "normalized": normalized,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "rate": config.rate,
                    "every": max(1, config.steps // config.looks),
                }
                for seed in range(config.seeds)
            ]
        )
        for normalized in ARMS
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train, and look at the input of the last hidden sigmoids over the test images."""
    first = unit[0]
    sizes = (data.train_images[0].numel(), 100, 100, 100, len(data.classes))
    seeds = [setting["seed"] for setting in unit]
    networks = MLPEnsemble(sizes, seeds, places={"before"} if first["normalized"] else ())
    quantiles = torch.tensor(PERCENTILES) / 100.0
    # Statistics of the test images themselves, so that a lag of the moving averages is not taken for a drift.
    images = networks.images(data.test_images[:600])
    looks: list[Tensor] = []

    @torch.no_grad()
    def observe(step: int) -> None:
        kept: list[Tensor] = []
        with batch_statistics(networks):
            networks(images, keep=kept)
        looks.append(torch.quantile(kept[-1], quantiles, dim=1))  # (3, R, C)

    train(
        networks,
        EnsembleOptimizer(networks, [setting["rate"] for setting in unit]),
        data,
        steps=first["steps"],
        batch=first["batch"],
        every=first["every"],
        observe=observe,
        advance=advance,
    )
    path = torch.stack(looks)  # (looks, 3, R, C)
    travel = (path.amax(0) - path.amin(0)).mean(dim=(0, 2))
    width = (path[:, 2] - path[:, 0]).mean(dim=(0, 2))
    return [
        {
            "unit": [[round(v, 3) for v in path[:, p, run, 0].tolist()] for p in range(3)],
            "travel": round(float(travel[run]), 5),
            "width": round(float(width[run]), 5),
        }
        for run in range(len(unit))
    ]


def answer(records: list[Record]) -> Answer:
    """Return how far the percentiles travel during training, with and without."""
    travel = {arm: values(records, "travel", normalized=arm) for arm in ARMS}
    relative = {arm: values(records, lambda r: r["travel"] / r["width"], normalized=arm) for arm in ARMS}
    ratio = ratio_interval(travel[False], travel[True])
    shape = ratio_interval(relative[False], relative[True])
    return make_answer(
        [
            Finding(
                "M3",
                "The input of the last hidden sigmoids is steadier with batch normalization",
                ratio,
                f"without it, the 15th, 50th and 85th percentile travel {ratio.text(2)} times as far over the "
                "training (mean over 100 units)",
                above=1.0,
            ),
            Finding(
                "M3",
                "The same, in units of the distribution's own width (15th to 85th percentile)",
                shape,
                f"without it, {shape.text(2)} times as far",
                above=1.0,
            ),
        ]
    )


def plot(records: list[Record]) -> Figure:
    """Draw the three percentiles of one unit over training, and the mean travel of all units."""
    fig, axes = figure(1, 2, height=3.9, sharey=True)
    for panel, (arm, name) in zip(axes[0], ARMS.items(), strict=True):
        record = select(records, normalized=arm)[0]
        every = record["setting"]["every"]
        for style, (percentile, path) in enumerate(zip(PERCENTILES, record["result"]["unit"], strict=True)):
            line(panel, [every * k for k in range(len(path))], [path], style, f"{percentile}th percentile")
        panel.axhline(0, color="#a0a0a0", linewidth=0.8, zorder=0)
        panel.set(title=f"{name}: one unit of the last hidden layer", xlabel="training steps")
    axes[0][0].set_ylabel("input of the sigmoid (dimensionless)")
    legend_below(fig, axes[0][0])
    return fig


STUDY = Study(
    name="input-distribution",
    title="What a hidden unit sees while it learns",
    question="How do the percentiles of the last hidden sigmoid's input move over training?",
    claim="With batch normalization the distribution of a hidden unit's input stays steadier during training.",
    formula=r"$\mathrm{mean}(\hat z) = 0,\quad \mathrm{var}(\hat z) = 1$ "
    r"over each mini-batch, so $\tilde z$ moves only as $\gamma$ and $\beta$ do",
    claims=("M3",),
    configs={
        "quick": Config(seeds=2, steps=300, looks=15),
        "default": Config(),
        "full": Config(seeds=20, steps=30000, looks=100),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
