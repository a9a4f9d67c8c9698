"""Many small networks in one: every seed and setting of a study is trained at the same time.

An ensemble of R networks keeps each weight as one tensor with a leading axis of length R. A layer of
all of them is one batched matrix product (one grouped convolution), and batch normalization of all of
them is one ordinary layer of this package over ``R * C`` channels: a channel's statistics never see
another channel, so no network sees another. Networks are made from their seeds one by one, so that a
network is the same whichever others it is trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.modules import BatchNorm1d, BatchNorm2d

__all__ = ["PLACES", "ConvEnsemble", "Ensemble", "MLPEnsemble"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
# Where an MLP can be normalized: its inputs, z (before the activation), a (after it), its outputs.
PLACES = ("inputs", "before", "after", "outputs")
# What stands before the sum of a hidden layer with its shortcut: nothing, 1 / sqrt(layers), or a learned scalar
# that begins at 0 (S. De and S. Smith, SkipInit, 2020, arXiv:2002.10444).
SHORTCUTS = ("plain", "scaled", "from zero")

Normalizer = Callable[[int], nn.Module]


class Ensemble(nn.Module):
    """R networks trained at once; what optimizers and accuracies need to know of them.

    Parameters
    ----------
    seeds : sequence of int
        One a network; networks with the same seed begin with the same weights.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.seeds = tuple(seeds)
        self.runs = len(self.seeds)

    def by_run(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Return every parameter with the shape that has one row for each network.

        Returns
        -------
        list of (Parameter, tuple of int)
            The shape is (R, values).

        Examples
        --------
        >>> from batchnorm_lab.studies.ensemble import MLPEnsemble
        >>> [shape for _, shape in MLPEnsemble((4, 3), seeds=[0, 1]).by_run()]
        [(2, 12), (2, 3)]
        """
        return [(p, (self.runs, p.numel() // self.runs)) for p in self.parameters()]

    def images(self, images: Tensor) -> Tensor:
        """Bring images (N, C, H, W), or (R, N, C, H, W), to the shape of this network's input.

        Parameters
        ----------
        images : Tensor
            The same for all networks, or one set for each.

        Returns
        -------
        Tensor
            Input of ``forward``.

        Examples
        --------
        >>> import torch
        >>> from batchnorm_lab.studies.ensemble import MLPEnsemble
        >>> MLPEnsemble((4, 3), seeds=[0, 1]).images(torch.zeros(5, 1, 2, 2)).shape
        torch.Size([2, 5, 4])
        """
        raise NotImplementedError

    def _gaussian(self, shape: tuple[int, ...], fan_in: int, gain: float) -> Tensor:
        """Draw (R, *shape) weights of standard deviation gain / sqrt(fan_in), each network from its seed."""
        self._drawn = getattr(self, "_drawn", 0) + 1
        weights = {}
        for seed in set(self.seeds):
            generator = torch.Generator().manual_seed(1_000_003 * seed + self._drawn)
            weights[seed] = torch.randn(shape, generator=generator) * (gain / fan_in**0.5)
        return torch.stack([weights[seed] for seed in self.seeds])


class MLPEnsemble(Ensemble):
    """R fully connected networks.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, hidden layers, outputs.
    seeds : sequence of int
        One a network.
    activation : {"sigmoid", "tanh", "relu"}
        Of every hidden layer.
    places : collection of str
        Where to normalize: any of `PLACES`; empty for not at all.
    gain : float
        Initial weights have standard deviation ``gain / sqrt(fan_in)``.
    weight_scale : sequence of float or None
        A factor on the initial weights of each network.
    normalizer : callable or None
        Makes the layer that normalizes ``R * C`` channels of ``R * C`` values; None is BatchNorm1d.
    shortcut : str or None
        One of `SHORTCUTS`: every hidden layer but the first is added to its own input, of the same width.
    **norm
        Arguments of BatchNorm1d.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.ensemble import MLPEnsemble
    >>> networks = MLPEnsemble((64, 20, 10), seeds=[0, 1, 2], places={"before"})
    >>> networks(networks.images(torch.rand(5, 1, 8, 8))).shape
    torch.Size([3, 5, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seeds: Sequence[int],
        *,
        activation: str = "sigmoid",
        places: Collection[str] = (),
        gain: float = 1.0,
        weight_scale: Sequence[float] | None = None,
        normalizer: Normalizer | None = None,
        shortcut: str | None = None,
        **norm: object,
    ) -> None:
        super().__init__(seeds)
        make = normalizer or (lambda channels: BatchNorm1d(channels, **norm))  # type: ignore[arg-type]
        self.sizes, self.places = tuple(sizes), frozenset(places)
        self.activation = ACTIVATIONS[activation]
        self.shortcut = shortcut
        if shortcut not in (None, *SHORTCUTS) or (shortcut and len(set(sizes[1:-1])) > 1):
            raise ValueError(f"shortcut={shortcut!r} needs one of {SHORTCUTS} and hidden layers of one width")
        scale = torch.ones(self.runs) if weight_scale is None else torch.tensor(list(weight_scale))
        hidden = len(sizes) - 2
        self.branches = nn.Parameter(torch.zeros(self.runs, hidden)) if shortcut == "from zero" else None
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.norms = nn.ModuleDict()
        if "inputs" in self.places:
            self.norms["inputs"] = make(self.runs * sizes[0])
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            self.weights.append(self._gaussian((fan_in, fan_out), fan_in, gain) * scale[:, None, None])
            # No bias where the mean is subtracted (M7); the list keeps one entry a layer for its index.
            centred = ("before" if layer < hidden else "outputs") in self.places
            self.biases.append(torch.zeros(self.runs, 0 if centred else fan_out))
            for place in ("before", "after") if layer < hidden else ("outputs",):
                if place in self.places:
                    self.norms[f"{place}{layer}"] = make(self.runs * fan_out)

    def by_run(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Return every parameter that holds values, with the shape (R, values).

        Returns
        -------
        list of (Parameter, tuple of int)
            Without the empty biases.

        Examples
        --------
        >>> from batchnorm_lab.studies.ensemble import MLPEnsemble
        >>> len(MLPEnsemble((4, 3, 2), seeds=[0], places={"before"}).by_run())
        5
        """
        return [pair for pair in super().by_run() if pair[0].numel()]

    def images(self, images: Tensor) -> Tensor:
        """Flatten images to (R, N, values); a view where all networks see the same.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (R, N, C, H, W)
            Pixels.

        Returns
        -------
        Tensor, shape (R, N, C * H * W)
            Input of ``forward``.

        Examples
        --------
        >>> import torch
        >>> from batchnorm_lab.studies.ensemble import MLPEnsemble
        >>> MLPEnsemble((4, 3), seeds=[0]).images(torch.zeros(5, 1, 2, 2)).shape
        torch.Size([1, 5, 4])
        """
        if images.ndim == 4:
            return images.flatten(1).expand(self.runs, -1, -1)
        return images.flatten(2)

    def forward(self, x: Tensor, keep: list[Tensor] | None = None) -> Tensor:
        """Return the outputs of every network.

        Parameters
        ----------
        x : Tensor, shape (R, N, inputs)
            A mini-batch for each network.
        keep : list or None, default None
            Receives the input of every hidden activation, each of shape (R, N, C).

        Returns
        -------
        Tensor, shape (R, N, outputs)
            Logits.
        """
        last = len(self.weights) - 1
        if "inputs" in self.places:
            x = self._normalize("inputs", x)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = torch.bmm(x, weight) if bias.shape[1] == 0 else torch.baddbmm(bias[:, None], x, weight)
            if layer == last:
                return self._normalize(f"outputs{layer}", z) if "outputs" in self.places else z
            if "before" in self.places:
                z = self._normalize(f"before{layer}", z)
            if keep is not None:
                keep.append(z)
            a = self.activation(z)
            if "after" in self.places:
                a = self._normalize(f"after{layer}", a)
            x = a if self.shortcut is None or layer == 0 else x + self._branch(layer) * a
        return x

    def _branch(self, layer: int) -> Tensor | float:
        if self.branches is not None:
            return self.branches[:, layer, None, None]
        return (len(self.sizes) - 2) ** -0.5 if self.shortcut == "scaled" else 1.0

    def _normalize(self, name: str, z: Tensor) -> Tensor:
        runs, samples, channels = z.shape
        flat = z.transpose(0, 1).reshape(samples, runs * channels)
        return self.norms[name](flat).view(samples, runs, channels).transpose(0, 1)


class ConvEnsemble(Ensemble):
    """R small convolutional networks: 3 x 3 convolutions, each followed by ReLU, then a linear layer.

    Every convolution but the first halves the image; the last one's channels are averaged over space.

    Parameters
    ----------
    image_shape : (int, int, int)
        Channels, height, width.
    channels : sequence of int
        Of the convolutions.
    classes : int
        Outputs.
    seeds : sequence of int
        One a network.
    normalized : bool
        Whether batch normalization stands before every ReLU.
    **norm
        Arguments of BatchNorm2d.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.ensemble import ConvEnsemble
    >>> networks = ConvEnsemble((1, 8, 8), (4, 8), 10, seeds=[0, 1], normalized=True)
    >>> networks(networks.images(torch.rand(5, 1, 8, 8))).shape
    torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        classes: int,
        seeds: Sequence[int],
        *,
        normalized: bool,
        **norm: object,
    ) -> None:
        super().__init__(seeds)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.norms = nn.ModuleList()
        for before, after in zip((image_shape[0], *channels), channels, strict=False):
            weight = self._gaussian((after, before, 3, 3), before * 9, 2**0.5)
            self.weights.append(weight.flatten(0, 1))
            if normalized:
                self.norms.append(BatchNorm2d(self.runs * after, **norm))  # type: ignore[arg-type]
            else:
                self.biases.append(torch.zeros(self.runs * after))
        self.head = nn.Parameter(self._gaussian((channels[-1], classes), channels[-1], 1.0))
        self.head_bias = nn.Parameter(torch.zeros(self.runs, classes))

    def images(self, images: Tensor) -> Tensor:
        """Bring images to (N, R * C, H, W), the networks side by side in the channels.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (R, N, C, H, W)
            Pixels.

        Returns
        -------
        Tensor, shape (N, R * C, H, W)
            Input of ``forward``.

        Examples
        --------
        >>> import torch
        >>> from batchnorm_lab.studies.ensemble import ConvEnsemble
        >>> networks = ConvEnsemble((1, 8, 8), (4,), 10, seeds=[0, 1], normalized=False)
        >>> networks.images(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
        """
        if images.ndim == 4:
            return images.repeat(1, self.runs, 1, 1)
        return images.transpose(0, 1).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every network.

        Parameters
        ----------
        x : Tensor, shape (N, R * C, H, W)
            From `images`.

        Returns
        -------
        Tensor, shape (R, N, classes)
            Logits.
        """
        for layer, weight in enumerate(self.weights):
            bias = None if self.norms else self.biases[layer]
            x = F.conv2d(x, weight, bias, stride=1 if layer == 0 else 2, padding=1, groups=self.runs)
            if self.norms:
                x = self.norms[layer](x)
            x = torch.relu(x)
        pooled = x.mean((2, 3)).view(len(x), self.runs, -1).transpose(0, 1)
        return torch.baddbmm(self.head_bias[:, None], pooled, self.head)
