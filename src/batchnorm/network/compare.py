"""Two networks' answers compared: the one place where rounding is told from error, for every tool.

A right change of a network computes the same quantities with other roundings. How far those move an answer is no
constant: a network that subtracts large numbers, or is deep, makes more of them than another. So it is measured,
on the given network, as what becomes of its answers when its values and its input are off by one unit in the last
place. Where a value is rounded once, a sum of K products is rounded in up to log2(K) places, and the vectors of a
norm meet in one scale and one shift: a factor of ``ROOM`` covers these, and ``FLOOR`` units beside it the roundings
of the answer itself.

A gradient jumps where a value lies at a kink (of ReLU, of a maximum), and rounding decides on which side. Which ones
do is chance, so weights and input are moved further as well, by ``_FAR`` units, and a few times what the gradients
then do is allowed.

A wrong change is off by far more than the network's own noise; where that noise could hide
one, the comparison tells nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.network.inputs import Forward, copied, each_tensor, own, run
from batchnorm.network.undo import Undo, hook_after, set_modes, stop_gradients

ROOM, FLOOR = 64, 16
_TELLING = 0.02  # where noise may be larger than this, an error could hide in it
_SHAKES, _FAR = 2, 16
_ROOM_FAR = 8
GRADIENT = "gradient"
"""How the places of gradients begin: they share one scale, for one may be zero but for rounding."""

Answers = dict[str, Any]
"""What a run of a network gave: a leaf for each place."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def leaves(tree: Any, path: str = "", seen: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values in an answer, wherever they are.

    Parameters
    ----------
    tree : object
        Containers, data classes and any object with attributes are looked into; modules are not.
    path : str, optional
        Where it is in the whole.
    seen : dict, optional
        What was looked into already, by ``id``.

    Yields
    ------
    tuple of str and object
        Where, and a dense tensor or a plain value. What can't be looked into is passed over.
    """
    if isinstance(tree, Tensor):
        if tree.is_nested:
            yield from leaves(tree.unbind(), path, seen)
        else:
            dense = tree.to_dense() if tree.layout is not torch.strided else tree
            yield path, dense.dequantize() if dense.is_quantized else dense
        return
    if isinstance(tree, _PLAIN):
        yield path, tree
        return
    seen = {} if seen is None else seen
    if isinstance(tree, (nn.Module, type, ModuleType)) or id(tree) in seen:
        return
    seen[id(tree)] = tree  # kept alive: an id may come again
    if type(tree).__module__ == "numpy" and getattr(tree, "dtype", None) is not None:
        if tree.dtype.kind in "biufc":
            yield path, torch.as_tensor(tree)
        return
    if isinstance(tree, Mapping):
        parts: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, Sequence) and tree and all(isinstance(item, float) for item in tree):
        # numbers of one list are of one scale, and one of them alone may be near 0
        yield path, torch.tensor(tree, dtype=torch.float32)
        return
    elif isinstance(tree, Sequence):
        parts = list(enumerate(tree))
    else:
        slots = [name for kind in type(tree).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [(name, getattr(tree, name)) for name in slots if hasattr(tree, name)]
        parts += list(getattr(tree, "__dict__", {}).items())
    for key, item in parts:
        yield from leaves(item, f"{path}.{key}", seen)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a result: in containers, data classes and other objects.

    Parameters
    ----------
    tree : object
        What a forward took or returned.

    Yields
    ------
    Tensor
        In the order in which they are stored.
    """
    yield from (leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor))


def kept(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of an answer, with copies of its tensors: what runs later may write to them.

    Parameters
    ----------
    tree : object
        What a network gave.

    Returns
    -------
    list of tuple of str and object
        As `leaves` gives them.
    """
    return [(path, x.detach().clone() if isinstance(x, Tensor) else x) for path, x in leaves(tree)]


def epsilon(value: Any) -> float | None:
    """One unit in the last place of 1, for a number that rounding reaches.

    Parameters
    ----------
    value : object
        A leaf.

    Returns
    -------
    float or None
        None for integers, booleans, text: they are the same or not.
    """
    if isinstance(value, Tensor):
        rounded = value.is_floating_point() or value.is_complex()
        return torch.finfo(value.dtype).eps if rounded and value.numel() else None
    # what dtype a plain number had as a tensor it does not say
    return torch.finfo(torch.float32).eps if isinstance(value, (float, complex)) else None


def apart(a: Any, b: Any, scale: float | None = None) -> float:
    """How far two leaves are apart.

    Parameters
    ----------
    a, b : object
        Leaves at the same place of two answers.
    scale : float, optional
        What a difference of numbers is divided by; the largest value of ``a`` by default.

    Returns
    -------
    float
        For numbers that rounding reaches, the largest difference over the scale; inf where kind, shape or the
        places of NaN and inf differ. For others 0 or inf.
    """
    if type(a) is not type(b):
        return float("inf")
    if not isinstance(a, Tensor):
        if epsilon(a) is None:
            return 0.0 if a == b else float("inf")
        a, b = torch.tensor(a), torch.tensor(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if epsilon(a) is None:
        return 0.0 if torch.equal(a, b) else float("inf")
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = (x.detach().cpu().to(kind) for x in (a, b))
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a[finite] - b[finite]).abs().max()) / max(_largest(a) if scale is None else scale, 1e-30)


def _largest(number: Any) -> float:
    """The largest magnitude among a leaf's finite numbers."""
    values = torch.as_tensor(number).detach().cpu()
    values = values[torch.isfinite(values)].abs().double()
    return float(values.max()) if values.numel() else 0.0


class Finding(NamedTuple):
    """What a comparison found: right, wrong, or (None) nothing that tells."""

    right: bool | None
    off: float = 0.0
    allowed: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}: relative difference {self.off:.3g}, allowed {self.allowed:.3g}"


def compared(given: Answers, other: Answers, repeats: Iterable[tuple[int, Answers]]) -> Finding:
    """Tell whether a changed network gives the answers of the given one, to the given one's own rounding.

    Parameters
    ----------
    given, other : dict
        What the given and the changed network answered, by place.
    repeats : iterable of tuple of int and dict
        From :func:`repeats`; drawn where the answers are not equal at once.

    Returns
    -------
    Finding
        The first place that is wrong; or whether any number told anything.
    """
    repeats, infinite = iter(repeats), float("inf")
    if list(given) != list(other) and list(given) == list(next(repeats)[1]):
        return Finding(False, infinite, 0.0, "the structure of the answer")
    shared = max((_largest(leaf) for place, leaf in given.items() if place.startswith(GRADIENT)), default=0.0)

    def distance(run: Answers, place: str) -> float:
        if place not in run:
            return infinite
        return apart(given[place], run[place], shared if place.startswith(GRADIENT) else None)

    off = {place: distance(other, place) for place in given if place in other}
    floor = {place: FLOOR * (epsilon(given[place]) or 0.0) for place in off}
    allowed = dict(floor)
    while any(off[place] > allowed[place] for place in off):
        room, shaken = next(repeats, (0, None))
        if shaken is None:
            break
        for place in off:
            if room == ROOM or place.startswith(GRADIENT):
                allowed[place] = max(allowed[place], floor[place] + room * distance(shaken, place))
    told = None
    for place, most in allowed.items():
        if off[place] > most:
            return Finding(False, off[place], most, place)
        number = epsilon(given[place]) is not None and bool(
            torch.isfinite(torch.as_tensor(given[place])).any()
        )
        told = True if number and most <= _TELLING else told
    return Finding(told)


def repeats(
    model: nn.Module,
    example: Any,
    ask: Callable[[nn.Module, Any], Answers],
    meant: Iterable[str] | None = None,
) -> Iterator[tuple[int, Answers]]:
    """Ask a network once more, then with its values and its input off by one unit in the last place, then by more.

    Parameters
    ----------
    model : torch.nn.Module
        The given network; copies of it are asked.
    example : Tensor, tuple or dict
        Its input.
    ask : callable
        Gives the answers of a network to an input.
    meant : iterable of str, optional
        Paths of the modules whose values are changed; all by default.

    Yields
    ------
    tuple of int and dict
        How many times what is seen here is allowed, and the answers.
    """
    yield ROOM, ask(copied(model), example)
    for seed in range(2 * _SHAKES):
        generator, far = torch.Generator().manual_seed(seed), seed >= _SHAKES

        def shake(tensor: Tensor, generator: torch.Generator = generator, far: bool = far) -> Tensor:
            if not tensor.is_floating_point() or tensor.is_quantized or tensor.is_nested:
                return tensor
            plain, unit = tensor.detach(), torch.finfo(tensor.dtype).eps
            signs = torch.randint(0, 2, tensor.shape, generator=generator).to(plain) * 2 - 1
            return plain + _FAR * unit * _largest(plain) * signs if far else plain * (1 + unit * signs)

        shaken = copied(model)
        modules = shaken.modules() if meant is None else map(shaken.get_submodule, dict.fromkeys(meant))
        tables = [(m._parameters,) if far else (m._parameters, m._buffers) for m in modules]
        held = {id(t): t for kinds in tables for table in kinds for t in table.values() if t is not None}
        for tensor in held.values():
            tensor.data = shake(tensor)
        yield _ROOM_FAR if far else ROOM, ask(shaken, each_tensor(shake, example))


def named(leaves: Iterable[tuple[str, Any]]) -> Answers:
    """Answers from leaves with their places; of a place that comes again, each with its number.

    Parameters
    ----------
    leaves : iterable of tuple of str and object
        As :func:`kept` gives them.

    Returns
    -------
    dict
        In the same order.
    """
    found: Answers = {}
    times: dict[str, int] = {}
    for place, leaf in leaves:
        times[place] = times.get(place, 0) + 1
        found[f"{place} #{times[place]}" if times[place] > 1 else place] = leaf
    return found


def answers(
    network: nn.Module, example: Any, tool: str, forward: Forward = None, places: Iterable[str] = ()
) -> Answers:
    """What a network gives in eval mode, without gradients, and what modules at some places in it do.

    Parameters
    ----------
    network : torch.nn.Module
        It is run; its modes are put back.
    example : object
        Its input; not written to.
    tool : str
        Who asks, for messages.
    forward : callable, optional
        ``forward(network, example)`` calls it.
    places : iterable of str
        Paths of modules whose outputs are wanted too.

    Returns
    -------
    dict
        A leaf for each place.
    """
    seen: list[tuple[str, Any]] = []
    end = Undo(always=True)
    with end, end:
        for n, place in enumerate(places):
            hook_after(end, network.get_submodule(place), partial(_note, seen, n))
        set_modes(end, network, False)
        stop_gradients(end)
        answer = kept(run(network, own(example), tool, forward))
    return named([*seen, *((f"the answer{path}", leaf) for path, leaf in answer)])


def _note(
    seen: list[tuple[str, Any]], n: int, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    seen += [(f"{n}{path}", leaf) for path, leaf in kept(output)]
