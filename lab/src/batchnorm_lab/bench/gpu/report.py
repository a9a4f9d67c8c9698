"""The result of a run as Markdown."""

from __future__ import annotations

from typing import Any

from batchnorm_lab.bench.gpu.peers import COPY, NAMES


def _cell(reading: dict[str, Any] | None, kind: str) -> str:
    return "-" if reading is None else f"{reading[kind]:.3f}"


def markdown(result: dict[str, Any]) -> str:
    """Write a result as Markdown.

    Parameters
    ----------
    result : dict
        As `batchnorm_lab.bench.gpu.run.run` gives it.

    Returns
    -------
    str
        Provenance, one table of steps, one of layers, and what is missing and why.
    """
    about = result["about"]
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "",
        "Medians in milliseconds: GPU time by graph replay with the cache warm / cold, then host time.",
        "",
        "| row | " + " | ".join((*NAMES, COPY)) + " |",
        "|---|" + "---|" * (len(NAMES) + 1),
    ]
    missing: list[str] = []
    for row in result["rows"]:
        title = row.get("case") or f"step of {row['step']}, batch {row['batch']}"
        if "failed" in row:
            missing.append(f"- {title}: {row['failed']}")
            continue
        missing += [f"- {title}, {name}: {why}" for name, why in row["missing"].items()]
        readings = row["readings"]
        if "case" in row:
            cells = [
                " / ".join(_cell(readings.get(name), kind) for kind in ("warm", "cold", "host"))
                for name in (*NAMES, COPY)
            ]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| step | variant | ms | host ms | peak bytes |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        for variant, reading in row.get("readings", {}).items() if "step" in row else ():
            figures = f"{reading['milliseconds']:.2f} | {reading['host']:.2f} | {reading['peak']}"
            lines.append(f"| {row['step']}, batch {row['batch']} | {variant} | {figures} |")
    lines += ["", "## Missing", "", *(missing or ["Nothing."])]
    late = result["not_begun_for_lack_of_time"]
    if late:
        lines.append(f"- {late} rows were not begun: the time was up")
    return "\n".join(lines) + "\n"
