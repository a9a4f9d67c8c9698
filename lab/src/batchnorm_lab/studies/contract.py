"""What a study is: settings in, records out, and a figure and an answer made from records alone.

A module of this package defines ``STUDY``. Its three functions share nothing but data:

- ``units(config)`` lists the work. A unit is a list of settings that are trained together as one
  batch of networks. A setting holds everything that decides a run: arm, seed, steps, rates ...
- ``measure(unit, data, advance)`` gives one result for each setting of the unit. It sees no
  configuration, so that a result can depend on nothing that its setting does not say.
- ``plot(records)`` and ``answer(records)`` see records only, so that a figure can be made again
  from a file, on another machine.

Settings and results are what JSON can hold.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import batchnorm
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.intervals import SEEDS_NEEDED, VERDICTS, Interval, verdict
from batchnorm_lab.studies.records import RecordFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Advance", "Answer", "Finding", "Record", "Result", "Setting", "Study", "Unit"]

Setting = dict[str, Any]
Result = dict[str, Any]
Record = dict[str, Any]
Advance = Callable[[float], None]

LEVELS = ("quick", "default", "full")


@dataclass(frozen=True)
class Unit:
    """Settings that are measured together, and what they cost compared with other units.

    Attributes
    ----------
    settings : list of dict
        One a run.
    cost : float
        Relative time, for the estimate of the time left.
    """

    settings: list[Setting]
    cost: float = 1.0


@dataclass(frozen=True)
class Finding:
    """One statement that a study tests, what was measured for it, and what follows.

    Attributes
    ----------
    claim : str
        The number of the claim, such as "M12", or "" for what only informs.
    statement : str
        What is claimed.
    interval : Interval
        What was measured.
    text : str
        What was measured, in words with its numbers.
    above, below : float or None
        What is claimed of the true value; neither for a figure that is not a claim.
    margin : float or None
        What is as good as the threshold, in the unit of the interval.
    verdict : str
        One of `intervals.VERDICTS`, by `make_answer`; "" for a figure that is not a claim.
    """

    claim: str
    statement: str
    interval: Interval
    text: str
    above: float | None = None
    below: float | None = None
    margin: float | None = None
    verdict: str = ""

    @property
    def claims(self) -> bool:
        """Whether there is a verdict to give."""
        return self.above is not None or self.below is not None


@dataclass(frozen=True)
class Answer:
    """The answer of a study, computed from its records.

    Attributes
    ----------
    sentence : str
        For people: figures and intervals in words.
    findings : tuple of Finding
        The parts of it.
    seeds : int
        How many seeds the smallest interval is over.
    """

    sentence: str
    findings: tuple[Finding, ...]
    seeds: int

    def __str__(self) -> str:
        return self.sentence


def make_answer(findings: Sequence[Finding], remarks: Sequence[str] = ()) -> Answer:
    """Judge findings together, and put them to an answer that says how sure it is.

    Each verdict is taken from the interval that holds together with those of all other findings of the study
    (:meth:`Interval.together`), so that the more is asked, the more each answer needs.

    Parameters
    ----------
    findings : sequence of Finding
        At least one.
    remarks : sequence of str
        Sentences that belong to the answer and test no claim.

    Returns
    -------
    Answer
        Its sentence lists every finding with its verdict, and says so if seeds are too few.

    Examples
    --------
    >>> from batchnorm_lab.studies.contract import Finding, make_answer
    >>> from batchnorm_lab.studies.intervals import mean_interval
    >>> gain = mean_interval([1.0, 1.1, 0.9, 1.0, 1.2])
    >>> print(make_answer([Finding("M12", "Learning is faster", gain, "gain 1.0", above=0.0)]))
    M12: borne out in 1 of 1. Learning is faster: borne out, gain 1.0. (95 % intervals over 5 seeds.)
    """
    judged = sum(finding.claims for finding in findings)
    findings = [_judge(finding, judged) for finding in findings]
    seeds = min(finding.interval.seeds for finding in findings)
    sentences = [_tally(findings)]
    for finding in findings:
        outcome = f"{finding.verdict}, " if finding.verdict else ""
        sentences.append(f"{finding.statement}: {outcome}{finding.text}.")
    sentences += remarks
    if seeds < SEEDS_NEEDED:
        plural = "s" if seeds != 1 else ""
        sentences.append(
            f"(Only {seeds} seed{plural}: a first look, not an answer; the default setting uses at least "
            f"{SEEDS_NEEDED}.)"
        )
    else:
        together = f" The {judged} verdicts hold together with 95 % (Bonferroni)." if judged > 1 else ""
        sentences.append(f"(95 % intervals over {seeds} seeds.{together})")
    return Answer(" ".join(sentence for sentence in sentences if sentence), tuple(findings), seeds)


def _judge(finding: Finding, together: int) -> Finding:
    """Return a finding with its verdict, taken so that all of them hold."""
    if not finding.claims:
        return finding
    wide = finding.interval.together(together)
    said = verdict(wide, above=finding.above, below=finding.below, margin=finding.margin)
    return replace(finding, verdict=said)


def _tally(findings: Sequence[Finding]) -> str:
    """Return for each claim in how many of its statements it was borne out, not borne out, undecided."""
    parts = []
    for claim in sorted({f.claim for f in findings if f.claim and f.verdict}, key=lambda name: int(name[1:])):
        verdicts = [f.verdict for f in findings if f.claim == claim and f.verdict]
        counts = [f"{name} in {verdicts.count(name)}" for name in VERDICTS if name in verdicts]
        parts.append(f"{claim}: {', '.join(counts)} of {len(verdicts)}.")
    return " ".join(parts)


@dataclass(frozen=True)
class Study:
    """A question about batch normalization, and how it is answered.

    Attributes
    ----------
    name : str
        As on the command line.
    title, question, claim, formula : str
        For people. ``formula`` is in matplotlib's mathtext.
    claims : tuple of str
        Numbers of the statements that are tested, such as "M12".
    configs : mapping of str to dataclass
        Settings of "quick" (seconds), "default" (minutes) and "full".
    units, measure, plot, answer : callable
        See the module's docstring.
    revision : int
        Raised when the experiment changes, so that older records are not taken for the same.
    """

    name: str
    title: str
    question: str
    claim: str
    formula: str
    claims: tuple[str, ...]
    configs: Mapping[str, Any]
    units: Callable[[Any], list[Unit]]
    measure: Callable[[list[Setting], ImageData, Advance], list[Result]]
    plot: Callable[[list[Record]], Figure]
    answer: Callable[[list[Record]], Answer]
    revision: int = field(default=1)

    def config(self, level: str = "default") -> Any:
        """Return the configuration of a level.

        Parameters
        ----------
        level : {"quick", "default", "full"}, default "default"
            How long it may take.

        Returns
        -------
        dataclass
            Change it with `dataclasses.replace`.

        Raises
        ------
        ArgumentError
            Another level.

        Examples
        --------
        >>> from batchnorm_lab.studies import get_study
        >>> get_study("faster-learning").config("quick").seeds < 5
        True
        """
        if level not in self.configs:
            raise ArgumentError(
                f"study {self.name}: no level is called {level!r}.",
                why=f"there are {', '.join(self.configs)}.",
                mend="take one of these.",
            )
        return self.configs[level]

    def run(
        self,
        config: Any = None,
        *,
        data: ImageData,
        path: str | Path | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[Record]:
        """Measure what is not yet measured, and return the records of this configuration.

        Parameters
        ----------
        config : dataclass or None, default None
            From `config`; None is the default level.
        data : ImageData
            What to learn from; pixels in [0, 1].
        path : path or None, default None
            A file of JSON lines. Runs found in it are not run again; new ones are added to it as
            they end. None keeps them in memory.
        progress : callable or None, default None
            Called with the share of the work that is done, from 0 to 1.

        Returns
        -------
        list of dict
            One a run, in the order of the configuration: settings, result, versions, wall time.

        Raises
        ------
        BatchNormError
            ``measure`` gave another number of results than there are settings.
        DataError
            ``path`` holds something that is not a record.

        Examples
        --------
        >>> from batchnorm_lab.data import load
        >>> from batchnorm_lab.studies import get_study
        >>> study = get_study("identity-recovery")
        >>> records = study.run(study.config("quick"), data=load("digits"))  # doctest: +SKIP
        """
        config = self.config() if config is None else config
        report = progress or (lambda share: None)
        about = {"name": data.name, "sample": fingerprint(data)}
        stored = RecordFile(path)
        work = self.units(config)
        total = sum(unit.cost for unit in work) or 1.0
        done = 0.0
        wanted: list[str] = []
        for unit in work:
            keys = [self.key(setting, about) for setting in unit.settings]
            wanted += keys
            if any(key not in stored for key in keys):
                start = time.perf_counter()
                results = self.measure(unit.settings, data, _part_of(report, done / total, unit.cost / total))
                if len(results) != len(unit.settings):
                    raise BatchNormError(
                        f"study {self.name}: {len(results)} results for {len(unit.settings)} settings.",
                        why="each run must have its own record.",
                        mend="this is a fault of the study; please report it.",
                    )
                seconds = time.perf_counter() - start
                stored.add(
                    {
                        "key": key,
                        "study": self.name,
                        "revision": self.revision,
                        "setting": setting,
                        "result": result,
                        "data": about,
                        "versions": versions(),
                        "wall_seconds": round(seconds, 3),
                        "runs_together": len(results),
                    }
                    for key, setting, result in zip(keys, unit.settings, results, strict=True)
                )
            done += unit.cost
            report(done / total)
        return [stored[key] for key in wanted]

    def key(self, setting: Setting, about: Mapping[str, Any]) -> str:
        """Return the key of a run: a hash of all that decides its result.

        Parameters
        ----------
        setting : dict
            Of the run.
        about : mapping
            Name and fingerprint of the data.

        Returns
        -------
        str
            16 hexadecimal digits.

        Examples
        --------
        >>> from batchnorm_lab.studies import get_study
        >>> len(get_study("faster-learning").key({"seed": 0}, {"name": "digits"}))
        16
        """
        text = json.dumps([self.name, self.revision, setting, dict(about)], sort_keys=True)
        return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


def _part_of(report: Advance, before: float, share: float) -> Advance:
    """Return what reports the progress of a part as progress of the whole."""
    return lambda done: report(before + share * done)


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on.

    Returns
    -------
    dict of str to str
        Of this package, torch and Python, and the commit of the sources (``+`` where they differ from it;
        empty outside a repository).

    Examples
    --------
    >>> from batchnorm_lab.studies.contract import versions
    >>> sorted(versions())
    ['batchnorm', 'commit', 'python', 'torch']
    """
    return {
        "batchnorm": batchnorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/src", ":/csrc", ":/lab/src")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def fingerprint(data: ImageData) -> str:
    """Return a short hash of images and labels, which names a sample of data.

    Parameters
    ----------
    data : ImageData
        Any.

    Returns
    -------
    str
        The numbers of training and test images and 8 hexadecimal digits.

    Examples
    --------
    >>> from batchnorm_lab.data import load
    >>> from batchnorm_lab.studies.contract import fingerprint
    >>> fingerprint(load("digits")).startswith("1197+600:")
    True
    """
    digest = hashlib.blake2s(digest_size=4)
    for part in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.contiguous().numpy().tobytes())
    return f"{len(data.train_labels)}+{len(data.test_labels)}:{digest.hexdigest()}"


@dataclass(frozen=True)
class Outcome:
    """What came out of one study.

    Attributes
    ----------
    study : Study
        Which.
    level : str
        "quick", "default" or "full".
    records : list of dict
        One a run.
    answer : Answer
        Computed from the records.
    records_path, svg, png : path
        Where they are.
    """

    study: Study
    level: str
    records: list[Record]
    answer: Answer
    records_path: Path
    svg: Path
    png: Path
