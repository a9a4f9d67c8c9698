"""Settings that every test shares."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "batchnorm",
    deadline=None,
    max_examples=50,
    # the same examples on every machine: a failure in CI is a failure here
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("batchnorm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
