"""Which call comes next: predicted from those before, alike on every rank."""

from __future__ import annotations

from typing import NamedTuple

_CONTEXT = 64
_KEPT = 1 << 14


class Plan(NamedTuple):
    """What all ranks must know of a message before it is sent.

    Parameters
    ----------
    code : int
        The call it belongs to, from `batchnorm.distributed.calls.code_of`.
    words : int
        Its length without the header.
    reduces : bool
        Whether it is a sum over ranks rather than a row from each.
    """

    code: int
    words: int
    reduces: bool = False


class Order:
    """The calls that the ranks of a group agreed on, and a guess at the next.

    A training loop repeats itself. The guess is what followed the last time when the calls before were
    these: a pointer into the past, which moves on while it is right and is set anew where it was wrong.
    It is a function of agreed calls, so every rank guesses the same, right or wrong.
    """

    def __init__(self) -> None:
        self._calls: list[Plan] = []
        self._next: int | None = None
        self.agreed = 0

    def guess(self) -> Plan | None:
        """Give the call that is to come.

        Returns
        -------
        Plan or None
            None where nothing like the last call was seen before.
        """
        return None if self._next is None else self._calls[self._next]

    def learn(self, call: Plan) -> None:
        """Take note of a call that every rank agreed on.

        Parameters
        ----------
        call : Plan
            What was sent.
        """
        right = self.guess() == call
        self._calls.append(call)
        self.agreed += 1
        if len(self._calls) > 2 * _KEPT:
            del self._calls[:_KEPT]
            right = False
        self._next = self._next + 1 if right and self._next is not None else self._look_back()

    def _look_back(self) -> int | None:
        calls, last = self._calls, len(self._calls) - 1
        best, found = 0, None
        for i in range(last - 1, -1, -1):
            if calls[i] != calls[last]:
                continue
            alike = 1
            while alike < _CONTEXT and alike <= i and calls[i - alike] == calls[last - alike]:
                alike += 1
            if alike > best:
                best, found = alike, i + 1
                if best == _CONTEXT:
                    break
        return found
