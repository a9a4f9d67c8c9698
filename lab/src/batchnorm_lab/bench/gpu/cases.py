"""What is measured: shapes, dtypes, layouts and forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RESNET = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
MOBILENET = ((32, 112), (96, 56), (144, 56), (192, 28), (384, 14), (576, 14), (960, 7), (1280, 7))
FORMS = {"bn": (None, False), "bn_act": ("relu", False), "bn_add_act": ("relu", True)}


class Case(NamedTuple):
    """One row of the benchmark.

    Parameters
    ----------
    shape : tuple of int
        (N, C, H, W) or (N, C).
    dtype : torch.dtype
        Of the input.
    channels_last : bool
        Memory order of four axes.
    form : str
        One of `FORMS`.
    training : bool
        Forward and backward with the batch's statistics; else inference.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    form: str
    training: bool

    @property
    def label(self) -> str:
        """Name for people."""
        order = "channels_last" if self.channels_last else "contiguous"
        mode = "training" if self.training else "inference"
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {order} {self.form} {mode}"

    def tensor(self, device: str, seed: int = 0) -> Tensor:
        """Make an input.

        Parameters
        ----------
        device : str
            Where.
        seed : int, optional
            Of the values.

        Returns
        -------
        Tensor
            Of the case's shape, dtype and memory order.
        """
        generator = torch.Generator(device=device).manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


def cases(quick: bool, dry: bool) -> list[Case]:
    """List the rows.

    Parameters
    ----------
    quick : bool
        A few of ResNet-50's.
    dry : bool
        Tiny shapes, one of each kind.

    Returns
    -------
    list of Case
        The most telling first, for time may run out.
    """
    half = torch.bfloat16
    if dry:
        shapes = ((2, 3, 4, 4), (6, 5))
        return [
            Case(shape, dtype, len(shape) == 4, form, training)
            for shape, dtype in zip(shapes, (torch.float32, half), strict=True)
            for form in FORMS
            for training in (True, False)
        ]
    batch = 256
    layers = [(batch, c, side, side) for c, side in RESNET]
    if quick:
        return [Case(s, half, True, form, True) for s in layers[1:9:3] for form in FORMS]
    found = [
        Case(s, half, True, form, training) for training in (True, False) for s in layers for form in FORMS
    ]
    found += [Case((batch, c, n, n), half, True, "bn_act", True) for c, n in MOBILENET]
    found += [
        Case(s, torch.float32, False, form, True) for s in layers[1::2] for form in ("bn_act", "bn_add_act")
    ]
    found += [Case(s, torch.float16, True, "bn_act", True) for s in layers[1::3]]
    found += [Case((n, c), half, False, "bn_act", True) for n, c in ((256, 512), (4096, 1024), (65536, 256))]
    return found
