"""Launching a compiled kernel without going through triton's own look-up, which costs 11 to 30 us a call.

What that look-up would find again each time is kept under a key: the kernel, its constants, and of every argument
what its machine code depends on. Three things are checked at each call, since nothing else would: that pointers
the code takes for multiples of 16 are, that integers fit the width it was compiled for, and that the tensors'
device is the current one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""How every kernel is compiled: fused multiply-adds said aloud, for triton's default is to change; and, where the
compiler can be told, as many registers as leave room for four programs of 4 warps on a processor."""
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 128

_handles: dict[tuple, Any] = {}

observers: list[Callable[[str, tuple[int, ...], tuple, dict[str, Any]], None]] = []
"""Called with name, grid, arguments and constants of every launch; for tests and benchmarks."""


def _class(argument: Any) -> Any:
    """What machine code depends on: dtype, alignment and (on ROCm) reach of a pointer, width of an integer."""
    if isinstance(argument, Tensor):
        near = torch.version.hip is None or argument.untyped_storage().size() < 2**31
        return argument.dtype, argument.data_ptr() % 16 == 0, near
    if isinstance(argument, int):
        return -(2**31) <= argument < 2**31
    return None if argument is None else float


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple,
    constants: dict[str, Any],
    warps: int,
) -> None:
    """Launch a kernel on the current stream of a device.

    Parameters
    ----------
    kernel : triton.JITFunction
        Its parameters are the arguments, then the constants, in this order.
    grid : tuple of int
        Programs along each axis.
    device : torch.device
        Where every tensor lies.
    arguments : tuple
        Tensors, integers, floats and None.
    constants : dict
        Values of the ``tl.constexpr`` parameters.
    warps : int
        Warps a program.
    """
    for observe in observers:
        observe(kernel.fn.__name__, grid, arguments, constants)
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, arguments, constants, warps)
        return
    _launch(kernel, grid, device, arguments, constants, warps)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple,
    constants: dict[str, Any],
    warps: int,
) -> None:
    key = (kernel, device.index, warps, *constants.values(), *map(_class, arguments))
    handle = _handles.get(key)
    if handle is None:
        # the first time through triton, which compiles and launches
        _handles[key] = kernel[grid](*arguments, **constants, num_warps=warps, **OPTIONS)
        return
    handle[(*grid, 1, 1)[:3]](*arguments, *constants.values())
