"""How long a run may take: nothing is begun that would end later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """The time of a run, shared by all its parts.

    Parameters
    ----------
    seconds : float
        From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self._longest: dict[str, float] = {}

    def allows(self, kind: str) -> bool:
        """Whether a part would end in time, if it takes as long as the longest of its kind so far.

        Parameters
        ----------
        kind : str
            Of the part.

        Returns
        -------
        bool
            For the first of its kind, whether there is time at all.
        """
        return time.perf_counter() + self._longest.get(kind, 0.0) < self._end

    @contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Remember how long a part takes.

        Parameters
        ----------
        kind : str
            Of the part.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), time.perf_counter() - start)
