"""Every code block of the documentation runs as it is written."""

from __future__ import annotations

import pytest
import torch
from pages import PAGES, blocks, name_of, python_of, run

WITH_PYTHON = [page for page in PAGES if python_of(page)]
# their code is that of the English page, to the letter but for comments: test_translations.py
TRANSLATED = [page for page in PAGES if page.parent.name == "ko" or page.name.endswith(".ko.md")]
CASES = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page in TRANSLATED else [])
    for page in WITH_PYTHON
]
LANGUAGES = {"python", "text", "bash", "console", "toml", "yaml", "cpp", "{toctree}", "{math}", ""}


@pytest.mark.parametrize("page", CASES)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run(page)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_says_its_language_and_one_that_is_not_run_says_why(page):
    for block in blocks(page):
        language = block.language.split(" ")[0]
        assert language in LANGUAGES or language.startswith("{"), (name_of(page), block.line, block.language)
        assert not block.skip or len(block.skip) > 20, "a reason, in words"


def test_few_blocks_are_not_run():
    every = [block for page in WITH_PYTHON for block in python_of(page)]
    assert sum(bool(block.skip) for block in every) <= 0.1 * len(every)
