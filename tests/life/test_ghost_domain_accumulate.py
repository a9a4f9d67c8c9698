"""Parts of a batch, domains, and windows of micro-batches."""

from __future__ import annotations

import contextlib
import copy
import signal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.domain import active_domain


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_state(layer, before):
    now = dict(layer.named_buffers())
    assert now.keys() == before.keys()
    for name, buffer in now.items():
        assert torch.equal(buffer, before[name]), name


# --- ghost batch norm


@given(n=st.integers(2, 13), size=st.integers(2, 6), with_mask=st.booleans())
def test_a_ghost_batch_is_its_parts_one_after_the_other(n, size, with_mask):
    torch.manual_seed(n * 7 + size)
    whole = batchnorm.BatchNorm1d(3, virtual_batch_size=size, activation="relu", dtype=torch.float64)
    parts = batchnorm.BatchNorm1d(3, activation="relu", dtype=torch.float64)
    z, residual = torch.randn(2, n, 3, 4, dtype=torch.float64)
    mask = torch.rand(n, 4) > 0.2 if with_mask else None
    pieces = -(-n // size)
    chunks = [None] * pieces if mask is None else mask.tensor_split(pieces)
    # fewer than two values a channel are an error of their own
    assume(mask is None or all(int(c.sum()) >= 2 for c in chunks))
    y = whole(z, residual, mask)
    expected = [
        parts(a, b, c)
        for a, b, c in zip(z.tensor_split(pieces), residual.tensor_split(pieces), chunks, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(expected))
    for a, b in zip(whole.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_no_larger_than_a_part_is_one_batch_and_eval_knows_no_parts():
    ghost, plain = batchnorm.BatchNorm1d(3, virtual_batch_size=8), batchnorm.BatchNorm1d(3)
    z = torch.randn(8, 3)
    assert torch.equal(ghost(z), plain(z))
    assert torch.equal(ghost.eval()(z.repeat(3, 1)), plain.eval()(z.repeat(3, 1)))


def test_an_error_in_the_last_part_leaves_no_trace_of_the_first():
    layer = batchnorm.BatchNorm1d(3, virtual_batch_size=2)
    layer(torch.randn(6, 3))
    before = state(layer)
    mask = torch.tensor([True, True, True, True, False, True])
    with pytest.raises(batchnorm.TooFewValuesError):
        layer(torch.randn(6, 3), mask=mask)
    layer.virtual_batch_size = 1
    with pytest.raises(batchnorm.TooFewValuesError):
        layer(torch.randn(6, 3))
    assert_state(layer, before)


# --- domains


def test_domains_keep_statistics_apart_under_one_gamma_and_beta():
    layer = batchnorm.BatchNorm1d(2, momentum=1.0)
    real, fake = torch.randn(64, 2) + 5, torch.randn(64, 2) * 3
    layer(real)
    with batchnorm.domain("fake"):
        y = layer(fake)
        torch.testing.assert_close(layer.eval()(fake), y, rtol=0.02, atol=0.02)
        layer.train()
    y.sum().backward()
    torch.testing.assert_close(layer.running_mean, real.mean(0))
    torch.testing.assert_close(layer.domains["fake"].running_mean, fake.mean(0))
    torch.testing.assert_close(layer.domains["fake"].running_var, fake.var(0))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_domains_nest_and_end_with_an_exception():
    layer = batchnorm.BatchNorm1d(1)
    z = torch.randn(4, 1)
    with batchnorm.domain("outer"):
        layer(z)
        with batchnorm.domain("inner"):
            layer(z)
        layer(z)
    with pytest.raises(KeyError), batchnorm.domain("outer"):
        raise KeyError
    layer(z)
    assert layer.domains["outer"].num_batches_tracked == 2
    assert layer.domains["inner"].num_batches_tracked == 1
    assert layer.num_batches_tracked == 1


def test_ctrl_c_at_any_instant_leaves_no_domain_in_force():
    # real signals: they come between any two instructions, those that begin and end the block among them
    def interrupt(*_):
        raise KeyboardInterrupt

    raised, before = 0, signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * 1e-7)
                while True:
                    with batchnorm.domain("outer"), batchnorm.domain("inner"):
                        pass
            except KeyboardInterrupt:
                raised += 1
            assert active_domain() is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised == 400


def test_a_domain_is_entered_by_hand_and_again_inside_itself():
    block = batchnorm.domain("fake")
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(block) is block
        with block, batchnorm.domain("real"):
            assert active_domain() == "real"
        assert active_domain() == "fake"
    assert active_domain() is None
    block.__enter__()
    assert active_domain() == "fake"
    block.__exit__(None, None, None)
    assert active_domain() is None


def test_the_state_dict_goes_round_with_its_domains_and_a_fresh_layer_makes_room():
    net = nn.Sequential(nn.Linear(2, 2), batchnorm.BatchNorm1d(2))
    for name in ("real", "fake"):
        with batchnorm.domain(name):
            net(torch.randn(8, 2))
    saved = copy.deepcopy(net.state_dict())
    assert "1.domains.fake.running_mean" in saved
    fresh = nn.Sequential(nn.Linear(2, 2), batchnorm.BatchNorm1d(2))
    fresh.load_state_dict(saved, strict=True)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, saved[name])
    theirs = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    result = theirs.load_state_dict(saved, strict=False)
    assert not result.missing_keys
    assert all(".domains." in key for key in result.unexpected_keys)
    # a state without the domains leaves them: nothing is known of them
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(theirs.state_dict())


def test_eval_in_a_domain_that_was_never_trained_says_which_there_are():
    layer = batchnorm.BatchNorm1d(2)
    with batchnorm.domain("real"):
        layer(torch.randn(4, 2))
    for made in (layer.eval(), batchnorm.freeze(layer).train()):
        with (
            pytest.raises(batchnorm.MissingStatisticsError, match="'fake'; there are real"),
            batchnorm.domain("fake"),
        ):
            made(torch.randn(4, 2))
    assert list(layer.domains) == ["real"]


def test_a_first_step_that_fails_begins_no_domain():
    layer = batchnorm.BatchNorm1d(2, on_nonfinite="raise")
    for z in (torch.randn(1, 2), torch.full((4, 2), float("nan")), torch.randn(4, 3)):
        with pytest.raises(batchnorm.BatchNormError), batchnorm.domain("fake"):
            layer(z)
        assert "domains" not in layer._modules
        assert set(layer.state_dict()) == set(nn.BatchNorm1d(2).state_dict())


def test_a_layer_without_statistics_passes_through_a_domain():
    layer, z = batchnorm.BatchNorm1d(2, track_running_stats=False), torch.randn(4, 2)
    outside = layer(z)
    with batchnorm.domain("fake"):
        assert torch.equal(layer(z), outside)
        assert torch.equal(layer.eval()(z), outside)
    assert not list(layer.buffers())


@pytest.mark.parametrize("name", ["", "a.b", "1st", 3, None, "train", "training", "keys", "float"])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(batchnorm.ArgumentError, match="domain"):
        batchnorm.domain(name)


def test_reset_and_half_reach_every_domain():
    layer = batchnorm.BatchNorm1d(2)
    with batchnorm.domain("fake"):
        layer(torch.randn(8, 2))
    layer.half()
    assert layer.domains["fake"].running_mean.dtype == torch.float32
    layer.reset_running_stats()
    fake = layer.domains["fake"]
    assert (
        float(fake.running_mean.abs().sum()),
        float(fake.running_var.sum()),
        int(fake.num_batches_tracked),
    ) == (0, 2, 0)


# --- accumulation


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("correction", [0, 1])
def test_a_window_is_one_step_by_all_its_values(momentum, correction):
    options = {"momentum": momentum, "running_var_correction": correction, "dtype": torch.float64}
    pooled, whole = batchnorm.BatchNorm1d(3, **options), batchnorm.BatchNorm1d(3, **options)
    for _ in range(3):
        parts = [torch.randn(n, 3, dtype=torch.float64) * n + n for n in (2, 9, 4)]
        with batchnorm.accumulate(pooled):
            for part in parts:
                pooled(part)
                assert pooled.running_mean is not None
        whole(torch.cat(parts))
    assert pooled.num_batches_tracked == 3
    for a, b in zip(pooled.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_micro_batches_are_still_normalized_by_themselves():
    pooled, plain = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    z = torch.randn(4, 3)
    with batchnorm.accumulate(pooled):
        assert torch.equal(pooled(z), plain(z))
        assert torch.equal(pooled.running_mean, torch.zeros(3)), "nothing moves before the end"


def test_an_exception_inside_commits_nothing_not_even_a_count():
    layer = batchnorm.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    before = state(layer)
    bad = torch.randn(4, 3)
    bad[0, 0] = float("nan")

    def window():
        with batchnorm.accumulate(layer):
            layer(torch.randn(4, 3))
            layer(bad)
            raise KeyError

    with pytest.raises(KeyError):
        window()
    assert_state(layer, before)
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 2, "the window is closed"


def test_windows_pool_parts_masks_and_domains_each_where_it_belongs():
    layer = batchnorm.BatchNorm1d(2, momentum=1.0, virtual_batch_size=4, dtype=torch.float64)
    z = torch.randn(3, 8, 2, 5, dtype=torch.float64)
    mask = torch.rand(3, 8, 5) > 0.3
    with batchnorm.accumulate(layer):
        layer(z[0], mask=mask[0])
        with batchnorm.domain("fake"):
            layer(z[1], mask=mask[1])
        layer(z[2], mask=mask[2])
    for holder, chosen in ((layer, [0, 2]), (layer.domains["fake"], [1])):
        kept = z[chosen].movedim(2, -1)[mask[chosen]]
        torch.testing.assert_close(holder.running_mean, kept.mean(0))
        torch.testing.assert_close(holder.running_var, kept.var(0))
        assert holder.num_batches_tracked == 1


@pytest.mark.parametrize("policy", ["skip", "propagate", "raise"])
def test_a_micro_batch_with_nan_follows_the_policy(policy):
    layer = batchnorm.BatchNorm1d(2, momentum=1.0, on_nonfinite=policy)
    good, bad = torch.randn(8, 2), torch.randn(8, 2)
    bad[0, 1] = float("nan")
    if policy == "raise":
        with pytest.raises(batchnorm.NonFiniteError), batchnorm.accumulate(layer):
            layer(torch.cat([layer(good), bad]))
        assert layer.num_batches_tracked == 0
        return
    with batchnorm.accumulate(layer):
        layer(good)
        layer(bad)
    torch.testing.assert_close(layer.running_mean[0], torch.cat([good, bad])[:, 0].mean())
    if policy == "skip":
        torch.testing.assert_close(layer.running_mean[1], good[:, 1].mean())
        assert layer.num_batches_skipped == 1
    else:
        assert torch.isnan(layer.running_mean[1])


def test_a_channel_without_a_finite_micro_batch_has_no_share_in_the_plain_average():
    layer = batchnorm.BatchNorm1d(2, momentum=None)
    first, second = torch.randn(8, 2), torch.randn(8, 2)
    first[:, 1] = float("inf")
    for z in (first, second):
        with batchnorm.accumulate(layer):
            layer(z)
    torch.testing.assert_close(layer.running_mean[1], second[:, 1].mean())
    torch.testing.assert_close(layer.running_mean[0], torch.stack([first, second])[:, :, 0].mean())


def test_copies_made_inside_a_window_are_outside_it():
    layer = batchnorm.BatchNorm1d(2)
    with batchnorm.accumulate(layer):
        layer(torch.randn(4, 2))
        copied = copy.deepcopy(layer)
    copied(torch.randn(4, 2))
    assert copied.num_batches_tracked == 1
    with batchnorm.accumulate(copied):
        copied(torch.randn(4, 2))
    assert copied.num_batches_tracked == 2


def test_a_frozen_layer_and_one_that_is_not_reached_stay_as_they_are():
    used, frozen, idle = (batchnorm.BatchNorm1d(2) for _ in range(3))
    batchnorm.freeze(frozen)
    net = nn.ModuleList([used, frozen, idle])
    with batchnorm.accumulate(net):
        frozen(used(torch.randn(4, 2)))
    assert [int(m.num_batches_tracked) for m in net] == [1, 0, 0]
    assert torch.equal(idle.running_var, torch.ones(2))


def test_windows_do_not_nest_and_want_a_layer_of_ours():
    layer = batchnorm.BatchNorm1d(2)
    with batchnorm.accumulate(layer):
        layer(torch.randn(4, 2))
        with pytest.raises(batchnorm.ArgumentError, match="another accumulate"), batchnorm.accumulate(layer):
            pass
    assert layer.num_batches_tracked == 1
    with pytest.raises(batchnorm.ArgumentError, match="no batch norm of this package"):
        batchnorm.accumulate(nn.BatchNorm1d(2))
