"""How one case is timed: every contender once a round, in an order that turns, and the floor with them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import VerificationError
from batchnorm_lab.bench.contenders import Contender, Unsupported, make
from batchnorm_lab.bench.operands import Operands, make_operands
from batchnorm_lab.bench.shapes import Case

SHORTEST_SECONDS = 1e-3
LONGEST_INNER = 100
SAMPLED_VALUES = 1 << 20
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-1}
# torch's channels_last sums over a million float32 values are off by a percent
TOLERANCE_OF_SUMS = 0.1


class Sample(NamedTuple):
    """Times of one contender in one direction, in milliseconds, one a round."""

    contender: str
    direction: str
    times: np.ndarray


class Outcome(NamedTuple):
    """What timing one case gave: samples, and why who is missing is missing."""

    case: Case
    samples: list[Sample]
    left_out: dict[str, str]


class Floor:
    """A copy of the tensor, and a triad reading two and writing one, into memory that is already mapped."""

    def __init__(self, operands: Operands) -> None:
        self.source = operands.z.detach().reshape(-1) if operands.z.is_contiguous() else flat(operands.z)
        self.other = torch.randn_like(self.source)
        self.target = torch.zeros_like(self.source)

    def copy(self) -> None:
        self.target.copy_(self.source)

    def triad(self) -> None:
        torch.add(self.source, self.other, out=self.target)


def flat(tensor: Tensor) -> Tensor:
    """View a dense tensor as one axis, in the order of memory.

    Parameters
    ----------
    tensor : Tensor
        Dense, any order of axes.

    Returns
    -------
    Tensor
        A view.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def clock(body: Callable[[], Any], inner: int) -> float:
    """Milliseconds a call of ``body``, over ``inner`` calls."""
    start = time.perf_counter()
    for _ in range(inner):
        body()
    return (time.perf_counter() - start) / inner * 1e3


def time_contender(contender: Contender, inner: int, training: bool) -> dict[str, float]:
    """Time some calls of one contender, forward and backward apart.

    Parameters
    ----------
    contender : Contender
        Warmed up.
    inner : int
        Calls to average over.
    training : bool
        Whether a backward follows each forward.

    Returns
    -------
    dict
        Milliseconds a call by direction. Giving the results back to the allocator is not counted.
    """
    settle = getattr(contender, "settle", None)
    if settle is not None:
        settle()
    forward = backward = 0.0
    for counted in range(-1, inner):
        # the first call of a turn is not counted: it meets the caches as another left them, while the floor's
        # turn, of many short calls, meets its own
        start = time.perf_counter()
        y = contender.forward()
        middle = time.perf_counter()
        if counted >= 0:
            forward += middle - start
        if training:
            gradients = contender.backward(y)
            if counted >= 0:
                backward += time.perf_counter() - middle
            del gradients
        del y
    times = {"forward": forward / inner * 1e3}
    if training:
        times["backward"] = backward / inner * 1e3
        times["forward+backward"] = (forward + backward) / inner * 1e3
    return times


def sampled(contender: Contender, value: Any) -> Tensor:
    """The first rows of a result as float32: enough of it to be compared."""
    dense = contender.as_torch(value).detach()
    few = max(1, SAMPLED_VALUES * len(dense) // max(1, dense.numel()))
    return dense[:few].float().flatten()


def check_same(case: Case, contenders: dict[str, Contender]) -> None:
    """Compare what the contenders compute, before any of them is timed.

    Parameters
    ----------
    case : Case
        What is to be timed.
    contenders : dict
        By name; the first is what the others are held against.

    Raises
    ------
    VerificationError
        One of them computes something else.
    """
    wanted: list[Tensor] = []
    reference = next(iter(contenders))
    for name, contender in contenders.items():
        y = contender.forward()
        values = [sampled(contender, y)]
        if case.mode == "training":
            values += [sampled(contender, gradient) for gradient in contender.backward(y)]
        if not wanted:
            wanted = values
        for which, (got, want) in enumerate(zip(values, wanted, strict=True)):
            # relative to the largest: a ReLU kink may fall on either side of 0 for a few values
            scale = float(want.abs().max()) + 1e-6
            tolerance = TOLERANCE_OF_SUMS if which in (2, 3) else TOLERANCE[case.dtype]
            wrong = ((got - want).abs() > tolerance * scale).double().mean().item()
            if wrong > 1e-3:
                raise VerificationError(
                    f"bench: {name} and {reference} disagree in {wrong:.2%} of result {which}, {case.label}.",
                    why="timings of different computations can not be compared.",
                    mend=f"leave {name} out, or report it with this line.",
                )


def time_case(
    case: Case,
    names: Sequence[str],
    *,
    rounds: int = 11,
    seconds: float = float("inf"),
    seed: int = 0,
) -> Outcome:
    """Time one case.

    Parameters
    ----------
    case : Case
        What is to be timed.
    names : sequence of str
        Contenders, of ``contenders.CONTENDERS``.
    rounds : int, optional
        In each, every contender and the floor have their turn.
    seconds : float, optional
        Start no round after this long, once there were 3.
    seed : int, optional
        Of the data.

    Returns
    -------
    Outcome
        With times of ``"floor"``: its forward is a copy, its backward a triad.
    """
    operands = make_operands(case, seed)
    training = case.mode == "training"
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            contender = make(name, case, operands)
            y = contender.forward()
            if training:
                contender.backward(y)
            contenders[name] = contender
        except (Unsupported, ImportError) as error:
            left_out[name] = str(error)
        except RuntimeError as error:  # a peer's own refusal
            if name in ("ours", "engine"):
                raise
            left_out[name] = str(error).splitlines()[0]
    check_same(case, contenders)

    floor = Floor(operands)
    floor_times = {"forward": floor.copy, "backward": floor.triad}
    inner = {name: inner_calls(time_contender(c, 1, training)["forward"]) for name, c in contenders.items()}
    floor.copy()
    inner_floor = inner_calls(clock(floor.copy, 1))
    times: dict[tuple[str, str], list[float]] = {}
    turn = [*contenders, "floor"]
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - started > seconds:
                break
            for name in turn[done % len(turn) :] + turn[: done % len(turn)]:
                if name == "floor":
                    one = {key: clock(body, inner_floor) for key, body in floor_times.items()}
                    one["forward+backward"] = one["forward"] + one["backward"]
                else:
                    one = time_contender(contenders[name], inner[name], training)
                for direction, milliseconds in one.items():
                    times.setdefault((name, direction), []).append(milliseconds)
    finally:
        gc.enable()
    samples = [Sample(name, direction, np.array(t)) for (name, direction), t in times.items()]
    if not training:
        samples = [s for s in samples if s.direction == "forward"]
    return Outcome(case, samples, left_out)


def inner_calls(milliseconds: float) -> int:
    """Choose how many calls one reading of the clock spans.

    Parameters
    ----------
    milliseconds : float
        What one call takes.

    Returns
    -------
    int
        1 for anything longer than a millisecond.
    """
    return max(1, min(LONGEST_INNER, int(SHORTEST_SECONDS * 1e3 / max(milliseconds, 1e-6))))
