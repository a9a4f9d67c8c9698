"""Find norms whose output goes to a sum or an activation and nowhere else, and write the forward anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from batchnorm.network.body import Body, Refused, follow_body
from batchnorm.network.flow import canonical
from batchnorm.network.fused import ALWAYS, Plan, finish, fused, importable, is_plain, until
from batchnorm.network.kinds import LAYERS, activation_name, has_hooks

_FRESH_FUNCTIONS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "linear",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "matmul",
    ]
)
_ACTIVATION_ARGUMENTS = {
    "leaky_relu": ("negative_slope", "inplace"),
    "hardtanh": ("min_val", "max_val", "inplace"),
    "clamp": ("min", "max"),
}


@dataclass
class Tail:
    """The norm that is the last step of a module.

    Parameters
    ----------
    path : str
        From the module.
    fresh : bool
        Whether what it reads was made by a layer for it alone, so that nobody changes it meanwhile.
    """

    path: str
    fresh: bool


@dataclass
class Site:
    """A norm and what follows it, in one forward.

    Parameters
    ----------
    node : torch.fx.Node
        The call of the norm, or of a child that ends in one.
    norm : str
        Path of the norm, from the module whose forward this is.
    passed : list of torch.fx.Node
        Calls of Identity on the way.
    total : torch.fx.Node or None
        The sum.
    act : torch.fx.Node or None
        The activation.
    activation : str or None
        Its name.
    """

    node: fx.Node
    norm: str
    passed: list[fx.Node] = field(default_factory=list)
    total: fx.Node | None = None
    act: fx.Node | None = None
    activation: str | None = None

    def __str__(self) -> str:
        return " -> ".join(
            ["norm", *(["add"] if self.total is not None else []), *filter(None, [self.activation])]
        )


@dataclass
class Rewriting:
    """What can be done about one module's forward.

    Parameters
    ----------
    plans : list of Plan
        One, or two where training and eval take different ways.
    sites : dict
        Path of a norm (from the module) to what is called with it.
    tail : Tail or None
        The norm that is the last step of the forward, in both modes.
    reason : str
        Why there is no plan.
    """

    plans: list[Plan] = field(default_factory=list)
    sites: dict[str, str] = field(default_factory=dict)
    tail: Tail | None = None
    reason: str = ""


def rewrite(module: nn.Module, tails: dict[int, Tail]) -> Rewriting:
    """Plan the forward of one module anew, for training and eval; nothing in it is changed.

    Parameters
    ----------
    module : torch.nn.Module
        With norms of ours in it.
    tails : dict
        ``id`` of each module below that ends in a norm, to that norm.

    Returns
    -------
    Rewriting
        Plans that call norms together with what follows; or the reason why there are none.
    """
    result = Rewriting()
    tails_seen: list[Tail | None] = []
    modes = [(m, m.training) for m in module.modules()]
    try:
        for training in (module.training, not module.training):
            for m, _ in modes:
                m.training = training
            body = follow_body(module)
            plan, sites, tail = _plan(module, body, tails)
            result.plans.append(plan)
            result.sites.update({site.norm: str(site) for site in sites})
            tails_seen.append(tail)
            if not any(name == "training" for _, name, _ in body.guards):
                break
    except Refused as why:
        return Rewriting(reason=str(why))
    finally:
        for m, training in modes:
            m.training = training
    result.tail = tails_seen[0] if all(tail == tails_seen[0] for tail in tails_seen) else None
    return result


def _plan(module: nn.Module, body: Body, tails: dict[int, Tail]) -> tuple[Plan, list[Site], Tail | None]:
    sites = list(_sites(module, body.graph, tails))
    end, tail, behind = _tail(module, body.graph, tails)
    norms = tuple(str(s.node.target) for s in sites if is_plain(_child(module, s.node)))
    elided, guards = [], list(body.guards)
    for node in [
        *behind,
        *(n for s in sites for n in [*s.passed, s.act] if n is not None and n.op == "call_module"),
    ]:
        child = module.get_submodule(str(node.target))
        _, inner = _activation_module(child)
        # for a class of another library there are the guards of its forward
        elided.append((str(node.target), type(child), activation_name(child, "", {})))
        guards += [
            (f"{node.target}.{path}".rstrip("."), attribute, value) for path, attribute, value in inner
        ]
    head = None
    if end is not None:
        graph, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
        graph.output(graph.graph_copy(body.graph, nodes))
        _write(module, graph, [_copied(site, nodes) for site in sites])
        _stop_before(graph, nodes[end], [nodes[n] for n in behind])
        head = _source(graph)
    _write(module, body.graph, sites)
    made = _source(body.graph)
    plan = Plan(made, head, body.required, body.defaults, body.tensors, tuple(guards), norms, tuple(elided))
    return plan, sites, tail


# -- finding -------------------------------------------------------------------------------------------------
def _child(module: nn.Module, node: Any) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return module.get_submodule(str(node.target))
    return None


def _ends_in(module: nn.Module, node: fx.Node, tails: dict[int, Tail]) -> str | None:
    """Path of the norm whose output a call returns."""
    child = _child(module, node)
    if child is None or has_hooks(child) or node.kwargs or not node.args:
        return None
    if is_plain(child):
        return str(node.target) if len(node.args) == 1 else None
    tail = tails.get(id(child))
    return None if tail is None else f"{node.target}.{tail.path}"


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _sites(module: nn.Module, graph: fx.Graph, tails: dict[int, Tail]) -> Iterator[Site]:
    calls: dict[str, int] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        path = _ends_in(module, node, tails)
        if path is not None:
            calls[path] = calls.get(path, 0) + 1
    taken: set[fx.Node] = set()
    # the later of two norms that are added takes the earlier as its residual
    for node in reversed(list(graph.nodes)):
        path = _ends_in(module, node, tails)
        if path is None:
            continue
        site = Site(node, path)
        user, value = _past_identity(module, node, site)
        if user is not None and user not in taken and calls[path] == 1:
            residual = _residual(module, user, value)
            if residual is not None and _may_wait(module, site, user, tails, order):
                site.total = user
                before = len(site.passed)
                user, value = _past_identity(module, site.total, site)
        if user is not None and user not in taken:
            site.activation = _activation(module, user, value)
            site.act = user if site.activation is not None else None
        if site.act is None:
            if site.total is None:
                continue
            del site.passed[before:]
        taken.update(n for n in (site.total, site.act) if n is not None)
        yield site


def _is_identity(module: nn.Module, node: fx.Node | None) -> bool:
    child = _child(module, node)
    return child is not None and type(child) is nn.Identity and not has_hooks(child)


def _past_identity(module: nn.Module, value: fx.Node, site: Site) -> tuple[fx.Node | None, fx.Node]:
    user = _only_user(value)
    while user is not None and _is_identity(module, user):
        site.passed.append(user)
        value, user = user, _only_user(user)
    return user, value


def _residual(module: nn.Module, total: fx.Node, value: fx.Node) -> fx.Node | None:
    """What a sum adds to a value; None for everything that is no plain sum of two tensors."""
    name, inplace = _function(total)
    if name != "add" or len(total.args) != 2 or total.kwargs:
        return None
    first, second = total.args
    if first is value and isinstance(second, fx.Node) and second is not value:
        return second
    if second is value and isinstance(first, fx.Node) and first is not value:
        # `first += value` is seen by whoever else holds what is in first
        return first if not inplace or (len(first.users) == 1 and _makes_new(module, first)) else None
    return None


def _makes_new(module: nn.Module, node: fx.Node) -> bool:
    """Whether a step surely returns a tensor that shares nothing with others."""
    child = _child(module, node)
    if child is not None:
        return (isinstance(child, LAYERS) or is_plain(child)) and not has_hooks(child)
    return node.op == "call_function" and _function(node)[0] in _FRESH_FUNCTIONS


def _may_wait(
    module: nn.Module, site: Site, total: fx.Node, tails: dict[int, Tail], order: dict[fx.Node, int]
) -> bool:
    """Whether the norm may run where the sum stands: what it reads must be the same then."""
    between = [n for n in order if order[site.node] < order[n] < order[total] and n not in site.passed]
    if all(n.op == "get_attr" or _is_calm(module, n) for n in between):
        return True
    child = _child(module, site.node)
    if not is_plain(child):
        return tails[id(child)].fresh
    z = site.node.args[0]
    return isinstance(z, fx.Node) and len(z.users) == 1 and _makes_new(module, z)


def _is_calm(module: nn.Module, node: fx.Node) -> bool:
    """Whether a step surely changes no tensor in place."""
    child = _child(module, node)
    if child is not None:
        return (isinstance(child, LAYERS) or is_plain(child) or type(child) is nn.Identity) and not has_hooks(
            child
        )
    name, inplace = _function(node)
    return name in {*_FRESH_FUNCTIONS, "add", "mul", "cat", "getattr", "size", "relu"} and not inplace


def _function(node: fx.Node) -> tuple[str, bool]:
    """Canonical name of a function or method, and whether it changes its first argument."""
    if node.op == "call_method":
        return canonical(str(node.target))
    if node.op != "call_function":
        return "", False
    name, inplace = canonical(getattr(node.target, "__name__", ""))
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        inplace = True
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args)  # type: ignore[arg-type]
        inplace = inplace or bound.arguments.get("inplace") is True
    except (TypeError, ValueError):
        pass
    return name, inplace


def _activation(module: nn.Module, node: fx.Node, value: fx.Node) -> str | None:
    if not node.args or node.args[0] is not value or value in node.args[1:] or value in node.kwargs.values():
        return None
    child = _child(module, node)
    if child is not None:
        alone = not has_hooks(child) and len(node.args) == 1 and not node.kwargs
        return _activation_module(child)[0] if alone else None
    if node.op not in ("call_function", "call_method"):
        return None
    home = getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_function" and not str(home).startswith(("torch", "_operator")):
        return None
    name, _ = _function(node)
    scalars = dict(zip(_ACTIVATION_ARGUMENTS.get(name, ("inplace",)), node.args[1:], strict=False))
    scalars.update(node.kwargs)
    if any(isinstance(v, fx.Node) for v in scalars.values()) or scalars.get("out") is not None:
        return None
    return activation_name(None, name, scalars)


def _activation_module(module: nn.Module) -> tuple[str | None, tuple[tuple[str, str, Any], ...]]:
    """Name of the activation that a module is, and what that rests on, where its class is another library's."""
    name = activation_name(module, "", {})
    known = (
        type(module).__module__.startswith("torch.nn")
        or module._modules
        or module._parameters
        or module._buffers
    )
    if name is not None or known:
        return name, ()
    modes = module.training
    try:
        found = []
        for training in (True, False):
            module.training = training
            body = follow_body(module)
            nodes = [n for n in body.graph.nodes if n.op not in ("placeholder", "output")]
            output = next(n for n in body.graph.nodes if n.op == "output")
            if len(nodes) != 1 or len(body.required) != 1 or body.defaults or output.args[0] is not nodes[0]:
                return None, ()
            argument = next(n for n in body.graph.nodes if n.op == "placeholder")
            found.append((_activation(module, nodes[0], argument), body.guards))
    except Refused:
        return None, ()
    finally:
        module.training = modes
    return found[0] if found[0] == found[1] else (None, ())


def _tail(
    module: nn.Module, graph: fx.Graph, tails: dict[int, Tail]
) -> tuple[fx.Node | None, Tail | None, list[fx.Node]]:
    """The call of a norm, or of a child that ends in one, whose output the forward returns; Identities after it."""
    value = next(node for node in graph.nodes if node.op == "output").args[0]
    behind: list[fx.Node] = []
    while isinstance(value, fx.Node) and len(value.users) == 1 and type(_child(module, value)) is nn.Identity:
        behind.append(value)
        value = value.args[0]
    path = _ends_in(module, value, tails) if isinstance(value, fx.Node) and len(value.users) == 1 else None
    if path is None or any(has_hooks(module.get_submodule(str(n.target))) for n in behind):
        return None, None, []
    inner = tails.get(id(_child(module, value)))
    z = value.args[0]
    fresh = inner.fresh if inner else isinstance(z, fx.Node) and len(z.users) == 1 and _makes_new(module, z)
    return value, Tail(path, fresh), behind


# -- writing -------------------------------------------------------------------------------------------------
def _copied(site: Site, nodes: dict[fx.Node, fx.Node]) -> Site:
    def to(node: fx.Node | None) -> fx.Node | None:
        return None if node is None else nodes[node]

    return replace(
        site,
        node=nodes[site.node],
        passed=[nodes[n] for n in site.passed],
        total=to(site.total),
        act=to(site.act),
    )


def _write(module: nn.Module, graph: fx.Graph, sites: list[Site]) -> None:
    """Put one call in the place of each site's."""
    for site in sites:
        order = dict(zip(graph.nodes, range(len(graph.nodes)), strict=True))
        members = [n for n in [site.node, *site.passed, site.total, site.act] if n is not None]
        chain = sorted(members, key=lambda node: order[node])
        residual = None
        if site.total is not None:
            residual = next(a for a in site.total.args if a not in chain)
        with graph.inserting_before(site.node):
            owner = graph.create_node("get_attr", str(site.node.target))
            local = is_plain(_child(module, site.node))
            pending = None if local else graph.call_function(until, (owner, *site.node.args))
        with graph.inserting_before(site.total or site.node):
            if local:
                done = graph.call_function(fused, (owner, site.node.args[0], residual, site.activation))
            else:
                done = graph.call_function(finish, (pending, residual, site.activation))
        chain[-1].replace_all_uses_with(done)
        for node in reversed(chain):
            graph.erase_node(node)


def _stop_before(graph: fx.Graph, end: fx.Node, behind: list[fx.Node]) -> None:
    """Return the norm at the end and its input, rather than its output."""
    for node in behind:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    with graph.inserting_before(end):
        owner = graph.create_node("get_attr", str(end.target))
        pending = graph.call_function(until, (owner, *end.args))
    end.replace_all_uses_with(pending)
    graph.erase_node(end)


def _source(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    code = graph.python_code("self")
    source = code.src.replace(" -> _Any_:", ":")
    names = {k: v for k, v in code.globals.items() if k not in ALWAYS and k in source}
    for name, value in names.items():
        if importable(value) is None:
            raise Refused(f"its forward calls {name}, which no module holds under that name")
    return source, names
