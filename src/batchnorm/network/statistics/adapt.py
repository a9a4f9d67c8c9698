"""Statistics for inputs whose distribution has shifted from training's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.layout import channel_axis, values_per_channel
from batchnorm.modules import Layer
from batchnorm.network.inputs import Forward, check_forward, run_each, target
from batchnorm.network.model import Where, check_number, check_runs, chooser, unwrapped
from batchnorm.network.record import Record, forget, write_record
from batchnorm.network.statistics.meter import given, moments
from batchnorm.network.undo import Undo, hook_before, set_modes, stop_gradients, write_together
from batchnorm.population import blend, merge


class _Blender:
    """One layer's source statistics, what a test batch showed, and the blend of both."""

    def __init__(self, layer: _BatchNorm, prior: float) -> None:
        self.layer, self.prior = layer, prior
        # whose statistics inference reads: the layer's own, or those of the domain in force
        self.holder: Any = (layer.population() if isinstance(layer, Layer) else None) or layer
        held: Any = self.holder
        self.source = (held.running_mean.clone(), held.running_var.clone())
        wide = [v.to(torch.float64 if v.device.type != "mps" else v.dtype) for v in self.source]
        self.mean, self.var = wide
        zeros = torch.zeros_like(self.mean)
        self.samples = 0
        self.seen = (zeros, zeros, zeros)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        z, mask = given(args, kwargs)
        if z.dim() < 2 or not z.is_floating_point():
            return  # the layer itself says what is wrong
        axis = channel_axis(z.dim(), getattr(layer, "channel_dim", 1))
        if z.shape[axis] != len(self.mean) or values_per_channel(z.shape, axis) == 0:
            return
        count, mean, m2 = (value.to(self.mean) for value in moments(z, axis, mask))
        finite = torch.isfinite(mean) & torch.isfinite(m2) & (count > 0)
        merged = merge(*self.seen, count, mean, m2)
        self.seen = tuple(torch.where(finite, new, old) for new, old in zip(merged, self.seen, strict=True))  # type: ignore[assignment]
        self.samples += z.shape[0]
        self.write()

    def write(self) -> None:
        count, mean, m2 = self.seen
        var = m2 / count.clamp(min=1)
        blended = blend(self.prior, self.mean, self.var, self.samples, mean, var)
        for buffer, new, old in zip(self.buffers(), blended, self.source, strict=True):
            buffer.copy_(torch.where(count > 0, new.to(buffer.dtype), old))

    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.holder.running_mean, self.holder.running_var


class adapt:
    """Blend the running statistics of a model with those of a batch of test inputs.

    Where test inputs come from a shifted distribution (fog, noise, another camera), the statistics of
    training do not fit, and a few test inputs without labels repair much of the harm. In each layer::

        mean = (prior * source_mean + n * batch_mean) / (prior + n)

    and the variance is that of the mixture of the two distributions, the spread between the two means
    included. n is the number of samples. The batch runs through the model once; each layer sees what the
    adapted layers before it put out.

    The statistics stay adapted until `restore` is called. Used in a ``with`` statement, the source
    statistics come back when the block ends, whatever happens in it. ``batchnorm.record(model)`` names the
    layers meanwhile. Only ``running_mean`` and ``running_var`` are written, in eval mode, for our layers and
    torch's; frozen layers too, for to freeze is about training.

    Parameters
    ----------
    model : Module
        A trained network; its statistics are changed in place, its mode is not.
    batch : Tensor, tuple, list or mapping
        Test inputs: a tensor, a tuple of what ``forward`` requires (a label behind it is left out), or
        keyword arguments.
    prior : float, default 4
        How many samples the source statistics are worth. 0 keeps nothing of them; inf everything. The
        default was chosen by measurement: the study ``shifted-inputs``.
    where : str or callable, optional
        Which layers: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    forward : callable, optional
        ``forward(model, batch)`` calls the network, where ``model(batch)`` is not how it takes one.
    inplace : bool, default True
        False adapts a copy, which is ``.model``.

    Raises
    ------
    ArgumentError
        A negative prior, or a model without (such) batch-norm statistics.
    ShapeError
        The batch reaches no batch norm with a sample in it.

    References
    ----------
    Schneider et al. 2020, arXiv:2006.16971, equation 3 (their N is ``prior``); Nado et al. 2020,
    arXiv:2006.10963.

    Examples
    --------
    >>> import torch, batchnorm
    >>> layer = batchnorm.BatchNorm1d(1).eval()
    >>> with batchnorm.adapt(layer, torch.full((16, 1), 4.0), prior=16):
    ...     print(layer.running_mean, layer.running_var)
    tensor([2.]) tensor([4.5000])
    >>> layer.running_mean
    tensor([0.])
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        prior: float = 4,
        *,
        where: Where = None,
        forward: Forward = None,
        inplace: bool = True,
    ) -> None:
        model, chosen = target(model, "adapt", inplace), chooser(where, "adapt")
        check_number(
            "adapt",
            "prior",
            prior,
            "not negative",
            lambda samples: samples >= 0,
            why="it is a number of samples.",
            mend="16 suits small test batches; 0 uses the batch alone.",
        )
        check_forward(forward, "adapt")
        check_runs(model, "adapt", forward)
        layers = {
            path: m
            for path, m in unwrapped(model).named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and chosen(path, m)
        }
        if not layers:
            raise ArgumentError(
                f"adapt: {type(model).__name__} has no batch norm with running statistics.",
                why="there is nothing to blend.",
                mend="a folded network has none left: adapt before you fold.",
            )
        self.model, self.prior, self._told = model, prior, Record(tool="adapt")
        self._blenders = [_Blender(layer, prior) for layer in layers.values()]
        self._end = Undo(always=True)
        self._end.add(self.restore)
        undo, end = Undo(), Undo(always=True)
        with undo, undo:
            undo.add(self.restore)
            with end, end:
                set_modes(end, model, False)
                for blender in self._blenders:
                    hook_before(end, blender.layer, blender.observe)
                stop_gradients(end)
                run_each(model, [batch], "adapt", forward)
            if not any(blender.samples for blender in self._blenders):
                raise ShapeError(
                    "adapt: the batch holds no sample, or reaches no batch norm.",
                    why="there is nothing to adapt to.",
                    mend="give at least one input of the kind the model takes.",
                )
            for (path, layer), blender in zip(layers.items(), self._blenders, strict=True):
                detail = f"{blender.samples} samples, the source worth {prior:g}"
                self._told.add(path, type(layer).__name__, "adapted", detail)
            write_record(model, self._told)

    def restore(self) -> None:
        """Give every layer its source statistics back; it may be called again."""
        forget(self.model, self._told.rows)
        write_together(
            [buffer for blender in self._blenders for buffer in blender.buffers()],
            [value for blender in self._blenders for value in blender.source],
        )

    def __enter__(self) -> adapt:
        return self

    def __exit__(self, *_: object) -> None:
        with self._end, self._end:
            pass
