"""How deep can a plain stack of layers be and still be trained, with and without? (M14)"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

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

# Initial weights have variance gain**2 / fan_in: 2 for ReLU (He), 1 for the others (LeCun, Glorot).
GAINS = {"sigmoid": 1.0, "tanh": 1.0, "relu": 2**0.5}
ARMS = {False: "plain", True: "batch norm"}
GOOD = 0.90


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates`` for its depth and activation."""

    seeds: int = 5
    steps: int = 400
    batch: int = 60
    width: int = 32
    depths: tuple[int, ...] = (2, 4, 8, 15, 30, 60)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.1)


def units(config: Config) -> list[Unit]:
    """Return one unit for each activation, arm and depth; rates and seeds are trained together."""
    return [
        Unit(
            [
                {
                    "activation": activation,
                    "normalized": normalized,
                    "depth": depth,
                    "rate": rate,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "width": config.width,
                }
                for rate in config.rates
                for seed in range(config.seeds)
            ],
            cost=depth + 2,
        )
        for activation in GAINS
        for normalized in ARMS
        for depth in config.depths
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Return the gradient norm of every layer's weights at the start, and the accuracy at the end."""
    first = unit[0]
    networks = MLPEnsemble(
        (data.train_images[0].numel(), *[first["width"]] * first["depth"], len(data.classes)),
        [setting["seed"] for setting in unit],
        activation=first["activation"],
        gain=GAINS[first["activation"]],
        places={"before"} if first["normalized"] else (),
    )
    norms = gradient_norms(networks, data, 256)
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit], "momentum")
    train(networks, optimizer, data, steps=first["steps"], batch=first["batch"], advance=advance)
    networks.eval()
    final = accuracy(networks, data.test_images, data.test_labels).tolist()
    results: list[Result] = []
    lowest = min(setting["rate"] for setting in unit)
    for run, setting in enumerate(unit):
        result: Result = {"accuracy": round(final[run], 4)}
        if setting["rate"] == lowest:  # the start is the same at every rate
            result["gradient"] = [float(f"{norm:.3g}") for norm in norms[run]]
        results.append(result)
    return results


def gradient_norms(networks: MLPEnsemble, data: ImageData, samples: int) -> list[list[float]]:
    """Return the Frobenius norm of the loss's gradient with respect to each layer's weights.

    Parameters
    ----------
    networks : MLPEnsemble
        Left with the statistics of its buffers moved and its gradients cleared.
    data : ImageData
        The first training images are used.
    samples : int
        How many of them.

    Returns
    -------
    list of list of float
        Networks by layers.
    """
    networks.train()
    images, labels = data.train_images[:samples], data.train_labels[:samples]
    logits = networks(networks.images(images))
    F.cross_entropy(logits.flatten(0, 1), labels.repeat(networks.runs), reduction="sum").div(
        len(labels)
    ).backward()
    norms = [w.grad.flatten(1).norm(dim=1) for w in networks.weights if w.grad is not None]
    networks.zero_grad(set_to_none=True)
    return [[float(v) for v in run] for run in torch.stack(norms, dim=1)]


def accuracies(records: list[Record], activation: str, normalized: bool, depth: int) -> list[float]:
    """Return final accuracies, one a seed, at the rate that is best on average over seeds.

    Parameters
    ----------
    records : list of dict
        Of this study.
    activation : str
        Of the hidden layers.
    normalized : bool
        The arm.
    depth : int
        Hidden layers.

    Returns
    -------
    list of float
        Between 0 and 1.
    """
    where = {"activation": activation, "normalized": normalized, "depth": depth}
    rates = sorted({record["setting"]["rate"] for record in select(records, **where)})
    return max((values(records, "accuracy", **where, rate=rate) for rate in rates), key=sum)


def depths_of(records: list[Record]) -> list[int]:
    """Return the depths of the records, in order.

    Parameters
    ----------
    records : list of dict
        Of this study.

    Returns
    -------
    list of int
        Hidden layers.

    Examples
    --------
    >>> from batchnorm_lab.studies.deep_networks import depths_of
    >>> depths_of([{"setting": {"depth": 4}}, {"setting": {"depth": 2}}])
    [2, 4]
    """
    return sorted({record["setting"]["depth"] for record in records})


def answer(records: list[Record]) -> Answer:
    """Return how deep a network can be trained to 90 %, and accuracies at the two largest depths."""
    depths = depths_of(records)
    findings = []
    for activation in GAINS:
        by_arm = {arm: [accuracies(records, activation, arm, depth) for depth in depths] for arm in ARMS}
        for depth, plain, normed in list(zip(depths, by_arm[False], by_arm[True], strict=True))[-2:]:
            gain = paired_difference([100 * a for a in normed], [100 * a for a in plain])
            findings.append(
                Finding(
                    "M14",
                    f"{activation}, {depth} layers deep: trains better with batch normalization",
                    gain,
                    verdict(gain, above=0.0),
                    f"test accuracy {mean_interval(100 * a for a in normed).estimate:.1f} % against "
                    f"{mean_interval(100 * a for a in plain).estimate:.1f} %, "
                    f"{gain.text(1, ' points', signed=True)}",
                )
            )
    remarks = []
    for activation in GAINS:
        deepest = {
            arm: max(
                (
                    d
                    for d in depths
                    if mean_interval(accuracies(records, activation, arm, d)).estimate >= GOOD
                ),
                default=0,
            )
            for arm in ARMS
        }
        remarks.append(
            f"With {activation}, the deepest network that reached {100 * GOOD:.0f} % had "
            f"{_layers(deepest[True])} with batch norm and {_layers(deepest[False])} without it."
        )
    shown = _shown(depths)
    for activation in GAINS:
        falls = {arm: _first_to_last(records, activation, arm, shown) for arm in ARMS}
        remarks.append(
            f"Before training, in a network of {shown} layers with {activation}, the gradient of the first layer "
            f"is {falls[True]:.3g} times that of the last hidden layer with batch norm, and {falls[False]:.3g} "
            "times without."
        )
    return make_answer(findings, remarks)


def _shown(depths: list[int]) -> int:
    """Return the depth whose gradients are shown: the deepest up to 30."""
    return max((depth for depth in depths if depth <= 30), default=depths[-1])


def _first_to_last(records: list[Record], activation: str, normalized: bool, depth: int) -> float:
    """Return the median over seeds of the first layer's gradient norm in units of the last hidden layer's."""
    chosen = select(records, activation=activation, normalized=normalized, depth=depth)
    norms = [record["result"]["gradient"] for record in chosen if "gradient" in record["result"]]
    ratios = [run[0] / run[-2] for run in norms if run[0] is not None and run[-2]]
    return statistics.median_high(ratios) if ratios else float("nan")


def plot(records: list[Record]) -> Figure:
    """Draw accuracy over depth, and the gradient norm by layer at the start."""
    depths = depths_of(records)
    shown = _shown(depths)
    fig, axes = figure(2, len(GAINS), width=10, height=6, sharey="row")
    for column, activation in enumerate(GAINS):
        for style, (arm, name) in enumerate(ARMS.items()):
            runs = [[100 * a for a in accuracies(records, activation, arm, depth)] for depth in depths]
            line(axes[0][column], depths, list(zip(*runs, strict=True)), style, name)
            chosen = select(records, activation=activation, normalized=arm, depth=shown)
            norms = [r["result"]["gradient"] for r in chosen if "gradient" in r["result"]]
            positive = [[norm for norm in layer if norm and norm > 0] for layer in zip(*norms, strict=True)]
            middle = [statistics.median_high(layer) if layer else None for layer in positive]
            line(axes[1][column], range(1, len(middle) + 1), [middle], style, name)
        axes[0][column].set(title=activation, xscale="log", xlabel="hidden layers (log scale)", ylim=(0, 101))
        axes[0][column].set_xticks(depths, [str(depth) for depth in depths])
        axes[0][column].minorticks_off()
        axes[1][column].set(yscale="log", xlabel=f"layer of {shown + 1} (1: nearest the input)")
    axes[0][0].set_ylabel("final test accuracy (%)")
    axes[1][0].set_ylabel("gradient norm of the weights\nat the start (median of seeds)")
    legend_below(fig, axes[0][0])
    return fig


STUDY = Study(
    name="deep-networks",
    title="Deep networks train well",
    question="How deep can a stack of layers without shortcuts be and still be trained?",
    claim="Deep networks train well.",
    formula=r"$\frac{\partial L}{\partial z} = \frac{\gamma}{\sigma}\left(\frac{\partial L}{\partial \tilde z} - "
    r"\overline{\frac{\partial L}{\partial \tilde z}} - \hat z\,"
    r"\overline{\frac{\partial L}{\partial \tilde z}\,\hat z}\right)$: "
    r"gradients are rescaled in every layer",
    claims=("M14",),
    configs={
        "quick": Config(seeds=2, steps=40, width=20, depths=(2, 8, 24), rates=(0.03,)),
        "default": Config(),
        "full": Config(
            seeds=10,
            steps=3000,
            width=64,
            depths=(2, 4, 8, 15, 22, 30, 42, 60),
            rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        ),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)


def _layers(depth: int) -> str:
    return f"{depth} layers" if depth else "none of these depths"
