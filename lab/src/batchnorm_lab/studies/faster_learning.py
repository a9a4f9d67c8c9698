"""Does a network learn faster with batch normalization, at the same and at higher learning rates? (M12)"""

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
from batchnorm_lab.studies.ensemble import ConvEnsemble, Ensemble, MLPEnsemble
from batchnorm_lab.studies.figures import figure, legend_below, line
from batchnorm_lab.studies.intervals import ratio_interval, verdict
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (1, 5, 30)
# The rate called 1x: where the plain network still learns steadily within the steps it is given.
RATES = {"mlp": 0.3, "cnn": 0.1}
NAMES = {"mlp": "MLP, 3 x 100 sigmoids", "cnn": "CNN, 3 convolutions, ReLU"}


@dataclass(frozen=True)
class Config:
    """Sizes of the study; ``every`` is the number of steps between two looks at the test accuracy."""

    seeds: int = 5
    batch: int = 60
    mlp_steps: int = 6000
    cnn_steps: int = 1500
    every: int = 25


def units(config: Config) -> list[Unit]:
    """Return one unit for each model and arm; rates and seeds are trained together."""
    work = []
    for model, steps, cost in (("mlp", config.mlp_steps, 1.0), ("cnn", config.cnn_steps, 2.5)):
        for normalized in (False, True):
            settings = [
                {
                    "model": model,
                    "normalized": normalized,
                    "factor": factor,
                    "rate": round(factor * RATES[model], 6),
                    "seed": seed,
                    "steps": steps,
                    "batch": config.batch,
                    "every": config.every,
                }
                for factor in FACTORS
                for seed in range(config.seeds)
            ]
            work.append(Unit(settings, cost * steps * len(settings)))
    return work


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train the networks of a unit and return their test accuracy over the steps."""
    first = unit[0]
    seeds = [setting["seed"] for setting in unit]
    networks: Ensemble
    if first["model"] == "mlp":
        sizes = (data.train_images[0].numel(), 100, 100, 100, len(data.classes))
        networks = MLPEnsemble(sizes, seeds, places={"before"} if first["normalized"] else ())
    else:
        networks = ConvEnsemble(
            data.image_shape, (8, 16, 16), len(data.classes), seeds, normalized=first["normalized"]
        )
    curve: list[list[float]] = []

    def observe(step: int) -> None:
        networks.eval()
        curve.append(accuracy(networks, data.test_images, data.test_labels).tolist())

    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(
        networks,
        optimizer,
        data,
        steps=first["steps"],
        batch=first["batch"],
        every=first["every"],
        observe=observe,
        advance=advance,
    )
    return [{"accuracy": [round(a, 4) for a in one]} for one in zip(*curve, strict=True)]


def steps_to(record: Record, target: float) -> int | None:
    """Return the first step at which a run's test accuracy reached a target, or None.

    Parameters
    ----------
    record : dict
        Of this study.
    target : float
        Between 0 and 1.

    Returns
    -------
    int or None
        At least one interval between two looks.

    Examples
    --------
    >>> from batchnorm_lab.studies.faster_learning import steps_to
    >>> steps_to({"setting": {"every": 10}, "result": {"accuracy": [0.1, 0.5, 0.9]}}, 0.5)
    10
    """
    every: int = record["setting"]["every"]
    for index, reached in enumerate(record["result"]["accuracy"]):
        if reached >= target:
            return max(every, index * every)
    return None


def race(
    records: list[Record], model: str, normalized: bool, factor: int
) -> tuple[list[int], list[int], int]:
    """Return steps to the baseline's best accuracy: of the baseline, of an arm, and how many never got there.

    Parameters
    ----------
    records : list of dict
        Of this study.
    model : {"mlp", "cnn"}
        Which network.
    normalized : bool
        The arm.
    factor : int
        The arm's learning rate, in units of the baseline's.

    Returns
    -------
    (list of int, list of int, int)
        One a seed; a run that never got there counts with all its steps, which flatters it.
    """
    baseline = select(records, model=model, normalized=False, factor=1)
    arm = select(records, model=model, normalized=normalized, factor=factor)
    base_steps, arm_steps, never = [], [], 0
    for base, other in zip(baseline, arm, strict=True):
        target = max(base["result"]["accuracy"])
        base_steps.append(steps_to(base, target) or base["setting"]["steps"])
        reached = steps_to(other, target)
        never += reached is None
        arm_steps.append(other["setting"]["steps"] if reached is None else reached)
    return base_steps, arm_steps, never


def answer(records: list[Record]) -> Answer:
    """Return how many times fewer steps each arm needs to the baseline's best accuracy."""
    findings = []
    for model in NAMES:
        best: dict[bool, list[int]] = {}
        for normalized in (True, False):
            for factor in FACTORS:
                base, arm, never = race(records, model, normalized, factor)
                if normalized not in best or sum(arm) < sum(best[normalized]):
                    best[normalized] = arm
                if not normalized:
                    continue
                ratio = ratio_interval(base, arm)
                missed = (
                    f"; {never} of {len(arm)} runs never got there and count as all their steps"
                    if never
                    else ""
                )
                findings.append(
                    Finding(
                        "M12",
                        f"{model.upper()} at {factor}x the learning rate, normalized, needs fewer steps",
                        ratio,
                        verdict(ratio, above=1.0),
                        f"{ratio.text(1)} times fewer steps to the plain network's best test accuracy than "
                        f"the plain network at 1x{missed}",
                    )
                )
        ratio = ratio_interval(best[False], best[True])
        findings.append(
            Finding(
                "M12",
                f"{model.upper()}, each at its own best of these rates",
                ratio,
                verdict(ratio, above=1.0),
                f"{ratio.text(1)} times fewer steps with batch normalization",
            )
        )
    published = "Published for Inception on ImageNet: 2.3, 14.8 and 11.5 times fewer at 1x, 5x and 30x."
    return make_answer(findings, [published])


def plot(records: list[Record]) -> Figure:
    """Draw test accuracy over steps for every arm of both networks."""
    fig, axes = figure(1, 2, height=4.5)
    for panel, model in zip(axes[0], NAMES, strict=True):
        style = 0
        for normalized in (False, True):
            for factor in FACTORS:
                chosen = select(records, model=model, normalized=normalized, factor=factor)
                every = chosen[0]["setting"]["every"]
                curves = values(
                    records, lambda r: r["accuracy"][1:], model=model, normalized=normalized, factor=factor
                )
                places = _spread(len(curves[0]), 80)
                steps = [every * (index + 1) for index in places]
                shown = [[100 * curve[index] for index in places] for curve in curves]
                kind = "batch norm" if normalized else "plain"
                line(panel, steps, shown, style, f"{kind}, {factor}x", markevery=_marks(places, 10))
                style += 1
        base = chosen[0]["setting"]
        panel.set(
            title=f"{NAMES[model]} (1x = {RATES[model]}, batch {base['batch']})",
            xscale="log",
            xlabel="training steps (log scale)",
            ylabel="test accuracy (%)",
            ylim=(0, 101),
        )
    legend_below(fig, axes[0][0], columns=3)
    return fig


def _spread(count: int, wanted: int) -> list[int]:
    """Return positions below ``count`` that are evenly spread on a logarithmic axis, the last one included."""
    return sorted({min(count, max(1, round(count ** (k / (wanted - 1))))) - 1 for k in range(wanted)})


def _marks(places: list[int], wanted: int) -> list[int]:
    """Return which of some positions to mark, evenly spread on a logarithmic axis."""
    targets = _spread(places[-1] + 1, wanted)
    return sorted({min(range(len(places)), key=lambda k: abs(places[k] - target)) for target in targets})


STUDY = Study(
    name="faster-learning",
    title="Learning gets faster",
    question="How many steps does a network need to the same accuracy, with and without batch normalization?",
    claim="Learning gets faster, and higher learning rates work.",
    formula=r"$\hat z = (z - \mu)\,/\,\sqrt{\sigma^2 + \epsilon},\qquad \tilde z = \gamma\,\hat z + \beta$",
    claims=("M12",),
    configs={
        "quick": Config(seeds=2, mlp_steps=300, cnn_steps=60, every=10),
        "default": Config(),
        "full": Config(seeds=10, mlp_steps=20000, cnn_steps=5000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
