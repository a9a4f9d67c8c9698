"""The flow of values: what is seen is so, and what can't be seen is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from chains import chain_after, next_call
from torch import Tensor, nn

from batchnorm.network.values.find import Flow, Unproven, batch_norms, find_flow


class Block(nn.Module):
    def __init__(self, channels: int = 4, *, act: str = "module") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.kind = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.kind == "module":
            return self.act(y)
        if self.kind == "function":
            return F.relu(y)
        if self.kind == "method":
            return y.relu_()
        if self.kind == "sum":
            y += x
            return torch.relu(y)
        return F.leaky_relu(y, 0.2)


def _next_path(flow: Flow, module: nn.Module) -> set[str]:
    return {next_call(flow, call).path for call in flow.calls(module)}


def both(model: nn.Module, *shape: int) -> list[Flow]:
    """On a made-up input in both modes, and on an example."""
    return [find_flow(model, modes_needed=(False, True)), find_flow(model, torch.randn(*shape))]


@pytest.mark.parametrize(
    ("kind", "activation", "with_sum"),
    [
        ("module", "relu", False),
        ("function", "relu", False),
        ("method", "relu", False),
        ("sum", "relu", True),
        ("other slope", None, False),
    ],
)
def test_what_follows_a_norm_is_found_in_every_spelling(
    kind: str, activation: str | None, with_sum: bool
) -> None:
    net = Block(act=kind)
    for flow in both(net, 2, 4, 5, 5):
        chain = chain_after(flow, net.bn)
        assert (chain.activation, chain.with_sum) == (activation, with_sum)
        assert _next_path(flow, net.conv) == {"bn"}


def test_the_model_is_left_as_it_was() -> None:
    class Remembers(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.conv(x)
            self.seen.append(self.last)
            self.steps += 1
            return self.bn(self.last)

    net = Remembers().train()
    net.bn.eval()
    net.seen, net.last = [], None
    net.register_buffer("steps", torch.zeros(()))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flow = find_flow(net, modes_needed=(False, True))
    assert net.seen == []
    assert net.last is None
    assert net.training
    assert not net.bn.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with pytest.raises(Unproven, match="kept"):
        next_call(flow, flow.calls(net.conv)[0])


def test_a_value_kept_by_a_hook_of_a_run_counts_as_read_by_others() -> None:
    net = nn.Sequential(Block(), nn.Conv2d(4, 4, 1))
    kept = []
    net[0].conv.register_forward_hook(lambda module, args, out: kept.append(out))
    flow = find_flow(net, torch.randn(1, 4, 4, 4))
    with pytest.raises(Unproven, match="kept by something"):
        flow.sole_reader(flow.calls(net[0].conv)[0].output)


def test_an_output_used_twice_or_returned_has_no_sole_reader() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.bn(z) * z

    class Returned(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.conv(x)
            return self.bn(z), z

    for kind, reason in ((Twice, "used 2 times"), (Returned, "returned")):
        net = kind()
        for flow in both(net, 1, 4, 4, 4):
            with pytest.raises(Unproven, match=reason):
                [flow.sole_reader(call.output) for call in flow.calls(net.conv)]


def test_reading_only_the_shape_is_not_using_the_value() -> None:
    class Shapes(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            n, c = z.shape[:2]
            return self.bn(z).reshape_as(z).view(n, c, -1) + torch.zeros_like(z).sum() * z.size(0)

    net = Shapes()
    flow = find_flow(net)
    assert _next_path(flow, net.conv) == {"bn"}


def test_a_change_in_place_through_a_view_is_seen_by_later_readers() -> None:
    class Views(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            z.flatten(1).relu_()
            return self.bn(z)

    net = Views()
    for flow in both(net, 1, 4, 4, 4):
        with pytest.raises(Unproven):
            [next_call(flow, call) for call in flow.calls(net.conv)]


def test_a_change_in_place_stands_between_maker_and_reader() -> None:
    class Changed(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            z.mul_(2)
            return self.bn(z)

    net = Changed()
    for flow in both(net, 1, 4, 4, 4):
        assert {next_call(flow, call).op for call in flow.calls(net.conv)} == {"mul"}


class Checks(nn.Module):
    """Raises on a bad shape, as many published networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: object) -> dict[str, Tensor]:
        if x.shape[1] != 4:
            raise ValueError("4 channels are needed")
        assert x.dim() == 4
        if not isinstance(x, Tensor):
            x = x[0]
        return {"out": self.block(x)}


def test_the_models_own_checks_are_no_obstacle() -> None:
    net = Checks()
    flow = find_flow(net, modes_needed=(False, True))
    assert chain_after(flow, net.block.bn).activation == "relu"


class Branches(nn.Module):
    """Goes one of two ways by what the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv, self.bn = Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(self.block(x))
        return self.bn(z) if z.mean() > -100 else z


def test_a_branch_on_values_is_followed_both_ways_and_parts_are_seen_nevertheless() -> None:
    net = Branches()
    for flow in both(net, 1, 4, 4, 4):
        assert chain_after(flow, net.block.bn).activation == "relu"
        with pytest.raises(Unproven):
            [next_call(flow, call) for call in flow.calls(net.conv)]


class Unusual(nn.Module):
    """Takes what nobody can make up, and runs its parts in loops."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(act="function")])
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, rows: list[Tensor], scale: float) -> Tensor:
        for block in self.blocks:
            rows = [block(row[None])[0] * scale for row in rows]
        return self.last(torch.stack(rows))


def test_what_takes_an_unusual_input_is_seen_with_an_example_and_refused_without() -> None:
    net = Unusual()
    flow = find_flow(net)
    with pytest.raises(Unproven, match="pass example="):
        flow.calls(net.last)
    flow = find_flow(net, ([torch.randn(4, 5, 5)] * 2, 2.0))
    assert [chain_after(flow, norm).activation for _, norm in batch_norms(net)] == ["relu", "relu"]


def test_a_forward_of_the_callers_says_how_the_network_is_called() -> None:
    net = Unusual()
    flow = find_flow(net, torch.randn(2, 4, 5, 5), forward=lambda model, batch: model(list(batch), 1.0))
    assert _next_path(flow, net.blocks[0].conv) == {"blocks.0.bn"}


def test_a_branch_on_a_flag_is_followed_both_ways() -> None:
    class Flag(Block):
        def forward(self, x: Tensor, raw: bool = False) -> Tensor:
            z = self.conv(x)
            return z if raw else self.bn(z)

    net = Flag()
    for flow in both(net, 1, 4, 4, 4):
        with pytest.raises(Unproven, match="returned"):
            [next_call(flow, call) for call in flow.calls(net.conv)]


def test_a_number_that_python_asks_for_is_taken_from_a_real_run() -> None:
    class Counts(Block):
        def forward(self, x: Tensor) -> Tensor:
            times = int((x == x).sum().item() > 0) + x.abs().argmax().item() * 0
            for _ in range(times):
                x = self.bn(self.conv(x))
            return x

    net = Counts()
    for flow in both(net, 1, 4, 4, 4):
        assert all(next_call(flow, call).path == "bn" for call in flow.calls(net.conv))


def test_a_look_writes_to_no_buffer_and_draws_no_number() -> None:
    net = nn.Sequential(Block(), nn.Dropout(), Block()).train()
    x = torch.randn(2, 4, 4, 4)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    for example in (x, None):
        assert {view.training for view in find_flow(net, example, modes_needed=(False, True)).views} == {
            False,
            True,
        }
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class Gated(nn.Module):
    """Takes another way in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.aux = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.bn(z) + self.aux(z) if self.training else self.bn(z)


def test_training_and_inference_are_two_flows() -> None:
    net = Gated()
    inference = find_flow(net)
    assert _next_path(inference, net.conv) == {"bn"}
    both_modes = find_flow(net, modes_needed=(False, True))
    with pytest.raises(Unproven, match="used 2 times"):
        [next_call(both_modes, call) for call in both_modes.calls(net.conv)]
    assert {call.view.training for call in both_modes.calls(net.aux)} == {True}


def test_an_optional_argument_is_followed_given_and_not_given() -> None:
    class Optional(Block):
        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y = self.bn(self.conv(x))
            return F.relu(y) if skip is None else F.relu(y + skip)

    net = Optional()
    assert "different things" in chain_after(find_flow(net), net.bn).reason


def test_parameters_read_by_name_are_reported() -> None:
    class Reads(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.conv.weight, padding=1)).to(self.bn.weight.dtype)

    net = Reads()
    for flow in both(net, 1, 4, 4, 4):
        assert flow.readers_elsewhere(net.conv) == ["(the model)"]
        assert flow.readers_elsewhere(net.bn) == []


def test_a_real_network_is_seen_whole() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], groups_width=4
    )
    net = transformers.RegNetForImageClassification(config)
    flow = find_flow(net, modes_needed=(False, True))
    chains = [chain_after(flow, norm) for _, norm in batch_norms(net)]
    assert len(chains) > 15
    assert all(chain.activation == "relu" for chain in chains)


def test_a_model_that_asks_whether_its_input_is_a_tensor_is_told_that_it_is() -> None:
    class Asks(Block):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            if isinstance(x, (list, tuple)):
                x = x[0]
            if not isinstance(x, Tensor):
                raise TypeError("a tensor is needed")
            return self.bn(self.conv(x))

    net = Asks()
    assert _next_path(find_flow(net), net.conv) == {"bn"}


def test_no_hook_is_left_behind() -> None:
    net = Block()
    find_flow(net, torch.randn(1, 4, 4, 4))
    assert not nn.modules.module._has_any_global_hook()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_model_that_asks_by_is_tensor_is_told_too() -> None:
    class Asks(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.bn(z) if torch.is_tensor(z) else z

    net = Asks()
    assert _next_path(find_flow(net), net.conv) == {"bn"}
    assert not torch.is_tensor(3)
