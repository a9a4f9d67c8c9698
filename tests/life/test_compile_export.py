"""torch.compile without a graph break or a second compilation, torch.export, and ONNX."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm

MASK = torch.tensor([[True, True, True, False, False]] * 3 + [[True, False, True, True, True]] * 3)
RESIDUAL = torch.linspace(-2, 2, 90).view(6, 3, 5)

# name -> options of the layer, arguments of the call
CASES = {
    "plain": ({}, {}),
    "momentum none": ({"momentum": None}, {}),
    "biased": ({"running_var_correction": 0}, {}),
    "not affine": ({"affine": False}, {}),
    "not tracking": ({"track_running_stats": False}, {}),
    "activation": ({"activation": "relu"}, {}),
    "residual": ({}, {"residual": RESIDUAL}),
    "relu6 and residual": ({"activation": "relu6"}, {"residual": RESIDUAL}),
    "gelu and residual": ({"activation": "gelu"}, {"residual": RESIDUAL}),
    "channels last": ({"channel_dim": -1}, {}),
    "mask": ({}, {"mask": MASK}),
    "mask, input out": ({"activation": "silu"}, {"mask": MASK, "masked_output": "input"}),
    "running": ({"on_single_value": "running"}, {}),
    "running, mask": ({"on_single_value": "running"}, {"mask": MASK}),
    "propagate": ({"on_nonfinite": "propagate"}, {}),
    "raise": ({"on_nonfinite": "raise"}, {}),
    "raise, mask": ({"on_nonfinite": "raise"}, {"mask": MASK}),
    "ghost": ({"virtual_batch_size": 2}, {}),
    "ghost, mask, none": ({"virtual_batch_size": 4, "momentum": None}, {"mask": MASK}),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same_state(ours, theirs):
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def steps(module, eager, inputs, arguments, backend="aot_eager"):
    """Run both over the inputs; the compiled one must not be compiled again on the way."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for z in inputs:
            leaves = [z.clone().requires_grad_() for _ in range(2)]
            outputs = [run(leaf, **arguments) for run, leaf in zip((compiled, eager), leaves, strict=True)]
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5, equal_nan=True)
            gradients = [
                torch.autograd.grad(y.square().sum(), [leaf, *m.parameters()])
                for y, leaf, m in zip(outputs, leaves, (module, eager), strict=True)
            ]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert_same_state(module, eager)


def batches(case, count=3):
    z = torch.randn(count, 6, 3, 5)
    # torch's own relu6 has another derivative at NaN when it is compiled
    if "raise" not in case and "relu6" not in case:
        z[1, 0, 0, 0] = float("nan")  # a bad batch is no reason to compile again
    return z.mT.contiguous() if case == "channels last" else z


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_every_option_compiles_whole_once_and_gives_eager_numbers(case, training):
    options, arguments = CASES[case]
    layer = batchnorm.BatchNorm1d(3, **options).train(training)
    steps(layer, copy.deepcopy(layer), batches(case), arguments)


class TwoDomains(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = batchnorm.BatchNorm1d(3)
        self.bn.add_domain("fake")

    def forward(self, z):
        y = self.bn(z)
        with batchnorm.domain("fake"):
            return y + self.bn(2 * z)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_domains_inside_the_graph(training):
    model = TwoDomains().train(training)
    steps(model, copy.deepcopy(model), batches(""), {})


def test_a_domain_around_the_graph_compiles_once_a_domain():
    layer = batchnorm.BatchNorm1d(3)
    for name in ("real", "fake"):
        layer.add_domain(name)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z = torch.randn(6, 3)
    for i in range(3):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            for name in ("real", "fake"):
                with batchnorm.domain(name):
                    torch.testing.assert_close(compiled(z + i), eager(z + i))
    assert_same_state(layer, eager)


def test_a_domain_that_begins_in_a_compiled_step():
    layer = batchnorm.BatchNorm1d(3)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with batchnorm.domain("new"):
        for _ in range(2):
            z = torch.randn(6, 3)
            torch.testing.assert_close(compiled(z), eager(z))
    assert_same_state(layer, eager)


def test_frozen_layers_and_the_way_back():
    layer = batchnorm.freeze(batchnorm.BatchNorm1d(3, activation="relu"))
    layer.running_mean.uniform_()
    steps(layer, copy.deepcopy(layer), batches(""), {})
    batchnorm.unfreeze(layer)
    torch.compiler.reset()  # what is frozen is part of the graph
    steps(layer, copy.deepcopy(layer), batches(""), {})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_accumulate_around_compiled_calls(backend):
    layer = batchnorm.BatchNorm1d(3, momentum=None)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for z in torch.randn(3, 2, 6, 3):
            for module, run in ((layer, compiled), (eager, eager)):
                with batchnorm.accumulate(module):
                    for micro in z:
                        run(micro)
    assert layer.num_batches_tracked == 3
    assert_same_state(layer, eager)


@pytest.mark.parametrize(
    ("backend", "ghost"),
    [
        ("aot_eager", None),
        ("aot_eager", 3),
        ("inductor", None),
        pytest.param("inductor", 3, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_the_graph_is_the_eager_error_and_moves_nothing(backend, ghost):
    layer = batchnorm.BatchNorm1d(3, on_nonfinite="raise", virtual_batch_size=ghost)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    z = torch.randn(6, 3, 5)
    compiled(z)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    bad = z.clone()
    bad[5, 1, 0] = float("inf")
    with pytest.raises(batchnorm.NonFiniteError, match="1 of 3 channels"):
        compiled(bad)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    if backend == "aot_eager":
        with pytest.raises(batchnorm.TooFewValuesError, match="the mask keeps 0"):
            compiled(z, mask=torch.zeros(6, 5, dtype=torch.bool))
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    "case", ["plain", "relu6 and residual", pytest.param("ghost, mask, none", marks=pytest.mark.slow)]
)
def test_inductor_gives_eager_numbers(case):
    options, arguments = CASES[case]
    layer = batchnorm.BatchNorm1d(3, **options)
    steps(layer, copy.deepcopy(layer), batches(case), arguments, backend="inductor")


def test_batches_of_changing_size_settle_on_one_dynamic_graph():
    layer = batchnorm.BatchNorm1d(3)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 7, 12, 5):
            z = torch.randn(n, 3)
            torch.testing.assert_close(compiled(z), eager(z))
    assert_same_state(layer, eager)


def test_a_whole_network_compiles_in_training():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        batchnorm.BatchNorm2d(4, activation="relu"),
        nn.Conv2d(4, 4, 3, bias=False),
        batchnorm.BatchNorm2d(4, momentum=None),
    )
    steps(net, copy.deepcopy(net), torch.randn(3, 2, 3, 8, 8), {})


def test_autocast_inside_a_graph():
    net = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4))
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for z in torch.randn(2, 8, 3):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = compiled(z), eager(z)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert net[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(net[1].running_mean, eager[1].running_mean, rtol=1e-2, atol=1e-2)


class Called(nn.Module):
    """A layer with its arguments, as a model would call it."""

    def __init__(self, case):
        super().__init__()
        options, self.arguments = CASES[case]
        self.bn = batchnorm.BatchNorm1d(3, **options)

    def forward(self, z):
        return self.bn(z, **self.arguments)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "case", ["plain", "relu6 and residual", "channels last", "mask", "ghost", "momentum none"]
)
def test_an_exported_program_runs_again_with_the_same_answers(case, training, strict):
    model = Called(case).train(training)
    eager = copy.deepcopy(model)
    data = batches("raise")
    data = data.mT.contiguous() if case == "channels last" else data
    program = torch.export.export(model, (data[0],), strict=strict)
    again = program.module()
    for z in data:
        torch.testing.assert_close(again(z), eager(z))
    state = again.state_dict()
    # strict export drops a buffer that the program does not use
    there = {name: tensor for name, tensor in eager.state_dict().items() if name in state}
    assert {name for name in eager.state_dict() if training or "running" in name} <= set(there)
    for name, tensor in there.items():
        torch.testing.assert_close(state[name], tensor)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_exported_program_is_saved_and_loaded(training, tmp_path):
    model = Called("relu6 and residual").train(training)
    eager = copy.deepcopy(model)
    z = torch.randn(6, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the serializer uses what torch itself deprecates
        torch.export.save(torch.export.export(model, (z,)), tmp_path / "program.pt2")
        again = torch.export.load(tmp_path / "program.pt2").module()
    for _ in range(2):
        torch.testing.assert_close(again(z), eager(z))


ONNX_CASES = {
    "plain": (batchnorm.BatchNorm1d, {}, (4, 3), False),
    "relu": (batchnorm.BatchNorm2d, {"activation": "relu"}, (2, 3, 4, 5), False),
    "residual": (batchnorm.BatchNorm2d, {"activation": "gelu"}, (2, 3, 4, 5), True),
    "channels last": (batchnorm.BatchNorm1d, {"channel_dim": -1, "activation": "silu"}, (2, 5, 3), False),
    "volume": (batchnorm.BatchNorm3d, {"affine": False}, (2, 3, 2, 3, 4), False),
}


@pytest.mark.parametrize("case", ONNX_CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnxruntime_gives_the_answers_of_the_exported_model(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    cls, options, shape, with_residual = ONNX_CASES[case]
    layer = cls(3, **options)
    for _ in range(3):
        layer(torch.randn(shape) * 2 + 1)
    layer.eval()
    arguments = tuple(torch.randn(shape) for _ in range(1 + with_residual))
    path = tmp_path / "model.onnx"
    torch.onnx.export(layer, arguments, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
    (answer,) = session.run(None, feed)
    with torch.no_grad():
        np.testing.assert_allclose(answer, layer(*arguments).numpy(), rtol=1e-5, atol=1e-5)
    import onnx

    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "BatchNormalization" in kinds, f"exporters and their users look for the operator: {kinds}"
