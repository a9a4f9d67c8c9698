"""The studies by name. Their modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from batchnorm.errors import ArgumentError
from batchnorm_lab.studies.contract import Study

__all__ = ["STUDIES", "choose", "get_study"]

STUDIES: tuple[str, ...] = (
    "faster-learning",
    "input-distribution",
    "noisy-batch-norm",
    "hyperparameter-robustness",
    "deep-networks",
    "where-to-normalize",
    "gamma-and-beta",
    "bias-is-redundant",
    "identity-recovery",
    "test-time-statistics",
    "small-batches",
    "shifted-inputs",
    "convention-traps",
)


def get_study(name: str) -> Study:
    """Return the study of a name.

    Parameters
    ----------
    name : str
        One of `STUDIES`.

    Returns
    -------
    Study
        Ready to run.

    Raises
    ------
    ArgumentError
        No study has this name.

    Examples
    --------
    >>> from batchnorm_lab.studies import get_study
    >>> get_study("faster-learning").claims
    ('M12',)
    """
    if name not in STUDIES:
        raise ArgumentError(
            f"no study is called {name!r}.",
            why=f"there are: {', '.join(STUDIES)}.",
            mend='take one of these names, or "all".',
        )
    study: Study = importlib.import_module(f"batchnorm_lab.studies.{name.replace('-', '_')}").STUDY
    return study


def choose(names: Iterable[str]) -> list[Study]:
    """Return the studies of some names, each once, in the order of `STUDIES`.

    Parameters
    ----------
    names : iterable of str
        Names of `STUDIES`; "all" stands for every one.

    Returns
    -------
    list of Study
        At least one.

    Raises
    ------
    ArgumentError
        An unknown name, or no name.

    Examples
    --------
    >>> from batchnorm_lab.studies.registry import choose
    >>> [study.name for study in choose(["small-batches", "faster-learning"])]
    ['faster-learning', 'small-batches']
    """
    wanted = list(names)
    if not wanted:
        raise ArgumentError(
            "no study was named.", why=f"there are: {', '.join(STUDIES)}.", mend='name one, or "all".'
        )
    studies = {name: get_study(name) for name in (STUDIES if "all" in wanted else wanted)}
    return [studies[name] for name in STUDIES if name in studies]
