"""Who is where, asked through the store when a message did not go through.

A rank that fails calls the roll: it writes what it is in, and raises an alarm. Ranks that still wait for a
message cannot hear that in their own thread, so a second thread looks for the alarm while they wait and
answers for them. Who does not answer is dead, asleep, or somewhere without a batch norm that pools.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

PATIENCE_S = 2.5
"""How long a rank has to answer."""

_LOOK_EVERY_S = 0.5
_WAITING_IS_LONG_S = 0.7


class RollCall:
    """The roll of one group.

    Parameters
    ----------
    group : ProcessGroup
        Whose ranks answer.
    """

    def __init__(self, group: Any) -> None:
        self._rank, self._size = group.rank(), group.size()
        try:
            self._store: Any = dist.PrefixStore("batchnorm", group.get_group_store())
        except Exception:
            # a backend without a store: nobody can be asked, and the error says so
            self._store = None
        self._heard: dict[int, str] = {}
        self._waits: tuple[float, str] | None = None
        self._answered = False

    def waits(self, where: str | None) -> None:
        """Note that this rank begins to wait for the others, or no longer does.

        Parameters
        ----------
        where : str or None
            What it is in; None when the message came.
        """
        self._waits = None if where is None else (time.monotonic(), where)

    def look(self) -> None:
        """Answer for a rank that has waited for long, if somebody called the roll."""
        waits = self._waits
        if self._store is None or self._answered or waits is None:
            return
        if time.monotonic() - waits[0] < _WAITING_IS_LONG_S:
            return
        try:
            if self._store.check(["lost/alarm"]):
                self._answered = True
                # remembered too, for the store may be gone when this rank's own wait ends
                self._collect("lost", waits[1])
        except Exception:
            self._answered = True

    def call(self, subject: str, where: str) -> tuple[dict[int, str], bool]:
        """Say where this rank is, and hear where the others are.

        Parameters
        ----------
        subject : str
            What the roll is called for; ``"lost"`` also raises the alarm.
        where : str
            What this rank is in.

        Returns
        -------
        answers : dict of int to str
            What each rank of the group that answered is in; this one is always there.
        asked : bool
            False where the store could not be asked.
        """
        done: list[bool] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # the store is gone with the rank that kept it
                self._collect(subject, where)
                done.append(True)

        # in a thread: a store that hangs must not hang this rank
        thread = threading.Thread(target=ask, daemon=True)
        if self._store is not None:
            thread.start()
            thread.join(PATIENCE_S + 1)
        return {**self._heard, self._rank: where}, bool(done)

    def _collect(self, subject: str, where: str) -> None:
        store = self._store
        store.set(f"{subject}/{self._rank}", where)
        if subject == "lost":
            store.set("lost/alarm", b"1")
        else:
            self._heard = {}
        open_ranks = [rank for rank in range(self._size) if rank != self._rank]
        deadline = time.monotonic() + PATIENCE_S
        while open_ranks and time.monotonic() < deadline:
            for rank in list(open_ranks):
                key = f"{subject}/{rank}"
                # `wait` would print what it does not find; `check` is quiet
                if store.check([key]):
                    self._heard[rank] = store.get(key).decode()
                    open_ranks.remove(rank)
            if open_ranks:
                time.sleep(0.03)


_rolls: WeakSet[RollCall] = WeakSet()
_watch: threading.Thread | None = None


def watch(roll: RollCall) -> None:
    """Let the second thread look after a roll.

    Parameters
    ----------
    roll : RollCall
        Looked after until nobody holds it.
    """
    global _watch
    _rolls.add(roll)
    if _watch is None or not _watch.is_alive():
        _watch = threading.Thread(target=_look_around, name="batchnorm-rollcall", daemon=True)
        _watch.start()


def _look_around() -> None:
    while True:
        time.sleep(_LOOK_EVERY_S)
        for roll in list(_rolls):
            roll.look()
