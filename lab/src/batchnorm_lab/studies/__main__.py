"""Write a report again from a folder of records: ``python -m batchnorm_lab.studies FOLDER FILE.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from batchnorm_lab.studies import page
from batchnorm_lab.studies.registry import STUDIES, get_study
from batchnorm_lab.studies.runner import outcome_of_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report from a folder of records, without running anything.

    Parameters
    ----------
    arguments : sequence of str or None, default None
        The folder and the file (``.md`` or ``.html``); None is ``sys.argv``.

    Returns
    -------
    int
        0, or 2 if the arguments are not these two.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2 or not given[1].endswith((".md", ".html")):
        print("usage: python -m batchnorm_lab.studies FOLDER FILE.md|FILE.html", file=sys.stderr)
        return 2
    folder, path = Path(given[0]), Path(given[1])
    outcomes = [
        outcome_of_folder(get_study(name), folder) for name in STUDIES if (folder / f"{name}.jsonl").exists()
    ]
    (page.write_html if path.suffix == ".html" else page.write_markdown)(outcomes, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
