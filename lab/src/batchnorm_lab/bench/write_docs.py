"""Writes the tables of docs/benchmarks.md from one or several CSVs; what stands above the mark is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from batchnorm_lab.bench.markdown import document
from batchnorm_lab.bench.results import read

MARK = "<!-- Below: written by batchnorm_lab.bench.write_docs from the CSVs of lab/results/. -->"
PAGE = Path(__file__).resolve().parents[4] / "docs" / "benchmarks.md"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="a later file replaces cases of an earlier one")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    found = pd.concat([read(path) for path in options.csv], ignore_index=True)
    kept = options.page.read_text(encoding="utf-8").split(MARK)[0] if options.page.exists() else ""
    options.page.write_text(f"{kept.rstrip()}\n\n{MARK}\n\n{document(found)}", encoding="utf-8")
    print(f"{len(found)} rows to {options.page}")


if __name__ == "__main__":
    main()
