"""The site of the documentation is built without a warning, every page and every link of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pages import DOCS


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("furo", "myst_parser", "numpydoc", "sphinx_copybutton"):
        pytest.importorskip(package)
    arguments = ["-b", "html", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in DOCS.rglob("*.md"):
        if "_build" not in page.parts:
            assert (tmp_path / page.relative_to(DOCS).with_suffix(".html")).is_file(), page
