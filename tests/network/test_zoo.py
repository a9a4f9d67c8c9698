"""Architectures that nobody wrote for this package: accelerate and fold give the answers of the given network."""

import copy

import pytest
import torch

import batchnorm

pytest.importorskip("transformers")
import zoo

# in seconds, together: residual sums, squeeze and excite, several branches, audio, a frozen backbone
FAST = ["ResNet, basic", "MobileNetV2", "TextNet", "Wav2Vec2-Conformer", "Table Transformer"]
# samples at places that it computes: rounding of float32 moves them (5e-13 in float64)
MAGNIFIES = {"Deformable DETR": 1e-3}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO]
)
def test_same_answers(name):
    seen = zoo.look(name)
    assert seen["found"] + seen["frozen"] > 0
    assert seen["called"] + len(seen["unseen"]) <= seen["found"]
    # float64 where the network takes it: what differs is the order of additions alone
    assert seen["eval"] < (1e-8 if seen["wide"] else 1e-4)
    assert seen["training"] < (1e-5 if seen["wide"] else 1e-2)
    assert seen["fold"] < MAGNIFIES.get(name, 1e-4)
    assert seen["fused"] >= seen["pairs"]
    assert seen["folded"] + len(seen["left"]) == seen["found"] + seen["frozen"]
    assert all(reason for _, reason in seen["left"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ResNet, basic", "Wav2Vec2-Conformer"])
def test_restored_to_the_last_attribute(name):
    model, _ = zoo.build(name)
    before = {n: (type(m), set(vars(m)), list(m._buffers)) for n, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    batchnorm.restore(batchnorm.accelerate(model))
    assert {n: (type(m), set(vars(m)), list(m._buffers)) for n, m in model.named_modules()} == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
