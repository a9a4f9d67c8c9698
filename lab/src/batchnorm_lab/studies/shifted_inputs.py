"""Do statistics of the test inputs repair what a shift of their distribution breaks? (M9, M11)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy import ndimage
from torch import Tensor

from batchnorm.network.statistics.adapt import adapt
from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.contract import (
    Advance,
    Answer,
    Finding,
    Record,
    Result,
    Setting,
    Study,
    Unit,
    make_answer,
)
from batchnorm_lab.studies.ensemble import ConvEnsemble
from batchnorm_lab.studies.figures import LINE_STYLES, figure, legend_below, line
from batchnorm_lab.studies.intervals import Interval, mean_interval, paired_difference
from batchnorm_lab.studies.records import values
from batchnorm_lab.studies.training import EnsembleOptimizer, accuracy, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEVERITIES = (1, 2, 3, 4, 5)
NO_PRIOR, NO_ADAPTATION = 0.0, "none"
CHOSEN_AT = 3
"""Severity of the validation images on which priors are chosen."""
CLEAN, ONE_CLASS = "clean", "one class"
MARGIN = 0.5
"""Points of error within which adapting to clean images counts as doing no harm; fixed beforehand."""
# Published with ResNet-50 on ImageNet-C: mean corruption error without, and with batches of 8 and 512.
PUBLISHED = "Published for ResNet-50 on ImageNet-C: mCE 76.7 without, 65.0 with batches of 8, 62.2 of 512."


def contrast(images: Tensor, severity: int) -> Tensor:
    """Pull pixels to the mean of their image: 0.6 of the contrast left at severity 1, 0.08 at 5.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        Pixels in [0, 1].
    severity : int
        1 to 5.

    Returns
    -------
    Tensor
        Of the same shape.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.shifted_inputs import contrast
    >>> contrast(torch.tensor([[[[0.0, 1.0]]]]), 1)
    tensor([[[[0.2000, 0.8000]]]])
    """
    left = (0.6, 0.4, 0.25, 0.15, 0.08)[severity - 1]
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + left * (images - mean)


def noise(images: Tensor, severity: int) -> Tensor:
    """Add Gaussian noise of standard deviation 0.1 (severity 1) to 0.5 (5), cut to [0, 1]; always the same.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        Pixels in [0, 1].
    severity : int
        1 to 5.

    Returns
    -------
    Tensor
        Of the same shape.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.shifted_inputs import noise
    >>> x = torch.rand(2, 1, 4, 4)
    >>> torch.equal(noise(x, 3), noise(x, 3))
    True
    """
    generator = torch.Generator().manual_seed(severity)
    return (images + 0.1 * severity * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, severity: int) -> Tensor:
    """Convolve with a Gaussian of standard deviation 0.4 pixels of 8 (severity 1) to 1.2 (5).

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W)
        Pixels in [0, 1].
    severity : int
        1 to 5.

    Returns
    -------
    Tensor
        Of the same shape.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.shifted_inputs import blur
    >>> torch.allclose(blur(torch.ones(1, 1, 8, 8), 5), torch.ones(1, 1, 8, 8))
    True
    """
    sigma = (0.4, 0.6, 0.8, 1.0, 1.2)[severity - 1] * images.shape[-1] / 8
    reach = min(images.shape[-1] - 1, max(1, round(3 * sigma)))
    pixels = ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", radius=reach, axes=(2, 3))
    return torch.from_numpy(pixels)


SHIFTS: dict[str, Callable[[Tensor, int], Tensor]] = {"contrast": contrast, "noise": noise, "blur": blur}


@dataclass(frozen=True)
class Config:
    """Sizes of the study: ``priors`` are in samples, ``batches`` the test samples that are adapted to."""

    seeds: int = 6
    steps: int = 600
    batch: int = 60
    rate: float = 0.1
    priors: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 16.0, 64.0)
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    test_images: int = 512


def units(config: Config) -> list[Unit]:
    """Return one unit: networks of all seeds; each is looked at under every shift."""
    return [
        Unit(
            [
                {
                    "seed": seed,
                    "steps": config.steps,
                    "batch": config.batch,
                    "rate": config.rate,
                    "priors": list(config.priors),
                    "batches": list(config.batches),
                    "test_images": config.test_images,
                }
                for seed in range(config.seeds)
            ]
        )
    ]


def measure(unit: list[Setting], data: ImageData, advance: Advance) -> list[Result]:
    """Train once, then measure the error under every shift, with and without adaptation, on both parts."""
    first = unit[0]
    choose, report = data.with_validation()
    networks = ConvEnsemble(
        data.image_shape, (8, 16, 16), len(data.classes), [s["seed"] for s in unit], normalized=True
    )
    optimizer = EnsembleOptimizer(networks, [setting["rate"] for setting in unit])
    share = 0.2
    train(
        networks,
        optimizer,
        report,
        steps=first["steps"],
        batch=first["batch"],
        advance=lambda done: advance(share * done),
    )
    networks.eval()
    looks = {
        "validation": conditions(choose, first["test_images"], (CHOSEN_AT,)),
        "error": conditions(report, first["test_images"], SEVERITIES),
    }
    total, done = sum(map(len, looks.values())), 0
    found: dict[str, dict[str, Tensor]] = {part: {} for part in looks}
    for part, shifted in looks.items():
        for name, (images, labels) in shifted.items():
            found[part][f"{name} {NO_ADAPTATION}"] = accuracy(networks, images, labels)
            for size in first["batches"]:
                for prior in first["priors"]:
                    if not (size == 1 and prior == NO_PRIOR):
                        found[part][f"{name} {size} {prior:g}"] = adapted_accuracy(
                            networks, images, labels, size, prior
                        )
            done += 1
            advance(share + (1 - share) * done / total)
    return [
        {
            part: {name: round(100 * (1 - float(each[run])), 2) for name, each in looked.items()}
            for part, looked in found.items()
        }
        for run in range(len(unit))
    ]


def conditions(data: ImageData, limit: int, severities: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the test images of a part as they are, sorted by class, and under every shift.

    Parameters
    ----------
    data : ImageData
        Its test part is used.
    limit : int
        At most so many images.
    severities : tuple of int
        Of the shifts.

    Returns
    -------
    dict
        Name to images and labels.
    """
    images, labels = data.test_images[:limit], data.test_labels[:limit]
    order = labels.argsort(stable=True)
    found = {CLEAN: (images, labels), ONE_CLASS: (images[order], labels[order])}
    for shift, change in SHIFTS.items():
        for severity in severities:
            found[f"{shift} {severity}"] = (change(images, severity), labels)
    return found


def adapted_accuracy(
    networks: ConvEnsemble, images: Tensor, labels: Tensor, size: int, prior: float
) -> Tensor:
    """Return accuracies if each test mini-batch is adapted to before it is classified.

    Parameters
    ----------
    networks : ConvEnsemble
        In eval mode; their statistics are as before when this returns.
    images, labels : Tensor
        Test images; with small mini-batches, 64 mini-batches evenly spread over them are enough.
    size : int
        Test images in a mini-batch.
    prior : float
        What the statistics of training are worth, in samples.

    Returns
    -------
    Tensor, shape (R,)
        Between 0 and 1.
    """
    size = min(size, len(images))
    batches = len(images) // size
    starts = [size * (k * batches // min(64, batches)) for k in range(min(64, batches))]
    right = torch.zeros(networks.runs)
    with torch.no_grad():
        for start in starts:
            part = images[start : start + size]
            with adapt(networks, networks.images(part), prior=prior):
                right += size * accuracy(networks, part, labels[start : start + size], chunk=size)
    return right / (size * len(starts))


def mean_error(
    records: list[Record], how: str, part: str = "error", severities: tuple[int, ...] = SEVERITIES
) -> list[float]:
    """Return the mean error over shifts and severities, one a seed.

    Parameters
    ----------
    records : list of dict
        Of this study.
    how : str
        "none", or "SIZE PRIOR".
    part : {"error", "validation"}, default "error"
        On test or on validation images.
    severities : tuple of int
        Which; validation images have `CHOSEN_AT` alone.

    Returns
    -------
    list of float
        In %.
    """
    names = [f"{shift} {severity} {how}" for shift in SHIFTS for severity in severities]
    return [sum(found[name] for name in names) / len(names) for found in values(records, part)]


def chosen_prior(records: list[Record], sizes: list[int]) -> float:
    """Return the prior with the smallest error on shifted validation images, over some sizes of mini-batches.

    Parameters
    ----------
    records : list of dict
        Of this study.
    sizes : list of int
        Mini-batches; where there are several, a prior must have been measured with all of them.

    Returns
    -------
    float
        In samples.
    """

    def error(prior: float) -> float:
        return sum(
            sum(mean_error(records, f"{size} {prior:g}", "validation", (CHOSEN_AT,))) for size in sizes
        )

    measured = set(choices(records))
    return min(
        (p for p in records[0]["setting"]["priors"] if all((s, p) in measured for s in sizes)), key=error
    )


def choices(records: list[Record]) -> list[tuple[int, float]]:
    """Return the pairs of mini-batch size and prior that were measured.

    Parameters
    ----------
    records : list of dict
        Of this study.

    Returns
    -------
    list of (int, float)
        In the order of size, then prior.
    """
    setting = records[0]["setting"]
    return [
        (size, prior)
        for size in setting["batches"]
        for prior in setting["priors"]
        if not (size == 1 and prior == NO_PRIOR)
    ]


def answer(records: list[Record]) -> Answer:
    """Return the error without adaptation and with it, on shifted images, clean ones and those of one class."""
    plain = mean_error(records, NO_ADAPTATION)
    sizes = sorted(records[0]["setting"]["batches"])
    few = sorted({sizes[0], min(sizes, key=lambda s: abs(s - 16)), sizes[-1]})
    findings = []
    for size in few:
        prior = chosen_prior(records, [size])
        error = mean_error(records, f"{size} {prior:g}")
        less = paired_difference(plain, error)
        samples = "sample" if size == 1 else "samples"
        findings.append(
            Finding(
                "M11",
                f"adapting to {size} test {samples} makes shifted inputs easier",
                less,
                f"mean error {mean_interval(error).text(1, ' %')} with prior {prior:g}, against "
                f"{mean_interval(plain).text(1, ' %')} without, {less.text(1, ' points')} less",
                above=0.0,
            )
        )
    for shift in SHIFTS:
        findings.append(_by_shift(records, shift, sizes[-1]))
    findings += [_unshifted(records, CLEAN, size) for size in few if size > 1]
    # larger ones would hold several classes
    findings.append(_unshifted(records, ONE_CLASS, min(sizes, key=lambda s: abs(s - 16))))
    one = chosen_prior(records, sizes)
    grid = records[0]["setting"]["priors"]
    remarks = [
        f"Priors were chosen on validation images at severity {CHOSEN_AT}; errors are of test images.",
        f"One prior for every size of mini-batch: {one:g}"
        + (", at an edge of the grid." if one in (grid[0], grid[-1]) else ", inside the grid."),
        _by_prior(records),
        PUBLISHED,
    ]
    return make_answer(findings, remarks)


def _by_prior(records: list[Record]) -> str:
    """What a default prior is chosen by: the error it leaves on each kind of image, over all mini-batches."""
    priors = [prior for prior in records[0]["setting"]["priors"] if prior != NO_PRIOR]
    sizes = records[0]["setting"]["batches"]

    def error(prior: float, *names: str) -> str:
        found = [
            result[f"{name} {size} {prior:g}"]
            for result in values(records, "validation")
            for name in names
            for size in sizes
        ]
        return f"{sum(found) / len(found):.1f}"

    shifted = [f"{shift} {CHOSEN_AT}" for shift in SHIFTS]
    told = "; ".join(
        f"prior {prior:g}, {error(prior, *shifted)} / {error(prior, CLEAN)} / {error(prior, ONE_CLASS)}"
        for prior in priors
    )
    return f"Validation error (%) over all mini-batches, shifted / clean / one class: {told}."


def _unshifted(records: list[Record], images: str, size: int) -> Finding:
    """What adapting does where nothing has shifted: to clean images, or to mini-batches of one class each."""
    prior = chosen_prior(records, [size])
    before = [found[f"{images} {NO_ADAPTATION}"] for found in values(records, "error")]
    after = [found[f"{images} {size} {prior:g}"] for found in values(records, "error")]
    more = paired_difference(after, before)
    text = (
        f"{size} samples, prior {prior:g}: error {mean_interval(after).estimate:.1f} % against "
        f"{mean_interval(before).estimate:.1f} %, {more.text(1, ' points')} more"
    )
    if images == CLEAN:
        statement = f"adapting to {size} clean samples does no harm, within {MARGIN:g} points"
        return Finding("M11", statement, more, text, below=MARGIN)
    statement = f"adapting to {size} samples of one class does harm"
    return Finding("M11", statement, more, text, above=0.0)


def _by_shift(records: list[Record], shift: str, size: int) -> Finding:
    def error(how: str) -> list[float]:
        return [
            sum(found[f"{shift} {severity} {how}"] for severity in SEVERITIES) / len(SEVERITIES)
            for found in values(records, "error")
        ]

    prior = chosen_prior(records, [size])
    before, after = error(NO_ADAPTATION), error(f"{size} {prior:g}")
    less = paired_difference(before, after)
    return Finding(
        "M11",
        f"it does so for {shift}",
        less,
        f"{size} samples, prior {prior:g}: mean error {mean_interval(after).estimate:.1f} % against "
        f"{mean_interval(before).estimate:.1f} %, {less.text(1, ' points')} less",
        above=0.0,
    )


def plot(records: list[Record]) -> Figure:
    """Draw the error over severity for each shift, and the mean error over mini-batch size and prior."""
    fig, axes = figure(2, 2, width=10, height=6.6)
    setting = records[0]["setting"]
    large = max(setting["batches"])
    arms = {NO_ADAPTATION: "no adaptation"} | {
        f"{size} {prior:g}": f"{size} test samples, prior {prior:g}"
        for size, prior in ((min(setting["batches"], key=lambda s: abs(s - 16)), 4.0), (large, 0.0))
        if prior in setting["priors"]
    }
    for panel, shift in zip(axes.flat, SHIFTS, strict=False):
        for style, (how, name) in enumerate(arms.items()):
            runs = [
                [found[f"{shift} {severity} {how}"] for severity in SEVERITIES]
                for found in values(records, "error")
            ]
            line(panel, SEVERITIES, runs, style, name)
        clean: Interval = mean_interval(values(records, lambda r: r["error"][f"{CLEAN} {NO_ADAPTATION}"]))
        panel.axhline(clean.estimate, color="#909090", linewidth=0.8, linestyle=":")
        panel.set(
            title=f"{shift} (dotted: clean images)", xlabel="severity", ylabel="test error (%)", ylim=(0, 95)
        )
        panel.set_xticks(SEVERITIES)
    panel = axes[1][1]
    sizes, priors = setting["batches"], setting["priors"]
    for style, prior in enumerate(priors[: len(LINE_STYLES)]):
        shown = [size for size in sizes if (size, prior) in choices(records)]
        by_size = [mean_error(records, f"{size} {prior:g}") for size in shown]
        line(panel, shown, list(zip(*by_size, strict=True)), style, f"prior {prior:g}")
    without = mean_interval(mean_error(records, NO_ADAPTATION)).estimate
    panel.axhline(without, color="#909090", linewidth=1.2, linestyle=":")
    panel.set(
        title="mean of all fifteen (dotted: no adaptation)",
        xscale="log",
        xlabel="test samples that are adapted to (log scale)",
        ylabel="mean test error (%)",
        ylim=(0, 1.45 * without),
    )
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    panel.legend(loc="upper center", ncols=min(4, len(priors)), fontsize=8, columnspacing=1)
    legend_below(fig, axes[0][0])
    return fig


STUDY = Study(
    name="shifted-inputs",
    title="Inputs that have shifted",
    question="How much of the harm of contrast, noise and blur do the statistics of test samples repair?",
    claim="The statistics of training belong to its distribution: where test inputs have shifted, blending in "
    "theirs helps.",
    formula=r"$\bar\mu = \frac{N\,\mu_\mathrm{train} + n\,\mu_\mathrm{test}}{N + n}$,"
    r"   N: prior,   n: test samples",
    claims=("M11",),
    configs={
        "quick": Config(seeds=2, steps=80, priors=(0.0, 4.0, 16.0), batches=(4, 16, 128), test_images=128),
        "default": Config(),
        "full": Config(
            seeds=20, steps=5000, priors=(0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0), test_images=100000
        ),
    },
    units=units,
    measure=measure,
    plot=plot,
    answer=answer,
    revision=2,
)
