"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch's layers, right in more cases, and faster."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import validation
from batchnorm.buffers import BUFFERS
from batchnorm.compiling import compiling
from batchnorm.distributed.groups import members, names_of
from batchnorm.domain import active_domain
from batchnorm.ecosystem.plain import torch_layer
from batchnorm.ecosystem.registration import announce
from batchnorm.ecosystem.symbolic import one_step
from batchnorm.errors import BatchNormError, ShapeError
from batchnorm.functional import Options, infer, train
from batchnorm.micro_batches import Accumulator
from batchnorm.statistics_in_force import Populations
from batchnorm.steps import Between

# looked at when they are set, in the constructor and after; eps when it is used, as in torch
_OPTIONS = frozenset(
    {
        "activation",
        "channel_dim",
        "momentum",
        "on_nonfinite",
        "on_single_value",
        "process_group",
        "running_var_correction",
        "virtual_batch_size",
    }
)


class Layer(Populations):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share; before torch's class in the order of bases."""

    _dimensions: tuple[int, ...]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    num_features: int
    eps: float
    pooled_network = 1  # which of the networks whose layers have these names; `synchronize` knows it
    affine: bool
    track_running_stats: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
        on_single_value: str = "error",
        on_nonfinite: str = "skip",
        virtual_batch_size: int | None = None,
        running_var_correction: int = 1,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.widen()
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.channel_dim = channel_dim
        self.on_single_value = on_single_value
        self.on_nonfinite = on_nonfinite
        self.virtual_batch_size = virtual_batch_size
        self.running_var_correction = running_var_correction
        self.process_group = process_group
        # its path in the model, for messages to other ranks and about them; `synchronize` knows it
        self.pooled_as = ""
        self.frozen_statistics = False
        self.frozen_affine = False
        self.learned_affine: tuple[bool, ...] = (True, True)
        self.accumulator: Accumulator | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # tools that look up the exact class hear of it
        announce(cls)

    @classmethod
    def adopt(cls, layer: nn.modules.batchnorm._NormBase, **options: Any) -> Layer:
        """Make a layer of ours around another's Parameters and buffers, which both then share.

        Parameters
        ----------
        layer : torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm
            The layer to take over; it is not changed.
        **options
            Keyword-only arguments of the constructor, e.g. ``activation``.

        Returns
        -------
        BatchNorm1d, BatchNorm2d or BatchNorm3d
            With the same Parameters, buffers and training flag; means and variances in half precision come over
            as float32. Hooks stay with the old layer.
        """
        new = cls(
            layer.num_features,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
            device="meta",
            **options,
        )
        for name in ("weight", "bias"):
            new._parameters[name] = layer._parameters.get(name)
        for name in BUFFERS:
            new._buffers[name] = layer._buffers.get(name)
        new.widen()
        new.training = layer.training
        return new

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        masked_output: str = "zero",
    ) -> Tensor:
        """Normalize ``input``; in training also move the running statistics.

        Parameters
        ----------
        input : Tensor, shape (N, C, *S)
            Pre-activations z.
        residual : Tensor, optional
            Added before the activation; shape and dtype of ``input``.
        mask : Tensor of bool, optional
            Shape of ``input`` without the channel axis; where False, a value counts for nothing.
        masked_output : {"zero", "input"}, default "zero"
            What comes out where ``mask`` is False.

        Returns
        -------
        Tensor
            Of the shape, dtype and memory format of ``input``.

        Raises
        ------
        BatchNormError
            As `batchnorm.functional.batch_norm`, with the layer's path in the model.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            # one step for whoever looks at the flow of values, as torch's own layers are
            return one_step(self, input, residual, mask, masked_output)
        try:
            return self._forward(input, residual, mask, masked_output)
        except BatchNormError as error:
            if not error.at and not compiling():
                error.at = _path_from_stack(self)
            raise

    @property
    def as_torch(self) -> nn.Module:
        """The layer of torch that computes what this one does, but for its activation; it shares everything."""
        return torch_layer(self)

    def _forward(
        self,
        z: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        masked_output: str,
        activation: str | None = None,
    ) -> Tensor:
        # activation: of this call alone, where network.accelerate found it behind the layer
        if not isinstance(z, Tensor):
            raise validation.not_a_tensor("input", z)
        if z.dim() not in self._dimensions:
            self._check_input_dim(z)
        validation.check_eps(self.eps, self.training)
        if masked_output != "zero":
            validation.check_option("masked_output", masked_output)
        options = Options(
            self.eps,
            self.activation if activation is None else activation,
            self.channel_dim,
            self.on_single_value,
            self.on_nonfinite,
            self.virtual_batch_size,
            self.momentum,
        )
        name = active_domain()
        if name is not None and self.training and not self.frozen_statistics and self._lacks(name):
            return self._first_in_domain(name, z, residual, mask, masked_output, activation)
        population = self.population()
        # a layer without statistics of its own always takes the batch's, as in torch
        if population is not None and (self.frozen_statistics or not self.training):
            mean, var = population.running_mean, population.running_var
            return infer(z, mean, var, self.weight, self.bias, residual, mask, masked_output, options)
        tracking: Any = population if self.training and self.track_running_stats else None
        if tracking is not None and self.accumulator is not None:
            tracking = self.accumulator.taking(tracking)
        between = None
        if self.process_group is not None and self.training:
            between = self._between(z, mask, name)
        return train(
            z, self.weight, self.bias, residual, mask, masked_output, tracking, population, options, between
        )

    def _between(self, z: Tensor, mask: Tensor | None, domain: str | None) -> Between | None:
        if self.virtual_batch_size is not None:
            raise validation.parts_and_pooling(self.virtual_batch_size)
        # a graph asks when it runs, for it may outlive the process group that it was compiled beside
        if not compiling() or torch.compiler.is_exporting():
            if not members(self.process_group):
                return None
            if not self.pooled_as:
                self.pooled_as = _path_from_stack(self) or type(self).__name__
        from batchnorm.pooling.graph import Pooling
        from batchnorm.pooling.ranks import Settings

        return Pooling(
            self.process_group,
            self.pooled_as or type(self).__name__,
            self.num_features,
            str(z.dtype)[6:],
            domain or "",
            self.on_single_value,
            self.on_nonfinite,
            mask is not None,
            Settings(
                self.eps,
                self.momentum,
                self.running_var_correction,
                self.track_running_stats,
                self.pooled_network,
            ),
        )

    def _first_in_domain(self, name: str, *rest: Any) -> Tensor:
        self.add_domain(name)
        try:
            return self._forward(*rest)
        except BaseException:
            # a step that fails leaves the layer as it was
            del self.domains[name]
            if not self.domains:
                del self.domains
            raise

    def __prepare_scriptable__(self) -> None:
        raise validation.no_script()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.is_nested:  # it has no shape to tell
            raise validation.no_dense_layout(input)
        if input.dim() not in self._dimensions:
            wanted = " or ".join(f"{d}D" for d in self._dimensions)
            raise ShapeError(
                f"{type(self).__name__}: expected {wanted} input (got {input.dim()}D input of shape "
                f"{tuple(input.shape)}).",
                why="the layer was made for data of another kind, and axis 1 would be read as the channel.",
                mend="use the BatchNorm of that dimension; or batchnorm.functional.batch_norm, which takes any.",
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS:
            if name == "process_group" and value is not None:
                value = names_of(value)
            validation.check_option(name, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Say what differs from torch's layer after what torch says.

        Returns
        -------
        str
            Arguments of the constructor, and what is frozen.
        """
        text = super().extra_repr()
        defaults = {
            "activation": None,
            "channel_dim": 1,
            "on_single_value": "error",
            "on_nonfinite": "skip",
            "virtual_batch_size": None,
            "running_var_correction": 1,
            "process_group": None,
        }
        shown = [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        frozen = [k for k in ("statistics", "affine") if getattr(self, f"frozen_{k}")]
        if frozen:
            shown.append("frozen=" + "+".join(frozen))
        return ", ".join([text, *shown])

    def freeze_affine(self, frozen: bool) -> None:
        """Stop gamma and beta from learning, or let them learn.

        Parameters
        ----------
        frozen : bool
            Whether they stop.
        """
        if frozen == self.frozen_affine:
            return
        parameters = (self.weight, self.bias)
        if frozen:  # one that stood still before is left so when the others learn again
            self.learned_affine = tuple(p is not None and p.requires_grad for p in parameters)
        for parameter, learned in zip(parameters, self.learned_affine, strict=True):
            if parameter is not None and learned:
                parameter.requires_grad_(not frozen)
        self.frozen_affine = frozen

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (
            ("accumulator", None),
            ("process_group", None),
            ("pooled_as", ""),
            ("learned_affine", (True, True)),
        ):
            self.__dict__.setdefault(name, value)


def _path_from_stack(layer: nn.Module) -> str:
    # only on the way out with an error: the outermost module that is running knows the layer's path
    path, frame = "", sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not layer:
            for name, module in owner.named_modules():
                if module is layer:
                    path = name
                    break
        frame = frame.f_back  # type: ignore[assignment]
    return path


_DOC = """Batch normalization over {what}, as ``torch.nn.{name}``, with an activation in the same pass.

    ::

        y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)

    In training ``mean`` and ``var`` (divisor m) are the mini-batch's, and the running statistics move
    toward them; in eval they are the running statistics. Statistics are float32 (float64 in a float64 layer),
    also after ``.half()`` and ``.bfloat16()``, which weight and bias follow. Buffers, parameters and state dict
    are those of ``torch.nn.{name}``, both ways.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float, default 1e-5
        Added to the variance [z]**2; positive.
    momentum : float in [0, 1] or None, default 0.1
        Weight of the NEW batch in the running statistics; None is the plain average of all batches.
        Keras and ONNX give the weight of the old value.
    affine : bool, default True
        Learn ``weight`` (gamma) and ``bias`` (beta).
    track_running_stats : bool, default True
        Keep running statistics; without them eval uses the batch's too.
    device : torch.device, optional
        Where parameters and buffers are made.
    dtype : torch.dtype, optional
        Of ``weight`` and ``bias``. Statistics are float64 beside float64, and float32 beside all others.
    bias : bool, default True
        Learn ``bias`` where ``affine`` is True.
    activation : str, optional
        As for `batchnorm.functional.batch_norm`.
    channel_dim : int, default 1
        The channel axis; -1 for channels last, e.g. (N, L, C).
    on_single_value : {{"error", "running"}}, default "error"
        Training with one value per channel: raise, or normalize with the running statistics.
    on_nonfinite : {{"skip", "propagate", "raise"}}, default "skip"
        A channel with NaN or inf: leave its statistics as they were and count the batch in
        ``num_batches_skipped``; ruin them, as torch; or raise.
    virtual_batch_size : int, optional
        Normalize parts of the batch of at most this size by themselves (ghost batch norm). The running
        statistics take one step a part.
    running_var_correction : {{1, 0}}, default 1
        Divisor of ``running_var``: m - 1 (torch), or m (Keras, flax, ONNX).
    process_group : str, ProcessGroup or DeviceMesh, optional
        Ranks over which training statistics and their gradients are pooled; ``"world"`` is all of them. The
        layer keeps the name. By default nothing is pooled. `batchnorm.synchronize` sets it in a whole model.

    Examples
    --------
    >>> import torch, batchnorm
    >>> layer = batchnorm.{name}(3, activation="relu")
    >>> y = layer(torch.randn({shape}))
    >>> bool((y >= 0).all())
    True
    """


class BatchNorm1d(Layer, nn.BatchNorm1d):  # type: ignore[misc]
    __doc__ = _DOC.format(what="(N, C) or (N, C, L)", name="BatchNorm1d", shape="8, 3")
    _dimensions = (2, 3)


class BatchNorm2d(Layer, nn.BatchNorm2d):  # type: ignore[misc]
    __doc__ = _DOC.format(what="(N, C, H, W)", name="BatchNorm2d", shape="8, 3, 4, 4")
    _dimensions = (4,)


class BatchNorm3d(Layer, nn.BatchNorm3d):  # type: ignore[misc]
    __doc__ = _DOC.format(what="(N, C, D, H, W)", name="BatchNorm3d", shape="8, 3, 2, 4, 4")
    _dimensions = (5,)
