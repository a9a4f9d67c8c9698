"""Does a network learn faster with batch normalization, at the same and at higher learning rates? (M12)"""

from __future__ import annotations

import math
import statistics
import time
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
from batchnorm_lab.studies.intervals import Interval, median_interval
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (0.3, 1, 5, 30, 100)
PUBLISHED = (1, 5, 30)
# The rate called 1x: where the plain network still learns steadily within the steps it is given.
RATES = {"mlp": 0.3, "cnn": 0.1}
NAMES = {"mlp": "MLP, 3 x 100 sigmoids", "cnn": "CNN, 3 convolutions, ReLU"}
TARGETS = (0.90, 0.95, 0.97)
"""Fixed before anything was measured."""


@dataclass(frozen=True)
class Config:
    """Sizes of the study; ``every`` is the number of steps between two looks at the accuracies.

    With 9 seeds each interval by ranks holds with 99.6 %, and so the twelve of this study hold together
    with 95 % (Bonferroni).
    """

    seeds: int = 9
    batch: int = 60
    mlp_steps: int = 3000
    cnn_steps: int = 800
    every: int = 20


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
    """Train the networks of a unit; return accuracy over the steps on both parts, and what a step costs."""
    first = unit[0]
    seeds = [setting["seed"] for setting in unit]
    choose, report = data.with_validation()
    networks: Ensemble
    if first["model"] == "mlp":
        sizes = (data.train_images[0].numel(), 100, 100, 100, len(data.classes))
        networks = MLPEnsemble(sizes, seeds, places={"before"} if first["normalized"] else ())
    else:
        networks = ConvEnsemble(
            data.image_shape, (8, 16, 16), len(data.classes), seeds, normalized=first["normalized"]
        )
    validation: list[list[float]] = []
    test: list[list[float]] = []
    pieces: list[float] = []
    left = 0.0

    def observe(step: int) -> None:
        nonlocal left
        if step:
            pieces.append((time.process_time() - left) / first["every"])
        networks.eval()
        validation.append(accuracy(networks, choose.test_images, choose.test_labels).tolist())
        test.append(accuracy(networks, report.test_images, report.test_labels).tolist())
        left = time.process_time()

    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    train(
        networks,
        optimizer,
        report,
        steps=first["steps"],
        batch=first["batch"],
        every=first["every"],
        observe=observe,
        advance=advance,
    )
    cost = round(1e3 * statistics.median(pieces) / len(unit), 4)
    return [
        {
            "validation": [round(a, 4) for a in one],
            "accuracy": [round(a, 4) for a in other],
            "milliseconds": cost,
        }
        for one, other in zip(zip(*validation, strict=True), zip(*test, strict=True), strict=True)
    ]


def steps_to(record: Record, target: float, part: str = "accuracy") -> int | None:
    """Return the first step at which a run's accuracy was seen to have reached a target, or None.

    Parameters
    ----------
    record : dict
        Of this study.
    target : float
        Between 0 and 1.
    part : {"accuracy", "validation"}, default "accuracy"
        On the test part or on the validation part.

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
    for index, reached in enumerate(record["result"][part]):
        if reached >= target:
            return max(every, index * every)
    return None


def arm(records: list[Record], model: str, normalized: bool, factor: float) -> list[Record]:
    """Return the runs of an arm, in the order of their seeds.

    Parameters
    ----------
    records : list of dict
        Of this study.
    model : {"mlp", "cnn"}
        Which network.
    normalized : bool
        With batch norm or without.
    factor : float
        The learning rate, in units of 1x.

    Returns
    -------
    list of dict
        One a seed.
    """
    return select(records, model=model, normalized=normalized, factor=factor)


def best_factor(records: list[Record], model: str, normalized: bool, target: float) -> float:
    """Return the rate at which an arm's median run is the first to reach a target on the validation part.

    Parameters
    ----------
    records : list of dict
        Of this study.
    model : {"mlp", "cnn"}
        Which network.
    normalized : bool
        With batch norm or without.
    target : float
        Between 0 and 1.

    Returns
    -------
    float
        One of `FACTORS`; where no median run arrives, the one whose median is most accurate at the end.
    """

    def slowness(factor: float) -> tuple[float, float]:
        runs = arm(records, model, normalized, factor)
        median = statistics.median([steps_to(run, target, "validation") or math.inf for run in runs])
        return median, -statistics.median([run["result"]["validation"][-1] for run in runs])

    return min(FACTORS, key=slowness)


def speedup(base: list[Record], other: list[Record], target: float) -> Interval:
    """Return how many times more steps the first arm needs to a target than the second, seed by seed.

    A step count is known to lie between two looks. A run that does not arrive is known to need more than all
    its steps. The ratio of two such counts has bounds, of which the interval is made.

    Parameters
    ----------
    base, other : list of dict
        Runs in the same order of seeds.
    target : float
        Between 0 and 1.

    Returns
    -------
    Interval
        Of the median ratio, by ranks.
    """

    def bounds(run: Record) -> tuple[float, float]:
        reached, setting = steps_to(run, target), run["setting"]
        return (
            (setting["steps"], math.inf) if reached is None else (max(1, reached - setting["every"]), reached)
        )

    lows, highs = [], []
    for one, two in zip(base, other, strict=True):
        (base_low, base_high), (other_low, other_high) = bounds(one), bounds(two)
        lows.append(0.0 if math.isinf(other_high) else base_low / other_high)
        highs.append(base_high / other_low)
    return median_interval(lows, highs)


def median_steps(runs: list[Record], target: float) -> str:
    """Say how many steps the median run of an arm needs, and how many runs do not arrive.

    Parameters
    ----------
    runs : list of dict
        Of one arm.
    target : float
        Between 0 and 1.

    Returns
    -------
    str
        For people.
    """
    steps = [steps_to(run, target) for run in runs]
    never = steps.count(None)
    median = statistics.median([math.inf if step is None else step for step in steps])
    text = f"more than {runs[0]['setting']['steps']}" if math.isinf(median) else f"{median:g}"
    return f"{text} steps" + (f" ({never} of {len(runs)} runs did not arrive)" if never else "")


def _arrives(runs: list[Record], target: float) -> bool:
    """Whether more than half of some runs reach a target."""
    return sum(steps_to(run, target) is not None for run in runs) > len(runs) / 2


def _compared(model: str, statement: str, base: list[Record], other: list[Record], target: float) -> Finding:
    ratio = speedup(base, other, target)
    cost = other[0]["result"]["milliseconds"] / base[0]["result"]["milliseconds"]
    text = f"{median_steps(other, target)} with batch norm, {median_steps(base, target)} without"
    if _arrives(other, target):
        atleast = "" if _arrives(base, target) else "at least "
        if math.isfinite(ratio.low):
            high = f"{ratio.high:.1f}" if math.isfinite(ratio.high) else "more"
            interval = f"[{ratio.low:.1f}, {high}]"
        else:
            interval = f"(no interval: {ratio.seeds} seeds)"
        text += (
            f": {atleast}{ratio.estimate:.1f} {interval} times as many without; a step costs {cost:.2f} times as "
            f"much with it, so {atleast}{ratio.estimate / cost:.1f} times as much processor time without"
        )
    return Finding("M12", f"{model.upper()} to {target:.0%}, {statement}", ratio, text, above=1.0)


def answer(records: list[Record]) -> Answer:
    """Return how many times fewer steps batch norm needs to targets that were fixed beforehand."""
    findings: list[Finding] = []
    chosen: list[float] = []
    for model in NAMES:
        for target in TARGETS:
            best = {norm: best_factor(records, model, norm, target) for norm in (False, True)}
            runs = {norm: arm(records, model, norm, factor) for norm, factor in best.items()}
            rates = f"each at its best rate ({best[True]:g}x with, {best[False]:g}x without)"
            findings.append(_compared(model, rates, runs[False], runs[True], target))
            chosen += best.values()
        base = arm(records, model, False, 1)
        for factor in PUBLISHED:
            rates = f"{factor}x the learning rate with, 1x without"
            findings.append(_compared(model, rates, base, arm(records, model, True, factor), 0.95))
    seeds = len(base)
    edges = sum(factor in (FACTORS[0], FACTORS[-1]) for factor in chosen)
    remarks = [
        "Rates were chosen on the validation part, steps were counted on the test part.",
        f"Of {len(chosen)} best rates {edges} lie at an edge of the grid.",
        f"Intervals of the median go by ranks, from the smallest seed to the largest; each of them holds with "
        f"{1 - 2.0 ** (1 - seeds):.1%}, the {len(findings)} together with at least "
        f"{max(0.0, 1 - len(findings) * 2.0 ** (1 - seeds)):.0%}.",
        "Published for Inception on ImageNet: 2.3, 14.8 and 11.5 times fewer at 1x, 5x and 30x.",
    ]
    return make_answer(findings, remarks)


def plot(records: list[Record]) -> Figure:
    """Draw test accuracy over steps for every arm of both networks."""
    fig, axes = figure(1, 2, height=4.5)
    for panel, model in zip(axes[0], NAMES, strict=True):
        style = 0
        for normalized in (False, True):
            for factor in PUBLISHED:
                chosen = select(records, model=model, normalized=normalized, factor=factor)
                every = chosen[0]["setting"]["every"]
                curves = values(
                    records, lambda r: r["accuracy"][1:], model=model, normalized=normalized, factor=factor
                )
                places = _spread(len(curves[0]), 80)
                steps = [every * (index + 1) for index in places]
                shown = [[100 * curve[index] for index in places] for curve in curves]
                kind = "batch norm" if normalized else "plain"
                line(panel, steps, shown, style, f"{kind}, {factor:g}x", markevery=_marks(places, 10))
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
    question="How many steps does a network need to a fixed accuracy, with and without batch normalization?",
    claim="Learning gets faster, and higher learning rates work.",
    formula=r"$\hat z = (z - \mu)\,/\,\sqrt{\sigma^2 + \epsilon},\qquad \tilde z = \gamma\,\hat z + \beta$",
    claims=("M12",),
    configs={
        "quick": Config(seeds=2, mlp_steps=300, cnn_steps=60, every=10),
        "default": Config(),
        "full": Config(seeds=15, mlp_steps=20000, cnn_steps=5000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)
