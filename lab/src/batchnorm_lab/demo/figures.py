"""The figures of the demonstration, readable in black and white; each comes as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from batchnorm_lab.demo.costs import Costs
from batchnorm_lab.demo.learning import TARGET, Curve
from batchnorm_lab.demo.one_sample import OneSample

PLAIN = {"color": "0.45", "linestyle": "--"}
NORMALIZED = {"color": "black", "linestyle": "-"}
STYLE: Any = {  # matplotlib's own type for it names every key there is
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm",
    "font.family": "sans-serif",
}


def svg(figure: Figure) -> str:
    """Write a figure as SVG to stand inside a page.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Drawn.

    Returns
    -------
    str
        The element, without the XML head.
    """
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):  # text stays text: smaller, read aloud, translated
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Draw test accuracy over steps, one panel a learning rate.

    Parameters
    ----------
    curves : sequence of Curve
        Of the plain and of the normalized network.

    Returns
    -------
    matplotlib.figure.Figure
        One row of panels.
    """
    factors = list(dict.fromkeys(curve.factor for curve in curves))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        axes = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
        for axis, factor in zip(axes, factors, strict=True):
            for curve in (c for c in curves if c.factor == factor):
                style = PLAIN if curve.name == "plain" else NORMALIZED
                axis.plot(curve.steps, curve.accuracies, label=curve.name, linewidth=1.6, **style)
                if curve.steps_to_target is not None:
                    axis.plot(curve.steps_to_target, TARGET, "o", color=style["color"], markersize=6)
            rate = next(c.learning_rate for c in curves if c.factor == factor)
            axis.axhline(TARGET, color="0.7", linewidth=0.8, linestyle=":")
            axis.set(title=f"learning rate {rate:g} ({factor}x)", xlabel="step (mini-batches of 60)")
            axis.set_ylim(0, 1.02)
        axes[0].set_ylabel("test accuracy")
        axes[0].legend(loc="lower right", frameon=False)
    return figure


def pre_activations(spreads: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Draw mean and standard deviation of z before each nonlinearity, before and after insertion.

    Parameters
    ----------
    spreads : mapping
        By network, then by layer: mean over channels of the mean, and of the standard deviation, of z.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        axes = figure.subplots(1, 2)
        titles = ("|mean| of z in a channel", "std of z in a channel")
        for which, (axis, title) in enumerate(zip(axes, titles, strict=True)):
            for offset, (name, layers) in zip((-0.2, 0.2), spreads.items(), strict=True):
                heights = [values[which] for values in layers.values()]
                places = [i + offset for i in range(len(layers))]
                fill = "white" if name == "plain" else "0.25"
                axis.bar(places, heights, 0.38, label=name, color=fill, edgecolor="black")
            axis.set_xticks(range(len(layers)), list(layers))
            axis.set(ylabel=title, xlabel="layer")
        axes[0].legend(frameon=False)
    return figure


def probabilities(answer: OneSample) -> Figure:
    """Draw one sample and what the network answers to it, in both ways.

    Parameters
    ----------
    answer : OneSample
        Of ``one_sample.ask_one_at_a_time``.

    Returns
    -------
    matplotlib.figure.Figure
        The image, and two bar charts.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(0.7, 1, 1))
        left.imshow(answer.image.numpy(), cmap="gray_r")
        left.set(title=f"one test sample: a {answer.label}", xticks=[], yticks=[])
        for axis, values, title in (
            (middle, answer.probabilities_batch, "mini-batch statistics"),
            (right, answer.probabilities_population, "population statistics"),
        ):
            draw_probabilities(axis, values, answer.label)
            axis.set_title(f"with {title}")
    return figure


def draw_probabilities(axis: matplotlib.axes.Axes, values: Tensor, label: int) -> None:
    """Draw bars of the probability of each class; the right class is filled.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        Where.
    values : Tensor, shape (classes,)
        Probabilities.
    label : int
        The right class.
    """
    fills = ["black" if k == label else "white" for k in range(len(values))]
    axis.bar(range(len(values)), values.tolist(), color=fills, edgecolor="black")
    axis.set(xlabel="class (filled: the right one)", ylabel="probability", ylim=(0, 1.05))
    axis.set_xticks(range(len(values)))


def by_batch_size(answer: OneSample) -> Figure:
    """Draw accuracy over the size of the mini-batch whose statistics are used.

    Parameters
    ----------
    answer : OneSample
        Of ``one_sample.ask_one_at_a_time``.

    Returns
    -------
    matplotlib.figure.Figure
        One panel.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3), layout="constrained")
        axis = figure.subplots()
        sizes, accuracies = list(answer.by_size), list(answer.by_size.values())
        axis.plot(sizes, accuracies, "o--", color="0.45", label="statistics of the mini-batch")
        axis.axhline(
            answer.accuracy_population, color="black", label="statistics of the population, one sample"
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set(xlabel="samples in the mini-batch", ylabel="test accuracy", ylim=(0, 1.05))
        axis.legend(frameon=False, loc="lower right")
    return figure


def folding(before: Costs, after: Costs, logits: Tensor, folded: Tensor) -> Figure:
    """Draw operations before and after folding, and the answers against each other.

    Parameters
    ----------
    before, after : Costs
        Of the normalized and of the folded network.
    logits, folded : Tensor, shape (N, classes)
        Their answers to the same samples.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        names = ["normalized", "folded"]
        extra = [c.operations - after.operations for c in (before, after)]
        numbers = [c.numbers - after.numbers for c in (before, after)]
        for place, values, label in ((-0.2, numbers, "stored numbers"), (0.2, extra, "operations a sample")):
            bars = left.bar(
                [i + place for i in range(2)],
                values,
                0.38,
                label=label,
                color="white" if place < 0 else "0.25",
                edgecolor="black",
            )
            left.bar_label(bars, [f"+{v:,}" if v else "0" for v in values])
        left.set_xticks(range(2), names)
        left.set(ylabel="more than folded")
        left.margins(y=0.15)
        left.legend(frameon=False)
        right.plot(logits.flatten().numpy(), folded.flatten().numpy(), ".", color="black", markersize=2)
        right.set(xlabel="logits of the normalized network", ylabel="of the folded network")
    return figure
