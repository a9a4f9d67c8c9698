"""What a call costs where the arithmetic is nothing: small inputs, functional and module."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from batchnorm_lab.bench.measure import Outcome, Sample
from batchnorm_lab.bench.shapes import Case, Shape

SMALL = "small"
SHAPES: tuple[Shape, ...] = ((64, 128), (32, 16, 8, 8))
INNER = 100


def small_cases() -> list[Case]:
    """List the small cases; their form says what is called.

    Returns
    -------
    list of Case
        ``"functional"`` and ``"module"`` for each shape, in training and inference.
    """
    return [
        Case(SMALL, shape, "rows" if len(shape) == 2 else "nchw", "float32", form, mode)
        for shape in SHAPES
        for form in ("functional", "module")
        for mode in ("training", "inference")
    ]


def callables(case: Case) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Make what is timed: ours and torch's, as a user calls it.

    Parameters
    ----------
    case : Case
        Of ``small_cases``.

    Returns
    -------
    dict
        By contender.
    """
    import batchnorm as package
    from batchnorm.functional import batch_norm

    channels = case.shape[1]
    training = case.mode == "training"
    if case.form == "module":
        name = "BatchNorm1d" if len(case.shape) == 2 else "BatchNorm2d"
        return {
            "ours": getattr(package, name)(channels).train(training),
            "eager": getattr(torch.nn, name)(channels).train(training),
        }
    weight = torch.ones(channels, requires_grad=True)
    bias = torch.zeros(channels, requires_grad=True)
    statistics = torch.zeros(channels), torch.ones(channels)

    def bind(operator: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda z: operator(z, *statistics, weight, bias, training, 0.1, 1e-5)

    return {"ours": bind(batch_norm), "eager": bind(F.batch_norm)}


def time_small(case: Case, *, rounds: int = 60) -> Outcome:
    """Time one small case; forward alone, and forward with backward.

    Parameters
    ----------
    case : Case
        Of ``small_cases``.
    rounds : int, optional
        Readings of the clock, each over 100 calls.

    Returns
    -------
    Outcome
        Like that of ``measure.time_case``, without a floor.
    """
    training = case.mode == "training"
    z = torch.randn(case.shape).requires_grad_(training)
    dy = torch.randn(case.shape)
    contenders = callables(case)
    times: dict[tuple[str, str], list[float]] = {}

    def forward(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.set_grad_enabled(training):
            for _ in range(INNER):
                call(z)

    def both(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _ in range(INNER):
            call(z).backward(dy)

    bodies = {"forward": forward, "forward+backward": both} if training else {"forward": forward}
    for done in range(-2, rounds):
        for direction, body in bodies.items():
            for name in list(contenders)[:: 1 if done % 2 else -1]:
                start = time.perf_counter()
                body(contenders[name])
                elapsed = (time.perf_counter() - start) / INNER * 1e3
                if done >= 0:
                    times.setdefault((name, direction), []).append(elapsed)
    samples = [Sample(name, direction, np.array(t)) for (name, direction), t in times.items()]
    return Outcome(case, samples, {})
