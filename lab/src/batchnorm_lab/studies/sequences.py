"""Images read as sequences of different padded length, and networks that read them, for the padding trap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.modules import BatchNorm1d
from batchnorm_lab.studies.ensemble import Ensemble

__all__ = ["SequenceEnsemble"]


class SequenceEnsemble(Ensemble):
    """R networks of two 1-d convolutions, each with batch norm and ReLU, and a linear layer on their mean.

    Padding never reaches the output by itself: values there are set to zero after every layer, and the
    mean is over the true positions. Whether it reaches the *statistics* is what ``masked`` decides.

    Parameters
    ----------
    rows, row_values : int
        True length of a sequence, and values at each position.
    channels, classes : int
        Sizes.
    seeds : sequence of int
        One a network.
    masked : bool
        Whether batch norm is told what is padding.

    Examples
    --------
    >>> import torch
    >>> from batchnorm_lab.studies.sequences import SequenceEnsemble
    >>> networks = SequenceEnsemble(8, 8, 16, 10, seeds=[0, 1], masked=True)
    >>> networks(networks.images(torch.rand(5, 1, 8, 8)), padding=3).shape
    torch.Size([2, 5, 10])
    """

    def __init__(
        self, rows: int, row_values: int, channels: int, classes: int, seeds: Sequence[int], *, masked: bool
    ) -> None:
        super().__init__(seeds)
        self.rows, self.masked = rows, masked
        self.weights = nn.ParameterList(
            self._gaussian((channels, before, 3), 3 * before, 2**0.5).flatten(0, 1)
            for before in (row_values, channels)
        )
        self.norms = nn.ModuleList(BatchNorm1d(self.runs * channels) for _ in range(2))
        # The mean of each half of the sequence, so that some of the order of the rows is kept.
        self.head = nn.Parameter(self._gaussian((channels * 2, classes), channels * 2, 1.0))
        self.head_bias = nn.Parameter(torch.zeros(self.runs, classes))

    def images(self, images: Tensor) -> Tensor:
        """Bring images to (N, R * C * W, H): the rows of an image are the positions of a sequence.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (R, N, C, H, W)
            Pixels.

        Returns
        -------
        Tensor, shape (N, R * C * W, H)
            Input of ``forward``.

        Examples
        --------
        >>> import torch
        >>> from batchnorm_lab.studies.sequences import SequenceEnsemble
        >>> networks = SequenceEnsemble(8, 8, 16, 10, seeds=[0, 1], masked=True)
        >>> networks.images(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 16, 8])
        """
        if images.ndim == 4:
            images = images.expand(self.runs, *images.shape)
        runs, samples, colours, height, width = images.shape
        return images.permute(1, 0, 2, 4, 3).reshape(samples, runs * colours * width, height)

    def forward(self, x: Tensor, padding: int = 0) -> Tensor:
        """Return the outputs of every network.

        Parameters
        ----------
        x : Tensor, shape (N, R * values, rows)
            From `images`.
        padding : int, default 0
            Positions of zeros that are added behind every sequence, as a longer one in the batch would.

        Returns
        -------
        Tensor, shape (R, N, classes)
            Logits.
        """
        x = F.pad(x, (0, padding))
        keep = torch.zeros(1, x.shape[2], dtype=torch.bool)
        keep[:, : self.rows] = True
        for weight, norm in zip(self.weights, self.norms, strict=True):
            z = F.conv1d(x, weight, padding=1, groups=self.runs) * keep
            z = norm(z, mask=keep.expand(len(z), -1)) if self.masked else norm(z)
            x = torch.relu(z) * keep
        half = self.rows // 2
        halves = torch.stack([x[:, :, :half].mean(2), x[:, :, half : self.rows].mean(2)], dim=2)
        features = halves.view(len(x), self.runs, -1).transpose(0, 1)
        return torch.baddbmm(self.head_bias[:, None], features, self.head)
