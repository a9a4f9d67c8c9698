"""Can batch normalization undo itself where a network needs no normalization? (M5)"""

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
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.figures import figure, line
from batchnorm_lab.studies.intervals import mean_interval
from batchnorm_lab.studies.records import values
from batchnorm_lab.studies.training import EnsembleOptimizer, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"float64": torch.float64, "float32": torch.float32}
MINI_BATCHES = (8, 16, 32, 64, 128, 256, 512)
# Rounding of the largest of some ten thousand values, in units of the format's last place.
ROUNDING = {"float64": 64 * 2.0**-52, "float32": 64 * 2.0**-23}
FOUND = 1e-3


@dataclass(frozen=True)
class Config:
    """Sizes of the study; ``descent`` is the number of steps in which gamma and beta are learned."""

    seeds: int = 5
    steps: int = 600
    batch: int = 60
    rate: float = 0.1
    descent: int = 60
    descent_rate: float = 0.1


def units(config: Config) -> list[Unit]:
    """Return one unit: plain networks of all seeds, whose z are then studied."""
    return [
        Unit(
            [
                {
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "rate": config.rate,
                    "descent": config.descent,
                    "descent_rate": config.descent_rate,
                }
                for seed in range(config.seeds)
            ]
        )
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train plain networks, then give gamma and beta the values that undo the normalization of their z."""
    first = unit[0]
    sizes = (data.train_images[0].numel(), 50, 50, len(data.classes))
    networks = MLPEnsemble(sizes, [setting["seed"] for setting in unit], activation="relu", gain=2**0.5)
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(networks, optimizer, data, steps=first["steps"], batch=first["batch"], advance=advance)
    layers: list[Tensor] = []
    with torch.no_grad():
        networks(networks.images(data.train_images[:1024]), keep=layers)
    results: list[Result] = []
    for run, setting in enumerate(unit):
        z = torch.cat([layer[run] for layer in layers], dim=1)  # (N, C) of all hidden layers
        z = z[:, z.std(dim=0) > 1e-3]  # a unit that never moves has nothing to recover
        results.append(
            {
                "exact": {name: float(f"{exact_error(z.to(dtype)):.4g}") for name, dtype in DTYPES.items()},
                "descent": [
                    float(f"{e:.4g}")
                    for e in descend(z.double(), setting["descent"], setting["descent_rate"])
                ],
                "mini_batch": {
                    str(m): round(mini_batch_error(z.double(), m), 5) for m in MINI_BATCHES if m <= len(z)
                },
                "channels": z.shape[1],
            }
        )
    return results


def undoing(z: Tensor) -> BatchNorm1d:
    """Return a batch norm with gamma = sqrt(var + eps) and beta = mean of ``z``.

    Parameters
    ----------
    z : Tensor, shape (N, C)
        Pre-activations.

    Returns
    -------
    BatchNorm1d
        In training mode.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.identity_recovery import undoing
    >>> z = torch.randn(50, 3, dtype=torch.float64) * 5 + 2
    >>> torch.allclose(undoing(z)(z), z)
    True
    """
    norm = BatchNorm1d(z.shape[1], dtype=z.dtype)
    norm.weight = nn.Parameter((z.var(dim=0, correction=0) + norm.eps).sqrt())
    norm.bias = nn.Parameter(z.mean(dim=0))
    return norm


@torch.no_grad()
def exact_error(z: Tensor) -> float:
    """Return the largest \\|z_tilde - z\\| of any value, in units of the largest \\|z\\| of its channel.

    Parameters
    ----------
    z : Tensor, shape (N, C)
        Pre-activations.

    Returns
    -------
    float
        A few times the precision of the number format.
    """
    return float(((undoing(z)(z) - z).abs().amax(0) / z.abs().amax(0)).max())


def descend(z: Tensor, steps: int, rate: float) -> list[float]:
    """Learn gamma and beta from 1 and 0 by gradient descent on the mean square of z_tilde - z.

    Parameters
    ----------
    z : Tensor, shape (N, C)
        Pre-activations, the target.
    steps : int
        Of gradient descent.
    rate : float
        Learning rate.

    Returns
    -------
    list of float
        Root mean square of z_tilde - z in units of the standard deviation, before each step and after the last.
    """
    norm = BatchNorm1d(z.shape[1], dtype=z.dtype)
    spread = z.var(dim=0, correction=0)
    path = []
    for step in range(steps + 1):
        square = (norm(z) - z).square().mean(dim=0)
        path.append(float((square.detach() / spread).mean().sqrt()))
        if step < steps:
            norm.zero_grad()
            square.sum().backward()
            with torch.no_grad():
                for parameter in norm.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=rate)
    return path


@torch.no_grad()
def mini_batch_error(z: Tensor, batch: int) -> float:
    """Return how far z_tilde is from z if gamma and beta fit all of z and it comes in mini-batches.

    Parameters
    ----------
    z : Tensor, shape (N, C)
        Pre-activations.
    batch : int
        Samples in a mini-batch.

    Returns
    -------
    float
        Root mean square, in units of the standard deviation of each channel.
    """
    norm = undoing(z)
    parts = [part for part in z.split(batch) if len(part) == batch]
    square = torch.stack([(norm(part) - part).square().mean(dim=0) for part in parts]).mean(dim=0)
    return float((square / z.var(dim=0, correction=0)).mean().sqrt())


def answer(records: list[Record]) -> Answer:
    """Return the error of the exact setting, and how close gradient descent comes to it."""
    findings = []
    for dtype, rounding in ROUNDING.items():
        errors = mean_interval(record["result"]["exact"][dtype] for record in records)
        findings.append(
            Finding(
                "M5",
                f"{dtype}: gamma = sqrt(var + eps), beta = mean gives z back to rounding",
                errors,
                f"largest relative error of any value {errors.estimate:.1e} [{errors.low:.1e}, {errors.high:.1e}]",
                below=rounding,
            )
        )
    last = mean_interval(values(records, lambda r: r["descent"][-1]))
    steps = records[0]["setting"]["descent"]
    start = mean_interval(values(records, lambda r: r["descent"][0]))
    findings.append(
        Finding(
            "M5",
            f"gradient descent on gamma and beta finds z to {FOUND:g} of its standard deviation",
            last,
            f"after {steps} steps the rms error is {last.estimate:.1e} [{last.low:.1e}, {last.high:.1e}] "
            f"(at the start: {start.text(2)})",
            below=FOUND,
        )
    )
    sizes = sorted(int(m) for m in records[0]["result"]["mini_batch"])
    size = min(sizes, key=lambda m: abs(m - 64))
    noise = mean_interval(values(records, lambda r: 100 * r["mini_batch"][str(size)]))
    findings.append(
        Finding(
            "",
            f"with statistics of mini-batches of {size} the identity is only approximate",
            noise,
            f"rms error {noise.text(1, ' %')} of the standard deviation, since each mini-batch has its own mean "
            "and variance",
        )
    )
    return make_answer(findings)


def plot(records: list[Record]) -> Figure:
    """Draw the error over the steps of gradient descent, and over the size of the mini-batch."""
    fig, axes = figure(1, 2, height=3.7)
    left, right = axes[0]
    paths = values(records, "descent")
    line(left, range(len(paths[0])), paths, 0, "gradient descent on gamma and beta")
    exact = mean_interval(values(records, lambda r: r["exact"]["float64"])).estimate
    left.axhline(
        exact, color="#D55E00", linestyle="--", linewidth=1.2, label="set from mean and variance (float64)"
    )
    left.set(
        title=r"learning $\gamma$ and $\beta$ with the target $z$",
        xlabel="steps of gradient descent",
        ylabel=r"rms of $\tilde z - z$ (standard deviations)",
        yscale="log",
    )
    left.legend(loc="center right")
    sizes = sorted(int(m) for m in records[0]["result"]["mini_batch"])
    runs = values(records, lambda r: [r["mini_batch"][str(m)] for m in sizes])
    line(right, sizes, runs, 0, "measured")
    right.plot(
        sizes,
        [(1.5 / m) ** 0.5 for m in sizes],
        color="#D55E00",
        linestyle="--",
        label=r"$\sqrt{1.5/m}$, Gaussian z",
    )
    right.set(
        title=r"$\gamma$, $\beta$ of all data, $\mu$, $\sigma$ of mini-batches",
        xlabel="mini-batch size m (log scale)",
        ylabel=r"rms of $\tilde z - z$ (standard deviations)",
        xscale="log",
        yscale="log",
    )
    right.set_xticks(sizes, [str(m) for m in sizes])
    right.minorticks_off()
    ticks = [0.03, 0.1, 0.3]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.legend()
    return fig


STUDY = Study(
    name="identity-recovery",
    title="Batch normalization can undo itself",
    question="Do gamma and beta give z back exactly, and does gradient descent find them?",
    claim="Where the network needs no normalization it can undo it.",
    formula=r"$\gamma = \sqrt{\sigma^2 + \epsilon},\quad \beta = \mu \quad\Rightarrow\quad "
    r"\tilde z = \gamma\,\hat z + \beta = z$",
    claims=("M5",),
    configs={
        "quick": Config(seeds=2, steps=60),
        "default": Config(),
        "full": Config(seeds=50, steps=3000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
