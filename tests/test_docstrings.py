"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import batchnorm
import batchnorm_lab

MODULES = [
    info.name
    for package in (batchnorm, batchnorm_lab)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith(("_core", "__main__"))
    # a peer of the benchmarks that need not be installed
    and (find_spec("jax") or not info.name.endswith("jax_peer"))
    # what stands on a package that need not be installed
    and (find_spec("triton") or ".triton." not in info.name)
    and (find_spec("lightning") or not info.name.endswith(".lightning"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed
