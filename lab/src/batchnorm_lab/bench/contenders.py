"""Who takes part: ours, torch eager, torch.compile and oneDNN, each behind the same few calls.

A contender is made for one case from the same tensors. ``forward()`` runs it as a user would, with the
output allocated by the call; ``backward()`` follows it through autograd. What they give back is compared
once, before anything is timed, so that no one is timed at something else.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm_lab.bench.operands import EPS, MOMENTUM, Operands
from batchnorm_lab.bench.shapes import Case


class Unsupported(Exception):
    """This contender cannot do this case; the message says why."""


class Contender(Protocol):
    """What the clock is put around."""

    def forward(self) -> Any: ...

    def backward(self, y: Any) -> Any: ...

    def as_torch(self, value: Any) -> Tensor: ...


def leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """Give a tensor that shares the memory of another and gathers a gradient of its own.

    Parameters
    ----------
    tensor : Tensor
        The tensor.
    wanted : bool
        Whether it takes part in autograd.

    Returns
    -------
    Tensor
        A detached view.
    """
    return tensor.detach().requires_grad_(wanted)


class TorchContender:
    """Torch eager: ``F.batch_norm``, then the addition and ReLU in place, as torchvision writes it."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case = case
        self.training = case.mode == "training"
        self.dy = operands.dy
        self.z = leaf(operands.z, self.training)
        residual = operands.residual
        self.residual = None if residual is None else leaf(residual, self.training)
        self.weight = leaf(operands.weight, self.training)
        self.bias = leaf(operands.bias, self.training)
        self.running_mean = operands.running_mean.clone()
        self.running_var = operands.running_var.clone()
        self.channel_dim = operands.channel_dim
        leaves = (self.z, self.weight, self.bias, self.residual)
        self.leaves = tuple(t for t in leaves if t is not None and self.training)
        self.call = self.prepare()

    def prepare(self) -> Any:
        return self.formula

    def formula(self, z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        if self.channel_dim == 2:
            z = z.transpose(1, 2)
        y = F.batch_norm(z, self.running_mean, self.running_var, weight, bias, self.training, MOMENTUM, EPS)
        if self.channel_dim == 2:
            y = y.transpose(1, 2)
        if residual is not None:
            y += residual
        return y if self.case.form == "plain" else F.relu_(y)

    def forward(self) -> Any:
        if self.training:
            return self.call(self.z, self.weight, self.bias, self.residual)
        with torch.no_grad():
            return self.call(self.z, self.weight, self.bias, self.residual)

    def backward(self, y: Any) -> Any:
        return torch.autograd.grad(y, self.leaves, self.dy)

    def as_torch(self, value: Any) -> Tensor:
        return value.to_dense() if value.is_mkldnn else value


class Compiled(TorchContender):
    """torch.compile with its defaults, for these very shapes."""

    def prepare(self) -> Any:
        import torch._inductor.config as inductor

        # part of the cache's key: code compiled for two threads must not serve one
        inductor.cpp.threads = torch.get_num_threads()
        torch._dynamo.reset()
        return torch.compile(self.out_of_place, dynamic=False)

    def out_of_place(self, z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return self.formula(z, weight, bias, residual)


class OneDnn(TorchContender):
    """oneDNN through torch's MKLDNN tensors; what it costs to make them is not counted."""

    def __init__(self, case: Case, operands: Operands) -> None:
        if case.layout not in ("nchw", "channels_last") or len(case.shape) not in (4, 5):
            raise Unsupported("MKLDNN tensors: batch_norm takes (N, C, H, W) and (N, C, D, H, W) only")
        if case.layout == "channels_last":
            raise Unsupported("MKLDNN tensors are made in the plain layout whatever the input's was")
        residual = operands.residual
        opaque = operands._replace(
            z=operands.z.to_mkldnn(),
            residual=None if residual is None else residual.to_mkldnn(),
            dy=operands.dy.to_mkldnn(),
        )
        super().__init__(case, opaque)
        self.channel_dim = 1

    def formula(self, z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(z, self.running_mean, self.running_var, weight, bias, self.training, MOMENTUM, EPS)
        if residual is not None:
            y = y + residual
        if self.case.form == "plain":
            return y
        return F.relu(y) if self.training else F.relu_(y)


class Ours(TorchContender):
    """``batchnorm.functional.batch_norm``, as a user calls it."""

    def prepare(self) -> Any:
        from batchnorm.functional import batch_norm

        self.operator = batch_norm
        self.activation = None if self.case.form == "plain" else "relu"
        self.extra: dict[str, Any] = {} if self.channel_dim == 1 else {"channel_dim": self.channel_dim}
        return self.formula

    def formula(self, z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return self.operator(
            z,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training,
            MOMENTUM,
            EPS,
            activation=self.activation,
            residual=residual,
            **self.extra,
        )


class EngineAlone(TorchContender):
    """The engine without autograd and dispatch around it: what the kernels themselves cost."""

    def prepare(self) -> Any:
        from batchnorm.kernels.contract import Moments, Norm
        from batchnorm.kernels.select import select

        self.engine = select(self.z)
        activation = None if self.case.form == "plain" else "relu"
        self.norm = Norm(self.channel_dim, EPS, self.weight, self.bias, self.residual, activation)
        self.moments = Moments(self.running_mean, (self.running_var + EPS).rsqrt())
        self.saved: Any = None
        return None

    def forward(self) -> Any:
        from batchnorm.kernels.contract import Moments

        with torch.no_grad():
            if not self.training:
                return self.engine.normalize(self.z, self.norm, self.moments)[0]
            y, mean, _, inv_std, self.saved = self.engine.forward(self.z, self.norm, None)  # type: ignore[misc]
            self.moments = Moments(mean, inv_std)
            return y

    def backward(self, y: Any) -> Any:
        added = self.residual is not None
        norm = self.norm._replace(residual=None, added=added)
        with torch.no_grad():
            dz, dbeta, dgamma, dresidual = self.engine.backward(
                self.dy, self.z, norm, self.moments, self.saved, True, added
            )
        return (dz, dgamma, dbeta) if dresidual is None else (dz, dgamma, dbeta, dresidual)


def make(name: str, case: Case, operands: Operands) -> Contender:
    """Make a contender ready to run a case.

    Parameters
    ----------
    name : str
        Of ``CONTENDERS``.
    case : Case
        What is to be timed.
    operands : Operands
        Its tensors.

    Returns
    -------
    Contender
        Ready, not yet warmed up.

    Raises
    ------
    Unsupported
        It cannot do this case, or is not installed.
    """
    if name == "jax":
        try:
            from batchnorm_lab.bench.jax_peer import Jax
        except ImportError as error:
            raise Unsupported("JAX is not installed") from error
        return Jax(case, operands)
    return TORCH_CONTENDERS[name](case, operands)


TORCH_CONTENDERS: dict[str, type[TorchContender]] = {
    "ours": Ours,
    "engine": EngineAlone,
    "eager": TorchContender,
    "compile": Compiled,
    "onednn": OneDnn,
}
PEERS = ("eager", "compile", "onednn", "jax")
CONTENDERS = ("ours", "engine", *PEERS)
