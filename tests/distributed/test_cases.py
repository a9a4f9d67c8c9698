"""The table of cases in README.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_case_has_a_test_that_exists():
    text = (HERE / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) > 50
    for row in rows:
        path = HERE / "test_ported.py"
        for file, name in re.findall(r"([\w./]+\.py)|`(test_\w+)`", row):
            if file:
                path = HERE / file
            else:
                assert f"def {name}(" in path.read_text(), (path.name, name)
    named = set(re.findall(r"\b([AT]\d+)\b", text))
    # T1 to T5 share a row
    assert {f"A{i}" for i in range(1, 19)} | {f"T{i}" for i in (1, 5, *range(6, 24))} <= named
