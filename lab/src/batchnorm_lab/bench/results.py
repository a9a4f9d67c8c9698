"""Rows of a benchmark with where they come from, and the CSV that keeps them."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError
from batchnorm_lab.bench.measure import Outcome


@dataclass(frozen=True)
class Provenance:
    """Where and with what a row was measured."""

    cpu: str
    isa: str
    engine: str
    threads: int
    batchnorm: str
    torch: str
    jax: str
    python: str
    commit: str
    timestamp: str


@dataclass(frozen=True)
class Row:
    """Times of one contender in one direction of one case.

    Times are milliseconds a call; ``ratio_*`` are quantiles of the contender's time over ours, round by
    round. ``left_out`` says why there is no time.
    """

    set: str
    shape: str
    layout: str
    dtype: str
    form: str
    mode: str
    direction: str
    contender: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    left_out: str
    cpu: str
    isa: str
    engine: str
    threads: int
    batchnorm: str
    torch: str
    jax: str
    python: str
    commit: str
    timestamp: str

    @property
    def case_key(self) -> tuple[str, ...]:
        """What was timed, without who."""
        return (self.shape, self.layout, self.dtype, self.form, self.mode, str(self.threads))


def installed(package: str) -> str:
    """Give the version of a package.

    Parameters
    ----------
    package : str
        Its name.

    Returns
    -------
    str
        ``""`` where it is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """Name the processor.

    Returns
    -------
    str
        The model and the number of cores this process may use.
    """
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return name


def commit() -> str:
    """Name the commit this package's sources stand at.

    Returns
    -------
    str
        Short hash, with ``+`` where sources differ from it; ``""`` outside a repository.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    short = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":/src", ":/csrc", ":/lab/src")
    return short + "+" if short and changed else short


def provenance(threads: int) -> Provenance:
    """Gather where and with what this process measures.

    Parameters
    ----------
    threads : int
        The thread budget.

    Returns
    -------
    Provenance
        Of every row of this run.
    """
    import torch

    from batchnorm.kernels import cpu
    from batchnorm.kernels.select import select

    engine = select(torch.empty(2, 2))
    return Provenance(
        cpu=processor(),
        isa=str(cpu.info().get("isa", "")),
        engine=engine.name,
        threads=threads,
        batchnorm=installed("batchnorm"),
        torch=torch.__version__,
        jax=installed("jax"),
        python=platform.python_version(),
        commit=commit(),
        timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def rows(outcome: Outcome, source: Provenance) -> list[Row]:
    """Turn the samples of one case into rows.

    Parameters
    ----------
    outcome : Outcome
        Of ``measure.time_case``.
    source : Provenance
        Of this run.

    Returns
    -------
    list of Row
        One a contender and direction, and one for each contender left out.
    """
    case = outcome.case
    common = {
        "set": case.set,
        "shape": "x".join(map(str, case.shape)),
        "layout": case.layout,
        "dtype": case.dtype,
        "form": case.form,
        "mode": case.mode,
        **asdict(source),
    }
    ours = {s.direction: s.times for s in outcome.samples if s.contender == "ours"}
    found: list[Row] = []
    for sample in outcome.samples:
        low, middle, high = np.percentile(sample.times, (20, 50, 80))
        ratio = [float("nan")] * 3
        if sample.direction in ours:
            ratio = list(np.percentile(sample.times / ours[sample.direction], (20, 50, 80)))
        found.append(
            Row(
                **common,
                direction=sample.direction,
                contender=sample.contender,
                rounds=len(sample.times),
                p20_ms=rounded(low),
                p50_ms=rounded(middle),
                p80_ms=rounded(high),
                ratio_p20=rounded(ratio[0]),
                ratio_p50=rounded(ratio[1]),
                ratio_p80=rounded(ratio[2]),
                left_out="",
            )
        )
    nothing = float("nan")
    for name, reason in outcome.left_out.items():
        found.append(
            Row(
                **common,
                direction="",
                contender=name,
                rounds=0,
                p20_ms=nothing,
                p50_ms=nothing,
                p80_ms=nothing,
                ratio_p20=nothing,
                ratio_p50=nothing,
                ratio_p80=nothing,
                left_out=reason,
            )
        )
    return found


def rounded(value: float) -> float:
    """Four digits: more is noise."""
    return float(f"{value:.4g}")


def append(path: Path, new: Iterable[Row]) -> None:
    """Add rows to a CSV, which is made if it is missing.

    Parameters
    ----------
    path : Path
        The file.
    new : iterable of Row
        To be added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(row) for row in new)


def read(path: Path) -> list[Row]:
    """Read rows back.

    Parameters
    ----------
    path : Path
        A CSV written by ``append``.

    Returns
    -------
    list of Row
        Every row, in order; a case measured twice is there twice.

    Raises
    ------
    DataError
        There is no such file, or it has other columns.
    """
    if not path.exists():
        raise DataError(f"bench: there are no rows: no file {path}.", mend="time something into it first.")
    numbers: dict[str, Any] = {"rounds": int, "threads": int}
    numbers |= {f.name: float for f in fields(Row) if f.type == "float"}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != {f.name for f in fields(Row)}:
            raise DataError(
                f"bench: {path} is not a file of benchmark rows, or one of another version.",
                mend="measure into a new file.",
            )
        return [Row(**{k: numbers.get(k, str)(v) for k, v in line.items()}) for line in reader]


def latest(found: Iterable[Row]) -> list[Row]:
    """Keep the last measurement of every case.

    Parameters
    ----------
    found : iterable of Row
        In the order they were measured.

    Returns
    -------
    list of Row
        Rows of one run a case.
    """
    listed = list(found)
    last = {row.case_key: row.timestamp for row in listed}
    return [row for row in listed if last[row.case_key] == row.timestamp]
