"""What is installed, which engine serves what and why, and with how many threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from batchnorm.kernels import cpu, select

PACKAGES = (
    "batchnorm",
    "torch",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "jinja2",
    "onnx",
    "onnxruntime",
    "jax",
    "triton",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def version(package: str) -> str:
    """Give the version of an installed package.

    Parameters
    ----------
    package : str
        Its distribution name.

    Returns
    -------
    str
        ``"not installed"`` where it is not.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[tuple[str, str]]:
    """List what runs here with its version.

    Returns
    -------
    list of (str, str)
        Python, then packages that this one uses or is compared with.
    """
    return [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)]


def engines() -> list[tuple[str, str]]:
    """Say for each device and dtype which engine would serve it, and why.

    Returns
    -------
    list of (str, str)
        Tensor, and engine with reason. Accelerators are only named where torch has one.
    """
    found: list[tuple[str, str]] = []
    for device in select.devices():
        by_reason: dict[str, list[str]] = {}
        refused = ""
        for dtype in DTYPES:
            try:
                z = torch.empty((2, 2), dtype=dtype, device=device)
            except (RuntimeError, TypeError) as error:  # a dtype that this device does not have
                refused = str(error).splitlines()[0]
                continue
            by_reason.setdefault(select.reason(z), []).append(str(dtype).removeprefix("torch."))
        found += [(f"{device.type}, {', '.join(names)}", why) for why, names in by_reason.items()]
        if not by_reason:
            found.append((device.type, f"torch can make no tensor there: {refused}"))
    if len(select.devices()) == 1:
        found.append(("accelerator", "none here, or this torch was built without one"))
    return found


def core() -> list[tuple[str, str]]:
    """Describe the C++ core: instruction set, compiler, threads, and the pool of output buffers.

    Returns
    -------
    list of (str, str)
        What the core says of itself.
    """
    return [(name, str(value)) for name, value in cpu.info().items()]


def threads() -> list[tuple[str, str]]:
    """Count processors and threads.

    Returns
    -------
    list of (str, str)
        What torch computes with, and what this process may run on.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    return [
        ("torch.get_num_threads()", str(torch.get_num_threads())),
        ("processors of this process", str(usable)),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]


def sections() -> dict[str, list[tuple[str, str]]]:
    """Tell all of it.

    Returns
    -------
    dict
        Title to lines of a name and what it is.
    """
    return {"versions": versions(), "engine": engines(), "C++ core": core(), "threads": threads()}
