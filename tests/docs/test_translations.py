"""A page and its translation: the same code, the same sections, and a link to each other."""

from __future__ import annotations

import ast
import re

import pytest
from pages import DOCS, ROOT, blocks, name_of, python_of

PAIRS = [(ROOT / "README.md", ROOT / "README.ko.md")]
PAIRS += [(DOCS / page.name, page) for page in sorted((DOCS / "ko").glob("*.md")) if page.name != "index.md"]
SAME_SECTIONS = [pair for pair in PAIRS if pair[0].name != "README.md"]  # the README's Korean is shorter


def sections(page):
    return re.findall(r"^(##+) ", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_what_a_learner_reads_is_there_in_korean():
    assert {english.name for english, _ in PAIRS} >= {"README.md", "tutorial.md", "mission.md", "faq.md"}


@pytest.mark.parametrize(("english", "korean"), PAIRS, ids=lambda page: name_of(page))
def test_both_have_the_same_code(english, korean):
    # comments are translated; what is run is not
    one, other = (
        [ast.dump(ast.parse(block.code)) for block in python_of(page)] for page in (english, korean)
    )
    assert one == other
    kinds = [[block.language for block in blocks(page)] for page in (english, korean)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(("english", "korean"), SAME_SECTIONS, ids=lambda page: name_of(page))
def test_both_have_the_same_sections_and_numbers(english, korean):
    assert sections(english) == sections(korean)
    statements = [re.findall(r"\bM\d+\b", page.read_text(encoding="utf-8")) for page in (english, korean)]
    assert sorted(set(statements[0])) == sorted(set(statements[1]))


@pytest.mark.parametrize(("english", "korean"), PAIRS, ids=lambda page: name_of(page))
def test_each_links_to_the_other(english, korean):
    assert re.search(rf"\((ko/)?{re.escape(korean.name)}\)", english.read_text(encoding="utf-8"))
    assert re.search(rf"\((\.\./)?{re.escape(english.name)}\)", korean.read_text(encoding="utf-8"))


@pytest.mark.parametrize("korean", [korean for _, korean in PAIRS], ids=name_of)
def test_a_translation_is_in_korean(korean):
    prose = re.sub(r"```.*?```|`[^`]*`|\([^)]*\)", "", korean.read_text(encoding="utf-8"), flags=re.DOTALL)
    hangul, latin = len(re.findall("[가-힣]", prose)), len(re.findall("[A-Za-z]", prose))
    assert hangul > latin
