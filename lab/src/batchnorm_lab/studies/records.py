"""Records of runs in a file of JSON lines, which a stopped study takes up again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from batchnorm.errors import DataError

__all__ = ["RecordFile", "at_edges", "best", "select", "values"]


class RecordFile:
    """Records by key, kept in a file of JSON lines if one is given.

    A line that was being written when the machine stopped has no newline; it is dropped, and its run
    is done again. Any other line that is not a record is an error: nothing is overwritten in silence.

    Parameters
    ----------
    path : path or None
        The file, made with its directory when the first record comes; None keeps records in memory.

    Raises
    ------
    DataError
        The file holds something that is not a record.

    Examples
    --------
    >>> from batchnorm_lab.studies.records import RecordFile
    >>> records = RecordFile(None)
    >>> records.add([{"key": "a", "result": {"accuracy": 0.9}}])
    >>> "a" in records, "b" in records
    (True, False)
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def all(self) -> list[dict[str, Any]]:
        """Return every record, in the order of the file.

        Returns
        -------
        list of dict
            Records of other configurations too.

        Examples
        --------
        >>> from batchnorm_lab.studies.records import RecordFile
        >>> RecordFile(None).all()
        []
        """
        return list(self._records.values())

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records, to the file as well; a key that is there already keeps its first record.

        Parameters
        ----------
        records : iterable of dict
            Each with a "key". Numbers that are not finite are stored as null.

        Examples
        --------
        >>> from batchnorm_lab.studies.records import RecordFile
        >>> records = RecordFile(None)
        >>> records.add([{"key": "a", "loss": float("nan")}])
        >>> records["a"]["loss"] is None
        True
        """
        new = [_finite(record) for record in records if record["key"] not in self._records]
        if self.path is not None and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in new))
        self._records.update((record["key"], record) for record in new)

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records.setdefault(record["key"], record)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}, is not a record: {line[:60]!r}.",
                    why="records that are damaged must not turn into figures, nor be written over.",
                    mend="move the file away; the study will be run again.",
                ) from error
        if rest:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")


def select(records: Iterable[dict[str, Any]], **setting: Any) -> list[dict[str, Any]]:
    """Return the records whose setting has the given values, in the order of their seeds.

    Parameters
    ----------
    records : iterable of dict
        Of one study.
    **setting
        Names and values.

    Returns
    -------
    list of dict
        Sorted by seed where there is one.

    Examples
    --------
    >>> from batchnorm_lab.studies.records import select
    >>> select([{"setting": {"arm": "a", "seed": 1}}, {"setting": {"arm": "b", "seed": 0}}], arm="b")
    [{'setting': {'arm': 'b', 'seed': 0}}]
    """
    found = [r for r in records if all(r["setting"].get(name) == value for name, value in setting.items())]
    return sorted(found, key=lambda record: record["setting"].get("seed", 0))


def values(
    records: Iterable[dict[str, Any]], result: str | Callable[[dict[str, Any]], Any], **setting: Any
) -> list[Any]:
    """Return one result of each selected record, in the order of their seeds.

    Parameters
    ----------
    records : iterable of dict
        Of one study.
    result : str or callable
        The name of the result, or a function of the dict of results.
    **setting
        As for `select`.

    Returns
    -------
    list
        One a record.

    Examples
    --------
    >>> from batchnorm_lab.studies.records import values
    >>> values([{"setting": {"seed": 0}, "result": {"accuracy": 0.9}}], "accuracy")
    [0.9]
    """
    chosen = [record["result"] for record in select(records, **setting)]
    return [result(r) if callable(result) else r[result] for r in chosen]


def best(
    records: Iterable[dict[str, Any]],
    axis: str = "rate",
    score: str | Callable[[dict[str, Any]], float] = "validation",
    **setting: Any,
) -> Any:
    """Return the value of one axis of the settings whose runs score highest, averaged over their seeds.

    Parameters
    ----------
    records : iterable of dict
        Of one study.
    axis : str, default "rate"
        The name in the settings.
    score : str or callable, default "validation"
        The name of a result, or a function of the dict of results. Of validation images: what is chosen on the
        images that are reported on is too good.
    **setting
        As for `select`.

    Returns
    -------
    object
        One of the values in the records, the first of equals.

    Examples
    --------
    >>> from batchnorm_lab.studies.records import best
    >>> run = lambda rate, found: {"setting": {"rate": rate, "seed": 0}, "result": {"validation": found}}
    >>> best([run(0.1, 0.8), run(0.3, 0.9)])
    0.3
    """
    chosen = select(records, **setting)
    return max(
        sorted({record["setting"][axis] for record in chosen}),
        key=lambda value: math.fsum(values(chosen, score, **{axis: value})),
    )


def at_edges(records: Iterable[dict[str, Any]], chosen: Iterable[float], axis: str = "rate") -> str:
    """Say how many of some choices lie at an edge of the grid, where a better one may lie beyond.

    Parameters
    ----------
    records : iterable of dict
        Of one study.
    chosen : iterable of float
        Values of the axis.
    axis : str, default "rate"
        The name in the settings.

    Returns
    -------
    str
        A sentence.

    Examples
    --------
    >>> from batchnorm_lab.studies.records import at_edges
    >>> records = [{"setting": {"rate": rate}} for rate in (0.1, 0.3, 1.0)]
    >>> at_edges(records, [0.3, 1.0])
    'Rates were chosen on validation images; 1 of 2 lie at an edge of the grid.'
    """
    grid = {record["setting"][axis] for record in records}
    found = list(chosen)
    edges = sum(value in (min(grid), max(grid)) for value in found)
    where = f"{edges} of {len(found)} lie at an edge of the grid."
    return f"{axis.capitalize()}s were chosen on validation images; {where}"


def _finite(value: Any) -> Any:
    """Return the value with numbers that JSON has no word for replaced by None."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
