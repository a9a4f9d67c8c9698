"""Which quantity should be normalized: the inputs, z, a, the outputs? (M1, M2, M6)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy import stats
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
from batchnorm_lab.studies.curves import at_best_rate, final, over_training
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.figures import figure, legend_below, line
from batchnorm_lab.studies.intervals import mean_interval, paired_difference, ratio_interval
from batchnorm_lab.studies.records import at_edges
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "inputs only": ("inputs",),
    "a (after)": ("after",),
    "z (before)": ("before",),
    "z and outputs": ("before", "outputs"),
}
ACTIVATIONS = ("sigmoid", "relu")
SMALL = 4
MARGIN = 0.5  # points of accuracy that are as good as none
# (claim, statement, the arm that should be better, the other, whether with mini-batches of `SMALL`)
CLAIMS = (
    (
        "M1",
        "normalizing z in the middle is better than normalizing the inputs only",
        "z (before)",
        "inputs only",
        False,
    ),
    (
        "M2",
        "z (before the nonlinearity) is a better target than a (after it)",
        "z (before)",
        "a (after)",
        False,
    ),
    (
        "M6",
        "leaving the output layer alone is better than normalizing it too",
        "z (before)",
        "z and outputs",
        False,
    ),
    (
        "M6",
        f"leaving the output layer alone is better, with mini-batches of {SMALL}",
        "z (before)",
        "z and outputs",
        True,
    ),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates``.

    With mini-batches of 4 only the arms that differ in the outputs are trained, for ``small_steps`` steps.
    """

    seeds: int = 8
    steps: int = 600
    small_steps: int = 2400
    batch: int = 60
    every: int = 20
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def units(config: Config) -> list[Unit]:
    """Return one unit for each activation, size of mini-batch and arm; rates and seeds are trained together."""
    sizes = [(config.batch, config.steps, config.every, arm) for arm in ARMS]
    looks = max(1, config.steps // config.every)
    small = (SMALL, config.small_steps, max(1, config.small_steps // looks))
    sizes += [(*small, arm) for arm in ("z (before)", "z and outputs")]
    return [
        Unit(
            [
                {
                    "activation": activation,
                    "arm": arm,
                    "rate": rate,
                    "seed": seed,
                    "steps": steps,
                    "batch": batch,
                    "every": every,
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ],
            cost=steps * (20 + batch),
        )
        for activation in ACTIVATIONS
        for batch, steps, every, arm in sizes
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train; return accuracies over the steps, and how far z and a are from a Gaussian at the end."""
    first = unit[0]
    choose, report = data.with_validation()
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 100, 100, 100, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation=first["activation"],
        gain=2**0.5 if first["activation"] == "relu" else 1.0,
        places=ARMS[first["arm"]],
    )
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
    networks.eval()
    kept: list[Tensor] = []
    with torch.no_grad():
        networks(networks.images(choose.test_images), keep=kept)
        far = {
            "z": distance_to_gaussian(kept[-1]),
            "a": distance_to_gaussian(networks.activation(kept[-1])),
        }
    return [
        {
            "validation": [round(a, 4) for a in one],
            "accuracy": [round(a, 4) for a in other],
            "from gaussian": {name: round(each[run], 4) for name, each in far.items()},
        }
        for run, (one, other) in enumerate(
            zip(zip(*validation, strict=True), zip(*test, strict=True), strict=True)
        )
    ]


def distance_to_gaussian(units: Tensor) -> list[float]:
    """Return how far the units of a layer are from a Gaussian of their own mean and variance.

    Parameters
    ----------
    units : Tensor, shape (R, N, C)
        Values of C units of R networks for N images.

    Returns
    -------
    list of float
        One a network: the mean over its units of the Wasserstein distance of order 1, in standard deviations.
        0 is a Gaussian; an even two-valued unit has 0.54. Units that do not vary are left out; NaN if none does.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.where_to_normalize import distance_to_gaussian
    >>> coin = torch.tensor([-1.0, 1.0]).repeat(500)[None, :, None]
    >>> [round(far, 2) for far in distance_to_gaussian(coin)]
    [0.54]
    """
    samples = units.shape[1]
    levels = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    gaussian = torch.from_numpy(stats.norm.ppf(levels.numpy()))[:, None]
    found = []
    for one in units.double():
        one = one[:, one.isfinite().all(0)]
        if one.shape[1]:
            one = one[:, one.std(0, correction=0) > 1e-6 * one.abs().amax(0)]
        if not one.shape[1]:
            found.append(math.nan)
            continue
        standard = (one - one.mean(0)) / one.std(0, correction=0)
        found.append(float((standard.sort(0).values - gaussian).abs().mean()))
    return found


def large(records: list[Record]) -> int:
    """Return the size of the mini-batches that all arms were trained with.

    Parameters
    ----------
    records : list of dict
        Of this study.

    Returns
    -------
    int
        Samples.
    """
    return max(record["setting"]["batch"] for record in records)


def answer(records: list[Record]) -> Answer:
    """Return the paired differences that the claims are about, and how Gaussian z and a are."""
    findings = []
    chosen = []
    for claim, statement, better, other, small in CLAIMS:
        for activation in ACTIVATIONS:
            where = {"activation": activation, "batch": SMALL if small else large(records)}
            for measured, name in ((over_training, "mean accuracy over training"), (final, "final accuracy")):
                runs = [at_best_rate(records, measured, arm=arm, **where) for arm in (better, other)]
                first, second = ([measured(run["result"]) for run in arm] for arm in runs)
                gain = paired_difference(first, second)
                chosen += [arm[0]["setting"]["rate"] for arm in runs]
                findings.append(
                    Finding(
                        claim,
                        f"{activation}: {statement}, {name}",
                        gain,
                        f"{mean_interval(first).estimate:.1f} % against "
                        f"{mean_interval(second).estimate:.1f} %, {gain.text(2, ' points', signed=True)}",
                        above=0.0,
                        margin=MARGIN,
                    )
                )
    findings += [_gaussian(records, activation) for activation in ACTIVATIONS]
    return make_answer(findings, [at_edges(records, chosen)])


def _gaussian(records: list[Record], activation: str) -> Finding:
    """The reason that is given for M2: z is nearer to a Gaussian than a, in a network that is not normalized."""
    runs = at_best_rate(records, final, activation=activation, arm="nothing", batch=large(records))
    z, a = ([run["result"]["from gaussian"][name] for run in runs] for name in ("z", "a"))
    ratio = ratio_interval(a, z)
    return Finding(
        "M2",
        f"{activation}: the reason, z is nearer to a Gaussian than a, in the last hidden layer of a plain network",
        ratio,
        f"a unit is {mean_interval(z).estimate:.2f} standard deviations from a Gaussian before the nonlinearity and "
        f"{mean_interval(a).estimate:.2f} after it (Wasserstein distance), {ratio.text(2)} times as far",
        above=1.0,
    )


def plot(records: list[Record]) -> Figure:
    """Draw the test error over steps for every arm at its best rate, and the final errors."""
    fig, axes = figure(1, 3, width=11, height=4.3)
    batch = large(records)
    for panel, activation in zip(axes[0], ACTIVATIONS, strict=False):
        for style, arm in enumerate(ARMS):
            runs = at_best_rate(records, over_training, activation=activation, arm=arm, batch=batch)
            curves = [run["result"]["accuracy"][1:] for run in runs]
            every = runs[0]["setting"]["every"]
            steps = [every * (index + 1) for index in range(len(curves[0]))]
            line(panel, steps, [[100 * (1 - a) for a in curve] for curve in curves], style, arm)
        panel.set(title=f"3 x 100 {activation}", xlabel="training steps")
    panel = axes[0][2]
    arms = [(arm, batch) for arm in ARMS] + [(arm, SMALL) for arm in ("z (before)", "z and outputs")]
    for style, activation in enumerate(ACTIVATIONS):
        errors = [
            mean_interval(
                100 - final(run["result"])
                for run in at_best_rate(records, final, activation=activation, arm=arm, batch=size)
            )
            for arm, size in arms
        ]
        panel.errorbar(
            [position + 0.16 * (2 * style - 1) for position in range(len(arms))],
            [error.estimate for error in errors],
            yerr=[error.high - error.estimate if math.isfinite(error.high) else 0.0 for error in errors],
            color=("#000000", "#0072B2")[style],
            marker=("o", "s")[style],
            markerfacecolor=("#000000", "white")[style],
            linestyle="none",
            capsize=3,
            label=activation,
        )
    names = [f"{arm}, {size}" if size != batch else arm for arm, size in arms]
    panel.set_xticks(range(len(arms)), [name.replace(" ", "\n") for name in names], fontsize=7)
    panel.set_title(f"at the end (mini-batches of {batch}, two of {SMALL})")
    panel.legend(loc="upper right")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    for each in axes[0]:
        each.set(yscale="log", ylabel="test error (%, log scale)", ylim=(0.9, 130))
        each.set_yticks(ticks, [str(tick) for tick in ticks])
        each.minorticks_off()
    legend_below(fig, axes[0][0], columns=5)
    return fig


STUDY = Study(
    name="where-to-normalize",
    title="Where to normalize",
    question="Nothing, the inputs, a (after the nonlinearity), z (before it), or z and the outputs too?",
    claim="The middle of the network is normalized, z rather than a, and not the output layer.",
    formula=r"$z = W a,\qquad a' = g(\mathrm{BN}(z))$",
    claims=("M1", "M2", "M6"),
    configs={
        "quick": Config(seeds=2, steps=60, small_steps=60, every=10, rates=(0.3, 1.0)),
        "default": Config(),
        "full": Config(seeds=20, steps=5000, small_steps=20000, every=50),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)
