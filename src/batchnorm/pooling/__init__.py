"""Statistics over ranks: what stands between the two halves of a step (`batchnorm.steps.Between`).

A layer asks here whether its input is spread over ranks. What serves it then is imported then: most processes
never pool, and need not wait for it.
"""

from __future__ import annotations

import sys

from torch import Tensor


def is_placed(z: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Parameters
    ----------
    z : Tensor
        Any.

    Returns
    -------
    bool
        Without importing what defines them.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(z, module.DTensor)
