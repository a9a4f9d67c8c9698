"""Tracers, exporters, quantizers and other compilers are given the plain model, and make of it what they would."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, image, prepared
from test_accelerated_answers import called
from torch import fx, nn

from batchnorm import accelerate, record, restore


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_and_symbolic_trace_see_the_plain_model():
    model, plain, x = called()
    wanted = plain(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), wanted)
    traced = fx.symbolic_trace(model)
    assert any(node.op == "call_module" and node.target == "bn" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), wanted)


@pytest.mark.parametrize("training", [True, False])
def test_export_records_torchs_own(training):
    model, plain, x = called(training=training)
    program = torch.export.export(model, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("batchnorm::" in name or "batchnorm." in name for name in names)
    assert any("batch_norm" in name for name in names)
    torch.testing.assert_close(program.module()(x), plain(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export(tmp_path, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, plain, x = called(lambda: NETWORKS["functional"][0]())
    model, plain, x = model.float(), plain.float(), x.float()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_an_outer_compiler_decides(training):
    model, plain, x = called(NETWORKS["basic"][0], training)
    graphs = []

    def outer(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    before = len(model._compiled_call_impl.compiled.graphs)
    torch.testing.assert_close(torch.compile(model, backend=outer, fullgraph=True)(x), plain(x))
    assert len(graphs) == 1
    assert sum("batch_norm" in name for name in graphs[0]) == 5
    # the very graph that it is given of the plain model, so it makes the very same program of it
    torch._dynamo.reset()
    torch.compile(plain, backend=outer, fullgraph=True)(x)
    assert graphs[0] == graphs[1]
    assert len(model._compiled_call_impl.compiled.graphs) == before


@pytest.mark.slow
def test_inductor_outside():
    model, plain, x = called(NETWORKS["basic"][0], True)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), plain(x))


def test_a_model_compiled_already_is_left_to_its_compiler():
    model = prepared(NETWORKS["functional"][0])
    model.compile(backend="eager")
    assert "that compiler decides" in record(accelerate(model)).reason("")
    compiled = torch.compile(prepared(NETWORKS["functional"][0]), backend="eager")
    assert "that compiler decides" in record(accelerate(compiled)).reason("")


def test_a_model_compiled_by_its_user_later_says_so_and_can_be_restored():
    model, plain, x = called()
    model.compile(backend="eager")
    torch.testing.assert_close(model(x), plain(x))
    (row,) = record(model).left_alone
    assert "Module.compile" in row.reason
    assert "copy" not in row.reason
    theirs = model._compiled_call_impl
    assert restore(model)._compiled_call_impl is theirs
    assert not record(model).rows


def test_the_backend_by_itself():
    from batchnorm.network.accelerate.backend import batchnorm as backend

    plain = prepared(NETWORKS["basic"][0])
    model = torch.compile(copy.deepcopy(plain), backend=backend, fullgraph=True)
    torch.testing.assert_close(model(image()), plain(image()))


@pytest.mark.filterwarnings("ignore")
def test_quantization_on_graphs_finds_torchs_layers():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    made = prepared(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).float().eval()
    x = image().float()
    results = [
        prepare_fx(copy.deepcopy(m), get_default_qconfig_mapping(), (x,)) for m in (made, accelerate(made))
    ]
    torch.testing.assert_close(results[1](x), results[0](x))
    assert str(results[1].graph) == str(results[0].graph)


def exported(model, x):
    """The program as text, and what each step says of where it comes from: quantizers find layers by these."""
    program = torch.export.export(model, (x,)).module()
    notes = [
        [str(node.meta.get(key)) for key in ("nn_module_stack", "torch_fn", "source_fn_stack")]
        for node in program.graph.nodes
    ]
    return str(program.graph), notes, program


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_is_that_of_the_plain_model_to_the_notes_beside_its_steps(training):
    model, plain, x = called(NETWORKS["basic"][0], training)
    (ours, our_notes, _), (theirs, their_notes, _) = exported(model, x), exported(plain, x)
    assert ours == theirs
    assert our_notes == their_notes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantization_after_training_of_exported_programs():
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def quantized(model):
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        ready = prepare_pt2e(exported(model, image().float())[2], quantizer)
        for seed in range(2):
            ready(image(seed).float())
        made = convert_pt2e(ready)
        return str(made.graph), made(image(5).float())

    plain = prepared(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).float().eval()
    model = accelerate(copy.deepcopy(plain))
    model(image().float())
    (graph, ours), (their_graph, theirs) = quantized(model), quantized(plain)
    assert graph == their_graph
    assert "quantize" in graph
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantization_aware_training_of_exported_programs(monkeypatch):
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e import qat_utils
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

    def quantized(model):
        x = image().float()
        quantizer = X86InductorQuantizer().set_global(
            get_default_x86_inductor_quantization_config(is_qat=True)
        )
        torch.manual_seed(0)
        ready = prepare_qat_pt2e(torch.export.export(model.train(), (x,)).module(), quantizer)
        for seed in range(2):
            ready(image(seed).float()).sum().backward()
        made = convert_pt2e(ready)
        return str(made.graph), made(x)

    plain = prepared(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).float()
    model = accelerate(copy.deepcopy(plain))
    for network in (model, plain):
        network(image().float())  # in training, where statistics move
    (graph, ours), (their_graph, theirs) = quantized(model), quantized(plain)
    assert graph == their_graph
    assert "quantize" in graph
    torch.testing.assert_close(ours, theirs)
