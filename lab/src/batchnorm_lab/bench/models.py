"""ResNet-50 and MobileNetV2 in plain torch; the caller chooses how a norm with its activation is written.

Layer by layer as in He et al. 2015 (arXiv:1512.03385; the stride of a bottleneck is on its 3x3
convolution, as common training code has it) and Sandler et al. 2018 (arXiv:1801.04381).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormAct = Callable[[int, "str | None"], nn.Module]
"""Channels and activation to a module whose ``forward`` takes ``(input, residual=None)``."""


class PlainNormAct(nn.Module):
    """torch.nn's own layers: batch norm, then an addition and an activation in place.

    Parameters
    ----------
    channels : int
        C.
    activation : str or None
        ``"relu"``, ``"relu6"`` or None.
    """

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        acts = {"relu": nn.ReLU, "relu6": nn.ReLU6}
        self.activation = nn.Identity() if activation is None else acts[activation](inplace=True)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.norm(input)
        if residual is not None:
            output += residual
        return self.activation(output)


def fused_norm_act(channels: int, activation: str | None) -> nn.Module:
    """Make our layer, which does the addition and the activation itself.

    Parameters
    ----------
    channels : int
        C.
    activation : str or None
        Any that ``batchnorm.BatchNorm2d`` knows.

    Returns
    -------
    nn.Module
        ``batchnorm.BatchNorm2d``.
    """
    import batchnorm

    return batchnorm.BatchNorm2d(channels, activation=activation)


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution that keeps the size of a map, without the bias that a norm makes useless."""
    padding = (kernel - 1) // 2
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and the input added before the last activation."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, norm_act: NormAct) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1, self.norm1 = conv(channels_in, width, 1), norm_act(width, "relu")
        self.conv2, self.norm2 = conv(width, width, 3, stride), norm_act(width, "relu")
        self.conv3, self.norm3 = conv(width, channels_out, 1), norm_act(channels_out, "relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                conv(channels_in, channels_out, 1, stride), norm_act(channels_out, None)
            )

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(self.norm1(self.conv1(input))))
        return self.norm3(self.conv3(hidden), self.shortcut(input))


class ResNet50(nn.Module):
    """53 convolutions, each with its batch norm; 25.6 million parameters with 1000 classes."""

    def __init__(self, norm_act: NormAct = PlainNormAct, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 64, 7, 2), norm_act(64, "relu"), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(depth):
                blocks.append(Bottleneck(channels, width, stride if index == 0 else 1, norm_act))
                channels = width * Bottleneck.expansion
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(input)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project; the input is added where shapes allow, without an activation."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, expand: int, norm_act: NormAct
    ) -> None:
        super().__init__()
        hidden = channels_in * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [conv(channels_in, hidden, 1), norm_act(hidden, "relu6")]
        layers += [conv(hidden, hidden, 3, stride, groups=hidden), norm_act(hidden, "relu6")]
        layers.append(conv(hidden, channels_out, 1))
        self.layers = nn.Sequential(*layers)
        self.norm = norm_act(channels_out, None)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.layers(input), input if self.adds else None)


class MobileNetV2(nn.Module):
    """52 convolutions, each with its batch norm; 3.5 million parameters with 1000 classes."""

    def __init__(self, norm_act: NormAct = PlainNormAct, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 32, 3, 2), norm_act(32, "relu6")]
        channels = 32
        for expand, channels_out, depth, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(depth):
                stride_here = stride if index == 0 else 1
                layers.append(InvertedResidual(channels, channels_out, stride_here, expand, norm_act))
                channels = channels_out
        layers += [conv(channels, 1280, 1), norm_act(1280, "relu6")]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).mean((2, 3)))


MODELS: dict[str, Callable[[NormAct], nn.Module]] = {"resnet50": ResNet50, "mobilenet_v2": MobileNetV2}


def make(name: str, norm_act: NormAct, seed: int = 0) -> nn.Module:
    """Make a model whose convolution weights depend on the seed alone, however its norms are written.

    Parameters
    ----------
    name : str
        Of ``MODELS``.
    norm_act : callable
        ``PlainNormAct`` or ``fused_norm_act``.
    seed : int, optional
        Of the weights.

    Returns
    -------
    nn.Module
        In training mode.
    """
    torch.manual_seed(seed)
    return MODELS[name](norm_act)
