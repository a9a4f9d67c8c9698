"""The binary version of CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from batchnorm_lab.data.files import content_of, existing, find, not_in_format, pixels
from batchnorm_lab.data.images import ImageData

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_RECORD = 1 + 3 * 32 * 32


def load_cifar10(directory: str | Path) -> ImageData:
    """Read the six files of the binary version of CIFAR-10.

    Parameters
    ----------
    directory : path
        Holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or the folder
        ``cifar-10-batches-bin`` that holds them.

    Returns
    -------
    ImageData
        Images of shape (3, 32, 32), ten classes.

    Raises
    ------
    DataError
        A file is missing or not what its name says.

    References
    ----------
    A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Examples
    --------
    >>> from batchnorm_lab.data import load_cifar10
    >>> cifar = load_cifar10("cifar-10-batches-bin")  # doctest: +SKIP
    """
    folder = existing(directory)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    train = [read_cifar10(find(folder, f"data_batch_{i}.bin")) for i in range(1, 6)]
    test_images, test_labels = read_cifar10(find(folder, "test_batch.bin"))
    return ImageData(
        "cifar10",
        pixels(np.concatenate([images for images, _ in train])),
        torch.from_numpy(np.concatenate([labels for _, labels in train])),
        pixels(test_images),
        torch.from_numpy(test_labels),
        CIFAR10_CLASSES,
    )


def read_cifar10(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of the binary version of CIFAR-10.

    A record is one byte for the class and 3,072 for the image: red, green, blue, each 32 rows of 32.

    Parameters
    ----------
    path : path
        The file, gzipped or not.

    Returns
    -------
    images : ndarray, shape (N, 3, 32, 32), uint8
        Pixels, 0 to 255.
    labels : ndarray, shape (N,), int64
        Classes, 0 to 9.

    Raises
    ------
    DataError
        The file can't be read, is empty, does not hold whole records, or holds a class above 9.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from batchnorm_lab.data import read_cifar10
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "test_batch.bin"
    >>> _ = path.write_bytes(bytes([3]) + bytes(3072))
    >>> images, labels = read_cifar10(path)
    >>> images.shape, labels
    ((1, 3, 32, 32), array([3]))
    """
    path = Path(path)
    content = content_of(path)
    if not content or len(content) % CIFAR10_RECORD:
        raise not_in_format(
            path, f"{len(content)} bytes", f"a multiple of {CIFAR10_RECORD} (label and image)"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD)
    labels = rows[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise not_in_format(path, f"class {labels.max()} in record {int(labels.argmax())}", "classes 0 to 9")
    return rows[:, 1:].reshape(-1, 3, 32, 32), labels
