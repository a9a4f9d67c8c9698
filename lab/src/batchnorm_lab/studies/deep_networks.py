"""How deep can a network be and still be trained, with and without, with shortcuts and without? (M14)"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from batchnorm_lab.studies.intervals import mean_interval, paired_difference
from batchnorm_lab.studies.records import at_edges, best, select, values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Initial weights have variance gain**2 / fan_in: 2 for ReLU (He), 1 for the others (LeCun, Glorot).
GAINS = {"sigmoid": 1.0, "tanh": 1.0, "relu": 2**0.5}
GOOD = 0.90
LEARNS = 0.2
"""Twice what guessing gives: below it at every learning rate a network has learned nothing."""
STACK = {False: "plain", True: "batch norm"}
"""The arms without shortcuts, for every activation; with shortcuts there are those of `RESIDUAL`, with ReLU."""
RESIDUAL: dict[tuple[bool, str], str] = {
    (False, "plain"): "shortcuts",
    (True, "plain"): "shortcuts and batch norm",
    (False, "scaled"): "shortcuts, branches by 1 / sqrt(layers)",
    (False, "from zero"): "shortcuts, branches from zero",
}
GROWTH = math.sqrt(math.pi / (math.pi - 1))
"""By which the gradient grows a layer towards the input, in a wide stack of batch norm and ReLU at its start.

G. Yang and others, A Mean Field Theory of Batch Normalization, 2019, arXiv:1902.08129: pi / (pi - 1) for squares.
"""


@dataclass(frozen=True)
class Config:
    """Sizes of the study; each arm is judged at the best of ``rates`` for its depth and activation."""

    seeds: int = 6
    steps: int = 400
    batch: int = 60
    width: int = 32
    depths: tuple[int, ...] = (2, 8, 15, 30, 60)
    residual_depths: tuple[int, ...] = (8, 30, 60)
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def units(config: Config) -> list[Unit]:
    """Return one unit for each activation, arm and depth; rates and seeds are trained together."""
    stacks = [
        (activation, normalized, None, depth)
        for activation in GAINS
        for normalized in STACK
        for depth in config.depths
    ]
    residual = [("relu", *arm, depth) for arm in RESIDUAL for depth in config.residual_depths]
    return [
        Unit(
            [
                {
                    "activation": activation,
                    "normalized": normalized,
                    "shortcut": shortcut,
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
        for activation, normalized, shortcut, depth in stacks + residual
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Return the gradient norm of every layer's weights at the start, and the accuracies at the end."""
    first = unit[0]
    choose, report = data.with_validation()
    networks = MLPEnsemble(
        (data.train_images[0].numel(), *[first["width"]] * first["depth"], len(data.classes)),
        [setting["seed"] for setting in unit],
        activation=first["activation"],
        gain=GAINS[first["activation"]],
        places={"before"} if first["normalized"] else (),
        shortcut=first["shortcut"],
    )
    norms = gradient_norms(networks, report, 256)
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit], "momentum")
    train(networks, optimizer, report, steps=first["steps"], batch=first["batch"], advance=advance)
    networks.eval()
    validation = accuracy(networks, choose.test_images, choose.test_labels).tolist()
    final = accuracy(networks, report.test_images, report.test_labels).tolist()
    results: list[Result] = []
    lowest = min(setting["rate"] for setting in unit)
    for run, setting in enumerate(unit):
        result: Result = {"validation": round(validation[run], 4), "accuracy": round(final[run], 4)}
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


def accuracies(
    records: list[Record], activation: str, normalized: bool, depth: int, shortcut: str | None = None
) -> list[float]:
    """Return final accuracies in %, one a seed, at the rate that is best on validation images.

    Parameters
    ----------
    records : list of dict
        Of this study.
    activation : str
        Of the hidden layers.
    normalized : bool
        With batch norm or without.
    depth : int
        Hidden layers.
    shortcut : str or None, default None
        As for `MLPEnsemble`.

    Returns
    -------
    list of float
        Between 0 and 100.
    """
    where: dict[str, Any] = {
        "activation": activation,
        "normalized": normalized,
        "depth": depth,
        "shortcut": shortcut,
    }
    return [100 * a for a in values(records, "accuracy", **where, rate=best(records, **where))]


def depths_of(records: list[Record], shortcut: str | None = None) -> list[int]:
    """Return the depths of the records, in order.

    Parameters
    ----------
    records : list of dict
        Of this study.
    shortcut : str or None, default None
        Of networks with this shortcut.

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
    return sorted({record["setting"]["depth"] for record in select(records, shortcut=shortcut)})


def answer(records: list[Record]) -> Answer:
    """Return accuracies at large depths with and without batch norm, and how deep a network can be trained."""
    depths, residual = depths_of(records), depths_of(records, "plain")
    findings = [
        _compared(
            f"{activation}, {depth} layers deep: trains better with batch normalization",
            accuracies(records, activation, True, depth),
            accuracies(records, activation, False, depth),
        )
        for activation in GAINS
        for depth in depths[-2:]
    ]
    findings += [
        _compared(
            f"relu with shortcuts, {depth} layers deep: trains better with batch normalization than {name}",
            accuracies(records, "relu", True, depth, "plain"),
            accuracies(records, "relu", False, depth, shortcut),
        )
        for depth in residual[-2:]
        for shortcut, name in (
            ("plain", "without"),
            ("scaled", "with branches scaled by 1 / sqrt(layers)"),
            ("from zero", "with branches that begin at zero"),
        )
    ]
    shown = _shown(depths)
    remarks = [_deepest(records, activation, depths) for activation in GAINS]
    for activation in GAINS:
        falls = {arm: _first_to_last(records, activation, arm, shown) for arm in STACK}
        remarks.append(
            f"Before training, in a network of {shown} layers with {activation}, the gradient of the first layer "
            f"is {falls[True]:.3g} times that of the last hidden layer with batch norm, and {falls[False]:.3g} "
            "times without."
        )
    grown = _first_to_last(records, "relu", True, shown) ** (1 / max(1, shown - 1))
    remarks.append(
        f"With batch norm and ReLU that is {grown:.2f} times a layer; theory says {GROWTH:.2f} for wide layers and "
        "large mini-batches (Yang et al., 2019): why a deep stack of these does not train without shortcuts."
    )
    arms = {
        (r["setting"]["activation"], r["setting"]["normalized"], r["setting"]["shortcut"]) for r in records
    }
    networks = [
        {"activation": activation, "normalized": normalized, "shortcut": shortcut, "depth": depth}
        for activation, normalized, shortcut in arms
        for depth in (depths if shortcut is None else residual)
    ]
    # where nothing is learned at any rate there is no best one
    learn = [
        rate
        for network in networks
        for rate in [best(records, **network)]
        if statistics.fmean(values(records, "validation", **network, rate=rate)) > LEARNS
    ]
    remarks.append(f"Of {len(networks)} networks {len(networks) - len(learn)} learn at no rate.")
    return make_answer(findings, [*remarks, at_edges(records, learn)])


def _compared(statement: str, normed: list[float], other: list[float]) -> Finding:
    gain = paired_difference(normed, other)
    text = (
        f"test accuracy {mean_interval(normed).estimate:.1f} % against {mean_interval(other).estimate:.1f} %, "
        f"{gain.text(1, ' points', signed=True)}"
    )
    return Finding("M14", statement, gain, text, above=0.0, margin=1.0)


def _deepest(records: list[Record], activation: str, depths: list[int]) -> str:
    """Say how deep a network without shortcuts can be and reach 90 %."""
    deepest = {
        arm: max(
            (
                depth
                for depth in depths
                if mean_interval(accuracies(records, activation, arm, depth)).estimate >= 100 * GOOD
            ),
            default=0,
        )
        for arm in STACK
    }
    return (
        f"With {activation}, the deepest network that reached {100 * GOOD:.0f} % had "
        f"{_layers(deepest[True])} with batch norm and {_layers(deepest[False])} without it."
    )


def _shown(depths: list[int]) -> int:
    """Return the depth whose gradients are shown: the deepest up to 30."""
    return max((depth for depth in depths if depth <= 30), default=depths[-1])


def _first_to_last(records: list[Record], activation: str, normalized: bool, depth: int) -> float:
    """Return the median over seeds of the first layer's gradient norm in units of the last hidden layer's."""
    chosen = select(records, activation=activation, normalized=normalized, depth=depth, shortcut=None)
    norms = [record["result"]["gradient"] for record in chosen if "gradient" in record["result"]]
    ratios = [run[0] / run[-2] for run in norms if run[0] is not None and run[-2]]
    return statistics.median_high(ratios) if ratios else float("nan")


def plot(records: list[Record]) -> Figure:
    """Draw accuracy over depth without shortcuts and with them, and the gradient norm by layer at the start."""
    depths, residual = depths_of(records), depths_of(records, "plain")
    shown = _shown(depths)
    fig, axes = figure(2, len(GAINS) + 1, width=13, height=6, sharey="row")
    for column, activation in enumerate(GAINS):
        for style, (arm, name) in enumerate(STACK.items()):
            runs = [accuracies(records, activation, arm, depth) for depth in depths]
            line(axes[0][column], depths, list(zip(*runs, strict=True)), style, name)
            chosen = select(records, activation=activation, normalized=arm, depth=shown, shortcut=None)
            norms = [r["result"]["gradient"] for r in chosen if "gradient" in r["result"]]
            positive = [[norm for norm in layer if norm and norm > 0] for layer in zip(*norms, strict=True)]
            middle = [statistics.median_high(layer) if layer else None for layer in positive]
            line(axes[1][column], range(1, len(middle) + 1), [middle], style, name)
        _over_depth(axes[0][column], activation, depths)
        axes[1][column].set(yscale="log", xlabel=f"layer of {shown + 1} (1: nearest the input)")
    for style, ((arm, shortcut), name) in enumerate(RESIDUAL.items()):
        runs = [accuracies(records, "relu", arm, depth, shortcut) for depth in residual]
        line(axes[0][-1], residual, list(zip(*runs, strict=True)), style, name)
    _over_depth(axes[0][-1], "relu with shortcuts", residual)
    axes[0][0].set_ylabel("final test accuracy (%)")
    axes[1][0].set_ylabel("gradient norm of the weights\nat the start (median of seeds)")
    axes[1][-1].axis("off")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    axes[1][-1].legend(handles, labels, loc="upper left", title="relu with shortcuts")
    legend_below(fig, axes[0][0])
    return fig


def _over_depth(panel: Axes, title: str, depths: list[int]) -> None:
    panel.set(title=title, xscale="log", xlabel="hidden layers (log scale)", ylim=(0, 101))
    panel.set_xticks(depths, [str(depth) for depth in depths])
    panel.minorticks_off()


STUDY = Study(
    name="deep-networks",
    title="Deep networks train well",
    question="How deep can a network be and still be trained, with and without shortcuts?",
    claim="Deep networks train well.",
    formula=r"$\frac{\partial L}{\partial z} = \frac{\gamma}{\sigma}\left(\frac{\partial L}{\partial \tilde z} - "
    r"\overline{\frac{\partial L}{\partial \tilde z}} - \hat z\,"
    r"\overline{\frac{\partial L}{\partial \tilde z}\,\hat z}\right)$: "
    r"gradients are rescaled in every layer",
    claims=("M14",),
    configs={
        "quick": Config(
            seeds=2, steps=40, width=20, depths=(2, 8, 24), residual_depths=(8, 24), rates=(0.03,)
        ),
        "default": Config(),
        "full": Config(
            seeds=10,
            steps=3000,
            width=64,
            depths=(2, 4, 8, 15, 22, 30, 42, 60),
        ),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)


def _layers(depth: int) -> str:
    return f"{depth} layers" if depth else "none of these depths"
