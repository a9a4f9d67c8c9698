"""The engine of torch's own batch norm: every device but the CPU, in eager and inside compiled graphs.

torch's kernels (cuDNN, MIOpen, native, MPS, XPU) normalize and take the statistics; what is ours is what stands
around them: the guard of the running statistics, the residual and the activation. `train` and `infer` are the
operator as torch differentiates it, so that what is saved and which backward runs are torch.nn's by construction.
The slots of `Engine` serve where statistics are pooled over ranks or masked, and where engines are compared.

Statistics have the accuracy of torch's kernels: they lose digits where the mean is more than about 1e4 deviations
away from zero. ``BATCHNORM_ENGINE=aten`` keeps them there.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.compiling import compiling
from batchnorm.kernels import aten
from batchnorm.kernels.activations import LEAKY_SLOPE, activate
from batchnorm.kernels.contract import Backward, Forward, Moments, Norm
from batchnorm.layout import values_per_channel
from batchnorm.population import Tracking, commit

# those whose backward looks at the output, so that the input may be overwritten
_IN_PLACE = {
    "relu": torch.relu_,
    "relu6": lambda u: F.hardtanh_(u, 0.0, 6.0),
    "leaky_relu": lambda u: F.leaky_relu_(u, LEAKY_SLOPE),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


class _Form(NamedTuple):
    """What torch's kernels are shown in place of a tensor: its axes in another order, and some of them as one."""

    order: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, t: Tensor) -> Tensor:
        """Give t in this form; a view wherever t lies as the tensor does that the form was made for."""
        t = t if self.order == tuple(range(t.dim())) else t.permute(self.order)
        return t if t.shape == self.shape else t.reshape(self.shape)

    def back(self, u: Tensor, like: Tensor) -> Tensor:
        """The inverse, for a tensor of the shape of ``like``: a view that lies as ``like`` does."""
        whole = tuple(like.shape[a] for a in self.order)
        u = u if u.shape == whole else u.view(whole)
        if self.order == tuple(range(like.dim())):
            return u
        return u.permute([self.order.index(a) for a in range(like.dim())])


def _form(z: Tensor, axis: int) -> _Form | None:
    """How torch's kernels are to be shown z; None: as it is.

    Packed values in an order that torch has no memory format for, as (N, L, C) or an image turned on its side, are
    shown in the order of memory, as a matrix or (N, C, S): nothing is copied, and y comes out as z lies.
    """
    in_graph = compiling()
    if axis == 1 and (in_graph or z.is_contiguous() or _has_channels_last(z)):
        return None
    axes = tuple(range(z.dim()))
    order = _packed_order(z) if not in_graph else axes if axis == axes[-1] else None
    if order is not None:
        outer, inner = (prod(z.shape[a] for a in part) for part in _around(order, axis))
        return _Form(order, (outer, z.shape[axis]) if axis == order[-1] else (outer, z.shape[axis], inner))
    if axis == 1:
        return None
    order = (0, axis, *(a for a in axes if a not in (0, axis)))
    return _Form(order, tuple(z.shape[a] for a in order))


def _around(order: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    at = order.index(axis)
    return order[:at], order[at + 1 :]


def _has_channels_last(z: Tensor) -> bool:
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(z.dim())
    return order is not None and z.is_contiguous(memory_format=order)


def _packed_order(z: Tensor) -> tuple[int, ...] | None:
    """The axes from the outermost in memory to the innermost; None where there are gaps or overlaps."""
    strides = z.stride()
    order = sorted(range(z.dim()), key=lambda a: -strides[a])
    step = 1
    for a in reversed(order):
        if z.shape[a] != 1:
            if strides[a] != step:
                return None
            step *= z.shape[a]
    return tuple(order)


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return v if v is None or v.dtype is dtype else v.to(dtype)


def _normalized(
    z: Tensor, norm: Norm, mean: Tensor, var: Tensor, training: bool, momentum: float, in_place: bool
) -> Tensor:
    dtype, form = aten.vector_dtype(z), _form(z, norm.axis)
    u = torch.batch_norm(
        z if form is None else form.of(z), _vector(norm.gamma, dtype), _vector(norm.beta, dtype), mean, var, training,
        momentum, norm.eps, torch.backends.cudnn.enabled,
    )  # fmt: skip
    # torch's backward of batch norm reads its input, never its output, which may be overwritten
    residual = norm.residual
    if residual is not None:
        if form is not None and residual.stride() != z.stride():
            u, form = form.back(u, z) + residual, None
        else:
            added = residual if form is None else form.of(residual)
            u = u.add_(added) if in_place else u + added
    if norm.activation is not None:
        change = _IN_PLACE.get(norm.activation) if in_place else None
        u = activate(u, norm.activation) if change is None else change(u)
    return u if form is None else form.back(u, z)


def train(z: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize with the batch's own statistics, as torch differentiates it.

    Parameters
    ----------
    z : Tensor
        Input, at least two values per channel.
    norm : Norm
        What is done with it.

    Returns
    -------
    y : Tensor
        Of the shape and dtype of ``z``.
    mean, var : Tensor, shape (C,)
        The batch's statistics; the variance has divisor m - 1. Not to be written to: the backward keeps them.
    """
    # momentum 1 into zeros is the batch's statistics; into whatever memory held, a NaN would stay a NaN
    c = z.shape[norm.axis]
    how: dict[str, Any] = {"dtype": aten.vector_dtype(z), "device": z.device}
    in_place = not compiling()
    # one launch for both; in a graph they cost none, and views that are written to are in a compiler's way
    mean, var = (
        torch.zeros((2, c), **how).unbind() if in_place else (torch.zeros(c, **how), torch.zeros(c, **how))
    )
    return _normalized(z, norm, mean, var, True, 1.0, in_place), mean, var


def infer(z: Tensor, norm: Norm, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize with population statistics, as torch differentiates it.

    Parameters
    ----------
    z, norm
        As for `train`.
    mean, var : Tensor, shape (C,)
        Population statistics, which are constants. Where a gradient is recorded the backward keeps them.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``z``.
    """
    dtype = aten.vector_dtype(z)
    in_place = not compiling()
    return _normalized(z, norm, mean.to(dtype), var.to(dtype), False, 0.0, in_place)


class TorchEngine(aten.AtenEngine):
    """`Engine` of torch's own batch norm; masks and pooled sums go by composed operations, as in `aten`."""

    name = "torch"

    def normalize(
        self,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        *,
        mask: Tensor | None = None,
        out: Tensor | None = None,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if mask is not None or not z.numel():
            return super().normalize(z, norm, moments, mask=mask, out=out, save=save)
        # torch takes a variance and an eps: the root of 1 / inv_std^2 is inv_std again, to its last digit
        exact = aten.exact_dtype(z.device)
        u = infer(z, norm._replace(activation=None, eps=0.0), moments.mean, moments.inv_std.to(exact) ** -2)
        return _finished(z, u, norm, out, save)

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        return _given(z, infer(z, norm, mean, var), out)

    def forward(
        self, z: Tensor, norm: Norm, tracking: Tracking | None, mask: Tensor | None = None
    ) -> Forward:
        m = values_per_channel(z.shape, norm.axis)
        u, mean, unbiased = train(z, norm._replace(activation=None))
        var = unbiased * ((m - 1) / m)
        if tracking is not None:
            commit(tracking, m, mean, unbiased, unbiased=True)
        y, saved = _finished(z, u, norm, None, True)
        return Forward(y, mean, var, aten.inverse_deviation(var, norm.eps, var.dtype), saved)

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
        mask: Tensor | None = None,
    ) -> Backward:
        if not z.numel():
            return super().backward(dy, z, norm, moments, saved, training, with_residual)
        du = self._derivative(dy, z, norm, moments, saved, None)[0].to(z.dtype)
        dtype = aten.vector_dtype(z)
        mean, inv_std = (v.to(dtype) for v in moments)
        # as constants torch wants a variance beside an eps, here 0
        constants = (None, None) if training else (mean, inv_std**-2)
        form = _form(z, norm.axis)
        shown = [t if form is None else form.of(t) for t in (du, z)]
        dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            *shown, _vector(norm.gamma, dtype), *constants, mean, inv_std, training, 0.0, [True, True, True]
        )
        dz = _given(z, dz if form is None else form.back(dz, z), None)
        return Backward(dz, dbeta.to(dtype), dgamma.to(dtype), _given(z, du, None) if with_residual else None)


def _given(z: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    """Give y in the memory format of z, or in ``out``."""
    if out is not None:
        return out.copy_(y)
    result = torch.empty_like(z)
    return y if y.stride() == result.stride() else result.copy_(y)


def _finished(
    z: Tensor, u: Tensor, norm: Norm, out: Tensor | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Give y of u, and what the backward needs with it."""
    return _given(z, activate(u, norm.activation), out), norm.saved(u) if save else None


engine = TorchEngine()
