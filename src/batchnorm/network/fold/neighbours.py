"""One fold under way: which norm may go where, by the flow of values, and the change itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.network.fold.affine import (
    Affine,
    Change,
    affine_of,
    agrees_on_trial,
    channels_in,
    channels_out,
    exact_after,
    fold_into_after,
    fold_into_before,
    fold_into_norm,
    foldable_layer,
    own_forward,
)
from batchnorm.network.fold.axes import Axis
from batchnorm.network.fold.remains import FoldedAway, FoldedNorm
from batchnorm.network.normalized import Normalized
from batchnorm.network.record import Record
from batchnorm.network.values.find import Flow, Unproven, batch_norms
from batchnorm.network.values.modules import LAYERS, has_hooks, is_layer
from batchnorm.network.values.values import Call, Value

TOOL = "fold"


@dataclass
class Folding:
    """One fold under way: planned on the flow of one copy of a network, done on ``result``.

    Parameters
    ----------
    flow : Flow
        In eval mode.
    result : torch.nn.Module
        What is changed.
    chosen : callable
        Whether a norm may go, by its name and itself.
    certain : bool
        Whether the number of axes seen is that of the user's data.
    steps : list of tuple of str
        Done so far: way (``"before"``, ``"after"``, ``"norm"``), path of the norm, path of what took it.
    gone : set of int
        ``id`` of the norms that are folded.
    affines : dict
        ``id`` of a norm to what it does.
    reasons : dict
        Path of a norm to why each way was closed.
    done : dict
        Path of a folded norm to where it went.
    """

    flow: Flow
    result: nn.Module
    chosen: Callable[[str, nn.Module], bool]
    certain: bool
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    affines: dict[int, Affine] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held: dict[int, str] = {}
        for path, module in self.flow.model.named_modules():
            for name, value in vars(module).items():
                if name != "_modules":
                    for kept in _modules_in(value):
                        self.held[id(kept)] = f"{path or 'the model'}, attribute {name}"

    # -- the order of things ----------------------------------------------------------------------------
    def fold_all(self) -> None:
        """Fold every norm that can be: into the layer in front, else the one behind, else the norm in front."""
        norms = [norm for _, norm in batch_norms(self.flow.model)]
        for norm in norms:
            self._attempt(norm, self._measure)
        norms = [norm for norm in norms if id(norm) in self.affines]
        norms.sort(key=lambda norm: min((c.order for c in self.flow._calls.get(id(norm), [])), default=0))
        attempts: list[tuple[Callable[[nn.Module], None], bool]] = [
            (self._before, False),
            (self._after, True),
            (self._into_norm, True),
        ]
        for attempt, backwards in attempts:
            for norm in reversed(norms) if backwards else norms:
                if id(norm) not in self.gone:
                    self._attempt(norm, attempt)

    def _attempt(self, norm: nn.Module, attempt: Callable[[nn.Module], None]) -> None:
        try:
            attempt(norm)
        except Unproven as why:
            reasons = self.reasons.setdefault(self.flow.path(norm), [])
            if str(why) not in reasons:
                reasons.append(str(why))

    def _measure(self, norm: nn.Module) -> None:
        path = self.flow.path(norm)
        if not any(self.chosen(name, norm) for name in self.flow.names(norm)):
            raise Unproven("where= does not mean it")
        if has_hooks(norm):
            raise Unproven("it has hooks")
        if id(norm) in self.held:
            raise Unproven(f"it is also kept in {self.held[id(norm)]}")
        if hasattr(norm, "parametrizations"):
            raise Unproven("its weight is computed by a parametrization")
        readers = self.flow.readers_elsewhere(norm)
        if readers:
            raise Unproven(
                f"its parameters or buffers are read by name in the forward of {', '.join(readers)}"
            )
        if isinstance(norm, _BatchNorm) and self.result.get_submodule(path).training:
            raise Unproven("it stays in training mode when the network is in eval mode")
        self.affines[id(norm)] = affine_of(norm)

    # -- the three ways ---------------------------------------------------------------------------------
    def _before(self, norm: nn.Module) -> None:
        affine, layer = self.affines[id(norm)], self._neighbour(norm, front=True)
        self._check_layer(layer, own=False)
        if channels_out(layer) != affine.scale.numel():
            raise Unproven(
                f"it has {affine.scale.numel()} channels, and {self.flow.path(layer)} {channels_out(layer)}"
            )
        straight = True
        for call in self.flow.calls(layer):
            axis: Axis | None = Axis.behind(call)
            value, reader = call.output, self.flow.sole_reader(call.output)
            while reader.module is not norm:
                if not self._passes(reader):
                    axis, straight = self._moved(reader, axis, value), False
                value, reader = reader.output, self.flow.sole_reader(reader.output)
            if axis is None:
                raise Unproven(f"the channels of {self.flow.path(layer)} are lost in a reshape before it")
            if not axis.is_same(affine.channel_dim):
                raise Unproven(
                    f"its channel axis is {affine.channel_dim}, and the channels of {self.flow.path(layer)} "
                    f"are axis {axis.place} of {axis.rank}"
                )
        guard = straight and not self.certain and isinstance(layer, nn.Linear) and affine.channel_dim >= 0
        self._change(norm, layer, affine, fold_into_before, after=False)
        rest = affine.tail
        if guard:
            rest = FoldedNorm() if _is_identity(rest) else nn.Sequential(FoldedNorm(), rest)
        self._replace(norm, rest)

    def _neighbour(self, norm: nn.Module, *, front: bool) -> nn.Module:
        """The one layer that makes what a norm reads, or reads what it makes, in every call of it."""
        found: nn.Module | None = None
        for call in self.flow.calls(norm):
            if len(call.inputs) != 1:
                raise Unproven("it is given a residual or a mask besides its input")
            other = self._maker(call, Axis.MOVES) if front else self._reader(call)
            if other is None:
                raise Unproven("no layer is seen in front of it")
            module = other.module
            if module is None or not is_layer(module):
                what = f"{other.op} {other.path if module is not None else ''}".strip()
                raise Unproven(
                    f"it follows {what}"
                    if front
                    else f"{what if module is None else other.path} stands behind it"
                )
            if found not in (None, module):
                pair = f"{self.flow.path(found)} and {self.flow.path(module)}"
                raise Unproven(
                    f"it is shared: it follows {pair}" if front else f"it is shared: {pair} follow it"
                )
            found = module
        assert found is not None
        return found

    def _after(self, norm: nn.Module) -> None:
        affine = self.affines[id(norm)]
        layer = self._neighbour(norm, front=False)
        if not _is_identity(affine.tail):
            return
        self._check_layer(layer, own=True)
        for call in self.flow.calls(layer):
            maker = self._maker(call)
            if maker is None or maker.module is not norm:
                raise Unproven(f"{self.flow.path(layer)} behind it also reads other values")
        if channels_in(layer) != affine.scale.numel():
            raise Unproven(
                f"it has {affine.scale.numel()} channels, and {self.flow.path(layer)} reads {channels_in(layer)}"
            )
        objection = exact_after(layer, affine)
        if objection:
            raise Unproven(f"{self.flow.path(layer)} behind it: {objection}")
        guard = False
        if isinstance(layer, nn.Linear):
            ranks = {len(c.output.shape) for c in self.flow.calls(layer)}
            if affine.channel_dim >= 0 and ranks - {2}:
                raise Unproven(
                    f"its channel axis is 1, and {self.flow.path(layer)} behind it reads the last of {max(ranks)}"
                )
            guard = affine.channel_dim >= 0 and not self.certain
        elif affine.channel_dim not in (1, -1 - len(layer.kernel_size)):  # type: ignore[arg-type]
            raise Unproven(
                f"its channel axis is {affine.channel_dim}, and that of {self.flow.path(layer)} is 1"
            )
        self._change(norm, layer, affine, fold_into_after, after=True)
        self._replace(norm, FoldedNorm() if guard else nn.Identity())

    def _into_norm(self, norm: nn.Module) -> None:
        affine, makers = self.affines[id(norm)], set[Any]()
        for call in self.flow.calls(norm):
            maker = self._maker(call) if len(call.inputs) == 1 else None
            makers.add(maker.module if maker is not None else None)
        first = makers.pop()
        before = self.affines.get(id(first))
        if not (
            before is not None
            and not makers
            and first is not norm
            and id(first) not in self.gone
            and (own_forward(first, (_BatchNorm,)) or hasattr(first, "channel_dim"))
            and all(first._parameters.get(name) is not None for name in ("weight", "bias"))
            and _is_identity(before.tail)
            and (before.channel_dim, before.scale.shape) == (affine.channel_dim, affine.scale.shape)
            and all(self._reader(call).module is norm for call in self.flow.calls(first))
        ):
            return
        fold_into_norm(self.result.get_submodule(self.flow.path(first)), affine)
        joined = replace(
            before, scale=before.scale * affine.scale, shift=before.shift * affine.scale + affine.shift
        )
        self.affines[id(first)] = joined
        self._note(norm, first, "norm")
        self._replace(norm, affine.tail)

    # -- conditions -------------------------------------------------------------------------------------
    def _passes(self, call: Call) -> bool:
        if call.module is not None and id(call.module) in self.gone:
            return _is_identity(self.affines[id(call.module)].tail)
        return call.passes_on

    def _maker(self, call: Call, through: frozenset[str] = frozenset()) -> Call | None:
        """The call that made what a call reads, past what hands it on."""
        maker = call.inputs[0].producer
        while maker is not None and maker.inputs and (self._passes(maker) or maker.op in through):
            maker = maker.inputs[0].producer
        return maker

    def _moved(self, reader: Call, axis: Axis | None, value: Value) -> Axis | None:
        if reader.op not in Axis.MOVES:
            raise Unproven(f"the layer in front is also used by {reader.op} {reader.path}".strip())
        return axis.moved(reader, value.shape, reader.output.shape) if axis is not None else None

    def _reader(self, call: Call) -> Call:
        reader = self.flow.sole_reader(call.output)
        while self._passes(reader):
            reader = self.flow.sole_reader(reader.output)
        return reader

    def _check_layer(self, layer: nn.Module, *, own: bool) -> None:
        path = self.flow.path(layer)
        if has_hooks(layer):
            raise Unproven(f"{path} has hooks")
        reason = foldable_layer(layer)
        if reason:
            raise Unproven(reason.format(path=path))
        shared = self.flow.shared(layer)
        if shared:
            raise Unproven(f"the parameters of {path}: {shared}")
        readers = self.flow.readers_elsewhere(layer)
        if readers:
            raise Unproven(f"parameters of {path} are read by name in the forward of {', '.join(readers)}")
        if own and not own_forward(layer, LAYERS):
            raise Unproven(f"{path} has a forward of its own, which may pad")

    # -- acts -------------------------------------------------------------------------------------------
    def _change(
        self, norm: nn.Module, layer: nn.Module, affine: Affine, change: Change, *, after: bool
    ) -> None:
        path = self.flow.path(layer)
        target = self.result.get_submodule(path)
        if not own_forward(layer, LAYERS) and not agrees_on_trial(target, affine, change, after=after):
            raise Unproven(
                f"the forward of {path} ({type(layer).__name__}) is not one that scales with its weight"
            )
        change(target, affine)
        self._note(norm, layer, "after" if after else "before")

    def _note(self, norm: nn.Module, target: nn.Module, way: str) -> None:
        norm_path, path = self.flow.path(norm), self.flow.path(target)
        self.gone.add(id(norm))
        self.steps.append((way, norm_path, path))
        self.done[norm_path] = f"into {path} {'behind' if way == 'after' else 'before'} it"

    def _replace(self, norm: nn.Module, by: nn.Module) -> None:
        by = (FoldedAway() if type(by) is nn.Identity else by).eval()
        for name in self.flow.names(norm):
            above, _, last = name.rpartition(".")
            parent = self.result.get_submodule(above)
            parent._modules[last] = by
            if type(parent) is Normalized and type(by) is FoldedAway and not has_hooks(parent):
                over, _, place = above.rpartition(".")
                if above:
                    self.result.get_submodule(over)._modules[place] = parent.layer

    def record(self) -> Record:
        """Tell of every norm where it went, or why it stayed.

        Returns
        -------
        Record
            One row a norm.
        """
        told = Record(tool=TOOL)
        for path, norm in batch_norms(self.flow.model):
            kind = type(norm).__name__
            if path in self.done:
                told.add(path, kind, "folded", self.done[path])
            else:
                reasons = [r for r in self.reasons.get(path, []) if r] or ["no neighbour can take it"]
                told.leave(path, kind, "; ".join(reasons))
        return told


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _modules_in(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [item for item in value if isinstance(item, nn.Module)]
    return []
