"""The engine of the C++ core; None where it was not built."""

from __future__ import annotations

import torch

from batchnorm.kernels.contract import Engine

engine: Engine | None = None
absence: str | None = "not built"
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
