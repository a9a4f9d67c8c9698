"""Does the bias of a layer that is followed by batch normalization do anything? (M7)"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.modules import BatchNorm1d
from batchnorm.network.statistics.calibrate import calibrate
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
from batchnorm_lab.studies.figures import LINE_STYLES, figure, line
from batchnorm_lab.studies.intervals import mean_interval, ratio_interval
from batchnorm_lab.studies.records import select, values
from batchnorm_lab.studies.training import mini_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"float64": torch.float64, "float32": torch.float32}
PRECISION = {"float64": 2.0**-52, "float32": 2.0**-23}
# What is meant by "to rounding": the gradient of b within so many units in the last place of that of W,
# and differences within ten times those that follow from one rounding of the initial weights.
GRADIENT_UNITS = 1000
CONTROL_FACTOR = 10.0
WITH, WITHOUT, CONTROL = "with b", "without b", "without b, weights rounded once"


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 5
    steps: int = 300
    batch: int = 60
    rate: float = 0.3
    width: int = 100


def units(config: Config) -> list[Unit]:
    """Return one unit for each run: the two networks of a run are trained in turns, for their times."""
    return [
        Unit(
            [
                {
                    "dtype": dtype,
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "rate": config.rate,
                    "width": config.width,
                }
            ]
        )
        for dtype in DTYPES
        for seed in range(config.seeds)
    ]


def network(
    inputs: int, width: int, classes: int, bias: bool, seed: int, dtype: torch.dtype
) -> nn.Sequential:
    """Return an MLP of three hidden layers; with and without ``bias`` it has the same initial weights.

    Parameters
    ----------
    inputs, width, classes : int
        Sizes.
    bias : bool
        Whether the linear layers before a batch norm have one; its initial values are random.
    seed : int
        Of the initial weights.
    dtype : torch.dtype
        Of everything.

    Returns
    -------
    Sequential
        Flatten, then Linear, BatchNorm1d, Sigmoid three times, then Linear.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.bias_is_redundant import network
    >>> len(network(4, 3, 2, False, 0, torch.float32))
    11
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in (inputs, width, width):
        linear = nn.Linear(fan_in, width, bias=bias, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(width, fan_in, generator=generator) / fan_in**0.5)
            drawn = torch.randn(width, generator=generator)
            if bias:
                linear.bias.copy_(drawn)
        # Smooth: at the kink of ReLU one rounding grows to a difference that hides what is looked for.
        layers += [linear, BatchNorm1d(width, dtype=dtype), nn.Sigmoid()]
    output = nn.Linear(width, classes, dtype=dtype)
    with torch.no_grad():
        output.weight.copy_(torch.randn(classes, width, generator=generator) / width**0.5)
        output.bias.zero_()
    return nn.Sequential(*layers, output)


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train both networks on the same mini-batches and compare losses, outputs, gradients and times."""
    return [_measure(setting, data, advance) for setting in unit]


def _measure(setting: Setting, data: ImageData, advance: Advance) -> Result:
    dtype = DTYPES[setting["dtype"]]
    images, labels = data.train_images.to(dtype), data.train_labels
    networks = {
        arm: network(
            images[0].numel(), setting["width"], len(data.classes), arm == WITH, setting["seed"], dtype
        )
        for arm in (WITH, WITHOUT, CONTROL)
    }
    _round_once(networks[CONTROL], setting["seed"])
    losses: dict[str, list[float]] = {arm: [] for arm in networks}
    times: dict[str, list[float]] = {arm: [] for arm in networks}
    gradient = 0.0
    source = mini_batches(len(labels), setting["batch"], [setting["seed"]])
    for step in range(setting["steps"]):
        index = next(source)[0]
        x, y = images[index], labels[index]
        # Taking turns in changing order, so that none has the warm caches every time.
        for arm in list(networks)[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            loss = F.cross_entropy(networks[arm](x), y)
            loss.backward()
            with torch.no_grad():
                for parameter in networks[arm].parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=setting["rate"])
            times[arm].append(time.perf_counter() - start)
            losses[arm].append(float(loss.detach()))
            if arm == WITH:
                gradient = max(gradient, _bias_gradient(networks[arm]))
            networks[arm].zero_grad(set_to_none=True)
        if step % 10 == 0:
            advance(step / setting["steps"])
    for trained in networks.values():
        # Not the moving averages: they begin at 0 whatever b is, and would show how far they have come.
        calibrate(trained, images, progress=False)
        trained.eval()
    with torch.no_grad():
        outputs = {arm: trained(data.test_images.to(dtype)) for arm, trained in networks.items()}
    every = max(1, setting["steps"] // 100)
    scale = float(outputs[WITHOUT].abs().max())
    result: Result = {
        "loss": [float(f"{loss:.6g}") for loss in losses[WITHOUT][::every]],
        "bias_gradient": float(f"{gradient:.4g}"),
        "every": every,
        "parameters": {arm: sum(p.numel() for p in networks[arm].parameters()) for arm in (WITH, WITHOUT)},
        "milliseconds": {arm: round(1e3 * median(times[arm]), 4) for arm in (WITH, WITHOUT)},
    }
    for arm, name in ((WITH, "bias"), (CONTROL, "control")):
        differences = [abs(a - b) / abs(b) for a, b in zip(losses[arm], losses[WITHOUT], strict=True)]
        result[name] = {
            "path": [float(f"{d:.3g}") for d in differences[::every]],
            "loss": float(f"{median(differences):.4g}"),
            "worst loss": float(f"{max(differences):.4g}"),
            "output": float(f"{float((outputs[arm] - outputs[WITHOUT]).abs().max()) / scale:.4g}"),
        }
    return result


def _round_once(changed: nn.Sequential, seed: int) -> None:
    """Change every weight to a neighbouring number of its format, up or down."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in changed:
            if isinstance(layer, nn.Linear):
                up = torch.rand(layer.weight.shape, generator=generator) < 0.5
                far = torch.where(up, torch.inf, -torch.inf).to(layer.weight.dtype)
                layer.weight.copy_(torch.nextafter(layer.weight, far))


def _bias_gradient(trained: nn.Sequential) -> float:
    """Return the largest gradient of a redundant bias, relative to the largest of its layer's weights."""
    largest = 0.0
    for linear, following in pairwise(trained):
        if isinstance(following, BatchNorm1d) and isinstance(linear, nn.Linear):
            if linear.bias.grad is None or linear.weight.grad is None:
                continue
            weight = float(linear.weight.grad.abs().max())
            largest = max(largest, float(linear.bias.grad.abs().max()) / max(weight, 1e-300))
    return largest


def answer(records: list[Record]) -> Answer:
    """Return how large the differences are, against one rounding of the weights, and what is saved."""
    findings = []
    for dtype, unit in PRECISION.items():
        for name, what, kind in (
            ("loss", "losses during training", "relative, median over steps"),
            ("output", "outputs after training", "relative to the largest output"),
        ):
            bias, control = (
                # a difference of exactly 0 has no logarithm
                [max(record["result"][arm][name], unit) for record in select(records, dtype=dtype)]
                for arm in ("bias", "control")
            )
            # what is taken for one unit may be any less: the logarithm is known to a factor of 2 and no better
            ratio = ratio_interval(bias, control, resolution=math.log(2))
            findings.append(
                Finding(
                    "M7",
                    f"{dtype}: with and without b, the {what} are the same to rounding",
                    ratio,
                    f"they differ by {max(bias):.1e} ({kind}, largest of the seeds), {ratio.text(2)} times as much "
                    "as after one rounding of the initial weights",
                    below=CONTROL_FACTOR,
                )
            )
        gradients = mean_interval(
            (v / unit for v in values(records, "bias_gradient", dtype=dtype)),
            resolution=1.0,
            within=(0, math.inf),
        )
        findings.append(
            Finding(
                "M7",
                f"{dtype}: the gradient of b is zero to rounding",
                gradients,
                f"at most {gradients.text(1)} units in the last place of the gradient of W",
                below=GRADIENT_UNITS,
            )
        )
    chosen = select(records, dtype="float32")
    times = [record["result"]["milliseconds"] for record in chosen]
    saved = mean_interval(100 * (1 - t[WITHOUT] / t[WITH]) for t in times)
    parameters = chosen[0]["result"]["parameters"]
    findings.append(
        Finding(
            "M7",
            "leaving b out saves time in training",
            saved,
            f"{saved.text(1, ' %', signed=True)} of a training step of this small network, and "
            f"{parameters[WITH] - parameters[WITHOUT]} of {parameters[WITH]} parameters",
            above=0.0,
        )
    )
    left = 0.9 ** chosen[0]["setting"]["steps"]
    remark = (
        "Outputs are compared with pooled statistics: a moving average begins at 0 whatever b is, and "
        f"{left:.0e} of b is missing from it after these steps."
    )
    return make_answer(findings, [remark])


def plot(records: list[Record]) -> Figure:
    """Draw the losses on top of each other, and their relative difference beside that of the control."""
    fig, axes = figure(1, 2, height=4.2)
    left, right = axes[0]
    style = 0
    for index, (dtype, unit) in enumerate(PRECISION.items()):
        result = select(records, dtype=dtype)[0]["result"]
        steps = [result["every"] * k for k in range(len(result["loss"]))]
        look = {key: LINE_STYLES[index][key] for key in ("color", "linestyle")}
        left.plot(steps, result["loss"], label=f"{dtype}, without b", **look)
        with_b = [a * (1 + d) for a, d in zip(result["loss"], result["bias"]["path"], strict=True)]
        left.plot(
            steps,
            with_b,
            linestyle="none",
            marker=("o", "x")[index],
            markersize=(7, 5)[index],
            markerfacecolor="none",
            markeredgecolor=look["color"],
            markevery=(5 * index, 10),
            label=f"{dtype}, with b",
        )
        for arm, name in (("bias", "with b"), ("control", "weights rounded once")):
            path = [max(d, unit / 16) for d in result[arm]["path"]]
            line(right, steps, [path], style, f"{dtype}, {name}", linewidth=1.0)
            style += 1
    left.set(title="losses (seed 0)", xlabel="training steps", ylabel="training loss (nats)", yscale="log")
    right.set(
        title="difference to the loss without b (seed 0)",
        xlabel="training steps",
        ylabel="relative difference (none: at the bottom)",
        yscale="log",
    )
    for panel in (left, right):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    return fig


STUDY = Study(
    name="bias-is-redundant",
    title="The bias before a batch norm is redundant",
    question="What is lost if b is left out of z = W a + b?",
    claim="b has no effect, since the mean is subtracted and beta does its job; leaving it out saves its cost.",
    formula=r"$\mathrm{BN}(W a + b) = \mathrm{BN}(W a),\qquad \frac{\partial L}{\partial b} = 0$",
    claims=("M7",),
    configs={
        "quick": Config(seeds=2, steps=100, width=24),
        "default": Config(),
        "full": Config(seeds=20, steps=3000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=4,
)
