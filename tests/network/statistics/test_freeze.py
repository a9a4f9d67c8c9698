"""Frozen statistics and frozen gamma and beta: through ``.train()``, saving, loading and torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm


def model():
    return nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4), nn.Linear(4, 4), batchnorm.BatchNorm1d(4))


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def step(net):
    net(torch.randn(8, 3)).square().sum().backward()


def test_train_thaws_a_torch_layer_in_eval_and_not_a_frozen_one_of_ours():
    theirs = nn.Sequential(nn.BatchNorm1d(3).eval())
    ours = batchnorm.freeze(nn.Sequential(batchnorm.BatchNorm1d(3)))
    for net in (theirs, ours):
        net.train()
        net(torch.randn(8, 3) + 5)
    assert theirs[0].num_batches_tracked == 1
    assert ours[0].num_batches_tracked == 0
    assert torch.equal(ours[0].running_mean, torch.zeros(3))


def test_frozen_statistics_normalize_in_train_mode_as_in_eval_and_gamma_still_learns():
    net = batchnorm.freeze(model())
    z = torch.randn(8, 3)
    assert torch.equal(net.train()(z), net.eval()(z))
    net.train()
    step(net)
    assert all(norm.weight.grad is not None for norm in norms(net))
    one = net[1]
    assert torch.isfinite(one(torch.randn(1, 4))).all(), "one sample is enough for a frozen layer"


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_frozen_shows_in_repr_and_holds_still(statistics, affine):
    net = batchnorm.freeze(model(), statistics=statistics, affine=affine)
    for norm in norms(net):
        assert ("frozen=" in repr(norm)) == (statistics or affine)
        assert ("statistics" in repr(norm).partition("frozen=")[2]) == statistics
        assert norm.weight.requires_grad is norm.bias.requires_grad is not affine
    step(net.train())
    for norm in norms(net):
        assert (norm.num_batches_tracked == 0) == statistics
        assert (norm.weight.grad is None) == affine
    batchnorm.unfreeze(net)
    step(net)
    for norm in norms(net):
        assert norm.num_batches_tracked == 1 + (not statistics)
        assert norm.weight.requires_grad
        assert "frozen" not in repr(norm)


def test_unfreeze_thaws_only_what_it_is_told_and_what_freeze_froze():
    net = batchnorm.freeze(model(), affine=True)
    batchnorm.unfreeze(net, affine=False)
    assert not any(norm.weight.requires_grad or norm.frozen_statistics for norm in norms(net))
    own = batchnorm.BatchNorm1d(3)
    own.weight.requires_grad_(False)  # the user's own doing
    batchnorm.unfreeze(batchnorm.freeze(own))
    assert not own.weight.requires_grad


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("written", ["frozen", "free", "torch"])
@pytest.mark.parametrize("held", ["frozen", "free"])
def test_loading_neither_thaws_nor_freezes(written, held, strict, assign, tmp_path):
    # a checkpoint is what was learned; what is held still is decided where it is loaded
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    source = {"frozen": batchnorm.freeze(model(), affine=True), "free": model(), "torch": theirs}[written]
    for norm in norms(source):
        norm.running_mean.fill_(3.0)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == set(theirs.state_dict())
    net = batchnorm.freeze(model(), affine=True) if held == "frozen" else model()
    net[1].bias.requires_grad_(False)  # the user's own doing
    before = [
        (p.requires_grad, n.frozen_statistics, n.frozen_affine) for n in norms(net) for p in n.parameters()
    ]
    net.load_state_dict(state, strict=strict, assign=assign)
    after = [
        (p.requires_grad, n.frozen_statistics, n.frozen_affine) for n in norms(net) for p in n.parameters()
    ]
    assert after == before
    net.train()(torch.randn(8, 3))
    for norm in norms(net):
        assert (norm.running_mean == 3.0).all() == (held == "frozen"), "what is held still is what was loaded"


def test_copies_and_the_whole_saved_model_stay_frozen(tmp_path):
    net = batchnorm.freeze(model(), affine=True)
    torch.save(net, tmp_path / "model.pt")
    for again in (copy.deepcopy(net), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert all(
            n.frozen_statistics and n.frozen_affine and not n.weight.requires_grad for n in norms(again)
        )


def test_update_bn_resets_and_thaws_torchs_frozen_statistics_and_not_ours():
    loader = [torch.randn(16, 3) + 4 for _ in range(4)]
    theirs, ours = nn.Sequential(nn.BatchNorm1d(3).eval()), nn.Sequential(batchnorm.BatchNorm1d(3))
    batchnorm.freeze(ours)
    for net in (theirs, ours):
        net[0].running_mean.fill_(2.0)
    torch.optim.swa_utils.update_bn(loader, theirs)
    assert float((theirs[0].running_mean - 2).abs().min()) > 1
    batchnorm.calibrate(ours, loader, progress=False)
    torch.optim.swa_utils.update_bn(loader, ours)
    assert torch.equal(ours[0].running_mean, torch.full((3,), 2.0))


@pytest.mark.parametrize("verb", ["freeze", "unfreeze"])
def test_a_model_without_a_norm_of_ours_is_an_error(verb):
    run = getattr(batchnorm, verb)
    with pytest.raises(batchnorm.ArgumentError, match="no batch norm"):
        run(nn.Linear(3, 3))
    mixed = nn.Sequential(batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(batchnorm.ArgumentError, match=r"torch\.nn's own") as caught:
        run(mixed)
    assert caught.value.at == "1"
    assert not mixed[0].frozen_statistics


def test_freezing_statistics_that_are_not_there_changes_nothing():
    net = nn.Sequential(batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(batchnorm.ArgumentError, match="no statistics to freeze") as caught:
        batchnorm.freeze(net, affine=True)
    assert caught.value.at == "1"
    assert not net[0].frozen_statistics
    assert net[0].weight.requires_grad
    batchnorm.freeze(net, statistics=False, affine=True)
    assert not net[1].weight.requires_grad


def test_param_groups_hold_every_learning_parameter_once_and_decay_no_norm():
    net = nn.Sequential(model(), nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
    net[0][2].weight = net[0][2].weight  # a shared parameter stays one
    net.append(net[2])
    batchnorm.freeze(net[0][1], affine=True)
    decayed, spared = batchnorm.param_groups(net, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2, 3}
    assert {p.dim() for p in spared["params"]} == {1}
    listed = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    torch.optim.AdamW([decayed, spared], lr=1e-3)


@pytest.mark.parametrize("decay", [-1.0, float("nan")])
def test_param_groups_refuse_a_decay_that_is_none(decay):
    with pytest.raises(batchnorm.ArgumentError, match="weight_decay"):
        batchnorm.param_groups(model(), decay)
    with pytest.raises(batchnorm.ArgumentError, match="no parameter"):
        batchnorm.param_groups(nn.ReLU(), 0.1)


def test_to_thaw_is_the_inverse_of_to_freeze():
    net = torch.nn.Sequential(batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3))
    net[0].weight.requires_grad_(False)  # stood still before

    def state():
        return [(n.frozen_statistics, n.frozen_affine, p.requires_grad) for n in net for p in n.parameters()]

    before = state()
    for _ in range(2):  # twice frozen is frozen
        batchnorm.freeze(net, affine=True)
    assert not any(p.requires_grad for p in net.parameters())
    assert state() != before
    batchnorm.unfreeze(net)
    assert state() == before


def test_where_says_which_layers_and_the_record_tells_of_them():
    net = torch.nn.ModuleDict({"stem": batchnorm.BatchNorm1d(3), "head": batchnorm.BatchNorm1d(3)})
    batchnorm.freeze(net, where="st*")
    assert (net["stem"].frozen_statistics, net["head"].frozen_statistics) == (True, False)
    batchnorm.freeze(net, where=lambda name, layer: name == "head")
    assert net["head"].frozen_statistics
    batchnorm.unfreeze(net, where="head")
    assert (net["stem"].frozen_statistics, net["head"].frozen_statistics) == (True, False)
    assert [(row.path, row.action) for row in batchnorm.record(net)] == [
        ("stem", "frozen"), ("head", "frozen"), ("head", "thawed")
    ]  # fmt: skip
    with pytest.raises(batchnorm.ArgumentError, match="where= means"):
        batchnorm.freeze(net, where="no such")
    with pytest.raises(batchnorm.ArgumentError, match="says of no module"):
        batchnorm.freeze(net, where=3)
