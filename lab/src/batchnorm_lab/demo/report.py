"""The report: one HTML file with its figures inside."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape

import batchnorm
from batchnorm.cli.outputs import write_text
from batchnorm_lab.demo import figures, words
from batchnorm_lab.demo.measure import Story

TEMPLATES = {"en": "report.html.j2", "ko": "report.ko.html.j2"}


def draw(story: Story) -> dict[str, str]:
    """Draw every figure of a run.

    Parameters
    ----------
    story : Story
        What was measured.

    Returns
    -------
    dict
        SVG by name.
    """
    drawn = {
        "pre_activations": figures.pre_activations(story.insertion.spreads),
        "learning_curves": figures.learning_curves(story.curves),
        "probabilities": figures.probabilities(story.one_sample),
        "by_batch_size": figures.by_batch_size(story.one_sample),
        "folding": figures.folding(
            story.folded.before, story.folded.after, story.folded.logits, story.folded.folded
        ),
    }
    return {name: figures.svg(figure) for name, figure in drawn.items()}


def write(
    story: Story, folder: Path, seconds: float, *, figures_apart: bool = False, language: str = "en"
) -> Path:
    """Write ``report.html``.

    Parameters
    ----------
    story : Story
        What was measured.
    folder : Path
        Made if it is missing.
    seconds : float
        How long the measurements took.
    figures_apart : bool, optional
        Write each figure as an SVG file beside it as well.
    language : {"en", "ko"}, default "en"
        Of the report and of the words in its figures.

    Returns
    -------
    Path
        Of the file.
    """
    environment = Environment(
        loader=PackageLoader("batchnorm_lab.demo", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["labelled"] = _labelled
    translated = words.TRANSLATORS[language]
    drawn = {name: words.in_figure(text, translated) for name, text in draw(story).items()}
    page = environment.get_template(TEMPLATES[language]).render(
        translated=translated,
        story=story,
        figures={name: Markup(text) for name, text in drawn.items()},
        seconds=seconds,
        version=batchnorm.__version__,
        torch=torch.__version__,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_text(path, page)
    if figures_apart:
        for name, text in drawn.items():
            write_text(folder / f"{name}.svg", text)
    return path


def _labelled(svg: Markup, text: str) -> Markup:
    """Give a figure the words that stand for it where it is not seen."""
    return Markup(str(svg).replace("<svg ", f'<svg role="img" aria-label="{escape(text)}" ', 1))
