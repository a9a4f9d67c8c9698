"""Does the bias of a layer that is followed by batch normalization do anything? (M7)"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.data import ImageData
from batchnorm.modules import BatchNorm1d
from batchnorm.studies.contract import (
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
from batchnorm.studies.figures import figure
from batchnorm.studies.intervals import mean_interval, verdict
from batchnorm.studies.records import select, values
from batchnorm.studies.training import mini_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = {"float64": torch.float64, "float32": torch.float32}
# "The same to rounding": this many units of the last place of the number format.
ROUNDING = {"float64": 1e6 * 2.0**-52, "float32": 1e6 * 2.0**-23}


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 5
    steps: int = 300
    batch: int = 60
    rate: float = 0.1
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
        Flatten, then Linear, BatchNorm1d, ReLU three times, then Linear.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.studies.bias_is_redundant import network
    >>> len(network(4, 3, 2, False, 0, torch.float32))
    11
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in (inputs, width, width):
        linear = nn.Linear(fan_in, width, bias=bias, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(width, fan_in, generator=generator) * (2 / fan_in) ** 0.5)
            drawn = torch.randn(width, generator=generator)
            if bias:
                linear.bias.copy_(drawn)
        layers += [linear, BatchNorm1d(width, dtype=dtype), nn.ReLU()]
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
        bias: network(images[0].numel(), setting["width"], len(data.classes), bias, setting["seed"], dtype)
        for bias in (True, False)
    }
    losses: dict[bool, list[float]] = {True: [], False: []}
    times: dict[bool, list[float]] = {True: [], False: []}
    gradient = 0.0
    source = mini_batches(len(labels), setting["batch"], [setting["seed"]])
    for step in range(setting["steps"]):
        index = next(source)[0]
        x, y = images[index], labels[index]
        # Taking turns in changing order, so that neither has the warm caches every time.
        for bias in (True, False) if step % 2 else (False, True):
            start = time.perf_counter()
            loss = F.cross_entropy(networks[bias](x), y)
            loss.backward()
            with torch.no_grad():
                for parameter in networks[bias].parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=setting["rate"])
            times[bias].append(time.perf_counter() - start)
            losses[bias].append(float(loss.detach()))
            if bias:
                gradient = max(gradient, _bias_gradient(networks[bias]))
            networks[bias].zero_grad(set_to_none=True)
        if step % 10 == 0:
            advance(step / setting["steps"])
    for trained in networks.values():
        trained.eval()
    with torch.no_grad():
        outputs = {bias: trained(data.test_images.to(dtype)) for bias, trained in networks.items()}
    every = max(1, setting["steps"] // 100)
    differences = [abs(a - b) / abs(b) for a, b in zip(losses[True], losses[False], strict=True)]
    return {
        "loss": [float(f"{loss:.6g}") for loss in losses[False][::every]],
        "difference": [float(f"{d:.3g}") for d in differences[::every]],
        "max_difference": float(f"{max(differences):.4g}"),
        "output_difference": float(
            f"{(outputs[True] - outputs[False]).abs().max() / outputs[False].abs().max():.4g}"
        ),
        "bias_gradient": float(f"{gradient:.4g}"),
        "every": every,
        "parameters": {
            str(bias).lower(): sum(p.numel() for p in trained.parameters())
            for bias, trained in networks.items()
        },
        "milliseconds": {str(bias).lower(): round(1e3 * median(t), 4) for bias, t in times.items()},
    }


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
    """Return how large the differences are, and what is saved."""
    findings = []
    for dtype, rounding in ROUNDING.items():
        for name, what in (
            ("max_difference", "the loss at any step of training, with and without b"),
            ("output_difference", "the outputs after training, with and without b"),
            ("bias_gradient", "the gradient of b against that of W"),
        ):
            # The worst seed is what an identity has to answer for; the interval is of log10 over seeds.
            logs = mean_interval(_log10(v) for v in values(records, name, dtype=dtype))
            worst = max(values(records, name, dtype=dtype))
            label = "is zero to rounding" if name == "bias_gradient" else "is the same to rounding"
            findings.append(
                Finding(
                    "M7",
                    f"{dtype}: {what} {label}",
                    logs,
                    verdict(logs, below=_log10(rounding)),
                    f"largest relative value $10^{{{logs.estimate:.1f}}}$ on average over seeds, "
                    f"{worst:.1e} at worst".replace("$10^{", "1e").replace("}$", ""),
                )
            )
    chosen = select(records, dtype="float32")
    share = [
        100 * (1 - r["result"]["milliseconds"]["false"] / r["result"]["milliseconds"]["true"]) for r in chosen
    ]
    saved = mean_interval(share)
    parameters = chosen[0]["result"]["parameters"]
    dropped = parameters["true"] - parameters["false"]
    findings.append(
        Finding(
            "M7",
            "leaving b out saves time in training",
            saved,
            verdict(saved, above=0.0),
            f"{saved.text(1, ' %', signed=True)} of a training step of this small network, and {dropped} of "
            f"{parameters['true']} parameters",
        )
    )
    left = 0.9 ** chosen[0]["setting"]["steps"]
    remark = (
        f"The running mean starts at 0 whatever b is: {left:.0e} of b is missing from it after these steps."
    )
    return make_answer(findings, [remark])


def _log10(value: float) -> float:
    """Return log10, of 1e-20 where the value is smaller: zero is the best there is."""
    return float(torch.log10(torch.tensor(max(value, 1e-20), dtype=torch.float64)))


def plot(records: list[Record]) -> Figure:
    """Draw the losses on top of each other, and their relative difference."""
    fig, axes = figure(1, 2, height=3.8)
    left, right = axes[0]
    for style, dtype in enumerate(DTYPES):
        record = select(records, dtype=dtype)[0]
        result, every = record["result"], record["result"]["every"]
        steps = [every * index for index in range(len(result["loss"]))]
        look = {"linestyle": ("-", "--")[style], "color": ("#000000", "#D55E00")[style]}
        left.plot(steps, result["loss"], label=f"{dtype}, without b", linewidth=1.2, **look)
        with_b = [a * (1 + d) for a, d in zip(result["loss"], result["difference"], strict=True)]
        left.plot(
            steps,
            with_b,
            linestyle="none",
            marker=("o", "x")[style],
            markersize=(7, 5)[style],
            markerfacecolor="none",
            markeredgecolor=look["color"],
            markevery=(5 * style, 10),
            label=f"{dtype}, with b",
        )
        floor = 2.0**-52 if dtype == "float64" else 2.0**-23
        right.plot(
            steps,
            [max(d, floor / 16) for d in result["difference"]],
            marker=("o", "x")[style],
            markevery=10,
            label=dtype,
            **look,
        )
        right.axhline(
            floor,
            color=look["color"],
            linestyle=":",
            linewidth=1.2,
            label=f"{dtype}, one unit in the last place",
        )
    left.set(title="losses (seed 0)", xlabel="training steps", ylabel="training loss (nats)", yscale="log")
    right.set(
        title="with against without b (seed 0; no difference is drawn at the bottom)",
        xlabel="training steps",
        ylabel="relative difference of the losses",
        yscale="log",
    )
    left.legend(loc="upper right")
    right.legend(loc="center right", fontsize=8)
    right.title.set_fontsize(9)
    return fig


STUDY = Study(
    name="bias-is-redundant",
    title="The bias before a batch norm is redundant",
    question="What is lost if b is left out of z = W a + b?",
    claim="b has no effect, since the mean is subtracted and beta does its job; leaving it out saves its cost.",
    formula=r"$\mathrm{BN}(W a + b) = \mathrm{BN}(W a),\qquad \frac{\partial L}{\partial b} = 0$",
    claims=("M7",),
    configs={
        "quick": Config(seeds=2, steps=250, width=32),
        "default": Config(),
        "full": Config(seeds=20, steps=3000),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
)
