"""How a batch norm, a sum and an activation look in the graphs that Dynamo makes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from batchnorm.functional import Options, infer_step, train_step
from batchnorm.network.accelerate.effects import arguments, storages, value, written
from batchnorm.network.accelerate.norm_calls import ours, torch_inference, torch_training
from batchnorm.population import Tracking

DEVICES = ("cpu",)
"""Where a kernel of ours is faster than torch's own batch norm."""

_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh", F.hardtanh_: "hardtanh",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
    F.silu: "silu", F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid", F.sigmoid: "sigmoid", torch.special.expit: "sigmoid",
    "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
    torch.tanh: "tanh", torch.tanh_: "tanh", F.tanh: "tanh", "tanh": "tanh", "tanh_": "tanh",
    F.gelu: "gelu",
}  # fmt: skip
_SUMS = frozenset([operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__"])


class Norm(NamedTuple):
    """A call of a batch norm, torch's or ours.

    Parameters
    ----------
    z : torch.fx.Node
        Its input.
    vectors : tuple
        What it reads beside that: statistics, gamma, beta.
    moved : tuple
        What it writes: running statistics and counts, in training.
    joins : bool
        Whether a sum and an activation may join it; no where it has its own.
    reason : str
        Why it runs as it was written; empty where it is called by us.
    call : callable
        Of an activation's name and what is added (or None), gives what is called, and its arguments.
    training : bool or None
        Mode of a norm of torch's; None for ours.
    """

    z: fx.Node
    vectors: tuple[Any, ...]
    moved: tuple[Any, ...]
    joins: bool
    reason: str
    call: Callable[[str | None, fx.Node | None], tuple[Callable[..., Tensor], tuple[Any, ...]]]
    training: bool | None = None


def norm(node: fx.Node) -> Norm | None:
    """Read a step as a batch norm.

    Parameters
    ----------
    node : torch.fx.Node
        Any step.

    Returns
    -------
    Norm or None
        None for every other step.
    """
    if node.op != "call_function":
        return None
    if node.target in (F.batch_norm, torch.batch_norm):
        found = _of_torch(node)
    elif node.target in (train_step, infer_step):
        found = _of_ours(node)
    else:
        return None
    if not isinstance(value(found.z), Tensor):
        return None
    device = value(found.z).device.type
    return found if device in DEVICES else found._replace(reason=f"torch's own is the faster on {device}")


def _of_torch(node: fx.Node) -> Norm:
    given = arguments(node)
    mean, var, gamma, beta = (given.get(k) for k in ("running_mean", "running_var", "weight", "bias"))
    training, momentum, eps = given.get("training", False), given.get("momentum", 0.1), given.get("eps", 1e-5)
    vectors = (mean, var, gamma, beta)

    def call(name: str | None, residual: fx.Node | None) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        if training:
            return torch_training(name), (given["input"], *vectors, momentum, eps, residual)
        return torch_inference(name), (given["input"], *vectors, eps, residual)

    reason = ""
    if type(training) is not bool:
        reason = "its mode is computed"
    elif not training and (mean is None or var is None):
        reason = "it has no running statistics"
    return Norm(given["input"], vectors, (mean, var) if training else (), True, reason, call, training)


def _no_call(*_: Any) -> Any:
    return None, ()


def _of_ours(node: fx.Node) -> Norm:
    """Read a step of our own operator: z, gamma, beta, residual, what else, and its options last."""
    z, gamma, beta, own_residual, *rest, options = node.args
    made = _built(options)
    if not isinstance(made, Options):
        given: Any = tuple(node.args)
        return Norm(given[0], given, given, False, "its options are computed", _no_call)
    step: Any = node.target
    training = step is train_step
    buffers = tuple(leaf for term in rest for leaf in _leaves(term))
    mask = rest[0] if training else rest[2]

    def call(name: str | None, residual: fx.Node | None) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        joined = made._replace(activation=name or made.activation)
        return ours(step, joined), (z, gamma, beta, own_residual if residual is None else residual, *rest)

    joins = own_residual is None and made.activation is None and mask is None
    return Norm(z, (gamma, beta, own_residual, *buffers), buffers if training else (), joins, "", call)  # type: ignore[arg-type]


def _built(node: Any) -> Any:
    """A named tuple of constants that a graph builds."""
    if not isinstance(node, fx.Node) or node.target is not Options:
        return node
    computed = any(isinstance(a, fx.Node) for a in (*node.args, *node.kwargs.values()))
    return node if computed else Options(*node.args, **node.kwargs)  # type: ignore[arg-type]


def _leaves(term: Any) -> Iterator[fx.Node]:
    """Tensors of a named tuple that a graph builds."""
    if isinstance(term, fx.Node):
        if term.op == "call_function" and term.target is Tracking:
            yield from (a for a in term.args if isinstance(a, fx.Node))
        else:
            yield term


def activation(node: fx.Node) -> str | None:
    """Read a step as one of the activations that join the normalizing pass.

    Parameters
    ----------
    node : torch.fx.Node
        Any step.

    Returns
    -------
    str or None
        None for every other step, and for another slope or approximation than the engines know.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    name = _ACTIVATIONS.get(node.target)
    if name is None:
        return None
    given = arguments(node)
    if name == "hardtanh":
        low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
        return "relu6" if (low, high) == (0, 6) else None
    if name == "leaky_relu" and given.get("negative_slope", 0.01) != 0.01:
        return None
    if name == "gelu" and given.get("approximate", "none") != "none":
        return None
    if given.get("out") is not None:
        return None
    return name


def is_sum(node: fx.Node) -> bool:
    """Whether a step adds two values."""
    return node.op in ("call_function", "call_method") and node.target in _SUMS


def added_to(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """Read a step as the sum of a tensor and another of its shape and dtype.

    Parameters
    ----------
    node : torch.fx.Node
        Any step.
    term : torch.fx.Node
        One of the two.

    Returns
    -------
    torch.fx.Node or None
        The other; None where the step is none such, or writes into the other.
    """
    if not is_sum(node):
        return None
    if len(node.args) != 2 or any(v is not None and v != 1 for v in node.kwargs.values()):
        return None
    first, second = node.args
    other = second if first is term else first
    if other is term or not isinstance(other, fx.Node):
        return None
    if is_in_place(node) and first is not term:
        return None
    return other if alike(value(other), value(term)) and alike(value(node), value(term)) else None


def alike(a: Any, b: Any) -> bool:
    """Whether two values are tensors of one shape, dtype and device, for every size that the graph serves."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype == b.dtype
        and a.device == b.device
        and a.layout == b.layout == torch.strided
        and a.dim() == b.dim()
        and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))
    )


def is_in_place(node: fx.Node) -> bool:
    """Whether a step overwrites its first argument and returns it."""
    memory = storages(node.args[:1])
    return value(node) is not None and storages(node) == memory and bool(written(node) & memory)


def passed_on(node: fx.Node) -> bool:
    """Whether a step hands on its first argument as it is: dropout out of training."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "torch.nn.functional":
        return False
    return node.target.__name__.endswith("dropout") and arguments(node).get("training", True) is False  # type: ignore[union-attr]
