"""Figures that read in black and white: lines differ in dash and marker, bars in hatch, not in colour alone."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm_lab.studies.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BAR_STYLES", "LINE_STYLES", "bars", "figure", "legend_below", "line", "save"]

# Colours of Okabe and Ito, dark enough for white paper, each with its own dash and marker.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#AA4499", "#7A7A7A")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "x")
LINE_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "linestyle": dash, "marker": marker}
    for colour, dash, marker in zip(_COLOURS, _DASHES, _MARKERS, strict=True)
)
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++")
_FILLS = ("#4d4d4d", "#ffffff", "#d9d9d9", "#ffffff", "#f2f2f2", "#bfbfbf")
BAR_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"facecolor": fill, "hatch": hatch, "edgecolor": "#000000"}
    for fill, hatch in zip(_FILLS, _HATCHES, strict=True)
)
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e0e0e0",
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "batchnorm",  # the same records give the same file
    "hatch.linewidth": 0.6,
}


def figure(rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.6, **axes: Any) -> Any:
    """Make a figure with its axes, outside of any window system.

    Parameters
    ----------
    rows, columns : int, default 1
        Of panels.
    width, height : float
        Of the whole figure, in inches.
    **axes
        Arguments of ``Figure.subplots``, such as ``sharey``.

    Returns
    -------
    (Figure, ndarray of Axes)
        The axes in an array of shape (rows, columns).

    Raises
    ------

    Examples
    --------
    >>> from batchnorm_lab.studies.figures import figure
    >>> fig, axes = figure(1, 2)
    >>> axes.shape
    (1, 2)
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False, **axes)


def line(
    axes: Axes,
    x: Sequence[float],
    runs: Sequence[Sequence[float | None]],
    style: int,
    label: str,
    **more: Any,
) -> None:
    """Draw the mean over seeds with its 95 % interval as a band.

    Parameters
    ----------
    axes : Axes
        Where.
    x : sequence of float
        Positions.
    runs : sequence of sequences of float or None
        One a seed, each as long as ``x``; positions where a seed has None are left out.
    style : int
        Which of `LINE_STYLES`.
    label : str
        For the legend.
    **more
        Arguments of ``Axes.plot``.
    """
    points = []
    for position, *seeds in zip(x, *runs, strict=True):
        if all(value is not None for value in seeds):
            points.append((position, mean_interval([float(v) for v in seeds if v is not None])))
    positions = [position for position, _ in points]
    chosen = LINE_STYLES[style] | {"markevery": max(1, len(points) // 12)} | more
    axes.plot(positions, [interval.estimate for _, interval in points], label=label, **chosen)
    if points and points[0][1].seeds > 1:
        low, high = [interval.low for _, interval in points], [interval.high for _, interval in points]
        if axes.get_yscale() == "log":  # set before, or never: a band below 0 has no place there
            low = [max(value, 1e-30) for value in low]
        axes.fill_between(positions, low, high, color=chosen["color"], alpha=0.15, linewidth=0)


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw grouped bars of means over seeds, with 95 % intervals.

    Parameters
    ----------
    axes : Axes
        Where.
    groups : sequence of str
        Labels along the axis.
    series : dict of str to sequence
        For each label of the legend, one sequence of seeds for each group.
    """
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        intervals = [mean_interval(seeds) for seeds in values]
        positions = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        half = [i.high - i.estimate if i.seeds > 1 else 0.0 for i in intervals]
        axes.bar(
            positions,
            [interval.estimate for interval in intervals],
            width * 0.92,
            yerr=half,
            capsize=2.5,
            error_kw={"elinewidth": 1.0},
            label=label,
            **BAR_STYLES[index],
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(False, axis="x")


def legend_below(fig: Figure, axes: Axes, columns: int = 3, **more: Any) -> None:
    """Put the legend of some axes below the whole figure, where it covers no data, in rows.

    Parameters
    ----------
    fig : Figure
        The figure.
    axes : Axes
        Whose labels.
    columns : int, default 3
        Of the legend.
    **more
        Arguments of ``Figure.legend``.
    """
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib fills columns; a reader goes along rows
    order = [k for column in range(columns) for k in range(column, len(labels), columns)]
    handles, labels = [handles[k] for k in order], [labels[k] for k in order]
    fig.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.6, **more
    )


def save(fig: Figure, stem: Path) -> tuple[Path, Path]:
    """Write a figure as SVG and PNG.

    Parameters
    ----------
    fig : Figure
        From `figure`.
    stem : path
        Without the ending.

    Returns
    -------
    (path, path)
        Of the SVG and of the PNG.
    """
    import matplotlib
    from PIL import Image

    stem.parent.mkdir(parents=True, exist_ok=True)
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    with matplotlib.rc_context(SETTINGS):
        fig.savefig(svg, metadata={"Date": None})
        # A hundredth of a point is finer than any printer: more digits in paths are only bytes.
        paths = re.compile(r'\bd="[^"]*"')
        text = svg.read_text(encoding="utf-8")
        shorter = paths.sub(lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), text)
        svg.write_text(shorter, encoding="utf-8")
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=110)
    # 96 colours are plenty for lines and letters, and a third of the bytes.
    Image.open(buffer).convert("RGB").quantize(96).save(png, optimize=True)
    return svg, png
