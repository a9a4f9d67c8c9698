"""Two networks' answers compared: rounding is told from error by what the given network makes of it."""

import copy

import pytest
import torch
from torch import nn

from batchnorm.network.compare import GRADIENT, apart, compared, kept, leaves, named, repeats


class Answer:
    def __init__(self, scores):
        self.scores = scores


def test_leaves_are_found_in_what_refers_to_itself():
    answer = Answer(torch.ones(2))
    answer.me = [answer]
    assert [path for path, _ in leaves(answer)] == [".scores"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(3), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([1j]), torch.tensor([-1j]), False),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0]), False),
        (True, 1, False),
        ("a", "a", True),
        (float("nan"), float("nan"), True),
    ],
)
def test_two_leaves_are_apart_or_not(a, b, same):
    assert (apart(a, b) == 0) is same


def net(*layers, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*layers).to(dtype)


@torch.no_grad()
def ask(network, x):
    return named(kept(network(x)))


def off_by(network, factor):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.mul_(factor)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_other_roundings_give_is_right_and_a_small_error_is_wrong(dtype):
    network, x = (
        net(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5), dtype=dtype),
        torch.randn(8, 30, dtype=dtype),
    )
    eps = torch.finfo(dtype).eps
    assert compared(ask(network, x), ask(network, x), repeats(network, x, ask)).right
    assert compared(ask(network, x), ask(off_by(network, 1 + 2 * eps), x), repeats(network, x, ask)).right
    wrong = compared(ask(network, x), ask(off_by(network, 1 + 2**12 * eps), x), repeats(network, x, ask))
    assert wrong.right is False
    assert wrong.off > wrong.allowed > 16 * eps


def test_a_network_that_amplifies_is_allowed_what_it_makes_of_its_own_rounding():
    class Sharp(nn.Module):
        def forward(self, z):
            return (3e2 * z).sin()

    x, eps = torch.randn(8, 30), torch.finfo(torch.float32).eps
    sharp, flat = net(nn.Linear(30, 5), Sharp()), net(nn.Linear(30, 5), nn.Tanh())
    other = ask(off_by(sharp, 1 + 8 * eps), x)
    off = apart(ask(sharp, x)[""], other[""])
    assert off > 100 * eps
    assert compared(ask(sharp, x), other, repeats(sharp, x, ask)).right
    # as far off, a network that does not amplify is wrong
    other = {"": ask(flat, x)[""] * (1 + off)}
    assert compared(ask(flat, x), other, repeats(flat, x, ask)).right is False


def test_answers_without_numbers_or_as_coarse_as_their_noise_tell_nothing():
    x = torch.randn(8, 30)
    network = net(nn.Linear(30, 5))

    def words(network, x):
        return named(kept({"label": "a", "index": network(x).argmax(1)}))

    assert compared(words(network, x), words(network, x), repeats(network, x, words)).right is None
    half = net(nn.Linear(30, 5), dtype=torch.bfloat16)
    y = x.bfloat16()
    assert compared(ask(half, y), ask(half, y), repeats(half, y, ask)).right is None


def test_an_answer_of_another_structure_is_wrong_unless_the_network_changes_it_itself():
    network, x = net(nn.Linear(3, 2)), torch.randn(4, 3)
    given = {"a": torch.ones(2), "b": torch.ones(2)}
    found = compared(given, {"a": torch.ones(2)}, repeats(network, x, lambda network, x: given))
    assert found.right is False
    assert "structure" in str(found)
    calls = iter(range(9))

    def other_places(network, x):
        return {"a": torch.ones(2), f"call {next(calls)}": torch.ones(2)}

    assert compared(given, {"a": torch.ones(2)}, repeats(network, x, other_places)).right is True


def test_gradients_share_one_scale():
    network, x = net(nn.Linear(3, 2)), torch.randn(4, 3)
    given = {f"{GRADIENT} of a": torch.tensor([1.0]), f"{GRADIENT} of b": torch.tensor([0.0])}
    almost = {**given, f"{GRADIENT} of b": torch.tensor([1e-7])}
    assert compared(given, almost, repeats(network, x, lambda network, x: given)).right
    alone = {"output": torch.tensor([0.0])}
    assert not compared(
        alone, {"output": torch.tensor([1e-7])}, repeats(network, x, lambda network, x: alone)
    ).right


def test_asking_again_changes_nothing_of_the_network_and_comes_with_its_input_changed():
    network, x = net(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(4, 3)
    before, given = copy.deepcopy(network.state_dict()), x.clone()
    network.train()
    runs = [run for _, run in repeats(network, x, lambda network, x: {"x": x.clone(), "y": network(x)})]
    assert len(runs) == 5
    assert torch.equal(runs[0]["x"], x)
    assert not any(torch.equal(run["x"], x) for run in runs[1:])
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_place_that_comes_again_has_a_number():
    assert list(named([("a", 1), ("b", 2), ("a", 3)])) == ["a", "b", "a #2"]
