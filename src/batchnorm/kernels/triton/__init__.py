"""Our GPU kernels, in Triton. Nothing here imports triton before a tensor is to be served by it.

`plan` decides from a tensor's shape how programs share it, `sweeps`, `merges` and `whole` are the kernels, `launch`
calls what was compiled, and `engine` is the `batchnorm.kernels.contract.Engine` made of them.
"""

from __future__ import annotations

import importlib
import os
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm.kernels.contract import Engine, Norm

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@cache
def load() -> tuple[Engine | None, str]:
    """Import the engine.

    Returns
    -------
    engine : Engine or None
        None where triton is missing or broken.
    reason : str
        Why it is not there; empty where it is.
    """
    try:
        return importlib.import_module("batchnorm.kernels.triton.engine").engine, ""
    except ImportError as error:
        return None, f"triton is not installed ({error})"
    except Exception as error:  # whatever a broken installation raises must not reach a training step
        return None, f"triton is installed and cannot be used ({type(error).__name__}: {error})"


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU; for tests.

    Returns
    -------
    bool
        ``TRITON_INTERPRET`` is set.
    """
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def refusal(z: Tensor) -> str:
    """Say why the kernels cannot serve a tensor.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.

    Returns
    -------
    str
        Empty where they can.
    """
    if z.dtype not in DTYPES:
        return f"its kernels do not know {z.dtype}"
    if not z.is_cuda and not (z.is_cpu and interpreted()):
        return f"its kernels run on CUDA and ROCm devices, not on {z.device.type!r}"
    try:
        return _fault(z.device)
    except _NotNow as why:
        return str(why)


class _NotNow(Exception):
    """Kernels could not be tried, for a reason that may pass: it must not be remembered."""


@cache
def _fault(device: torch.device) -> str:
    """Say why kernels do not run on a device; empty where the smallest of them did.

    A compiler that is missing, or too old for the GPU, shows only when something is compiled.
    """
    engine, reason = load()
    if engine is None:
        return reason
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise _NotNow("its kernels cannot be tried for the first time while a graph is captured")
    try:
        # whatever watches or fakes the caller's tensors must not meet this one
        with _disable_current_modes(), torch.no_grad():
            one = torch.ones((1, 1), device=device)
            engine.infer(one, Norm(1, 1.0), one[0], one[0])
    except Exception as error:
        said = f"triton is installed and cannot be used ({type(error).__name__}: {error})"
        if "out of memory" in str(error):
            raise _NotNow(said) from None
        return said
    return ""
