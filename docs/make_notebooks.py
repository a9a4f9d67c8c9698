"""Make the notebooks of docs/notebooks/ from the pages: ``python docs/make_notebooks.py``.

Text and code are those of the pages, so that nothing is written twice; a test compares them and runs every cell.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

DOCS = Path(__file__).parent
NOTEBOOKS: dict[str, list[tuple[str, list[str]]]] = {
    # name: pages, and of each the sections that are taken (all where none is named)
    "1-from-the-note": [("tutorial.md", [])],
    "2-fine-tuning": [("how-to/fine-tuning.md", [])],
    "3-small-batches": [("how-to/small-batches.md", []), ("how-to/gradient-accumulation.md", [])],
    "4-deployment": [("how-to/deployment.md", [])],
    "5-sickness-and-cure": [
        ("how-to/stale-statistics.md", []),
        ("why.md", ["Statistics", "Freezing", "Errors"]),
    ],
}
START = """*Made from [{page}](../{page}) by `docs/make_notebooks.py`. It needs torch and this package:
`pip install .` in a clone of the repository.*"""


def parts(text: str) -> list[tuple[str, str]]:
    """Cut a page into text and Python, in order."""
    found = []
    for number, part in enumerate(
        re.split(r"^```python\n(.*?)^```\n?", text, flags=re.MULTILINE | re.DOTALL)
    ):
        if part.strip():
            found.append(("code" if number % 2 else "markdown", part.strip("\n")))
    return found


def chosen(text: str, sections: list[str]) -> str:
    """Take the beginning of a page and some of its sections."""
    if not sections:
        return text
    beginning, *rest = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return beginning + "".join(part for part in rest if part.splitlines()[0][3:] in sections)


def rebased(text: str, page: str) -> str:
    """Let links of a page lead to the same places from the notebooks' folder."""
    home = posixpath.dirname(page)

    def moved(found: re.Match[str]) -> str:
        target = found.group(1)
        if target.startswith(("http", "#")):
            return found.group(0)
        return f"]({posixpath.relpath(posixpath.join(home, target), 'notebooks')})"

    return re.sub(r"(?<=\w)\]\(([^)\s]+)\)", moved, text)


def notebook(pages: list[tuple[str, list[str]]]) -> str:
    """Make a notebook of some pages.

    Parameters
    ----------
    pages : list of (str, list of str)
        A page, and its sections that are taken; all where none is named.

    Returns
    -------
    str
        The file, in version 4.5 of the format.
    """
    cells = []
    for page, sections in pages:
        text = chosen((DOCS / page).read_text(encoding="utf-8"), sections)
        moved = [(kind, part if kind == "code" else rebased(part, page)) for kind, part in parts(text)]
        for kind, source in [("markdown", START.format(page=page)), *moved]:
            cell = {
                "cell_type": kind,
                "id": f"cell-{len(cells)}",
                "metadata": {},
                "source": source.splitlines(True),
            }
            cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    """Write every notebook."""
    for name, pages in NOTEBOOKS.items():
        (DOCS / "notebooks" / f"{name}.ipynb").write_text(notebook(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
