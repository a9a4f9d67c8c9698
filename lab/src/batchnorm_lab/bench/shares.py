"""Of what a faster batch norm can gain in a training step, the share that ``accelerate`` gains.

Networks of timm, unchanged, take turns with their accelerated copy and with a floor, in which every norm is a copy of
its input and activations vanish: ``(before - after) / (before - floor)``.

    python -m batchnorm_lab.bench.shares --threads 2 --out lab/results/NAME.csv
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm_lab.bench.measure import Outcome, Sample
from batchnorm_lab.bench.results import append, provenance, rows
from batchnorm_lab.bench.shapes import Case
from batchnorm_lab.bench.steps import batch_of, make_step, take_turns


class Network(NamedTuple):
    """Name in timm, and images a step."""

    timm: str
    batch: int


NETWORKS = {
    "resnet18": Network("resnet18", 8),
    "resnet50": Network("resnet50", 4),
    "mobilenet_v2": Network("mobilenetv2_100", 8),
    "mobilenet_v3": Network("mobilenetv3_large_100", 8),
    "densenet121": Network("densenet121", 4),
    "efficientnet_b0": Network("efficientnet_b0", 8),
    "regnety": Network("regnety_008", 8),
}
ACTIVATIONS = frozenset(["relu", "relu6", "silu", "swish", "hardswish"])


class CopyBothWays(torch.autograd.Function):
    """The least that a layer does whose output and gradient are tensors of their own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clone()


class CopyLayer(nn.Module):
    """In place of a norm."""

    def forward(self, z: Tensor) -> Tensor:
        return CopyBothWays.apply(z)


def floor(model: nn.Module) -> nn.Module:
    """Make the network that no batch norm can beat: every norm copies, and activations vanish.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.

    Returns
    -------
    torch.nn.Module
        It computes something else, in the same convolutions and memory.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, CopyLayer())
            elif type(child).__name__.lower() in ACTIVATIONS:
                setattr(parent, name, nn.Identity())
    return model


def time_share(
    name: str, *, layout: str, size: int, threads: int, rounds: int, seconds: float, path: Path | None
) -> Outcome:
    """Time training steps of one network as given, accelerated, and at the floor, in turns.

    Parameters
    ----------
    name : str
        Of ``NETWORKS``.
    layout : str
        ``"nchw"`` or ``"channels_last"``.
    size : int
        Side of the images.
    threads : int
        Thread budget.
    rounds : int
        Steps timed of each, after two that are not.
    seconds : float
        After so many no further round begins, once there are five.
    path : Path or None
        CSV to which rows are added.

    Returns
    -------
    Outcome
        Samples of contenders ``"eager"``, ``"ours"`` (accelerated) and ``"floor"``.
    """
    import timm

    import batchnorm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = NETWORKS[name]
    given: nn.Module = timm.create_model(network.timm, pretrained=False).train()
    if layout == "channels_last":
        given = given.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = batch_of(network.batch, size, layout)
    models = {"eager": given, "ours": batchnorm.accelerate(copy.deepcopy(given)), "floor": floor(given)}
    steps = {contender: make_step(model, images, labels) for contender, model in models.items()}
    losses = {}
    for contender, step in steps.items():
        torch.manual_seed(1)  # dropout
        losses[contender] = step()
        step()
    if abs(losses["ours"] - losses["eager"]) > 1e-3 * losses["eager"]:
        raise SystemExit(f"{name}: the accelerated network's loss is another: nothing was timed")
    times = take_turns(steps, rounds, seconds)
    case = Case("share", (network.batch, 3, size, size), layout, "float32", name, "training")
    outcome = Outcome(case, [Sample(contender, "step", np.array(t)) for contender, t in times.items()], {})
    before, after, least = (float(np.median(times[c])) for c in ("eager", "ours", "floor"))
    print(
        f"{name} batch {network.batch} {layout}: {before:.0f} ms, {after:.0f} accelerated, floor {least:.0f}; "
        f"share {(before - after) / (before - least):.2f} ({len(times['eager'])} rounds)",
        flush=True,
    )
    if path is not None:
        append(path, rows(outcome, provenance(threads)))
    return outcome


def main() -> None:
    """Time what the arguments ask for, and print or add rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--layouts", default="nchw,channels_last")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds, for a network and layout")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, help="CSV to which rows are added")
    options = parser.parse_args()
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"shares: timm is needed ({error}).\n  mend: pip install timm") from None
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    started = time.perf_counter()
    for layout in options.layouts.split(","):
        for name in options.networks.split(","):
            time_share(
                name,
                layout=layout,
                size=options.size,
                threads=options.threads,
                rounds=options.rounds,
                seconds=options.seconds,
                path=options.out,
            )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
