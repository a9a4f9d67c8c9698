"""Every tool by one set of rules: inplace=, where=, forward=, inputs, records, hints, wrapped networks."""

import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm
from batchnorm.errors import ArgumentError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ONE = [{"moving_mean": np.ones(4), "moving_variance": np.ones(4)}][0]


class Network(nn.Module):
    """Two norms, and a layer without one; called in a way of its own where ``pair`` is given."""

    def __init__(self, norm=batchnorm.BatchNorm2d):
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 4, 3), norm(4)
        self.b, self.bn2 = nn.Conv2d(4, 4, 3), norm(4)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.a(x)))
        x = torch.relu(self.bn2(self.b(x)))
        return self.d(torch.relu(self.c(x)))


class Odd(Network):
    """Takes what no loader gives."""

    def forward(self, x, scale):
        return super().forward(x * scale["by"])


def odd(model, batch):
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch, {"by": 1.0})


# what every tool is called with; its default of inplace; whether where= and forward= make sense
TOOLS = {
    "insert": (lambda m, x, **k: batchnorm.insert(m, x, **k), False, True, True),
    "fold": (lambda m, x, **k: batchnorm.fold(m, x, **k), False, True, True),
    "accelerate": (lambda m, x, **k: batchnorm.accelerate(m, x, **k), True, False, True),
    "convert": (lambda m, x, **k: batchnorm.convert(m, "torch", example=x, **k), True, True, True),
    "calibrate": (lambda m, x, **k: batchnorm.calibrate(m, [x], **k), True, True, True),
    "freeze": (lambda m, x, **k: batchnorm.freeze(m, **k), True, True, False),
    "unfreeze": (lambda m, x, **k: batchnorm.unfreeze(m, **k), True, True, False),
    "synchronize": (lambda m, x, **k: batchnorm.synchronize(m, **k), True, True, False),
    "desynchronize": (lambda m, x, **k: batchnorm.desynchronize(m, **k), True, False, False),
    "restore": (lambda m, x, **k: batchnorm.restore(m, **k), True, False, False),
    "load_keras": (lambda m, x, **k: batchnorm.load_keras(m, {"bn1": ONE}, **k), True, False, False),
    "adapt": (lambda m, x, **k: batchnorm.adapt(m, x, **k).model, True, True, True),
}
QUICK = [name for name in TOOLS if name != "accelerate"]  # it compiles, for seconds


def looks(model):
    """All that a tool could change, but for the record."""
    tensors = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    plain = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }
    classes = [(path, type(module)) for path, module in model.named_modules()]
    return tensors, plain, classes, [p.requires_grad for p in model.parameters()]


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def given_to(name):
    model = Network()
    if name == "unfreeze":
        batchnorm.freeze(model)
    if name in ("desynchronize",):
        batchnorm.synchronize(model)
    if name == "restore":
        batchnorm.freeze(model)  # which it leaves, and says so
    return model


@pytest.mark.parametrize("name", QUICK)
def test_inplace_says_whether_the_given_network_is_changed(name):
    tool, default, *_ = TOOLS[name]
    assert inspect.signature(getattr(batchnorm, name)).parameters["inplace"].default is default
    for inplace in (False, True):
        model = given_to(name)
        before, parts = looks(model), list(model.modules())
        norms = {model.bn1, model.bn2}
        result = tool(model, X, inplace=inplace)
        assert (result is model) is inplace
        if not inplace:
            assert same(before, looks(model))
            assert list(model.modules()) == parts
            assert not set(result.modules()) & set(parts)
        elif name not in ("restore",):
            assert not same(before, looks(model))
            assert set(parts) - norms <= set(model.modules())


@pytest.mark.parametrize("name", ["accelerate"])
def test_accelerate_leaves_the_given_network_where_it_is_told_to(name):
    model = Network()
    result = batchnorm.accelerate(model, inplace=False)
    assert result is not model
    assert batchnorm.record(result).of("accelerated")
    assert not batchnorm.record(model).rows
    assert getattr(model, "_compiled_call_impl", None) is None


@pytest.mark.parametrize("name", [name for name in QUICK if TOOLS[name][2]])
@pytest.mark.parametrize("where", ["bn1", lambda path, module: path == "bn1"], ids=["pattern", "predicate"])
def test_where_says_which_part(name, where):
    if name == "insert":
        where = "a" if isinstance(where, str) else (lambda path, module: path == "a")
    model = given_to(name) if name != "insert" else nn.Sequential()
    if name == "insert":
        model = nn.ModuleDict({})
        model = Network(norm=lambda channels: nn.Identity())
    rows = batchnorm.record(TOOLS[name][0](model, X, where=where)).rows
    done = {row.path for row in rows if row.tool == name and row.action != "left alone"}
    assert done == {"a" if name == "insert" else "bn1"}


@pytest.mark.parametrize("name", QUICK)
def test_every_tool_writes_a_record_that_any_terminal_prints(name):
    result = TOOLS[name][0](given_to(name), X)
    rows = [row for row in batchnorm.record(result) if row.tool == name]
    assert rows
    assert all(row.kind and row.action for row in rows)
    str(batchnorm.record(result)).encode("ascii")


def test_parameter_groups_are_recorded_once():
    model = Network()
    for _ in range(2):
        batchnorm.param_groups(model, 0.1)
    rows = batchnorm.record(model).of("without decay")
    assert [row.path for row in rows] == ["a", "bn1", "b", "bn2", "c", "d"]


@pytest.mark.parametrize("name", [name for name in QUICK if TOOLS[name][3]])
def test_a_tuple_means_the_same_to_every_tool_and_so_does_forward(name):
    tool = TOOLS[name][0]
    plain = batchnorm.record(tool(Network(), X)).counts()
    label = torch.zeros(4)
    for batch in ((X, label), [X, label], (X,), {"x": X}, ({"x": X}, label)):
        assert batchnorm.record(tool(Network(), batch)).counts() == plain, batch
    assert batchnorm.record(tool(Odd(), (X, {"by": 1.0}, label))).counts() == plain
    assert batchnorm.record(tool(Odd(), (X, label), forward=odd)).counts() == plain
    with pytest.raises(ArgumentError, match=rf"{name}: forward=3"):
        tool(Network(), X, forward=3)


def test_data_that_is_a_batch_with_its_label_is_refused_and_a_split_tensor_is_several_batches():
    for tool in (batchnorm.calibrate, lambda m, data: batchnorm.insert(m, data=data)):
        with pytest.raises(ArgumentError, match="one batch with a label"):
            tool(Network(), (X, torch.zeros(4)))
    assert "2 calls" in batchnorm.record(batchnorm.calibrate(Network(), X.split(2))).rows[0].detail


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one process."""
    address = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = [AveragedModel, torch.compile, nn.DataParallel, nn.parallel.DistributedDataParallel]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_the_network_inside_of_a_wrapper_is_meant(wrap, alone):
    for name in ("fold", "insert"):
        model = Network()
        result = TOOLS[name][0](wrap(model), X)
        assert type(result) is Network
        assert [row.path for row in batchnorm.record(result)] == [
            row.path for row in batchnorm.record(TOOLS[name][0](model, X))
        ]
        with pytest.raises(ArgumentError, match="inplace=True"):
            TOOLS[name][0](wrap(model), X, inplace=True)
    for name in ("calibrate", "freeze", "adapt", "convert", "synchronize", "load_keras"):
        wrapped = wrap(Network())
        assert TOOLS[name][0](wrapped, X) is wrapped
        paths = ["bn1"] if name == "load_keras" else ["bn1", "bn2"]
        assert [row.path for row in batchnorm.record(wrapped)] == paths, name
    calibrated, plain = wrap(Network()), Network()
    plain.load_state_dict(batchnorm.convert(calibrated, "batchnorm", inplace=False).state_dict())
    batchnorm.calibrate(calibrated, X.split(2), where="bn1")
    batchnorm.calibrate(plain, X.split(2), where="bn1")
    inside = batchnorm.convert(calibrated, "batchnorm", inplace=False)
    assert torch.equal(inside.bn1.running_var, plain.bn1.running_var)


def by_fully_shard(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


def by_fsdp(model):
    return torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def by_fsdp_within(model):
    model.a = by_fsdp(model.a)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [by_fully_shard, by_fsdp, by_fsdp_within])
def test_a_sharded_network_is_measured_where_it_is_and_not_copied_or_given_other_layers(shard, alone):
    for name in ("fold", "insert"):
        for inplace in (False, True):
            with pytest.raises(ArgumentError, match=f"{name}: the network is sharded"):
                TOOLS[name][0](shard(Network()), X, inplace=inplace)
    with pytest.raises(ArgumentError, match="calibrate: the network is sharded"):
        batchnorm.calibrate(shard(Network()), [X], inplace=False)
    plain = Network()
    sharded = shard(copy.deepcopy(plain))
    batchnorm.calibrate(plain, X.split(2))
    assert batchnorm.calibrate(sharded, X.split(2)) is sharded
    assert [row.path for row in batchnorm.record(sharded)] == ["bn1", "bn2"]
    measured = dict(sharded.named_buffers())
    for name, value in plain.named_buffers():
        found = next(v for k, v in measured.items() if k.endswith(name))
        torch.testing.assert_close(found, value)


@pytest.mark.filterwarnings("ignore")
def test_gamma_and_beta_in_one_parameter_with_others_cannot_be_spared(alone):
    with pytest.raises(ArgumentError, match="param_groups: FullyShardedDataParallel has made one"):
        batchnorm.param_groups(by_fsdp(Network()), 0.1)
    decays, spared = batchnorm.param_groups(by_fully_shard(Network()), 0.1)
    assert [p.dim() for p in decays["params"]] == [4] * 4
    assert len(spared["params"]) == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_every_tool_refuses_a_scripted_network_in_the_same_words(name):
    scripted = torch.jit.trace(Network(nn.BatchNorm2d).eval(), X)
    with pytest.raises(ArgumentError, match=f"{name}: the network is scripted"):
        TOOLS[name][0](scripted, X)


def test_restore_takes_off_what_accelerate_put_on_and_names_what_stays():
    model = batchnorm.accelerate(batchnorm.freeze(Network(), where="bn2"))
    assert getattr(batchnorm.restore(model), "_compiled_call_impl", None) is None
    assert not batchnorm.record(model).of("accelerated")
    left = [row for row in batchnorm.record(model) if row.tool == "restore"]
    assert [(row.path, "unfreeze" in row.reason) for row in left] == [("bn2", True)]
    batchnorm.restore(batchnorm.unfreeze(model))
    assert not [row for row in batchnorm.record(model) if row.tool == "restore"]


def test_freeze_and_unfreeze_are_inverse():
    for affine in (False, True):
        model = Network()
        model.bn1.weight.requires_grad_(False)
        before = looks(model)
        batchnorm.unfreeze(batchnorm.freeze(model, affine=affine))
        assert same(before, looks(model))


def test_hints_name_ways_out_that_exist():
    """Every call and argument that a message of the package tells to use is there."""
    texts = []
    for path in Path(batchnorm.__file__).parent.rglob("*.py"):
        texts += re.findall(r'mend=\(?f?"([^"]+)"', path.read_text()) + re.findall(
            r"mend=f?'([^']+)'", path.read_text()
        )
    assert len(texts) > 60
    calls = [(name, text) for text in texts for name in re.findall(r"batchnorm\.(\w+)\(", text)]
    assert len(calls) >= 5
    for name, text in calls:
        assert hasattr(batchnorm, name), text
    for text in texts:
        for name, argument in re.findall(r"\b(\w+)\((?:model|network|net), (?:\w+, )?(\w+)=", text):
            if hasattr(batchnorm, name):
                assert argument in inspect.signature(getattr(batchnorm, name)).parameters, text


def test_a_copy_of_a_network_with_a_record_has_it():
    model = batchnorm.freeze(Network())
    assert batchnorm.record(copy.deepcopy(model)).rows == batchnorm.record(model).rows
