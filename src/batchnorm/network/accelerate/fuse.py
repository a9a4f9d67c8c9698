"""In a Dynamo graph, a norm and the sum and the activation behind it become one call.

Nothing else is touched: the graph still counts batches, draws random numbers and changes modes where it did.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from batchnorm.kernels.activations import PIECEWISE_LINEAR
from batchnorm.network.accelerate import checkpoint, patterns
from batchnorm.network.accelerate.effects import EVERYTHING, is_mode_change, overlap, storages, value, written
from batchnorm.network.accelerate.norm_calls import torch_is_faster
from batchnorm.network.accelerate.rows import Found

_OURS = "batchnorm"
"""Among what is noted of a step: it is a call that stands for several."""


@dataclass
class _Chain:
    """A norm and what is computed of its output alone, in order."""

    norm: patterns.Norm
    node: fx.Node
    total: fx.Node | None = None
    residual: fx.Node | None = None
    act: fx.Node | None = None
    activation: str | None = None
    skipped: list[fx.Node] = field(default_factory=list)
    reason: str = ""

    @property
    def last(self) -> fx.Node:
        return self.act or self.total or self.node

    @property
    def parts(self) -> tuple[str, ...]:
        return ("norm", *(["add"] if self.total else []), *([self.activation] if self.activation else []))


def fuse(module: fx.GraphModule, places: dict[str, tuple[str, str]]) -> list[Found]:
    """Rewrite a graph of Dynamo in place.

    Parameters
    ----------
    module : torch.fx.GraphModule
        As Dynamo gives it to a backend, with what it saw each step return.
    places : dict
        Name of an input to path and class of the module that owns it, as far as they are known.

    Returns
    -------
    list of Found
        One for each norm.
    """
    graph = module.graph
    inside: list[Found] = []
    for step, body in checkpoint.bodies(graph, module).items():
        outer = [n.name if isinstance(n, fx.Node) else "" for n in step.args[1:]]
        inner = [n.name for n in body.graph.nodes if n.op == "placeholder"]
        inside += fuse(body, {i: places[o] for i, o in zip(inner, outer, strict=False) if o in places})
        checkpoint.replace(graph, step, body)
    _name_what_is_overwritten(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for node in list(graph.nodes):
        norm = patterns.norm(node)
        if norm is None:
            continue
        where, kind = _place(norm, node, places)
        if norm.reason:
            found.append(Found(where, (), norm.reason, kind))
            continue
        chain = _follow(norm, node, order)
        few = _too_few(chain)
        if few:
            found.append(Found(where, (), few, kind))
            continue
        _replace(graph, chain)
        found.append(Found(where, chain.parts, "" if len(chain.parts) > 1 else chain.reason, kind))
    graph.lint()
    module.recompile()
    return [*found, *inside]


def _name_what_is_overwritten(graph: fx.Graph) -> None:
    """After ``y.add_(x)``, let later steps read its result rather than y: the same tensor, by its new name."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if patterns.is_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
            target = node.args[0]
            if target.op == "placeholder":
                continue
            for user in list(target.users):
                if user is not node and order[user] > order[node]:
                    user.replace_input_with(target, node)


def _place(norm: patterns.Norm, node: fx.Node, places: dict[str, tuple[str, str]]) -> tuple[str, str]:
    for tensor in norm.vectors:
        if isinstance(tensor, fx.Node) and tensor.name in places:
            return places[tensor.name]
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", "batch_norm")
    return str(path), getattr(kind, "__name__", str(kind))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _follow(norm: patterns.Norm, node: fx.Node, order: dict[fx.Node, int]) -> _Chain:
    chain = _Chain(norm, node)
    step, passed = node, []
    while norm.joins:
        user = _only_user(step)
        if user is None:
            chain.reason = (
                f"its output is read {len(step.users)} times" if step.users else "nobody reads its output"
            )
            break
        if any(is_mode_change(n) for n in _between(step, user)):
            chain.reason = "the mode changes behind it"
            break
        if patterns.passed_on(user):
            step = user
            passed.append(user)
            continue
        if chain.total is None:
            residual = patterns.added_to(user, step)
            if residual is not None:
                chain.reason = _why_not_moved(chain, user, residual, order)
                if chain.reason:
                    break
                chain.total, chain.residual, step = user, residual, user
                chain.skipped += passed
                passed = []
                continue
        name = patterns.activation(user)
        if patterns.is_sum(user):
            chain.reason = (
                "a second sum stands behind it"
                if chain.total
                else "what is added has another shape or dtype, or is overwritten by the sum"
            )
        elif name is None or not patterns.alike(value(user), value(node)):
            chain.reason = f"{_called(user)} stands behind it"
        elif (
            chain.residual is not None
            and name not in PIECEWISE_LINEAR
            and _written_later(chain.residual, user)
        ):
            chain.reason = "what is added is overwritten later"
        else:
            chain.act, chain.activation = user, name
            chain.skipped += passed
        break
    return chain


def _too_few(chain: _Chain) -> str:
    """Why a norm of torch's stays as it is written; where the size changes from call to call, the call decides."""
    values, training = value(chain.norm.z).numel(), chain.norm.training
    if training is None or type(values) is not int:
        return ""
    few = torch_is_faster(values, training, len(chain.parts) > 1)
    return f"its {values:,} values are so few that torch's own calls cost less" if few else ""


def _called(node: fx.Node) -> str:
    if _OURS in node.meta:
        return "another norm, whose call adds it,"
    return "the output" if node.op == "output" else getattr(node.target, "__name__", str(node.target))


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    steps, node = [], first.next
    while node is not last:
        steps.append(node)
        node = node.next
    return steps


def _why_not_moved(chain: _Chain, total: fx.Node, residual: fx.Node, order: dict[fx.Node, int]) -> str:
    """Why the norm cannot be called where its sum stands: somebody writes what it reads, or reads what it writes."""
    norm = chain.norm
    reads, moved = storages([norm.z, norm.vectors]), storages(norm.moved)
    for step in _between(chain.node, total):
        if step in chain.skipped or step.op == "placeholder":
            continue
        if overlap(written(step), reads):
            return f"{_called(step)} overwrites what it reads before the sum"
        if moved and overlap(storages((step.args, step.kwargs)), moved):
            return f"{_called(step)} reads its statistics before the sum"
    return ""


def _written_later(residual: fx.Node, last: fx.Node) -> bool:
    """Whether the residual, which a smooth activation's backward reads, may be overwritten by then."""
    memory = storages(residual)
    if EVERYTHING in memory:
        return True
    for node in residual.graph.nodes:
        if node.op == "placeholder" and overlap(storages(node), memory):
            return True
        if node.op == "output" and overlap(storages((node.args, node.kwargs)), memory):
            return True
    step = last.next
    while step.op != "root":
        if overlap(written(step), memory):
            return True
        step = step.next
    return False


def _replace(graph: fx.Graph, chain: _Chain) -> None:
    norm, last = chain.norm, chain.last
    call, given = norm.call(chain.activation, chain.residual)
    # where the sum stands: only there what is added is there as well
    with graph.inserting_before(chain.total or chain.node):
        new = graph.call_function(call, given)
    new.meta = {**last.meta, _OURS: True}
    last.replace_all_uses_with(new)
    dead = [node for node in (chain.node, *chain.skipped, chain.total, chain.act) if node is not None]
    while dead:
        # from the end: each but the last is read by the next
        node = next(node for node in dead if not node.users)
        graph.erase_node(node)
        dead.remove(node)
