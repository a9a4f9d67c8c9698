"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import batchnorm

MODULES = [
    info.name
    for info in pkgutil.walk_packages(batchnorm.__path__, "batchnorm.")
    if not info.name.endswith(("_core", "__main__"))
    # a peer of the benchmarks that need not be installed
    and (find_spec("jax") or not info.name.endswith("jax_peer"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed
