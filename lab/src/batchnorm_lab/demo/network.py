"""The network that the demonstration starts from: plain, as one writes it without batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainNetwork(nn.Module):
    """Three convolutions and two linear layers for 8 x 8 images; the ReLUs are functions, not modules."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.output = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of images.

        Parameters
        ----------
        images : Tensor, shape (N, 1, 8, 8)
            Standardized pixels.

        Returns
        -------
        Tensor, shape (N, classes)
            Logits.
        """
        a = F.relu(self.conv1(images))
        a = F.relu(self.conv2(a))
        a = F.relu(self.conv3(a))
        a = F.relu(self.hidden(torch.flatten(a, 1)))
        return self.output(a)


def plain_network(seed: int) -> PlainNetwork:
    """Make the network with weights that depend on the seed alone.

    Parameters
    ----------
    seed : int
        Of the initial weights.

    Returns
    -------
    PlainNetwork
        In training mode. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlainNetwork()
