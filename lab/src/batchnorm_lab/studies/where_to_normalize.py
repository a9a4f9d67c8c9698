"""Which quantity should be normalized: the inputs, z, a, the outputs? (M1, M2, M6)"""

from __future__ import annotations

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
from batchnorm_lab.studies.figures import figure, legend_below, line
from batchnorm_lab.studies.intervals import mean_interval, paired_difference, verdict
from batchnorm_lab.studies.records import select, values
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
# (claim, statement, the arm that should be better, the other)
CLAIMS = (
    (
        "M1",
        "normalizing z in the middle is better than normalizing the inputs only",
        "z (before)",
        "inputs only",
    ),
    ("M2", "z (before the nonlinearity) is a better target than a (after it)", "z (before)", "a (after)"),
    ("M6", "leaving the output layer alone is better than normalizing it too", "z (before)", "z and outputs"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates``."""

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
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ]
        )
        for activation in ACTIVATIONS
        for arm in ARMS
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train, and return the test accuracy over the steps."""
    first = unit[0]
    networks = MLPEnsemble(
        (data.train_images[0].numel(), 100, 100, 100, len(data.classes)),
        [setting["seed"] for setting in unit],
        activation=first["activation"],
        gain=2**0.5 if first["activation"] == "relu" else 1.0,
        places=ARMS[first["arm"]],
    )
    curve: list[list[float]] = []

    def observe(step: int) -> None:
        networks.eval()
        curve.append(accuracy(networks, data.test_images, data.test_labels).tolist())

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
    return [{"accuracy": [round(a, 4) for a in one]} for one in zip(*curve, strict=True)]


def final(result: Result) -> float:
    """Return the accuracy at the end, in %: the mean of the last five looks, which is steadier than one.

    Parameters
    ----------
    result : dict
        Of a run.

    Returns
    -------
    float
        0 to 100.

    Examples
    --------
    >>> from batchnorm_lab.studies.where_to_normalize import final
    >>> final({"accuracy": [0.1, 0.9, 0.9, 0.9, 0.9, 0.9]})
    90.0
    """
    last = result["accuracy"][-5:]
    return 100 * sum(last) / len(last)


def over_training(result: Result) -> float:
    """Return the mean accuracy over the whole training, in %: high for what learns fast and well.

    Parameters
    ----------
    result : dict
        Of a run.

    Returns
    -------
    float
        0 to 100.

    Examples
    --------
    >>> from batchnorm_lab.studies.where_to_normalize import over_training
    >>> over_training({"accuracy": [0.1, 0.5, 0.7]})
    60.0
    """
    later = result["accuracy"][1:]
    return 100 * sum(later) / len(later)


def best_rate(records: list[Record], activation: str, arm: str) -> float:
    """Return the learning rate with the highest accuracy over training, averaged over seeds.

    Parameters
    ----------
    records : list of dict
        Of this study.
    activation, arm : str
        Which networks.

    Returns
    -------
    float
        One of the rates tried.
    """
    rates = sorted({record["setting"]["rate"] for record in select(records, activation=activation, arm=arm)})
    return max(rates, key=lambda rate: sum(_of(records, over_training, activation, arm, rate)))


def answer(records: list[Record]) -> Answer:
    """Return the paired differences that the three claims are about."""
    findings = []
    for claim, statement, better, other in CLAIMS:
        for activation in ACTIVATIONS:
            for measured, name in ((over_training, "mean accuracy over training"), (final, "final accuracy")):
                of = {
                    arm: _of(records, measured, activation, arm, best_rate(records, activation, arm))
                    for arm in (better, other)
                }
                gain = paired_difference(of[better], of[other])
                findings.append(
                    Finding(
                        claim,
                        f"{activation}: {statement}, {name}",
                        gain,
                        verdict(gain, above=0.0),
                        f"{mean_interval(of[better]).estimate:.1f} % against "
                        f"{mean_interval(of[other]).estimate:.1f} %, {gain.text(2, ' points', signed=True)}",
                    )
                )
    return make_answer(findings, ["Every arm at the best of its learning rates."])


def plot(records: list[Record]) -> Figure:
    """Draw the test error over steps for every arm at its best rate, and the final errors."""
    fig, axes = figure(1, 3, width=11, height=4.3)
    for panel, activation in zip(axes[0], ACTIVATIONS, strict=False):
        for style, arm in enumerate(ARMS):
            rate = best_rate(records, activation, arm)
            curves = _of(records, lambda r: r["accuracy"][1:], activation, arm, rate)
            every = select(records, activation=activation, arm=arm)[0]["setting"]["every"]
            steps = [every * (index + 1) for index in range(len(curves[0]))]
            line(panel, steps, [[100 * (1 - a) for a in curve] for curve in curves], style, arm)
        panel.set(title=f"3 x 100 {activation}", xlabel="training steps")
    panel = axes[0][2]
    for style, activation in enumerate(ACTIVATIONS):
        errors = [
            mean_interval(
                100 - a for a in _of(records, final, activation, arm, best_rate(records, activation, arm))
            )
            for arm in ARMS
        ]
        panel.errorbar(
            [position + 0.16 * (2 * style - 1) for position in range(len(ARMS))],
            [error.estimate for error in errors],
            yerr=[error.high - error.estimate if error.seeds > 1 else 0.0 for error in errors],
            color=("#000000", "#0072B2")[style],
            marker=("o", "s")[style],
            markerfacecolor=("#000000", "white")[style],
            linestyle="none",
            capsize=3,
            label=activation,
        )
    panel.set_xticks(range(len(ARMS)), [arm.replace(" ", "\n") for arm in ARMS])
    panel.set_title("at the end (mean of the last 5 looks)")
    panel.legend(loc="upper right")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    for each in axes[0]:
        each.set(yscale="log", ylabel="test error (%, log scale)", ylim=(0.9, 130))
        each.set_yticks(ticks, [str(tick) for tick in ticks])
        each.minorticks_off()
    legend_below(fig, axes[0][0], columns=5)
    return fig


def _of(records: list[Record], measured: object, activation: str, arm: str, rate: float) -> list:
    return values(records, measured, activation=activation, arm=arm, rate=rate)  # type: ignore[arg-type]


STUDY = Study(
    name="where-to-normalize",
    title="Where to normalize",
    question="Nothing, the inputs, a (after the nonlinearity), z (before it), or z and the outputs too?",
    claim="The middle of the network is normalized, z rather than a, and not the output layer.",
    formula=r"$z = W a,\qquad a' = g(\mathrm{BN}(z))$",
    claims=("M1", "M2", "M6"),
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
