"""Tests compute with our kernels, though their networks are so small that torch's would serve."""

import pytest

from batchnorm.network.accelerate import norm_calls


@pytest.fixture(autouse=True)
def _our_kernels_whatever_the_size(monkeypatch):
    monkeypatch.setattr(norm_calls, "ALONE", -1)
    monkeypatch.setattr(norm_calls, "JOINED", -1)
