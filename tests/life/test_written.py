"""What a tracer or an exporter records of a layer or of the operator: torch's batch norm and nothing of ours."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import batchnorm
from batchnorm.functional import batch_norm

# draft_export leaves its log open
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)

BATCH_NORMS = ("aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm", "aten._batch_norm")


def net(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        batchnorm.BatchNorm2d(4, **options),
        nn.Conv2d(4, 4, 1),
        batchnorm.BatchNorm2d(4, **options),
    )


def twin(model):
    """The same network of torch's layers."""
    made = copy.deepcopy(model)
    for i, layer in enumerate(made):
        if isinstance(layer, batchnorm.BatchNorm2d):
            theirs = nn.BatchNorm2d(
                4, layer.eps, layer.momentum, track_running_stats=layer.track_running_stats
            )
            theirs.load_state_dict(layer.state_dict())
            made[i] = theirs.train(layer.training)
    return made


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def assert_torchs(graph, norms=2):
    names = operators(graph)
    assert not any(name.startswith("batchnorm.") for name in names), names
    assert sum(name.startswith(BATCH_NORMS) for name in names) == norms, names


def jit(model, z):
    return torch.jit.trace(model, z)


def export(model, z):
    program = torch.export.export(model, (z,))
    assert_torchs(program.graph)
    return program.module()


def strict_export(model, z):
    program = torch.export.export(model, (z,), strict=True)
    assert_torchs(program.graph)
    return program.module()


def draft(model, z):
    program = torch.export.draft_export(model, (z,))
    assert_torchs(program.graph)
    return program.module()


def proxies(model, z):
    graph = make_fx(model)(z)
    assert_torchs(graph.graph)
    return graph


WRITERS = [jit, export, strict_export, draft, proxies]
SETTINGS = {
    "plain": {},
    "average": {"momentum": None},
    "without statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_other_data_give_what_torchs_layers_give(write, options, training):
    model = net(**options)
    model(torch.randn(8, 3, 6, 6) * 2 + 1)
    model.train(training)
    theirs = twin(model)
    written = write(model, torch.randn(8, 3, 6, 6))
    # what a writer does to the statistics while it writes is its own affair
    for holder in (written, model):
        held = dict(holder.named_buffers())
        for name, buffer in theirs.named_buffers():
            if name in held:
                held[name].copy_(buffer)
    for _ in range(2):
        z = torch.randn(8, 3, 6, 6) * 3 - 1
        torch.testing.assert_close(written(z), theirs(z), rtol=1e-4, atol=1e-5)
    # make_fx closes over the layers' own buffers
    moved = dict((model if write is proxies else written).named_buffers())
    for name, buffer in theirs.named_buffers():
        # an exported graph of inference drops the count, which it does not use
        if training or name in moved:
            torch.testing.assert_close(moved[name], buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("write", [jit, export, make_fx], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options",
    [{"activation": "silu"}, {"channel_dim": -1, "activation": "relu"}, {"virtual_batch_size": 4}],
    ids=str,
)
def test_what_stands_beside_it_is_visible(write, options, training):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batchnorm.BatchNorm2d(4, **options)

        def forward(self, z):
            return self.norm(z, residual=z * 0.5)

    block = Block().train(training)
    plain = copy.deepcopy(block)
    z = torch.randn(8, 4, 4, 4)
    written = write(block, z) if write is jit else None
    if write is make_fx:
        written = make_fx(block)(z)
        norms = 2 if training and "virtual_batch_size" in options else 1
        assert_torchs(written.graph, norms)
    elif write is export:
        written = torch.export.export(block, (z,)).module()
        assert not any("batchnorm" in name for name in operators(written.graph))
    for _ in range(2):
        z = torch.randn(8, 4, 4, 4) + 1
        torch.testing.assert_close(written(z), plain(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mask_is_written_with_torchs_operations(training):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3, on_nonfinite="raise")

        def forward(self, z, mask):
            return self.norm(z, mask=mask)

    model = Masked().train(training)
    plain = copy.deepcopy(model)
    z, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.3
    program = torch.export.export(model, (z, mask))
    traced = torch.jit.trace(copy.deepcopy(model), (z, mask), check_trace=False)
    assert not any("batchnorm" in name for name in operators(program.graph))
    assert "batchnorm::" not in str(traced.inlined_graph)
    z, mask = torch.randn(4, 3, 5) + 2, torch.rand(4, 5) > 0.5
    expected = plain(z, mask)
    torch.testing.assert_close(program.module()(z, mask), expected)
    torch.testing.assert_close(traced(z, mask), expected)


def noted(graph):
    """Operations with their arguments, and what an exporter notes beside each for tools that look for layers."""
    found = []
    for node in graph.nodes:
        layers = list(node.meta.get("nn_module_stack", {}).values())
        found.append((str(node.target), str(node.args), layers[-1:], node.meta.get("torch_fn")))
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "momentum": 0.3}, {"affine": False}], ids=str)
def test_an_exported_layer_cannot_be_told_from_torchs(training, options):
    def graph(of):
        layers = [
            nn.Conv2d(3, 4, 1),
            of.BatchNorm2d(4, **options),
            nn.ReLU(),
            nn.Flatten(2),
            of.BatchNorm1d(4),
        ]
        model = nn.Sequential(*layers).train(training)
        return torch.export.export(model, (torch.randn(4, 3, 5, 5),)).graph

    assert noted(graph(batchnorm)) == noted(graph(nn))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"eps": 1e-3}], ids=str)
def test_an_exported_call_of_the_operator_cannot_be_told_from_torchs(training, options):
    class Call(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, z):
            return self.function(z, self.mean, self.var, training=training, **options)

    def graph(function):
        found = torch.export.export(Call(function), (torch.randn(4, 3, 5),)).graph
        return [(str(node.target), str(node.args)) for node in found.nodes]

    assert graph(batch_norm) == graph(F.batch_norm)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_pt2e_quantization_aware_training_gives_torchs_numbers(activation, monkeypatch):
    pytest.importorskip("torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e import allow_exported_model_train_eval, qat_utils
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

    # torchao exports every pattern that it looks for, anew each time: minutes for kinds of convolution not in here
    for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
        search = getattr(qat_utils, name)
        monkeypatch.setattr(
            qat_utils, name, lambda m, kind, *a, f=search, **k: f(m, kind, *a, **k) if kind is F.conv2d else m
        )

    def run(of, **options):
        torch.manual_seed(0)
        norm = of.BatchNorm2d(8, **options)
        after = nn.Identity() if options else (nn.ReLU() if activation else nn.Identity())
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), norm, after, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        z = torch.randn(4, 8, 3, 10, 10)
        quantizer = X86InductorQuantizer().set_global(
            get_default_x86_inductor_quantization_config(is_qat=True)
        )
        prepared = prepare_qat_pt2e(torch.export.export(model, (z[0],)).module(), quantizer)
        allow_exported_model_train_eval(prepared)
        optimizer, given = torch.optim.SGD(prepared.parameters(), lr=0.05), []
        for batch in z:
            optimizer.zero_grad()
            given.append(prepared(batch))
            given[-1].square().sum().backward()
            optimizer.step()
        prepared.eval()
        given.append(prepared(z[0]))
        prepared.train()
        converted = convert_pt2e(prepared)
        allow_exported_model_train_eval(converted)
        converted.eval()
        given.append(converted(z[0]))
        kept = {k: v for k, v in prepared.state_dict().items() if "running" in k}
        called = [str(node.target) for node in converted.graph.nodes]
        assert not any("batch_norm" in name for name in called)  # it is in the convolution
        return [*given, *kept.values()], sorted(called)

    (have, ours), (want, theirs) = (
        run(batchnorm, **({"activation": activation} if activation else {})),
        run(nn),
    )
    assert ours == theirs
    for mine, torchs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_a_training_graph_of_torchs_quantization_goes_to_eval_and_back():
    pytest.importorskip("torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e import allow_exported_model_train_eval
    model = net()
    z = torch.randn(8, 3, 6, 6)
    exported = allow_exported_model_train_eval(torch.export.export(model, (z,)).module())
    model.load_state_dict(exported.state_dict())
    for _ in range(2):
        exported.train()
        model.train()
        torch.testing.assert_close(exported(z), model(z), rtol=1e-4, atol=1e-5)
        exported.eval()
        model.eval()
        before = {k: v.clone() for k, v in exported.state_dict().items() if "running" in k}
        torch.testing.assert_close(exported(z + 5), model(z + 5), rtol=1e-4, atol=1e-5)
        assert len(before) == 4
        for name, value in before.items():
            assert torch.equal(exported.state_dict()[name], value), f"{name} moved at inference"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_operator_is_torchs_in_a_symbolic_trace(training):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, z):
            return batch_norm(
                z, self.mean, self.var, training=training, activation="relu", residual=z, channel_dim=-1
            )

    graph = torch.fx.symbolic_trace(Own())
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert torch.nn.functional.batch_norm in called
    z = torch.randn(4, 5, 3)
    torch.testing.assert_close(graph(z), Own()(z))


def test_a_symbolic_trace_refuses_what_torch_has_no_call_for():
    class Own(nn.Module):
        def forward(self, z, mask):
            return batch_norm(z, None, None, training=True, mask=mask)

    with pytest.raises(batchnorm.TraceError, match="symbolic trace"):
        torch.fx.symbolic_trace(Own())


def test_what_torchs_operator_cannot_do_is_refused():
    z = torch.randn(4, 3)
    with pytest.raises(batchnorm.ArgumentError, match="running_var_correction=0"):
        torch.jit.trace(batchnorm.BatchNorm1d(3, running_var_correction=0), z)
    layer = batchnorm.BatchNorm1d(3)
    with batchnorm.accumulate(layer), pytest.raises(batchnorm.ArgumentError, match="inside accumulate"):
        torch.jit.trace(layer, z)
    with pytest.raises(batchnorm.TraceError, match=r"torch\.jit\.trace") as caught:
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), layer))
    assert 'to="torch"' in str(caught.value)
    with pytest.raises(batchnorm.TraceError, match=r"torch\.jit\.script"):
        torch.jit.script(batch_norm)


def _run(file, z):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()), full_check=True)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: z.numpy()})[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["legacy", "dynamo"]
)
def test_an_onnx_file_is_valid_and_gives_the_same(dynamo, dtype):
    model = net(activation="relu")
    model(torch.randn(8, 3, 6, 6) * 2 + 1)
    model = model.eval().to(dtype)
    z = torch.randn(8, 3, 6, 6).to(dtype)
    file = io.BytesIO()
    torch.onnx.export(model, (z,), file, dynamo=dynamo)
    z = torch.randn(8, 3, 6, 6).to(dtype)
    loose = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(_run(file, z), model(z), **loose)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_legacy_exporter_in_training_writes_a_batch_norm_and_no_constant():
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    z = torch.randn(8, 3, 6, 6)
    torch.onnx.export(
        net(), (z,), file, dynamo=False, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False
    )
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    norms = [node for node in nodes if node.op_type == "BatchNormalization"]
    assert len(norms) == 2
    assert all(a.i == 1 for node in norms for a in node.attribute if a.name == "training_mode")
