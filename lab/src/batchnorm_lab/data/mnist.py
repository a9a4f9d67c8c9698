"""The IDX files of MNIST and of the data sets made in its form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm_lab.data.files import content_of, existing, find, not_in_format, pixels
from batchnorm_lab.data.images import ImageData

# the third byte of an IDX file names the type of its elements; all are big-endian
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load_mnist(directory: str | Path) -> ImageData:
    """Read the four IDX files of MNIST, or of a data set in its form, gzipped or not.

    Parameters
    ----------
    directory : path
        Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``
        and ``t10k-labels-idx1-ubyte``, each with or without ``.gz``, or with a dot before ``idx``.

    Returns
    -------
    ImageData
        Images of shape (1, H, W); as many classes as the largest label says, and at least two.

    Raises
    ------
    DataError
        A file is missing or not what its name says.

    References
    ----------
    Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits, 1998, which
    defines the IDX format.

    Examples
    --------
    >>> from batchnorm_lab.data import load_mnist
    >>> mnist = load_mnist("mnist")  # doctest: +SKIP
    """
    folder = existing(directory)
    parts: list[Tensor] = []
    for prefix in ("train", "t10k"):
        image_file = find(folder, f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte")
        label_file = find(folder, f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte")
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.dtype != np.uint8 or images.ndim != 3:
            raise not_in_format(
                image_file, f"{images.ndim} axes of {images.dtype}", "3 axes of unsigned bytes"
            )
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise not_in_format(
                label_file, f"{labels.ndim} axes of {labels.dtype}", "1 axis of unsigned bytes"
            )
        if len(images) != len(labels):
            raise not_in_format(label_file, f"{len(labels)} labels", f"{len(images)}, one for each image")
        parts += [pixels(images[:, None]), torch.from_numpy(labels.astype(np.int64))]
    train_images, train_labels, test_images, test_labels = parts
    largest = max((int(part.max()) for part in (train_labels, test_labels) if len(part)), default=0)
    classes = tuple(str(c) for c in range(max(largest + 1, 2)))
    return ImageData("mnist", train_images, train_labels, test_images, test_labels, classes)


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file, gzipped or not.

    The format: two zero bytes, a byte for the element type, a byte for the number of axes, one
    big-endian 32-bit length an axis, then the elements in C order, big-endian.

    Parameters
    ----------
    path : path
        The file; gzip is recognized by its content, not by its name.

    Returns
    -------
    ndarray
        In the machine's byte order, of the type and shape that the header says.

    Raises
    ------
    DataError
        The file can't be read, its header is not IDX, or it is longer or shorter than its header says.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from batchnorm_lab.data import read_idx
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    >>> read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    content = content_of(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise not_in_format(
            path, f"the first bytes {content[:4].hex(' ') or '(none)'}", "two zero bytes (IDX)"
        )
    if content[2] not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise not_in_format(path, f"element type 0x{content[2]:02x}", f"one of {known}")
    dtype, axes = np.dtype(IDX_TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise not_in_format(
            path, f"a header of {axes} axes in {len(content)} bytes", "one length for each axis"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", axes, offset=4))
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise not_in_format(path, f"{len(content)} bytes", f"{expected} for the shape {shape} in its header")
    elements = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return elements.astype(dtype.newbyteorder("="))
