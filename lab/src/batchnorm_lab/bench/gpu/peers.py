"""Who takes part: torch eager, torch.compile, our engines `torch` and `triton`, apex where it is; and a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels import select, triton
from batchnorm_lab.bench.gpu.cases import FORMS, Case

NAMES = ("eager", "compile", "torch", "triton", "apex")
COPY = "copy"


class Missing(Exception):
    """A peer that is not here, with the reason."""


class Plain(nn.Module):
    """torch.nn's batch norm, then an addition and an activation."""

    def __init__(self, channels: int, form: str, dimensions: int) -> None:
        super().__init__()
        self.norm = (nn.BatchNorm2d if dimensions == 4 else nn.BatchNorm1d)(channels)
        self.activation, _ = FORMS[form]

    def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(z)
        if residual is not None:
            y = y + residual
        return torch.relu_(y) if self.activation else y


def _ours(case: Case) -> nn.Module:
    made = batchnorm.BatchNorm2d if len(case.shape) == 4 else batchnorm.BatchNorm1d
    return made(case.shape[1], activation=FORMS[case.form][0])


def _apex(case: Case) -> nn.Module:
    try:
        module = importlib.import_module("apex.contrib.groupbn")
    except ImportError as error:
        raise Missing(f"apex is not installed ({error})") from None
    if not case.channels_last:
        raise Missing("apex's fused layer takes channels_last alone")
    return module.BatchNorm2d_NHWC(case.shape[1], fuse_relu=FORMS[case.form][0] == "relu")


def make(name: str, case: Case, device: str, dry: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Make one peer's call for a case: forward, and backward in training.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    case : Case
        What is done.
    device : str
        Where.
    dry : bool
        Compile without a code generator.

    Returns
    -------
    callable
        Gives y, and in training dz, d(gamma), d(beta) and, where there is one, d(residual).

    Raises
    ------
    Missing
        The peer is not here, or does not do this.
    """
    if name == "triton":
        refusal = triton.refusal(case.tensor(device))
        if refusal:
            raise Missing(refusal)
    layer = _apex(case) if name == "apex" else _ours(case) if name in ("torch", "triton") else None
    layer = (layer or Plain(case.shape[1], case.form, len(case.shape))).to(device).train(case.training)
    call: Callable[..., Tensor] = layer
    if name == "compile":
        call = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager" if dry else "inductor")
    z = case.tensor(device, 0).requires_grad_(case.training)
    residual = case.tensor(device, 1).requires_grad_(case.training) if FORMS[case.form][1] else None
    dy = case.tensor(device, 2)
    wanted = [z, *layer.parameters(), *([] if residual is None else [residual])]

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.training):
            y = call(z) if residual is None else call(z, residual)
        return (y, *torch.autograd.grad(y, wanted, dy)) if case.training else (y,)

    if name not in ("torch", "triton"):
        return run

    def forced() -> tuple[Tensor, ...]:
        with select.use(name):
            return run()

    return forced


def copy_of(case: Case, device: str) -> Callable[[], Any]:
    """Make a copy of the case's tensor into memory that is there: the floor.

    Parameters
    ----------
    case : Case
        Its tensor.
    device : str
        Where.

    Returns
    -------
    callable
        The copy.
    """
    source = case.tensor(device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def errors(case: Case, device: str, dry: bool, names: tuple[str, ...] = NAMES) -> dict[str, float | str]:
    """Compare what every peer gives with float64, before anything is timed.

    Parameters
    ----------
    case : Case
        What is done.
    device : str
        Where.
    dry : bool
        As for `make`.
    names : tuple of str, optional
        Which peers.

    Returns
    -------
    dict
        The largest error of y, dz and d(residual), over the largest value; or why there is none.
    """
    exact = [t.detach() for t in _in_float64(case, device)]
    found: dict[str, float | str] = {}
    for name in names:
        try:
            results = make(name, case, device, dry)()
        except Missing as why:
            found[name] = str(why)
            continue
        except Exception as error:  # a peer's failure costs its own column
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        worst = 0.0
        for have, want in zip(results, exact, strict=True):
            if have.shape == case.shape:
                off = (have.detach().double() - want).abs()
                # where rounding decides the side of the kink both sides are right: a thousandth may differ
                # (topk is shared by many programs where kthvalue is one's work)
                kept = off.flatten().topk(1 + off.numel() // 1000, sorted=False).values.min()
                worst = max(worst, float(kept / want.abs().max().clamp(min=1e-12)))
        found[name] = worst
    return found


def _in_float64(case: Case, device: str) -> tuple[Tensor, ...]:
    layer = Plain(case.shape[1], case.form, len(case.shape)).double().to(device).train(case.training)
    z, residual, dy = (case.tensor(device, seed).double() for seed in range(3))
    z.requires_grad_(case.training)
    residual.requires_grad_(case.training)
    added = [residual] if FORMS[case.form][1] else []
    y = layer(z, *added)
    return (y, *torch.autograd.grad(y, [z, *layer.parameters(), *added], dy)) if case.training else (y,)
