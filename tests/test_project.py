"""What a project says of itself in several places is the same in all of them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from pages import ROOT

import batchnorm

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAB = tomllib.loads((ROOT / "lab/pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_version_is_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {PROJECT["project"]["version"], LAB["project"]["version"], cited["version"]} == {
        batchnorm.__version__
    }
    assert f"## {batchnorm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_python_that_is_named_is_tested_and_built():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"cp{v.replace('.', '')}-*" for v in named]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_the_oldest_torch_and_the_pinned_one_are_tested():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    torches = tests["jobs"]["tests"]["strategy"]["matrix"]["torch"]
    oldest = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"])).group(1)
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert torches[0] == f"{oldest}.*"
    assert f"{pinned}.*" in torches


def test_every_extra_is_pinned():
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for needs in PROJECT["project"]["optional-dependencies"].values():
        for need in needs:
            name = re.split(r"[\[<>=; ]", need)[0].lower().replace("_", "-")
            # a torch that is built for GPUs brings the triton it was built with: constraints.txt
            assert name in pinned | {"batchnorm", "triton"}, name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_files_and_targets_that_are_there(workflow):
    text = workflow.read_text()
    assert yaml.safe_load(text)["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets
    for path in re.findall(r"\b(?:tests|packaging)/[\w/.]+\.(?:py|sh)\b", text):
        assert (ROOT / path).is_file(), path


def test_forms_for_issues_are_well_formed():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        if form.name != "config.yml":
            told = yaml.safe_load(form.read_text())
            assert {"name", "description", "body"} <= set(told)


def test_the_instruction_set_of_this_machine_is_one_that_the_core_knows():
    if sys.platform == "win32":
        pytest.skip("a shell script")
    told = subprocess.run(
        ["sh", str(ROOT / "packaging/isa.sh")], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    assert told in {"all", *re.findall(r"set\(ISA_FLAGS_(\w+) ", (ROOT / "CMakeLists.txt").read_text())}


def test_tests_mirror_the_rooms_of_the_network():
    """``ranks`` is tested by several processes, in ``tests/distributed``."""
    rooms = {face.parent.name for face in (ROOT / "src/batchnorm/network").glob("*/__init__.py")}
    tested = {file.parent.name for file in (ROOT / "tests/network").glob("*/test_*.py")}
    assert tested == rooms - {"ranks"}
    assert list((ROOT / "tests/distributed").glob("test_*.py"))
