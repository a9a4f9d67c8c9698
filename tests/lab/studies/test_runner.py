"""What the command line calls: folders, reports, data of a user's own, and requests that make no sense."""

import html
import html.parser
import importlib
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from image_files import write_mnist
from rich.console import Console

from batchnorm.errors import ArgumentError, DataError
from batchnorm_lab.studies import registry, runner
from batchnorm_lab.studies.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAMES = ["input-distribution", "bias-is-redundant"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Make the quick level of two studies smaller still."""
    for name, changes in (
        ("input-distribution", {"steps": 10, "looks": 2}),
        ("bias-is-redundant", {"steps": 4, "width": 8}),
    ):
        study = registry.get_study(name)
        small = replace(study.config("quick"), **changes)
        module = importlib.import_module(f"batchnorm_lab.studies.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "STUDY", replace(study, configs={**study.configs, "quick": small}))


def run(*names, **more):
    console = Console(file=io.StringIO(), width=120)
    outcomes = runner.run_studies(names or NAMES, quick=True, console=console, **more)
    return outcomes, console.file.getvalue()


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids, self.open = set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_html_report_holds_everything_and_needs_nothing(tmp_path):
    outcomes, _ = run(out=tmp_path / "out", html=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    links = Links()
    links.feed(text)
    text = html.unescape(text)
    assert {"svg", "table", "h2"} <= links.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links.links)
    assert "script" not in links.tags
    assert len(links.ids) == len(set(links.ids)), "figures must not share identifiers"
    targets = {link[1:] for link in links.links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert targets <= set(links.ids)
    for outcome in outcomes:
        assert outcome.study.question in text
        assert f"batchnorm study {outcome.study.name} --quick" in text
        for finding in outcome.answer.findings:
            assert finding.text in text


def test_the_markdown_report_links_to_files_that_are_there(tmp_path):
    outcomes, _ = run(out=tmp_path / "docs" / "studies", markdown=tmp_path / "docs" / "studies.md")
    text = (tmp_path / "docs" / "studies.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) == 3 * len(outcomes)
    assert all((tmp_path / "docs" / link).is_file() for link in links)
    anchors = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert anchors == {outcome.study.name for outcome in outcomes}
    for finding in outcomes[0].answer.findings:
        assert f"**{finding.verdict}**" in text
        assert finding.text in text


def test_figures_are_well_formed_and_lie_beside_their_records(tmp_path):
    outcomes, _ = run(out=tmp_path)
    for outcome in outcomes:
        assert ElementTree.parse(outcome.svg).getroot().tag.endswith("svg")
        assert outcome.png.read_bytes()[:4] == b"\x89PNG"
        assert outcome.records_path.read_text().count("\n") == len(outcome.records)


def test_answers_and_places_are_printed(tmp_path):
    outcomes, printed = run(NAMES[0], out=tmp_path)
    flat = " ".join(printed.split())
    for finding in outcomes[0].answer.findings:
        assert finding.statement in flat
    assert "Only 2 seeds" in flat


def test_a_report_is_made_again_from_a_folder_without_running(tmp_path, monkeypatch):
    run(out=tmp_path / "out", markdown=tmp_path / "first.md")
    for name in NAMES:
        module = importlib.import_module(f"batchnorm_lab.studies.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "STUDY", replace(module.STUDY, measure=None))
    assert main([str(tmp_path / "out"), str(tmp_path / "second.md")]) == 0
    first, second = ((tmp_path / name).read_text() for name in ("first.md", "second.md"))
    before, others, after = re.split(r"(Not on this page.*?\n\n)", second, maxsplit=1, flags=re.DOTALL)
    assert before + after == first
    assert all((name in others) == (name not in NAMES) for name in registry.STUDIES)


def test_a_study_whose_runs_are_incomplete_is_not_in_the_report_and_is_named(tmp_path, capsys):
    outcomes, _ = run(out=tmp_path)
    path = outcomes[0].records_path
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert main([str(tmp_path), str(tmp_path / "report.md")]) == 0
    assert "holds no complete set of records" in capsys.readouterr().err
    assert f"## {NAMES[0]}" not in (tmp_path / "report.md").read_text()
    assert f"## {NAMES[1]}" in (tmp_path / "report.md").read_text()
    (tmp_path / f"{NAMES[1]}.jsonl").unlink()
    assert main([str(tmp_path), str(tmp_path / "none.md")]) == 1
    assert not (tmp_path / "none.md").exists()


def test_the_report_command_says_how_it_is_used(capsys):
    assert main(["only-one"]) == 2
    assert "usage" in capsys.readouterr().err


def test_mnist_files_are_studied(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder, train=80, test=20, side=10)
    outcomes, _ = run(NAMES[0], out=tmp_path / "out", data="mnist", data_dir=folder)
    assert outcomes[0].records[0]["data"]["name"] == "mnist"
    assert outcomes[0].records[0]["data"]["sample"].startswith("80+20:")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"names": ["no-such-study"]}, "no-such-study"),
        ({"names": []}, "no study was named"),
        ({"names": NAMES, "quick": True, "full": True}, "quick and full"),
        ({"names": NAMES, "data": "mnist"}, "directory"),
        ({"names": NAMES, "data": "imagenet"}, "imagenet"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_made(tmp_path, arguments, says):
    with pytest.raises(ArgumentError, match=says):
        runner.run_studies(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        run(out=tmp_path / "out")
