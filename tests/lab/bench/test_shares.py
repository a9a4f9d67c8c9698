"""What a step can gain is measured against a network in which norms copy and activations vanish, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_lab.bench import markdown, models, results, shares, steps
from batchnorm_lab.bench.measure import Outcome, Sample
from batchnorm_lab.bench.shapes import Case


def test_the_floor_copies_where_a_norm_was_and_keeps_every_convolution():
    given = models.make("mobilenet_v2", models.PlainNormAct)
    least = shares.floor(given)
    kinds = [type(m) for m in least.modules()]
    assert kinds.count(shares.CopyLayer) == 52
    assert not {nn.BatchNorm2d, nn.ReLU6} & set(kinds)
    for kind in (nn.Conv2d, nn.Linear, nn.Dropout):
        assert kinds.count(kind) == [type(m) for m in given.modules()].count(kind)
    assert any(isinstance(m, nn.BatchNorm2d) for m in given.modules())
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = shares.CopyLayer()(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_everybody_has_a_turn_in_every_round_and_the_order_turns():
    seen: list[str] = []
    times = steps.take_turns({n: lambda n=n: seen.append(n) or 0.0 for n in "abc"}, 4)
    assert "".join(seen) == "cbaabccbaabc"
    assert {len(t) for t in times.values()} == {4}
    assert len(steps.take_turns({"a": lambda: 0.0}, 50, seconds=0.0)["a"]) == 5


def test_a_share_below_the_bar_is_told_as_missed():
    def text_of(ours: float) -> str:
        times = {"eager": 110.0, "ours": ours, "floor": 90.0}
        case = Case("share", (8, 3, 224, 224), "channels_last", "float32", "resnet18", "training")
        outcome = Outcome(case, [Sample(n, "step", np.array([t])) for n, t in times.items()], {})
        return markdown.document(results.rows(outcome, results.provenance(1)))

    assert "1.10 | 0.50 (>= 0.85: MISSED)" in text_of(100.0)
    assert "1.00 (>= 0.85: hit)" in text_of(90.0)


@pytest.mark.slow
def test_a_network_of_timm_is_timed(tmp_path):
    pytest.importorskip("timm", exc_type=ImportError)
    path = tmp_path / "rows.csv"
    shares.time_share("resnet18", layout="nchw", size=32, threads=1, rounds=2, seconds=1.0, path=path)
    assert set(results.read(path)["contender"]) == {"eager", "ours", "floor"}
