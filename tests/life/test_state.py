"""What a layer holds: torch's parameters and buffers and no others, statistics in a dtype of their own."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import batchnorm
from batchnorm import skips

NAN = float("nan")
HALVES = (torch.float16, torch.bfloat16)


def poisoned(layer, times=1):
    for _ in range(times):
        z = torch.randn(8, layer.num_features)
        z[0, 0] = NAN
        layer(z)
    return layer


def net(norm=batchnorm.BatchNorm1d, **options):
    return nn.Sequential(nn.Linear(3, 8), norm(8, **options), nn.ReLU(), nn.Linear(8, 2))


# -- no buffer beyond torch's ------------------------------------------------------------------------------


@pytest.mark.parametrize("track", [True, False])
def test_buffers_parameters_and_keys_are_torchs(track):
    ours = batchnorm.BatchNorm1d(3, track_running_stats=track)
    theirs = nn.BatchNorm1d(3, track_running_stats=track)
    if track:
        poisoned(ours)
    for names in (nn.Module.named_buffers, nn.Module.named_parameters):
        assert [n for n, _ in names(ours)] == [n for n, _ in names(theirs)]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours._buffers.keys() == theirs._buffers.keys()
    assert not any(isinstance(value, torch.Tensor) for value in ours.__dict__.values())


def test_a_domain_holds_torchs_buffers_too():
    layer = batchnorm.BatchNorm1d(3)
    with batchnorm.domain("fake"):
        poisoned(layer)
    assert list(layer.domains["fake"].state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]
    assert (layer.num_batches_skipped, layer.domains["fake"].num_batches_skipped) == (0, 1)


@pytest.mark.parametrize("engine", ["cpu", "aten"])
def test_skips_are_counted_by_every_engine(engine):
    if engine == "cpu" and batchnorm.kernels.cpu.engine is None:
        pytest.skip("the core is not built")
    with batchnorm.kernels.select.use(engine):
        layer = poisoned(batchnorm.BatchNorm1d(3), times=3)
        layer(torch.randn(8, 3))
    assert layer.num_batches_skipped == 3
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_skips_are_counted_in_a_compiled_graph_without_compiling_again(backend):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    layer = batchnorm.BatchNorm1d(3)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    compiled(torch.randn(8, 3))
    z = torch.randn(8, 3)
    z[0, 0] = NAN
    for _ in range(2):
        compiled(z)
    assert layer.num_batches_skipped == 2
    assert torch.isfinite(layer.running_mean).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_examples_of_an_ensemble_are_counted_apart():
    layers = [batchnorm.BatchNorm1d(3) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(layers)
    z = torch.randn(3, 8, 3)
    z[1, 0, 0] = NAN

    def run(p, b, z):
        return torch.func.functional_call(layers[0], (p, b), (z,))

    torch.vmap(run)(params, buffers, z)
    counts = [skips.counted(mean) for mean in buffers["running_mean"]]
    assert counts == [0, 1, 0]


def test_a_copy_begins_at_zero_and_leaves_the_count_where_it_was():
    layer = poisoned(batchnorm.BatchNorm1d(3), times=2)
    file = io.BytesIO()
    torch.save(layer, file)
    assert b"skip" not in file.getvalue().replace(b"on_nonfinite", b"").replace(b"skipq", b"")
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.num_batches_skipped == 0
        poisoned(other)
        assert (other.num_batches_skipped, layer.num_batches_skipped) == (1, 2)


def test_other_statistics_begin_at_zero():
    layer = poisoned(batchnorm.BatchNorm1d(3))
    layer.load_state_dict(batchnorm.BatchNorm1d(3).state_dict())
    assert layer.num_batches_skipped == 0
    poisoned(layer).reset_running_stats()
    assert layer.num_batches_skipped == 0
    poisoned(layer).to_empty(device="cpu")
    assert layer.num_batches_skipped == 0


def test_the_count_goes_with_the_memory_it_is_of():
    gc.collect()
    # layers that other tests left alive
    others = sum(not weak.expired() for weak, _ in skips._counts.values())
    for _ in range(50):
        # the allocator gives the same addresses again and again
        layer = batchnorm.BatchNorm1d(3)
        assert layer.num_batches_skipped == 0
        poisoned(layer)
        assert layer.num_batches_skipped == 1
    del layer
    gc.collect()
    poisoned(batchnorm.BatchNorm1d(3))
    assert len(skips._counts) <= others + 2


def test_pruning_channels_in_place():
    # as structured pruning does it: index everything that has one value a channel
    model = poisoned(batchnorm.BatchNorm1d(8))
    keep = [0, 3, 5]
    for name, value in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(value.data[keep]))
    for name, value in list(model.named_buffers()):
        if value.dim():
            setattr(model, name, value[keep])
    model.num_features = 3
    reference = nn.BatchNorm1d(3)
    reference.load_state_dict(model.state_dict())
    z = torch.randn(16, 3)
    torch.testing.assert_close(model(z), reference(z))
    torch.testing.assert_close(model.running_var, reference.running_var)
    poisoned(model)
    assert model.num_batches_skipped == 1


def test_pruning_by_torch():
    layer = batchnorm.BatchNorm1d(8)
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(torch.randn(4, 8)).sum().backward()
    prune.remove(layer, "weight")
    assert int((layer.weight == 0).sum()) == 4


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_averaged_model_of_torchs_layer_takes_ours(momentum):
    theirs, ours = net(nn.BatchNorm1d, momentum=momentum), net(momentum=momentum)
    averaged = torch.optim.swa_utils.AveragedModel(theirs, use_buffers=True)
    for _ in range(3):
        ours(torch.randn(16, 3) + 2)
        averaged.update_parameters(ours)
    torch.testing.assert_close(averaged.module[1].running_mean.shape, ours[1].running_mean.shape)
    assert float(averaged.module[1].running_mean.abs().sum()) > 0


@pytest.mark.parametrize("poison", [(), (0,), (2,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("engine", ["cpu", "aten"])
def test_the_plain_average_needs_no_count_of_its_own(poison, engine):
    if engine == "cpu" and batchnorm.kernels.cpu.engine is None:
        pytest.skip("the core is not built")
    batches = torch.randn(6, 16, 2) * 3 + 1
    for i in poison:
        batches[i, 0, 0] = NAN
    layer = batchnorm.BatchNorm1d(2, momentum=None)
    with batchnorm.kernels.select.use(engine):
        for batch in batches:
            # a stop in between: what counts is all in the buffers
            layer = copy.deepcopy(layer)
            layer(batch)
    expected = None
    for k, batch in enumerate(batches, 1):
        mean = batch[:, 0].mean()
        if torch.isfinite(mean):
            expected = mean if expected is None else expected + (mean - expected) / k
    torch.testing.assert_close(layer.running_mean[0], expected)
    torch.testing.assert_close(layer.running_mean[1], batches[:, :, 1].mean())


def test_a_model_library_loads_it_without_garbage(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "norms-of-ours"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.norm = batchnorm.BatchNorm1d(4, momentum=None)
            self.half_norm = batchnorm.freeze(batchnorm.BatchNorm1d(4))
            self.post_init()

        def forward(self, z):
            return self.norm(z)

    model = Model(Config())
    model(torch.randn(8, 4))
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, *HALVES):
        again = Model.from_pretrained(tmp_path, dtype=dtype)
        assert again.norm.weight.dtype == dtype
        assert again.half_norm.frozen_statistics
        for norm in (again.norm, again.half_norm):
            assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        again.train()(torch.randn(8, 4, dtype=dtype))
        assert again.norm.running_mean.dtype == torch.float32
        assert again.norm.num_batches_skipped == 0
        assert again.norm.num_batches_tracked == 2
        assert float((again.norm.running_mean - model.norm.running_mean).abs().max()) < 2


# -- dtypes ------------------------------------------------------------------------------------------------

WAYS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "to like": lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    "type": lambda m: m.type(torch.bfloat16),
    "apply": lambda m: m._apply(lambda t: t.half() if t.is_floating_point() else t),
    "empty": lambda m: m.to_empty(device="cpu"),
    "load half": lambda m: m.load_state_dict(_halved(m.state_dict()), assign=True) and m,
    "load": lambda m: m.load_state_dict(_halved(m.state_dict())) and m,
    "set": lambda m: setattr(m, "running_var", m.running_var.half()) or m,
    "copy": copy.deepcopy,
}


def _halved(state):
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


@given(ways=st.lists(st.sampled_from(sorted(WAYS)), min_size=1, max_size=5))
def test_statistics_are_float32_or_float64_whatever_happens(ways):
    layer = batchnorm.BatchNorm1d(3)
    layer.add_domain("other")
    for way in ways:
        layer = WAYS[way](layer) or layer
        for holder in (layer, layer.domains["other"]):
            assert holder.running_mean.dtype in (torch.float32, torch.float64)
            assert holder.running_var.dtype in (torch.float32, torch.float64)
        assert layer.weight.dtype == layer.bias.dtype
        if way in ("float", "double"):
            wanted = torch.float32 if way == "float" else torch.float64
            assert {t.dtype for t in layer.state_dict().values()} == {wanted, torch.int64}


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_default_dtype_is_that_of_parameters(default):
    torch.set_default_dtype(default)
    try:
        layer = batchnorm.BatchNorm1d(3)
        domain = layer.add_domain("other")
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == default
    wide = torch.float64 if default is torch.float64 else torch.float32
    assert layer.running_mean.dtype == layer.running_var.dtype == domain.running_var.dtype == wide


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_that_were_narrowed_behind_our_back_are_wide_when_they_are_used(half, training):
    # FSDP's mixed precision sets .data, model libraries write into _buffers
    layer = batchnorm.BatchNorm1d(3, momentum=1e-4).train(training)
    layer.running_mean.data = layer.running_mean.data.to(half)
    layer._buffers["running_var"] = layer.running_var.to(half)
    for _ in range(10):
        layer(torch.randn(8, 3, dtype=half))
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    # in half precision a step this small is lost
    assert bool((layer.running_var != 1).all()) == training


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_one_dtype_for_flat_vectors(half):
    model = net().to(half)
    assert len({p.dtype for p in model.parameters()}) == 1
    vector = parameters_to_vector(model.parameters())
    assert vector.dtype == half
    vector_to_parameters(vector + 1, model.parameters())
    assert torch.equal(parameters_to_vector(model.parameters()), vector + 1)
    model(torch.randn(8, 3, dtype=half)).sum().backward()
    assert all(p.grad.dtype == half for p in model.parameters())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "mask", "compiled", "compiled eval"])
def test_half_parameters_give_what_their_values_give_in_float32(half, mode):
    torch.compiler.reset()
    layer = batchnorm.BatchNorm1d(3, activation="silu").to(half)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    wide = copy.deepcopy(layer).float()
    z = torch.randn(8, 3, 5).to(half)
    dy = torch.randn(8, 3, 5).to(half)
    mask = torch.rand(8, 5) > 0.2 if mode == "mask" else None
    results = []
    for each, dtype in ((layer, half), (wide, torch.float32)):
        each.train("eval" not in mode)
        run = torch.compile(each, backend="aot_eager") if "compiled" in mode else each
        entered = z.detach().to(dtype).clone().requires_grad_()
        y = run(entered, None, mask)
        y.backward(dy.to(dtype))
        assert y.dtype == entered.grad.dtype == each.weight.grad.dtype == dtype
        results.append([t.float() for t in (y, entered.grad, each.weight.grad, each.bias.grad)])
    # everything is computed in float32 at least, and rounded once to the half type
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=torch.finfo(half).eps, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, wide.running_mean)
    torch.testing.assert_close(layer.running_var, wide.running_var)


def test_torchs_layer_and_back_in_half_precision():
    z = torch.randn(8, 3).half()
    model = nn.Sequential(nn.BatchNorm1d(3)).half()
    batchnorm.convert(model, to="batchnorm")(z)
    assert {t.dtype for t in model.buffers()} == {torch.float32, torch.int64}
    batchnorm.convert(model, to="torch")(z)
    assert {t.dtype for t in model.buffers()} == {torch.float16, torch.int64}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["mixed precision", "whole bfloat16"])
def test_sharded_parameters_have_one_dtype_and_statistics_stay_wide(way, tmp_path):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    half = torch.bfloat16
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        policy = MixedPrecision(half, half, half) if way == "mixed precision" else None
        made = net() if policy else net().to(half)
        model = FullyShardedDataParallel(made, mixed_precision=policy, device_id=torch.device("cpu"))
        z = torch.randn(16, 3, dtype=torch.float32 if policy else half)
        for _ in range(2):
            model(z).float().sum().backward()
        assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_statistics_that_were_narrowed_are_wide_again_in_a_compiled_graph_too():
    torch.compiler.reset()
    layer = batchnorm.BatchNorm1d(3)
    layer.running_var.data = layer.running_var.data.half()
    compiled = torch.compile(layer, backend="aot_eager")
    plain = batchnorm.BatchNorm1d(3)
    for _ in range(3):
        z = torch.randn(8, 3)
        torch.testing.assert_close(compiled(z), plain(z))
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_var, plain.running_var)
