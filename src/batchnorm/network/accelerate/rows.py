"""What is told of a compiled model: its graphs, where they break, and what became of each norm."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.network.record import LEFT_ALONE, Row

TOOL = "accelerate"


@dataclass
class Found:
    """A norm of a graph, and what became of it.

    Parameters
    ----------
    where : str
        Path of the module whose forward calls it.
    parts : tuple of str
        ``"norm"``, ``"add"`` and the activation's name, as far as they are in one call; empty where the norm runs
        as it was written.
    reason : str
        Why no more is in the call.
    kind : str
        What it is: the class of the module, or ``"batch_norm"``.
    """

    where: str
    parts: tuple[str, ...] = ()
    reason: str = ""
    kind: str = "batch_norm"

    def __str__(self) -> str:
        return " -> ".join(self.parts) if len(self.parts) > 1 else ""


@dataclass
class Graph:
    """What Dynamo made of a piece of Python.

    Parameters
    ----------
    norms : list of Found
        Its batch norms.
    steps : int
        How many calls it holds.
    ended : str
        Why it ended where it did; empty where the forward was over.
    trouble : str
        Why it runs as Dynamo gave it; empty where it was rewritten.
    """

    norms: list[Found]
    steps: int
    ended: str = ""
    trouble: str = ""


def rows(graphs: list[Graph], recompiled: list[str], seconds: float) -> list[Row]:
    """Rows of a record.

    Parameters
    ----------
    graphs : list of Graph
        In the order in which they were compiled.
    recompiled : list of str
        What had changed, each time that something was compiled anew.
    seconds : float
        That the calls took in which something was compiled.

    Returns
    -------
    list of Row
        One for the compilation, one a break, one a norm (the latest way it was called in), one a recompilation.
    """
    if not graphs and not seconds:
        return [Row("", "Dynamo", "not compiled", "it compiles at the first call", "", TOOL)]
    breaks = [g.ended for g in graphs if g.ended]
    summary = (
        f"{_number(len(graphs), 'graph')}, {_number(len(breaks), 'break')}, "
        f"{_number(sum(g.steps for g in graphs), 'call')}; first calls took {seconds:.1f} s"
    )
    found = [Row("", "Dynamo", "compiled", summary, "", TOOL)]
    for reason in dict.fromkeys(breaks):
        found.append(Row("", "Dynamo", "broke the graph", f"{breaks.count(reason)} times", reason, TOOL))
    for graph in graphs:
        if graph.trouble:
            found.append(Row("", "graph", LEFT_ALONE, "", graph.trouble, TOOL))
    latest: dict[str, list[Found]] = {}
    for graph in graphs:
        here: dict[str, list[Found]] = {}
        for norm in graph.norms:
            here.setdefault(norm.where, []).append(norm)
        latest.update(here)
    for norms in latest.values():
        # a norm called more than once: the call with the most in it
        norm = max(norms, key=lambda n: len(n.parts))
        found.append(
            Row(norm.where, norm.kind, "called" if norm.parts else LEFT_ALONE, str(norm), norm.reason, TOOL)
        )
    for reason in dict.fromkeys(recompiled):
        found.append(Row("", "Dynamo", "compiled anew", "", reason, TOOL))
    return found


def first_line(text: str) -> str:
    """The first line of a message that has something in it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
