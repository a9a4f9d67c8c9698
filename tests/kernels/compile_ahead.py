"""Compile the kernels for GPUs that are not here, and print what the machine code needs; run by test_compiled.py.

Run without TRITON_INTERPRET. Prints one JSON line a configuration.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm.kernels.triton import launch, merges, sweeps, whole
from batchnorm.kernels.triton.engine import _constants, _held, _merging
from batchnorm.kernels.triton.plan import Plan, plan

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
INTEGERS = [
    *(
        "rows",
        "columns",
        "inner",
        "channels",
        "total",
        "rows_a_program",
        "size",
        "parts_inner",
        "entries",
        "width",
    ),
]
TENSORS = ["z", "residual", "y", "dy", "dz", "dresidual"]
VECTORS = [
    *("gamma", "beta", "mean", "spread", "inv_std", "var", "partial", "running_mean", "running_var"),
    *("sum_dy", "sum_dy_zhat"),
]

SHAPES = {
    "rows of 64": ("RC", 100_352, 64, 1),
    "rows of 24": ("RC", 100_352, 24, 1),
    "rows of 3, the last not full": ("RC", 99_999, 3, 1),
    "rows of 37": ("RC", 4_096, 37, 1),
    "7x7": ("NCS", 32, 2048, 49),
    "7x7, as many as are held": ("NCS", 64, 512, 49),
    "14x14": ("NCS", 256, 1024, 196),
    "56x56": ("NCS", 32, 64, 3136),
    "64x64x64": ("NCS", 2, 32, 262_144),
    "a small matrix": ("RC", 256, 512, 1),
    "as many rows as are held": ("RC", 512, 256, 1),
    "37 channels, held": ("RC", 500, 37, 1),
}


def configurations(dtype: str, p: Plan) -> Iterator[tuple[Any, set[str], dict[str, Any], int]]:
    """Kernel, what is None, constants, warps: every form that the engine launches."""
    swept, held = _constants(p), _held(p)
    for act, left_out in (
        (0, {"residual", "bits"}),
        (1, {"residual", "bits"}),
        (1, {"residual"}),
        (8, {"bits"}),
    ):
        absent = left_out - ({"residual"} if "bits" not in left_out else set())
        if p.whole:
            yield whole.forward, absent | {"tracked"}, {**held, "GUARD": True, "ACT": act}, p.warps
            yield whole.backward, left_out, {**held, "TRAINING": True, "ACT": act}, p.warps
        else:
            yield sweeps.normalize, absent, {**swept, "VARIANCE": act == 0, "ACT": act}, p.warps
            yield sweeps.reduce, left_out, {**swept, "ACT": act}, p.warps
            yield sweeps.apply, left_out | {"count"}, {**swept, "ACT": act}, p.warps
    if not p.whole:
        yield sweeps.statistics, set(), swept, p.warps
    constants = _merging(p)[1]
    yield merges.merge_statistics, {"tracked"}, {**constants, "GUARD": True, "RAW": False}, 4
    yield merges.merge_sums, set(), constants, 4
    if dtype == "bfloat16":
        yield from rarer(p, swept, held, constants)


def rarer(
    p: Plan, swept: dict, held: dict, merging: dict
) -> Iterator[tuple[Any, set[str], dict[str, Any], int]]:
    """Constant statistics, a count from other ranks, no affine map, a plain average, statistics alone."""
    plain = {"residual", "bits"}
    if p.whole:
        yield whole.forward, plain | {"bump"}, {**held, "GUARD": False, "ACT": 0}, p.warps
        yield whole.backward, plain | {"gamma", "beta"}, {**held, "TRAINING": False, "ACT": 1}, p.warps
        yield sweeps.count_skips, set(), {}, 4
        return
    constant = {"count", "sum_dy", "sum_dy_zhat"}
    alone = {"tracked", "inv_std", "running_mean", "running_var"}
    yield sweeps.apply, plain | constant, {**swept, "ACT": 1}, p.warps
    yield sweeps.apply, plain, {**swept, "ACT": 0}, p.warps
    yield sweeps.statistics, {"tracked"}, swept, p.warps
    absent = plain | {"gamma", "beta", "skips", "var"}
    yield sweeps.normalize, absent, {**swept, "VARIANCE": False, "ACT": 0}, p.warps
    yield merges.merge_statistics, set(), {**merging, "GUARD": False, "RAW": False}, 4
    yield merges.merge_statistics, alone, {**merging, "GUARD": False, "RAW": True}, 4


def compile_one(kernel: Any, absent: set[str], constants: dict, warps: int, dtype: str, arch: int) -> dict:
    signature, constant, attributes = {}, dict(constants), {}
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(TENSORS, POINTER[dtype])
    types |= dict.fromkeys(VECTORS, "*fp32") | {
        "tracked": "*i64",
        "bump": "*i64",
        "count": "*fp64",
        "bits": "*u8",
    }
    types |= {"skips": "*i64"}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constant.setdefault(name, None)
            continue
        signature[name] = types.get(name, "fp32")
        if signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constant, attributes)
    options = {"num_warps": warps, **launch.OPTIONS}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", said)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    code = made.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "atomics": bool(re.search(r"\b(atom|red)\.", code)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.(v4\.[bu]32|v2\.[bu]64)", code)),
        "wide_stores": len(re.findall(r"st\.global\S*\.(v4\.[bu]32|v2\.[bu]64)", code)),
    }


def main(architectures: list[int], shapes: list[str], dtypes: list[str]) -> None:
    for name in shapes:
        for dtype in dtypes:
            p = plan(*SHAPES[name], 4 if dtype == "float32" else 2)
            aligned = p.align * (4 if dtype == "float32" else 2) == 16
            for kernel, absent, constants, warps in configurations(dtype, p):
                for arch in architectures:
                    found = compile_one(kernel, absent, constants, warps, dtype, arch)
                    about = {"shape": name, "dtype": dtype, "kernel": kernel.fn.__name__, "arch": arch}
                    about |= {"act": constants.get("ACT"), "absent": sorted(absent), "warps": warps}
                    print(json.dumps({**about, "aligned": aligned, **found}), flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1].split(",")], sys.argv[2].split(";"), sys.argv[3].split(","))
