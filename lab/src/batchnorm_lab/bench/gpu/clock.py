"""How one call is timed: GPU time by replaying a graph, host time apart, launches and peak memory.

A replay holds no Python, so that what is read is the kernels' time; warm replays follow each other, cold ones have
the cache overwritten before. On a CPU, for the dry run, a replay is the call itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

FLUSHED = 1 << 28
"""Bytes written to empty the cache: several times the largest one."""


class Device(Protocol):
    """What timing needs of a device."""

    name: str

    def synchronize(self) -> None:
        """Wait."""

    def replay_of(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Give what runs the call's kernels again."""

    def milliseconds(self, replay: Callable[[], Any], cold: bool) -> float:
        """Time one replay on the device's own clock."""

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes that a call takes at its height."""


class Processor:
    """The CPU, in place of a GPU."""

    name = "cpu"

    def __init__(self) -> None:
        self._flush = torch.zeros(1 << 16)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def replay_of(self, call: Callable[[], Any]) -> Callable[[], Any]:
        call()
        return call

    def milliseconds(self, replay: Callable[[], Any], cold: bool) -> float:
        if cold:
            self._flush.zero_()
        start = time.perf_counter()
        replay()
        return (time.perf_counter() - start) * 1e3

    def peak(self, call: Callable[[], Any]) -> int:
        call()
        return 0


class Gpu:
    """A CUDA or ROCm device."""

    name = "cuda"

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSHED // 4, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def replay_of(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, chooses, allocates
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay(graph: torch.cuda.CUDAGraph = graph, kept: Any = kept) -> None:
            graph.replay()

        return replay

    def milliseconds(self, replay: Callable[[], Any], cold: bool) -> float:
        if cold:
            self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Reading(NamedTuple):
    """Times of one call in milliseconds, medians; launches, and bytes at the height."""

    warm: float
    cold: float
    host: float
    launches: int
    peak: int


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def host_milliseconds(device: Device, call: Callable[[], Any], calls: int) -> float:
    """Time what the host does for one call, while the device has work to do.

    Parameters
    ----------
    device : Device
        Where it runs.
    call : callable
        What is timed.
    calls : int
        How often.

    Returns
    -------
    float
        Milliseconds a call until it returns.
    """
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    device.synchronize()
    return spent / calls * 1e3


def launches(call: Callable[[], Any]) -> int:
    """Count the kernels that a call launches, as the profiler sees them; on a CPU, the operations.

    Parameters
    ----------
    call : callable
        What is counted.

    Returns
    -------
    int
        0 where the profiler sees none, as without the right to trace.
    """
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    # beside its kernels a device's trace has the host's calls that launch them
    host = torch.autograd.DeviceType.CPU
    return sum(
        event.count
        for event in profile.key_averages()
        if not event.key.startswith("Memcpy") and (event.device_type == host) != on_gpu
    )


def read(device: Device, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Reading | str]:
    """Time several calls interleaved: each once a round, in an order that turns.

    Parameters
    ----------
    device : Device
        Where they run.
    calls : dict
        By name.
    rounds : int
        How often each has its turn.

    Returns
    -------
    dict
        A reading each; or, as text, why there is none.
    """
    found: dict[str, Reading | str] = {}
    replays: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        try:
            replays[name] = device.replay_of(call)
        except Exception as error:  # a peer's refusal costs its own column
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[tuple[str, bool], list[float]] = {}
    order = list(replays)
    for turn in range(rounds):
        shift = turn % max(len(order), 1)
        for name in order[shift:] + order[:shift]:
            for cold in (False, True):
                times.setdefault((name, cold), []).append(device.milliseconds(replays[name], cold))
    replays.clear()  # and the memory that graphs hold: what follows takes its own
    for name in order:
        call, (warm, emptied) = calls[name], (median(times[name, kind]) for kind in (False, True))
        try:
            found[name] = Reading(
                warm, emptied, host_milliseconds(device, call, rounds), launches(call), device.peak(call)
            )
        except torch.OutOfMemoryError as error:
            found[name] = f"out of memory: {str(error).splitlines()[0]}"
    return found
