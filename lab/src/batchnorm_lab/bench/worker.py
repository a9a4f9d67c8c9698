"""One process, one thread budget: times the cases it is told and adds their rows to a CSV."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from batchnorm_lab.bench.latency import SMALL, small_cases, time_small
from batchnorm_lab.bench.measure import Outcome, time_case
from batchnorm_lab.bench.results import CASE, append, provenance, read, rows
from batchnorm_lab.bench.shapes import Case, Shape


@dataclass
class Order:
    """What a worker is to do.

    ``prepare`` only runs what torch.compile makes of each case, so that its cache on disk is filled.
    ``resume`` passes over the cases that ``path`` already has at this thread budget. No case is begun
    after ``stop_after`` seconds.
    """

    path: str
    threads: int
    cases: list[Case]
    contenders: list[str]
    rounds: int
    seconds: float
    small: bool = False
    prepare: bool = False
    resume: bool = False
    stop_after: float = float("inf")

    def to_json(self) -> str:
        """Write it down for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Read what ``to_json`` wrote."""
        order = cls(**json.loads(text))
        order.cases = [Case(name, as_shape(shape), *rest) for name, shape, *rest in order.cases]
        return order


@dataclass
class Line:
    """What is said of a case once it is done."""

    label: str
    parts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.label:<58} {'  '.join(self.parts)}"


def as_shape(values: object) -> Shape:
    """JSON knows lists only."""
    return tuple(values)  # type: ignore[arg-type]


def summary(outcome: Outcome) -> Line:
    """Say in a line what a case gave: ours in milliseconds, and the others over ours.

    Parameters
    ----------
    outcome : Outcome
        Of one case.

    Returns
    -------
    Line
        Prints as one line.
    """
    medians = {(s.contender, s.direction): float(sorted(s.times)[len(s.times) // 2]) for s in outcome.samples}
    line = Line(outcome.case.label)
    for direction in dict.fromkeys(s.direction for s in outcome.samples):
        own = medians.get(("ours", direction))
        if own is None:
            listed = [f"{n} {t:.3g} ms" for (n, d), t in medians.items() if d == direction]
        else:
            listed = [f"ours {own:.3g} ms"]
            listed += [
                f"{n} {t / own:.2f}x" for (n, d), t in medians.items() if d == direction and n != "ours"
            ]
        line.parts.append(f"[{direction}: {', '.join(listed)}]")
    return line


def serve(order: Order) -> None:
    """Time what is ordered, one case after another, each kept as soon as it is done.

    Parameters
    ----------
    order : Order
        What to do.
    """
    torch.set_num_threads(order.threads)
    path = Path(order.path)
    source = provenance(order.threads)
    finished: set[tuple[str | int, ...]] = set()
    if order.resume and path.exists():
        finished = set(read(path)[CASE].itertuples(index=False, name=None))

    def known(case: Case) -> bool:
        shape = "x".join(map(str, case.shape))
        key = (shape, case.layout, case.dtype, case.form, case.mode, order.threads)
        return key in finished

    def keep(outcome: Outcome) -> None:
        append(path, rows(outcome, source))
        print(summary(outcome), flush=True)

    todo = [case for case in order.cases if not known(case)]
    if order.small and not order.prepare:
        todo += [case for case in small_cases() if not known(case)]
    started = time.perf_counter()
    done = 0
    for case in todo:
        if time.perf_counter() - started > order.stop_after:
            break
        if order.prepare:
            time_case(case, ["compile"], rounds=0)
            print(f"prepared {case.label}", flush=True)
        elif case.set == SMALL:
            keep(time_small(case))
        else:
            keep(time_case(case, order.contenders, rounds=order.rounds, seconds=order.seconds))
        done += 1
    print(f"{done} of {len(todo)} cases, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    serve(Order.from_json(sys.stdin.read()))
