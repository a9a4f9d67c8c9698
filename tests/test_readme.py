"""What the README and the documentation say works when it is typed in."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from pages import DOCS, PAGES, ROOT, links, name_of

from batchnorm.cli import app


def test_the_example_of_the_readme_has_fifteen_lines():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 1
    assert len([line for line in examples[0].splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for target in links(page):
        if not target.startswith(("http", "#")):
            path = unquote(target.partition("#")[0])
            assert (page.parent / path).exists(), target


def test_every_page_of_the_documentation_is_in_the_navigation():
    listed = {(DOCS / "index.md").resolve()}
    for page in DOCS.rglob("index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page.resolve() for page in PAGES if DOCS in page.parents} == listed


def test_every_command_that_is_named_is_there():
    there = {command.name or command.callback.__name__ for command in app.build().registered_commands}
    named = [
        (page.name, command)
        for page in PAGES
        for command in re.findall(r"(?:^|`)batchnorm ([a-z]+)", page.read_text(), re.MULTILINE)
    ]
    assert {command for _, command in named} >= {"demo", "bench", "study", "info", "fold", "insert"}
    for page, command in named:
        assert command in there, f"{page}: batchnorm {command}"


def test_every_target_of_make_that_is_named_is_there():
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [
        (page.name, target)
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    ]
    assert {target for _, target in named} >= {"demo", "test", "lint"}
    for page, target in named:
        assert target in there, f"{page}: make {target}"
