"""Write a report again from a folder of records: ``python -m batchnorm_lab.studies FOLDER FILE.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from batchnorm.errors import DataError
from batchnorm_lab.studies import page
from batchnorm_lab.studies.contract import Outcome
from batchnorm_lab.studies.registry import STUDIES, get_study
from batchnorm_lab.studies.runner import outcome_of_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report from a folder of records, without running anything.

    A study whose records are not complete, or are of an earlier revision of the experiment, is left out; the
    report says so.

    Parameters
    ----------
    arguments : sequence of str or None, default None
        The folder and the file (``.md`` or ``.html``); None is ``sys.argv``.

    Returns
    -------
    int
        0, 1 if no study is complete, or 2 if the arguments are not these two.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2 or not given[1].endswith((".md", ".html")):
        print("usage: python -m batchnorm_lab.studies FOLDER FILE.md|FILE.html", file=sys.stderr)
        return 2
    folder, path = Path(given[0]), Path(given[1])
    outcomes: list[Outcome] = []
    missing = []
    for name in STUDIES:
        try:
            outcomes.append(outcome_of_folder(get_study(name), folder))
        except DataError as error:
            print(error, file=sys.stderr)
            missing.append(name)
    if not outcomes:
        return 1
    (page.write_html if path.suffix == ".html" else page.write_markdown)(outcomes, path, missing)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
