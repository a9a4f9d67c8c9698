"""Real ranks for a study: processes of one job of `torch.distributed` over gloo, on this machine."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from batchnorm.errors import BatchNormError
from batchnorm_lab.studies.contract import Advance

__all__ = ["on_ranks"]

# what a server of processes has imported, none of them imports again
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def on_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, advance: Advance = lambda share: None
) -> list[Any]:
    """Run a function once on each of several new ranks.

    Parameters
    ----------
    function : callable
        ``function(advance, *arguments)``, of a module; `torch.distributed` is initialised when it begins.
    ranks : int
        How many processes.
    *arguments : object
        The same on every rank.
    advance : callable
        Called with what the function of rank 0 tells its own ``advance``.

    Returns
    -------
    list
        What the function returned, in the order of ranks.

    Raises
    ------
    BatchNormError
        A rank raised or died; the others are ended.
    """
    context: Any = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload([__name__, function.__module__])
    threads = max(1, (os.cpu_count() or 1) // ranks)
    pipes: dict[Any, int] = {}
    processes = []
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                receive, send = context.Pipe(duplex=False)
                settings = send, Path(folder, "store").as_uri(), rank, ranks, threads
                process = context.Process(target=_work, args=(settings, function, arguments), daemon=True)
                process.start()
                send.close()
                pipes[receive] = rank
                processes.append(process)
            while pipes:
                for pipe in wait(list(pipes)):
                    kind, value = _received(pipe)
                    if kind == "advance":
                        advance(value)
                    elif kind == "result":
                        results[pipes.pop(pipe)] = value
                    else:
                        raise BatchNormError(
                            f"rank {pipes[pipe]} of {ranks} did not end its part of a study: {value}",
                            why="a result is that of all ranks together.",
                            mend="run the study again; if this comes back, it is a fault of the study.",
                        )
        finally:
            for process in processes:
                process.join(None if len(results) == ranks else 0)
                process.kill()
    return [results[rank] for rank in range(ranks)]


def _received(pipe: Any) -> tuple[str, Any]:
    try:
        told: tuple[str, Any] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "error", "it died."
    return told


def _work(settings: tuple[Any, ...], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send, store, rank, ranks, threads = settings
    torch.set_num_threads(threads)

    def tell(kind: str, value: Any) -> None:
        # tensors by value: shared memory would end with this process
        send.send_bytes(pickle.dumps((kind, value)))

    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        result = function(lambda share: tell("advance", share) if rank == 0 else None, *arguments)
        # none leaves while another still reads what it sent
        dist.barrier()
        dist.destroy_process_group()
        tell("result", result)
    except Exception:
        tell("error", traceback.format_exc())
