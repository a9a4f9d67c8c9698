"""Rows of a benchmark with where they come from, and the CSV that keeps them."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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


_FIGURES = ("p20_ms", "p50_ms", "p80_ms", "ratio_p20", "ratio_p50", "ratio_p80")
COLUMNS = (
    *("set", "shape", "layout", "dtype", "form", "mode", "direction", "contender", "rounds"),
    *_FIGURES,
    "left_out",
    *(field.name for field in fields(Provenance)),
)
"""Of a table of results, a row for each contender in each direction of each case.

Times are milliseconds a call; ``ratio_*`` are quantiles of the contender's time over ours, round by round.
``left_out`` says why there is no time.
"""

CASE = ["shape", "layout", "dtype", "form", "mode", "threads"]
"""What was timed, without who."""


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


def rows(outcome: Outcome, source: Provenance) -> pd.DataFrame:
    """Turn the samples of one case into rows.

    Parameters
    ----------
    outcome : Outcome
        Of ``measure.time_case``.
    source : Provenance
        Of this run.

    Returns
    -------
    DataFrame
        `COLUMNS`; a row a contender and direction, and one for each contender left out.
    """
    case = outcome.case
    ours = {s.direction: s.times for s in outcome.samples if s.contender == "ours"}
    found: list[dict[str, Any]] = []
    for sample in outcome.samples:
        ratios = sample.times / ours[sample.direction] if sample.direction in ours else [nan]
        quantiles = [*np.percentile(sample.times, (20, 50, 80)), *np.percentile(ratios, (20, 50, 80))]
        # four digits: more is noise
        figures = {name: float(f"{value:.4g}") for name, value in zip(_FIGURES, quantiles, strict=True)}
        who = {"direction": sample.direction, "contender": sample.contender, "rounds": len(sample.times)}
        found.append({**who, **figures, "left_out": ""})
    for name, reason in outcome.left_out.items():
        found.append({"direction": "", "contender": name, "rounds": 0, "left_out": reason})
    about = {name: getattr(case, name) for name in ("set", "layout", "dtype", "form", "mode")}
    shape = "x".join(map(str, case.shape))
    return pd.DataFrame(found, columns=list(COLUMNS)).assign(**about, shape=shape, **asdict(source))


def append(path: Path, new: pd.DataFrame) -> None:
    """Add rows to a CSV, which is made if it is missing.

    Parameters
    ----------
    path : Path
        The file.
    new : DataFrame
        To be added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    new.to_csv(path, mode="a", header=fresh, index=False)


def read(path: Path) -> pd.DataFrame:
    """Read rows back.

    Parameters
    ----------
    path : Path
        A CSV written by ``append``.

    Returns
    -------
    DataFrame
        Every row, in order; a case measured twice is there twice.

    Raises
    ------
    DataError
        There is no such file, or it has other columns.
    """
    if not path.exists():
        raise DataError(f"bench: there are no rows: no file {path}.", mend="time something into it first.")
    kinds = {
        name: float if name in _FIGURES else int if name in ("rounds", "threads") else str for name in COLUMNS
    }
    missing = {name: ["", "nan"] for name in _FIGURES}
    found = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=missing)
    if set(found.columns) != set(COLUMNS):
        raise DataError(
            f"bench: {path} is not a file of benchmark rows, or one of another version.",
            mend="measure into a new file.",
        )
    return found


def latest(found: pd.DataFrame) -> pd.DataFrame:
    """Keep the last measurement of every case.

    Parameters
    ----------
    found : DataFrame
        In the order they were measured.

    Returns
    -------
    DataFrame
        Rows of one run a case.
    """
    return found[found["timestamp"] == found.groupby(CASE)["timestamp"].transform("last")]
