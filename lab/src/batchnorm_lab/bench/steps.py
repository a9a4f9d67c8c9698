"""Times training steps of one model written in several ways, in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm_lab.bench import models
from batchnorm_lab.bench.measure import Outcome, Sample
from batchnorm_lab.bench.results import append, provenance, rows
from batchnorm_lab.bench.shapes import Case

CONTENDER = {"before": "eager", "after": "ours", "accelerated": "accelerated"}


def make_variant(name: str, variant: str, layout: str) -> nn.Module:
    """Make a model in one of the ways it can be written.

    Parameters
    ----------
    name : str
        Of ``models.MODELS``.
    variant : str
        ``"before"``, ``"after"`` or ``"accelerated"``.
    layout : str
        ``"nchw"`` or ``"channels_last"``.

    Returns
    -------
    nn.Module
        In training mode.
    """
    model = models.make(name, models.fused_norm_act if variant == "after" else models.PlainNormAct)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if variant == "accelerated":
        import batchnorm

        model = batchnorm.accelerate(model)
    return model.train()


def make_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """Make one step of training: forward, loss, backward and SGD.

    Parameters
    ----------
    model : torch.nn.Module
        Trained in place.
    images, labels : Tensor
        One batch, used in every step.

    Returns
    -------
    callable
        It takes a step and gives the loss.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def batch_of(number: int, size: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch of random images and labels, the same every time.

    Parameters
    ----------
    number, size : int
        Images, and their side.
    layout : str
        ``"nchw"`` or ``"channels_last"``.

    Returns
    -------
    images : Tensor, shape (number, 3, size, size)
        In that layout.
    labels : Tensor, shape (number,)
        Of 1000 classes.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, size, size, generator=generator)
    labels = torch.randint(1000, (number,), generator=generator)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels


def take_turns(
    steps: dict[str, Callable[[], float]], rounds: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Time steps in turns, in an order that turns, without the garbage collector.

    Parameters
    ----------
    steps : dict
        By contender.
    rounds : int
        Steps of each.
    seconds : float, optional
        After so many no further round begins, once there are five.

    Returns
    -------
    dict
        Milliseconds by contender, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > seconds:
            break
        for name in list(steps)[:: 1 if done % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    gc.enable()
    return times


def time_steps(
    name: str,
    variants: Sequence[str],
    *,
    batch: int,
    size: int,
    layout: str,
    threads: int,
    rounds: int,
    path: Path | None,
) -> Outcome:
    """Time training steps of one model, its variants in turns.

    Parameters
    ----------
    name : str
        Of ``models.MODELS``.
    variants : sequence of str
        Of ``CONTENDER``.
    batch, size : int
        Images a step, and their side.
    layout : str
        ``"nchw"`` or ``"channels_last"``.
    threads : int
        Thread budget.
    rounds : int
        Steps timed of each variant, after one that is not.
    path : Path or None
        CSV to which rows are added.

    Returns
    -------
    Outcome
        Samples of contenders ``"eager"`` (before), ``"ours"`` (after) and ``"accelerated"``.
    """
    torch.set_num_threads(threads)
    images, labels = batch_of(batch, size, layout)
    steps = {v: make_step(make_variant(name, v, layout), images, labels) for v in variants}
    losses = {}
    for variant, step in steps.items():
        torch.manual_seed(1)  # dropout
        losses[variant] = step()
    print("first loss:", ", ".join(f"{v} {loss:.6f}" for v, loss in losses.items()))
    if max(losses.values()) - min(losses.values()) > 1e-3 * max(losses.values()):
        raise SystemExit("the variants do not compute the same loss: nothing was timed")
    times = take_turns(steps, rounds)
    case = Case("step", (batch, 3, size, size), layout, "float32", name, "training")
    samples = [Sample(CONTENDER[v], "step", np.array(t)) for v, t in times.items()]
    outcome = Outcome(case, samples, {})
    for variant, measured in times.items():
        line = f"{name} batch {batch} {layout} {variant}: {np.median(measured):.0f} ms"
        if "before" in times and variant != "before":
            ratio = np.array(times["before"]) / np.array(measured)
            line += f", {np.median(times['before']) / np.median(measured):.2f}x"
            line += f" (round by round {ratio.min():.2f} to {ratio.max():.2f})"
        print(line, flush=True)
    if path is not None:
        append(path, rows(outcome, provenance(threads)))
    return outcome
