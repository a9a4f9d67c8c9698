"""A progress bar over batches, where rich is installed and somebody looks at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def watched(batches: Iterable[Any], title: str, wanted: bool) -> Iterator[Any]:
    """Give the batches one by one, and show on standard error how far it is.

    Parameters
    ----------
    batches : iterable
        Of batches; with a length, the bar knows its end.
    title : str
        What is going on.
    wanted : bool
        Whether the caller asked for a bar.

    Yields
    ------
    object
        The batches.
    """
    if not (wanted and sys.stderr.isatty()):
        yield from batches
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:  # of the extra ``batchnorm[cli]``: it goes on without a bar
        yield from batches
        return
    yield from track(batches, title, console=Console(stderr=True), transient=True)
