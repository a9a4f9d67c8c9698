"""Pages of Markdown as tests see them: their code blocks, with what a comment before one says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / name
        for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "lab/src/batchnorm_lab/bench/README.md")
    ]
    + list(DOCS.rglob("*.md"))
)
PAGES = [page for page in PAGES if page.exists() and "_build" not in page.parts]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, the line it begins on, and why it is not run ("" if it is)."""

    language: str
    code: str
    line: int
    skip: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in lists and quotations too."""
    found, skip = [], ""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            comment = re.search(r"<!--\s*skip:\s*(.*?)\s*-->", token.content, re.DOTALL)
            skip = comment.group(1) if comment else ""
        elif token.type == "fence":
            found.append(Block(token.info.strip(), token.content, token.map[0] + 1, skip))
            skip = ""
        elif token.nesting == 0:
            skip = ""
    return found


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def run(page: Path) -> dict[str, object]:
    """Run the Python of a page, as somebody who copies one block after the other."""
    space: dict[str, object] = {"__name__": "__main__"}
    for block in python_of(page):
        if not block.skip:
            # empty lines before it, so that an error names the line of the page
            source = "\n" * block.line + block.code
            exec(compile(source, name_of(page), "exec"), space)
    return space


def links(page: Path) -> list[str]:
    """Targets of links and images in the prose of a page, without what stands in code."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for part in token.children or []:
            target = part.attrs.get("href") or part.attrs.get("src")
            if target:
                found.append(str(target))
    return found
