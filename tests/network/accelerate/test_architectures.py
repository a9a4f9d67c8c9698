"""Architectures that nobody wrote for this package: accelerated, each gives the answers of the given network."""

import architectures
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_same_answers_and_every_norm_accounted_for(name):
    pytest.importorskip("timm", exc_type=ImportError)
    seen = architectures.look(name)
    assert seen["called"] > 0
    assert all(seen["left"].values())
    assert all(seen["single"].values())
    # a norm that is neither called nor left alone with a reason is one whose forward nobody calls
    given, x = architectures.build(name)
    for path in seen["unseen"]:
        given.get_submodule(path).register_forward_pre_hook(lambda m, i: pytest.fail("it is called"))
    for training in (True, False):
        given.train(training)(x)
