"""What a tool did to a network, what it left alone, and why: a table that travels with the network."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from batchnorm.network.model import check_model, unwrapped

ATTRIBUTE = "_batchnorm_record"
LEFT_ALONE = "left alone"
_WIDTH = 140


@dataclass(frozen=True)
class Row:
    """One line of a record.

    Parameters
    ----------
    path : str
        Where in the model, as in ``named_modules()``; ``""`` is the model itself.
    kind : str
        What is there: the class name of the module.
    action : str
        What was done, as a past participle (``"inserted"``, ``"folded"``, ...), or ``"left alone"``.
    detail : str
        What exactly: the new layer, the layer folded into.
    reason : str
        Why it was left alone, or a condition that the change rests on.
    tool : str
        The function that did it.
    """

    path: str
    kind: str
    action: str
    detail: str = ""
    reason: str = ""
    tool: str = ""


@dataclass
class Record:
    """Rows in the order in which they were written; prints as a table.

    Parameters
    ----------
    rows : list of Row
        What was done and left alone so far.
    tool : str
        Who writes, where a row does not say.

    Examples
    --------
    >>> from batchnorm.network.record import Record
    >>> made = Record()
    >>> made.add("conv1", "Conv2d", "folded", "BatchNorm2d bn1", tool="fold")
    >>> made.counts()
    {'folded': 1}
    """

    rows: list[Row] = field(default_factory=list)
    tool: str = ""

    def add(
        self, path: str, kind: str, action: str, detail: str = "", reason: str = "", *, tool: str = ""
    ) -> None:
        """Write one row.

        Parameters
        ----------
        path, kind, action, detail, reason, tool : str
            The fields of :class:`Row`.
        """
        self.rows.append(Row(path, kind, action, detail, reason, tool or self.tool))

    def leave(self, path: str, kind: str, reason: str, *, tool: str = "") -> None:
        """Write that something was left alone.

        Parameters
        ----------
        path, kind, reason, tool : str
            The fields of :class:`Row`.
        """
        self.add(path, kind, LEFT_ALONE, reason=reason, tool=tool)

    def of(self, action: str) -> list[Row]:
        """Rows with one action.

        Parameters
        ----------
        action : str
            For example ``"folded"``.

        Returns
        -------
        list of Row
            In the order written.
        """
        return [row for row in self.rows if row.action == action]

    @property
    def left_alone(self) -> list[Row]:
        """Rows of what was not changed."""
        return self.of(LEFT_ALONE)

    def reason(self, path: str) -> str:
        """Why the module at a path was left alone.

        Parameters
        ----------
        path : str
            As in ``named_modules()``.

        Returns
        -------
        str
            The reason of the latest such row; empty when there is none.
        """
        return next((row.reason for row in reversed(self.rows) if row.path == path and row.reason), "")

    def counts(self) -> dict[str, int]:
        """How often each action occurs.

        Returns
        -------
        dict
            Action to number of rows.
        """
        return dict(Counter(row.action for row in self.rows))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        done = ", ".join(f"{n} {action}" for action, n in self.counts().items()) or "nothing done"
        if not self.rows:
            return done
        several = len({row.tool for row in self.rows}) > 1
        lines = [("tool", "path", "kind", "action", "detail", "reason")]
        lines += [(r.tool, r.path or "(the model)", r.kind, r.action, r.detail, r.reason) for r in self.rows]
        return f"{done}\n{_table([line if several else line[1:] for line in lines])}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Lay lines out in columns; the first is the heading.

    A fixed width and ASCII alone: the text does not depend on the terminal that it is printed on.
    """
    cells = [[text.encode("ascii", "backslashreplace").decode() for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > _WIDTH:
        widths[widths.index(max(widths))] -= 1
    drawn = []
    for line in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        wrapped = [textwrap.wrap(text, width) or [""] for text, width in zip(line, widths, strict=True)]
        for part in zip_longest(*wrapped, fillvalue=""):
            padded = (text.ljust(width) for text, width in zip(part, widths, strict=True))
            drawn.append("  ".join(padded).rstrip())
    return "\n".join(drawn)


def record(network: torch.nn.Module) -> Record:
    """What the tools of this package did to a network, and what they left alone and why.

    Parameters
    ----------
    network : torch.nn.Module
        A network that ``insert``, ``fold``, ``accelerate``, ``convert``, ... returned.

    Returns
    -------
    Record
        Prints as a table. Empty for a network that no tool has touched. It is copied and pickled with
        the network, and is no part of its state dict.

    Raises
    ------
    ArgumentError
        ``network`` is no network.

    Examples
    --------
    >>> import torch, batchnorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [row.path for row in batchnorm.record(batchnorm.insert(net)) if row.action == "inserted"]
    ['0']
    """
    check_model(network, "record")
    network = unwrapped(network)
    return Record([*_of(network).rows, *_live(network)])


def _of(network: torch.nn.Module) -> Record:
    found = getattr(network, ATTRIBUTE, None)
    return found if isinstance(found, Record) else Record()


def _live(network: torch.nn.Module) -> list[Row]:
    """What is known only of the network that runs, and not of a copy: what its compiler told."""
    call = getattr(network, "_compiled_call_impl", None)
    told = getattr(call, "rows", None)
    if told is not None:
        return told()
    if any(row.action == "accelerated" for row in _of(network)):
        if call is None:
            why = "a copy, or loaded: it runs as plain torch, for what is compiled is not copied; accelerate it again"
        else:
            why = "compiled anew by somebody else (Module.compile), and that compiler decides"
        return [Row("", type(network).__name__, LEFT_ALONE, "", why, "accelerate")]
    return []


def forget_tool(network: torch.nn.Module, tool: str) -> None:
    """Take the rows of one tool out of a network's record.

    Parameters
    ----------
    network : torch.nn.Module
        The network that the rows tell of; changed in place.
    tool : str
        As in :class:`Row`.
    """
    forget(network, [row for row in _of(unwrapped(network)).rows if row.tool == tool])


def forget(network: torch.nn.Module, rows: Sequence[Row]) -> None:
    """Take some rows out of a network's record, and the record away where nothing is left.

    Parameters
    ----------
    network : torch.nn.Module
        The network that the rows tell of; changed in place.
    rows : sequence of Row
        Those that were written, not others that say the same.
    """
    network = unwrapped(network)
    present = _of(network).rows
    gone = {id(row) for row in rows}
    kept = [row for row in present if id(row) not in gone]
    if kept:
        object.__setattr__(network, ATTRIBUTE, Record(kept))
    elif present:
        network.__dict__.pop(ATTRIBUTE, None)


def write_record(network: torch.nn.Module, rows: Record) -> torch.nn.Module:
    """Append rows to a network's record.

    Parameters
    ----------
    network : torch.nn.Module
        The network that the rows tell of; changed in place.
    rows : Record
        What to append to what it has.

    Returns
    -------
    torch.nn.Module
        ``network``.
    """
    # a new object: a copy of the network made earlier may still hold the old one
    inside = unwrapped(network)
    object.__setattr__(inside, ATTRIBUTE, Record([*_of(inside).rows, *rows.rows]))
    return network
