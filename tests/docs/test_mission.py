"""The mission's statements lead to the code, the test and the study that they name."""

from __future__ import annotations

import ast
import re

import pytest
from pages import DOCS, name_of

from batchnorm_lab.mission import STATEMENTS as SENTENCES
from batchnorm_lab.studies.registry import STUDIES, get_study

PAGES = [DOCS / "mission.md", DOCS / "ko/mission.md"]
STATEMENTS = [f"M{number}" for number in range(1, 15)]


def statement(page, name):
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^\*\*{name}\*\* .*?(?=^\*\*M|^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return found.group(0)


def links(page, name):
    # those of the list; what was measured may link to more
    return re.findall(r"^- .*?\]\(([^)]+)\)(?:: `(\w+)`)?", statement(page, name), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_leads_to_code_and_to_a_test_that_is_there(page, name):
    code, test = links(page, name)[:2]
    assert (page.parent / code[0]).is_file()
    tree = ast.parse((page.parent / test[0]).read_text(encoding="utf-8"))
    assert test[1] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_leads_to_a_study_of_it(page, name):
    studies = [target.split("#")[1] for target, _ in links(page, name) if "studies.md#" in target]
    assert set(studies) <= set(STUDIES)
    assert any(name in get_study(study).claims for study in studies), "the study says it is about it"
    for study in studies:
        assert f"\n## {study}\n" in (DOCS / "studies.md").read_text(encoding="utf-8")


def test_every_number_that_a_page_cites_is_a_statement():
    cited = [
        (f"M{number}", name_of(page))
        for page in DOCS.rglob("*.md")
        for number in re.findall(r"\bM(\d+)\b", page.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 50
    for number, page in cited:
        assert number in STATEMENTS, page


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_a_page_that_cites_a_number_says_where_it_is_explained(page):
    text = page.read_text(encoding="utf-8")
    if page.name not in ("mission.md", "changelog.md") and re.search(r"\bM\d+\b", text):
        assert "mission.md" in text or "What the numbers mean" in text


def test_the_reports_explain_every_statement():
    assert list(SENTENCES) == STATEMENTS
    assert "**M12** Learning gets faster." in (DOCS / "studies.md").read_text(encoding="utf-8")
