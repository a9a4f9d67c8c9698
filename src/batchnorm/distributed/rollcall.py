"""Who is where, asked through the store when a message did not go through.

A rank that fails calls the roll: it writes what it is in, and raises an alarm. Ranks that still wait for a
message cannot hear that in their own thread, so a second thread looks for the alarm while they wait and
answers for them. Who does not answer is dead, asleep, or somewhere without a batch norm that pools.

A rank may be waiting in another group than the one that asks (of a mesh: within its node). Then it says so,
and its group is asked in turn, so that the rank that holds everybody up is named, and not its neighbour.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any, NamedTuple
from weakref import WeakSet

import torch.distributed as dist

PATIENCE_S = 2.5
"""How long a rank has to answer."""

_LOOK_EVERY_S = 0.5
_WAITING_IS_LONG_S = 0.7
_LOST, _ALARM = "lost", "lost/alarm"


class Place(NamedTuple):
    """Where a rank is.

    Parameters
    ----------
    where : str
        The call.
    group : str
        The name of the group that it is in there.
    members : list of int
        The ranks of that group.
    """

    where: str
    group: str
    members: list[int]


class Heard(NamedTuple):
    """What a roll call brought.

    Parameters
    ----------
    places : dict of int to Place
        Of each rank that answered; the one that asked is always there.
    missing : list of int
        Who did not answer.
    raised : dict of int to str
        Errors that missing ranks had raised before.
    asked : bool
        False where the store could not be asked.
    """

    places: dict[int, Place]
    missing: list[int]
    raised: dict[int, str]
    asked: bool


class RollCall:
    """The roll of one group; ranks are those of the job.

    Parameters
    ----------
    group : ProcessGroup
        Whose ranks answer.
    """

    def __init__(self, group: Any) -> None:
        self._name, self._rank = group.group_name, dist.get_rank()
        self._members: list[int] = dist.get_process_group_ranks(group)
        try:
            self._store: Any = dist.PrefixStore("batchnorm", dist.distributed_c10d._get_default_store())
            # a job before this one may have had the same store: what was written before now is not for this roll
            self._begun = self._now()
            if self._store.check([f"raised/{self._rank}"]):
                self._store.delete_key(f"raised/{self._rank}")
        except Exception:
            # a backend without a store: nobody can be asked, and the error says so
            self._store = None
        self._places: dict[int, Place] = {}
        self._raised: dict[int, str] = {}
        self._answered = False

    def waits(self, where: str | None) -> None:
        """Note that this rank begins to wait for the others, or no longer does.

        Parameters
        ----------
        where : str or None
            What it is in; None when the message came.
        """
        if where is None:
            _waiting.pop(id(self), None)
        else:
            _waiting[id(self)] = time.monotonic(), Place(where, self._name, self._members)

    def look(self) -> None:
        """Answer for a rank that has waited for long, if somebody called the roll."""
        waiting = min(list(_waiting.values()), default=None)
        if self._store is None or self._answered or waiting is None:
            return
        if time.monotonic() - waiting[0] < _WAITING_IS_LONG_S:
            return
        try:
            alarm = self._key(_ALARM)
            if self._store.check([alarm]) and int(self._store.get(alarm)) > self._begun:
                self._answered = True
                # remembered too, for the store may be gone when this rank's own wait ends; aside, for this
                # thread answers in other groups meanwhile
                self._aside(lambda: self._collect(_LOST, waiting[1]), 0)
        except Exception:
            self._answered = True

    def call(self, subject: str, where: str, turn: str = "") -> Heard:
        """Say where this rank is, and hear where the others are.

        Parameters
        ----------
        subject : str
            What the roll is called for; ``"lost"`` also raises the alarm.
        where : str
            What this rank is in.
        turn : str
            Which call of this subject it is; an answer to another one is none.

        Returns
        -------
        Heard
            Also of ranks of other groups, where one of this group waits there.
        """
        own = Place(where, self._name, self._members)
        self._answered |= subject == _LOST
        done = self._aside(lambda: self._collect(subject, own, turn), PATIENCE_S + 1)
        places = {**self._places, self._rank: own}
        expected = set(self._members)
        for place in self._places.values():
            expected.update(place.members)
        return Heard(places, sorted(expected - set(places)), dict(self._raised), done)

    def raises(self, what: str) -> None:
        """Leave a note of an error that this rank is about to raise, for ranks that will wait for it in vain.

        Parameters
        ----------
        what : str
            What was wrong.
        """
        self._aside(lambda: self._store.set(f"raised/{self._rank}", what), 1)

    def _aside(self, work: Any, limit: float) -> bool:
        done: list[bool] = []

        def run() -> None:
            with contextlib.suppress(Exception):  # the store is gone with the rank that kept it
                work()
                done.append(True)

        # in a thread: a store that hangs must not hang this rank
        if self._store is not None:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(limit)
        return bool(done)

    def _key(self, subject: str, rank: int | None = None, group: str | None = None) -> str:
        return f"{group or self._name}/{subject}" + ("" if rank is None else f"/{rank}")

    def _now(self) -> int:
        """Give a number that is larger than all that any rank was given before."""
        return int(self._store.add("clock", 1))

    def _collect(self, subject: str, own: Place, turn: str = "") -> None:
        store = self._store
        store.set(self._key(subject, self._rank), json.dumps((self._now(), turn, own)))
        if subject == _LOST:
            store.set(self._key(_ALARM), str(self._now()))
        else:
            self._places = {}
        open_ranks = {rank: self._name for rank in self._members if rank != self._rank}
        asked = {self._name}
        deadline = time.monotonic() + PATIENCE_S
        while open_ranks and time.monotonic() < deadline:
            for rank, group in list(open_ranks.items()):
                key = self._key(subject, rank, group)
                # `wait` would print what it does not find; `check` is quiet
                heard = json.loads(store.get(key)) if store.check([key]) else None
                if heard is not None and heard[0] > self._begun and heard[1] == turn:
                    place = self._places[rank] = Place(*heard[2])
                    del open_ranks[rank]
                    if place.group not in asked:
                        asked.add(place.group)
                        store.set(self._key(_ALARM, group=place.group), str(self._now()))
                        known = {self._rank, *self._places, *open_ranks}
                        open_ranks |= {r: place.group for r in place.members if r not in known}
                elif subject == _LOST and rank not in self._raised and store.check([f"raised/{rank}"]):
                    self._raised[rank] = store.get(f"raised/{rank}").decode()
            if open_ranks.keys() <= self._raised.keys():
                return
            time.sleep(0.03)


# since when and where this process waits; seldom more than one place
_waiting: dict[int, tuple[float, Place]] = {}
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
