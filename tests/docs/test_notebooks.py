"""The notebooks are made of the pages as they are now, and every cell of them runs."""

from __future__ import annotations

import importlib.util
import json

import pytest
from pages import DOCS

spec = importlib.util.spec_from_file_location("make_notebooks", DOCS / "make_notebooks.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def read(name):
    return json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_there_are_five_and_no_other():
    assert len(made.NOTEBOOKS) == 5
    assert {path.stem for path in (DOCS / "notebooks").glob("*.ipynb")} == set(made.NOTEBOOKS)


@pytest.mark.parametrize("name", made.NOTEBOOKS)
def test_a_notebook_is_that_of_the_pages(name):
    there = (DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert there == made.notebook(made.NOTEBOOKS[name]), "run: python docs/make_notebooks.py"
    assert sum(cell["cell_type"] == "code" for cell in read(name)["cells"]) >= 1


@pytest.mark.parametrize("name", made.NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in made.re.findall(r"(?<=\w)\]\(([^)\s]+)\)", "".join(cell["source"])):
                if not target.startswith(("http", "#")):
                    assert (DOCS / "notebooks" / target.partition("#")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", made.NOTEBOOKS)
def test_every_cell_of_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for number, cell in enumerate(read(name)["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), space)
