"""A whole training step of ResNet-50 and MobileNetV2 on 224x224 images: torch's batch norm against ours.

The two share weights and data and take turns, step by step; a step is forward, loss, backward and SGD.
``before``: torch.nn. ``after``: our layers written into the model with activation and residual fused.
``accelerated``: the ``before`` model, unchanged but for ``batchnorm.accelerate``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def main() -> None:
    """Time what the arguments ask for, and print or add rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="resnet50,mobilenet_v2")
    parser.add_argument("--variants", default="before,after,accelerated")
    parser.add_argument("--layouts", default="nchw")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", default="8,16", help="batch of ResNet-50 and of MobileNetV2")
    parser.add_argument("--out", type=Path, help="CSV to which rows are added")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from batchnorm_lab.bench.steps import time_steps

    batches = dict(zip(("resnet50", "mobilenet_v2"), map(int, options.batches.split(",")), strict=True))
    started = time.perf_counter()
    for layout in options.layouts.split(","):
        for name in options.models.split(","):
            time_steps(
                name,
                options.variants.split(","),
                batch=batches[name],
                size=options.size,
                layout=layout,
                threads=options.threads,
                rounds=options.rounds,
                path=options.out,
            )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
