"""What is timed: named sets of shapes, and the cases made from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from batchnorm.errors import ArgumentError

Shape = tuple[int, ...]

SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "resnet": (
        (32, 64, 112, 112),
        (32, 64, 56, 56),
        (32, 256, 56, 56),
        (32, 128, 28, 28),
        (32, 512, 28, 28),
        (32, 256, 14, 14),
        (32, 1024, 14, 14),
        (32, 512, 7, 7),
        (32, 2048, 7, 7),
    ),
    "mobilenet": (
        (32, 32, 112, 112),
        (32, 96, 56, 56),
        (32, 144, 56, 56),
        (32, 192, 28, 28),
        (32, 384, 14, 14),
        (32, 576, 14, 14),
        (32, 960, 7, 7),
        (32, 1280, 7, 7),
    ),
    "cifar": ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (128, 64, 32, 32)),
    "unet3d": ((2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 128, 16, 16, 16), (2, 320, 8, 8, 8)),
    "mlp": ((64, 128), (256, 512), (256, 4096), (4096, 1024), (65536, 64), (65536, 256)),
    "seq": ((32, 128, 256), (16, 512, 512), (8, 2048, 768)),
    "awkward": (
        (1, 64, 56, 56),
        (32, 3, 224, 224),
        (16, 61, 37, 29),
        (32, 64, 32, 32),
        (32, 64, 64, 64),
        (64, 1, 28, 28),
        (4, 2, 512, 512),
        (32, 100, 1, 1),
    ),
}
"""Shapes by set; those of ``"seq"`` are (N, L, C), all others (N, C, *S)."""

FORMS = ("plain", "relu", "add_relu")
MODES = ("training", "inference")
LAYOUTS = ("nchw", "channels_last")
DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    """One thing to time: a shape in a layout and dtype, with what is fused onto it, in a mode.

    ``layout`` is ``"nchw"`` (contiguous), ``"channels_last"``, ``"rows"`` for (N, C) or ``"nlc"`` for
    (N, L, C).
    """

    set: str
    shape: Shape
    layout: str
    dtype: str
    form: str
    mode: str

    @property
    def label(self) -> str:
        """A short name, unique among cases."""
        dims = "x".join(map(str, self.shape))
        return f"{dims} {self.layout} {self.dtype} {self.form} {self.mode}"

    @property
    def values(self) -> int:
        """Number of values in the tensor."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def layouts_of(set_name: str, shape: Shape) -> tuple[str, ...]:
    """Give the layouts in which a shape of a set is timed.

    Parameters
    ----------
    set_name : str
        A key of ``SHAPE_SETS``.
    shape : tuple of int
        One of its shapes.

    Returns
    -------
    tuple of str
        Names of layouts.
    """
    if set_name == "seq":
        return ("nlc",)
    return ("rows",) if len(shape) == 2 else LAYOUTS


def cases(
    sets: Iterable[str],
    *,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] = DTYPES,
    forms: Sequence[str] = FORMS,
    modes: Sequence[str] = MODES,
) -> list[Case]:
    """List every case of some sets of shapes.

    Parameters
    ----------
    sets : iterable of str
        Keys of ``SHAPE_SETS``, or ``"all"``.
    layouts : sequence of str, optional
        Of ``LAYOUTS``; shapes that have one layout only are always listed.
    dtypes : sequence of str, optional
        Of ``DTYPES``.
    forms : sequence of str, optional
        Of ``FORMS``.
    modes : sequence of str, optional
        Of ``MODES``.

    Returns
    -------
    list of Case
        In a fixed order.

    Raises
    ------
    ArgumentError
        A name is none of the known ones.
    """
    names = list(sets)
    if "all" in names:
        names = list(SHAPE_SETS)
    for given, known in (
        (names, SHAPE_SETS),
        (layouts, LAYOUTS),
        (dtypes, DTYPES),
        (forms, FORMS),
        (modes, MODES),
    ):
        for name in given:
            if name not in known:
                raise ArgumentError(f"bench: {name!r} is not known.", mend=f"choose from {', '.join(known)}.")
    return [
        Case(name, shape, layout, dtype, form, mode)
        for name in names
        for shape in SHAPE_SETS[name]
        for layout, dtype, form, mode in product(layouts_of(name, shape), dtypes, forms, modes)
        if layout in layouts or layout in ("rows", "nlc")
    ]


def bar_cases() -> list[Case]:
    """List the cases that the bar is measured over.

    Returns
    -------
    list of Case
        ResNet-50 and MobileNetV2 at batch 32: BN+ReLU in float32, BN+add+ReLU in float32 and bfloat16,
        in training, both layouts.
    """
    sets = ("resnet", "mobilenet")
    return cases(sets, dtypes=("float32",), forms=("relu", "add_relu"), modes=("training",)) + cases(
        sets, dtypes=("bfloat16",), forms=("add_relu",), modes=("training",)
    )
