"""Runs a function in several processes that form a job of torch.distributed over gloo.

A server process has torch and this package imported and forks a process for each rank, so that a job costs
a fraction of a second and every test has fresh processes that it may kill.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_context = multiprocessing.get_context("forkserver")
# the server looks for modules where the environment says; what it has imported no process imports again
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_HERE), os.environ.get("PYTHONPATH"))))
_context.set_forkserver_preload(
    ["torch._dynamo", "ranks", *sorted(file.stem for file in _HERE.glob("test_*.py"))]
)


@dataclass
class Outcome:
    """How a rank ended: what it returned, what it raised, and its exit code (negative for a signal)."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    code: int | None = None
    seconds: float = 0.0


def run(function: Callable[..., Any], ranks: int, *args: Any, **options: Any) -> list[Any]:
    """Give what ``function(rank, *args)`` returns on each rank; raise what it raises."""
    outcomes = outcomes_of(function, ranks, *args, **options)
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None or outcome.code != 0:
            raise AssertionError(f"rank {rank} ended with {outcome.code}:\n{outcome.trace}")
    return [outcome.result for outcome in outcomes]


def outcomes_of(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 60,
    limit: float = 150,
    init: bool = True,
    threads: int = 1,
    store: str = "tcp",
) -> list[Outcome]:
    """Give how each rank ended. ``timeout`` is the group's; who runs longer than ``limit`` is killed."""
    with tempfile.TemporaryDirectory() as folder:
        where = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(ranks):
            receive, send = _context.Pipe(duplex=False)
            settings = (where if init else None, ranks, timeout, threads, store)
            process = _context.Process(target=_rank, args=(send, function, rank, args, settings))
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        end = time.monotonic() + limit
        outcomes = [Outcome() for _ in range(ranks)]
        for outcome, receive in zip(outcomes, pipes, strict=True):
            with contextlib.suppress(EOFError):
                if receive.poll(max(0.0, end - time.monotonic())):
                    outcome.result, outcome.error, outcome.trace, outcome.seconds = pickle.loads(
                        receive.recv_bytes()
                    )
        for outcome, process in zip(outcomes, processes, strict=True):
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                outcome.trace += f"\nkilled after {limit} s"
                process.kill()
                process.join()
            outcome.code = process.exitcode
        return outcomes


def _rank(
    send: Any, function: Callable[..., Any], rank: int, args: tuple[Any, ...], settings: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    where, ranks, timeout, threads, store = settings
    torch.set_num_threads(threads)
    # compilers in this process: a pool of them would outlive it
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if "BATCHNORM_TEST_DUMP_S" in os.environ:
        faulthandler.dump_traceback_later(float(os.environ["BATCHNORM_TEST_DUMP_S"]), exit=False)
    torch.manual_seed(0)
    begun = time.monotonic()
    result, error, trace = None, None, ""
    try:
        if where is not None:
            span = datetime.timedelta(seconds=timeout)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            kept = _store(store, where, rank, ranks)
            # all are there before anybody's timeout begins: on a busy machine a process may start late
            kept.set(f"up/{rank}", b"1")
            kept.wait([f"up/{r}" for r in range(ranks)], datetime.timedelta(seconds=120))
            dist.init_process_group("gloo", store=kept, rank=rank, world_size=ranks, timeout=span)
        begun = time.monotonic()
        result = function(rank, *args)
    except BaseException as raised:
        error, trace = raised, traceback.format_exc()
    seconds = time.monotonic() - begun
    try:
        message = pickle.dumps((result, error, trace, seconds))
    except Exception as raised:
        message = pickle.dumps((None, RuntimeError(f"{error!r}; {raised!r}"), trace, seconds))
    send.send_bytes(message)
    send.close()
    if error is not None:
        # the others may still wait in the store that this rank keeps, or for its connection
        time.sleep(0 if rank else 0.2)
    elif where is not None and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.barrier()
            dist.destroy_process_group()


def _store(kind: str, where: str, rank: int, ranks: int) -> Any:
    """A store in the process of rank 0, as without torchrun, or a file, which outlives every rank."""
    import torch.distributed as dist

    if kind == "file":
        return dist.FileStore(where, ranks)
    if rank == 0:
        made = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        with open(where + ".new", "w") as file:
            file.write(str(made.port))
        os.rename(where + ".new", where)
        return made
    while not os.path.exists(where):
        time.sleep(0.005)
    with open(where) as file:
        return dist.TCPStore("127.0.0.1", int(file.read()), ranks, is_master=False)
