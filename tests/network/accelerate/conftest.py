"""Tests compute with our kernels, though their networks are so small that torch's would serve."""

import pytest

from batchnorm.network.accelerate import call


@pytest.fixture(autouse=True)
def _our_kernels_whatever_the_size(monkeypatch):
    monkeypatch.setattr(call, "ALONE", -1)
    monkeypatch.setattr(call, "JOINED", -1)
