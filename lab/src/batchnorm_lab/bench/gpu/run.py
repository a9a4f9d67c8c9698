"""Rows, one by one: each stands alone, and costs nothing but itself where memory or a peer is missing."""

from __future__ import annotations

import gc
import json
import platform
from contextlib import suppress
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from batchnorm.errors import ArgumentError
from batchnorm.info import versions
from batchnorm.kernels import table
from batchnorm.kernels.contract import Norm
from batchnorm_lab.bench.gpu import peers, steps
from batchnorm_lab.bench.gpu.budget import Budget
from batchnorm_lab.bench.gpu.cases import FORMS, Case, cases
from batchnorm_lab.bench.gpu.clock import Device, Gpu, Processor, host_milliseconds, median, read

SECONDS = {False: 460.0, True: 85.0}
"""What a run may take: under 8 minutes, or 90 seconds with ``quick``."""

LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def provenance(device: Device) -> dict[str, Any]:
    """Say what was measured, on what, and when.

    Parameters
    ----------
    device : Device
        The one measured.

    Returns
    -------
    dict
        Versions, machine, date.
    """
    about: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    about |= {"machine": platform.machine(), "system": platform.system(), "versions": dict(versions())}
    if device.name == "cpu":
        return {
            **about,
            "device": "cpu, a dry run: no figure here says anything of a GPU",
            "architecture": "dry",
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        **about,
        "device": properties.name,
        "architecture": table.architecture(0),
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _gpu() -> Device:
    try:
        return Gpu()
    except RuntimeError as error:  # the context itself may find no memory, which torch tells otherwise
        if "out of memory" not in str(error):
            raise
        raise ArgumentError(
            "bench --gpu: the GPU has no memory left to measure with.",
            why=str(error).splitlines()[0],
            mend="end what else runs there, or choose another GPU with CUDA_VISIBLE_DEVICES.",
        ) from None


def _alone(row: dict[str, Any], body: Any) -> dict[str, Any]:
    """Run one row's body; whatever it raises is the row's result."""
    torch.compiler.reset()  # of one function only so many shapes are compiled, and every row has another
    try:
        return {**row, **body()}
    except torch.OutOfMemoryError as error:
        return {**row, "failed": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:
        return {**row, "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            with suppress(
                RuntimeError
            ):  # after an illegal access every call raises, and rows are still to be told
                torch.cuda.empty_cache()


def measure(case: Case, device: Device, rounds: int, dry: bool) -> dict[str, Any]:
    """Check and time one case.

    Parameters
    ----------
    case : Case
        What.
    device : Device
        Where.
    rounds : int
        Turns of each peer.
    dry : bool
        Compile without a code generator.

    Returns
    -------
    dict
        Errors over float64, readings, and what is missing and why.
    """
    wrong = peers.errors(case, device.name, dry)
    missing = {name: why for name, why in wrong.items() if isinstance(why, str)}
    checked = {name: off for name, off in wrong.items() if not isinstance(off, str)}
    missing |= {
        name: f"wrong: off by {off:.2g}"
        for name, off in checked.items()
        if not off <= LARGEST_ERROR[case.dtype]
    }
    calls = {name: peers.make(name, case, device.name, dry) for name in checked if name not in missing}
    calls[peers.COPY] = peers.copy_of(case, device.name)
    found = read(device, calls, rounds)
    missing |= {name: value for name, value in found.items() if isinstance(value, str)}
    readings = {name: value._asdict() for name, value in found.items() if not isinstance(value, str)}
    return {"errors": checked, "missing": missing, "readings": readings}


def measure_step(
    name: str, device: Device, rounds: int, batch: int, side: int, dry: bool, budget: Budget
) -> dict[str, Any]:
    """Time whole steps of a network, its variants interleaved.

    Parameters
    ----------
    name : str
        The network.
    device : Device
        Where.
    rounds, batch, side : int
        Turns, images, and their side.
    dry : bool
        A tiny network.
    budget : Budget
        Decides whether a variant is still begun.

    Returns
    -------
    dict
        Milliseconds a step, and bytes at the height, by variant; what failed and why.
    """
    made: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for variant in steps.VARIANTS:
        kind = f"{variant.split(',')[0]} step"
        if not budget.allows(kind):
            missing[variant] = "not begun: it would not have ended in time"
            continue
        try:
            with budget.part(kind):
                made[variant] = steps.make(name, variant, batch, side, device.name, dry)
                made[variant]()
        except Exception as error:
            made.pop(variant, None)
            missing[variant] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    times: dict[str, list[float]] = {variant: [] for variant in made}
    for _ in range(rounds):
        for variant, step in made.items():
            device.synchronize()
            times[variant].append(device.milliseconds(step, False))
    readings = {
        variant: {
            "milliseconds": median(times[variant]),
            "host": host_milliseconds(device, step, 1),
            "peak": device.peak(step),
        }
        for variant, step in made.items()
    }
    return {"missing": missing, "readings": readings}


def selection(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of `batchnorm.kernels.table` from the training rows measured.

    Parameters
    ----------
    rows : list of dict
        Of this run.
    about : dict
        Provenance, kept with each.

    Returns
    -------
    list of dict
        Those in which both our engines were measured.
    """
    found = []
    for row in rows:
        readings = row.get("readings", {})
        if "case" not in row or not {"torch", "triton"} <= set(readings):
            continue
        case: Case = row["case"]
        activation, added = FORMS[case.form]
        z = torch.empty(case.shape, dtype=case.dtype, device="meta")
        z = z.contiguous(memory_format=torch.channels_last) if case.channels_last else z
        key = table.key_of(
            z, Norm(1, 1e-5, None, None, z if added else None, activation), about["architecture"]
        )
        # the slower of cold and warm decides, host time where the host is what is waited for
        ratios = [
            max(readings["torch"][kind], readings["torch"]["host"])
            / max(readings["triton"][kind], readings["triton"]["host"])
            for kind in ("warm", "cold")
        ]
        found.append(
            {**key._asdict(), "over_torch": min(ratios), "device": about["device"], "date": about["date"]}
        )
    return found


def run(out: Path, quick: bool, dry: bool, console: Console) -> dict[str, Any]:
    """Measure everything, and write ``gpu.json``, ``gpu.md`` and ``measured.json``.

    Parameters
    ----------
    out : Path
        The folder for them.
    quick : bool
        90 seconds instead of 8 minutes.
    dry : bool
        On the CPU, with tiny shapes.
    console : rich.console.Console
        Where progress is told.

    Returns
    -------
    dict
        What ``gpu.json`` holds.

    Raises
    ------
    ArgumentError
        No GPU is here, or one without memory.
    """
    from batchnorm_lab.bench.gpu.report import markdown

    if not dry and not torch.cuda.is_available():
        raise ArgumentError(
            "bench --gpu: torch finds no CUDA or ROCm device here.",
            why=f"torch {torch.__version__} was built for {torch.version.cuda or torch.version.hip or 'no GPU'}.",
            mend="run it where a GPU is, or --dry-run to see that it works.",
        )
    budget = Budget(inf if dry else SECONDS[quick])
    device: Device = Processor() if dry else _gpu()
    about, rows, skipped = provenance(device), [], 0
    rounds = 2 if dry else 5 if quick else 15
    size = {"batch": 2, "side": 8} if dry else {"batch": 64 if quick else 128, "side": 224}
    networks = ("resnet50",) if quick else ("resnet50", "mobilenet_v2")
    for name in networks:
        row = {"step": name, **size}
        rows.append(
            _alone(row, lambda name=name: measure_step(name, device, rounds, dry=dry, budget=budget, **size))
        )
        console.print(f"{name}: {rows[-1].get('failed', 'measured')}")
    for case in cases(quick, dry):
        if not budget.allows("layer"):
            skipped += 1
            continue
        with budget.part("layer"):
            rows.append(_alone({"case": case}, lambda case=case: measure(case, device, rounds, dry)))
        console.print(f"{case.label}: {rows[-1].get('failed', 'measured')}")
    written = [{**row, "case": row["case"].label} if "case" in row else row for row in rows]
    result = {"about": about, "rows": written, "not_begun_for_lack_of_time": skipped}
    chosen = [] if dry else selection(rows, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(markdown(result), encoding="utf-8")
    note = "Rows of `batchnorm bench --gpu`."
    (out / "measured.json").write_text(
        json.dumps({"note": note, "rows": chosen}, indent=1) + "\n", encoding="utf-8"
    )
    console.print(
        f"written: {', '.join(str(out / name) for name in ('gpu.json', 'gpu.md', 'measured.json'))}"
    )
    return result
