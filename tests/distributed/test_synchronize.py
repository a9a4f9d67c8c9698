"""From plain layers to pooling ones and back: the same objects, with nothing lost on the way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError, PoolingError


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: batch norm, dropout and activation in one layer."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.plain = nn.BatchNorm2d(4, momentum=None)
        self.ours = batchnorm.BatchNorm2d(4, activation="relu", on_nonfinite="raise")
        self.sync = nn.SyncBatchNorm(4, eps=1e-3)
        self.act = BatchNormAct2d(4)
        self.shared = self.act
        self.none = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4)
        self.seen = []
        self.plain.register_forward_hook(lambda *_: self.seen.append("plain"))
        self.sync.register_forward_pre_hook(lambda *_: self.seen.append("sync"))

    def forward(self, x):
        for layer in (
            self.conv,
            self.plain,
            self.ours,
            self.sync,
            self.act,
            self.none,
            self.shared,
            self.instance,
        ):
            x = layer(x)
        return x


def held(model):
    """Everything of every layer, by identity where it is an object that others may hold."""
    table = {}
    for path, module in model.named_modules(remove_duplicate=False):
        values = {
            k: v for k, v in module.__dict__.items() if not k.startswith(("_modules", "_batchnorm_record"))
        }
        for name in ("_parameters", "_buffers"):
            values[name] = {k: (id(v), None if v is None else v._version) for k, v in values[name].items()}
        values = {k: (dict(v) if isinstance(v, dict) else v) for k, v in values.items()}
        table[path] = (id(module), type(module), values)
    return table


def test_there_and_back_leaves_class_hooks_parameters_and_options_as_they_were():
    model = Zoo()
    before, keys = held(model), list(model.state_dict())
    assert batchnorm.synchronize(model) is model
    assert {type(m).__name__ for m in model.modules() if getattr(m, "process_group", None)} == {
        "BatchNorm2d",
        "PooledBatchNorm",
        "BatchNormAct2d",
    }
    assert model.act is model.shared
    assert model.act.pooled_as == "act"
    assert list(model.state_dict()) == keys
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert type(model.instance) is nn.InstanceNorm2d
    done = batchnorm.record(model).of("synchronized")
    assert [row.path for row in done] == ["plain", "ours", "sync", "act", "none"]
    assert batchnorm.desynchronize(model) is model
    assert held(model) == before
    assert len(batchnorm.record(model).of("desynchronized")) == 5


def test_twice_there_is_once_there():
    model = Zoo()
    before = held(model)
    batchnorm.synchronize(batchnorm.synchronize(model), "a name")
    assert model.plain.process_group == ("a name",)
    batchnorm.desynchronize(model)
    assert held(model) == before


def test_a_layer_made_with_a_group_keeps_it_both_ways():
    model = nn.Sequential(batchnorm.BatchNorm1d(2, process_group="few"), nn.BatchNorm1d(2))
    batchnorm.synchronize(model)
    assert [m.process_group for m in model] == [("few",), ("world",)]
    batchnorm.desynchronize(model)
    assert model[0].process_group == ("few",)


def test_what_is_not_understood_is_left_alone_with_the_reason():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + x.mean()

    class Strange(nn.BatchNorm2d):
        def forward(self, x):
            return x * self.weight.view(1, -1, 1, 1)

    model = nn.Sequential(Odd(2), Strange(2), nn.LazyBatchNorm2d(), nn.Linear(2, 2))
    batchnorm.synchronize(model)
    assert type(model[1]) is Strange
    assert {row.path for row in batchnorm.record(model).left_alone} == {"1", "2"}


def test_the_wrong_group_changes_nothing():
    model = Zoo()
    before = held(model)
    with pytest.raises(ArgumentError, match="no process group"):
        batchnorm.synchronize(model, 7)
    with pytest.raises(ArgumentError, match="own"):
        batchnorm.synchronize(model, "own")
    assert held(model) == before


def test_a_synchronized_model_is_copied_pickled_averaged_and_loaded_without_a_group():
    model = batchnorm.synchronize(Zoo())
    model.seen = None
    model.plain._forward_hooks.clear()
    model.sync._forward_pre_hooks.clear()
    x = torch.randn(3, 2, 4, 4)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    copies.append(averaged.module)
    wanted = copy.deepcopy(model).train()(x)
    for twin in copies:
        assert torch.equal(twin.train()(x), wanted)
        assert twin.plain.process_group == ("world",)
        assert type(batchnorm.desynchronize(twin).sync) is nn.SyncBatchNorm
    plain = Zoo()
    plain.load_state_dict(model.state_dict())


def test_an_option_without_counterpart_in_the_old_class_keeps_the_layer_ours():
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)))
    model[0].activation = "relu"
    batchnorm.desynchronize(model)
    assert type(model[0]) is batchnorm.BatchNorm1d
    assert model[0].process_group is None
    assert "activation" in batchnorm.record(model).reason("0")


def test_eval_fold_and_export_are_those_of_the_plain_model():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    plain[1].running_mean.uniform_(-1, 1)
    pooled = batchnorm.synchronize(copy.deepcopy(plain)).eval()
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(pooled(x), plain(x))
    torch.testing.assert_close(batchnorm.fold(pooled)(x), batchnorm.fold(plain)(x))
    programs = [torch.export.export(m, (x,)) for m in (plain, pooled)]
    targets = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert targets[0] == targets[1]
    torch.testing.assert_close(programs[1].module()(x), plain(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_of_a_synchronized_model_is_that_of_the_plain_one():
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    pooled = batchnorm.synchronize(copy.deepcopy(plain)).eval()
    x = torch.randn(2, 2, 3, 3)
    kinds = []
    for model in (plain, pooled):
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        kinds.append([node.op_type for node in program.model.graph])
    assert kinds[0] == kinds[1]
    assert kinds[0]


# -- groups ----------------------------------------------------------------------------------------------------
def halves(rank, how):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, dtype=torch.float64)[rank]
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    if how == "name":
        mine = mine.group_name
    elif how == "mesh":
        from torch.distributed.device_mesh import init_device_mesh

        mine = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "pool"))["pool"]
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)).double(), mine)
    other = groups[1 - rank // 2]
    refused = False
    try:
        batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)), other)
    except ArgumentError as error:
        refused = "no member" in str(error)
    z = x.clone().requires_grad_()
    model(z).pow(3).sum().backward()
    return z.grad, model[0].running_var, refused


@pytest.mark.parametrize("how", ["group", "name", "mesh"])
def test_each_half_pools_by_itself(how):
    found = run(halves, 4, how)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    for half in (0, 1):
        layer = nn.BatchNorm1d(2).double()
        z = x[2 * half : 2 * half + 2].reshape(6, 2).clone().requires_grad_()
        layer(z).pow(3).sum().backward()
        torch.testing.assert_close(torch.cat([f[0] for f in found[2 * half : 2 * half + 2]]), z.grad)
        for f in found[2 * half : 2 * half + 2]:
            torch.testing.assert_close(f[1], layer.running_var)
            assert f[2]


def two_levels(rank, sizes):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "node"))
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64)
    layer = batchnorm.BatchNorm1d(3, dtype=torch.float64, process_group=mesh)
    z = x.split(sizes)[rank].clone().requires_grad_()
    layer(z).pow(3).sum().backward()
    # one layer too many, on one rank of one node: the other node is told
    odd = batchnorm.BatchNorm1d(5 if rank == 1 else 3, process_group=mesh)
    try:
        odd(torch.randn(4, odd.num_features))
    except PoolingError as error:
        return z.grad, layer.running_var, str(error), len(layer.process_group)
    return None


def test_a_mesh_pools_within_nodes_and_then_between_them():
    sizes = [3, 0, 1, 5]
    found = run(two_levels, 4, sizes, timeout=8)
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64).requires_grad_()
    layer = nn.BatchNorm1d(3).double()
    layer(x).pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([f[0] for f in found]), x.grad)
    for _, var, text, levels in found:
        assert levels == 2
        assert torch.equal(var, found[0][1])
        torch.testing.assert_close(var, layer.running_var)
        assert "rank 1" in text


def before_init(rank, where):
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)))
    x = torch.arange(8.0).view(4, 2)
    alone = copy.deepcopy(model)(x[rank::2]).detach()
    results = []
    for i in range(2):  # a job that begins anew, as after an elastic restart
        dist.init_process_group("gloo", init_method=f"file://{where}{i}", rank=rank, world_size=2)
        results.append(copy.deepcopy(model)(x[rank::2]).detach())
        dist.destroy_process_group()
    return alone, *results


def test_synchronize_may_come_before_the_process_group_and_outlive_it(tmp_path):
    found = run(before_init, 2, str(tmp_path / "store"), init=False)
    x = torch.arange(8.0).view(4, 2)
    wanted = nn.BatchNorm1d(2)(x).detach()
    for rank, (alone, *pooled) in enumerate(found):
        torch.testing.assert_close(alone, nn.BatchNorm1d(2)(x[rank::2]).detach())
        for y in pooled:
            torch.testing.assert_close(y, wanted[rank::2])


def gone(rank):
    group = dist.new_group([0, 1])
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)), group)
    dist.destroy_process_group(group)
    with pytest.raises(PoolingError, match="no process group named"):
        model(torch.randn(3, 2))


def test_a_group_that_is_no_more_is_named():
    run(gone, 2)


def own(rank):
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)), "own")
    before = dist.group.WORLD._get_sequence_number_for_group()
    model(torch.randn(3, 2))
    return dist.group.WORLD._get_sequence_number_for_group() - before


def test_a_group_of_its_own_leaves_the_other_alone():
    assert run(own, 2) == [0, 0]
