"""Labelled images to learn from: an embedded data set, and readers of two original file formats.

``load("digits")`` needs no download: it is the 1,797 real handwritten digits (8 x 8 pixels) that
scikit-learn ships. ``load("mnist", directory)`` reads the IDX files of MNIST and of the data sets
made in its form; ``load("cifar10", directory)`` the binary version of CIFAR-10. All three give the
same thing: an `ImageData` of float32 pixels in [0, 1] with a fixed split into training and test.

Nothing is unpickled, and no file is trusted: sizes are compared with the header before anything is
made of them, and a file that does not fit raises `DataError` with what was found and expected.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, DataError

__all__ = [
    "DATA_SETS",
    "ImageData",
    "load",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "read_cifar10",
    "read_idx",
]

# The share of the 1,797 digits held out, and the seed of the split: fixed, so that figures compare.
DIGITS_TEST_IMAGES = 600
DIGITS_SPLIT_SEED = 0

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_RECORD = 1 + 3 * 32 * 32

# The third byte of an IDX file names the type of its elements; all are big-endian.
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class ImageData:
    """Images and labels, split into a training and a test part.

    Parameters
    ----------
    name : str
        Which data set this is.
    train_images : Tensor, shape (N, C, H, W), float32
        Pixels in [0, 1] (0 is the darkest value the format can hold, 1 the brightest).
    train_labels : Tensor, shape (N,), int64
        The class of each image, in ``range(len(classes))``.
    test_images : Tensor, shape (M, C, H, W), float32
        Pixels of the test part.
    test_labels : Tensor, shape (M,), int64
        Classes of the test part.
    classes : tuple of str
        The names of the classes.

    Raises
    ------
    DataError
        A part is empty, its shapes do not fit, or a label is not the number of a class.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check_part(self.name, part, images, labels, len(self.classes))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return int(channels), int(height), int(width)

    def standardized(self) -> ImageData:
        """Return the same images with each colour channel at mean 0 and variance 1.

        The mean and the variance (divisor n) are those of the training images and are applied to
        the test images too, as they would be to images that come later.

        Returns
        -------
        ImageData
            A new object; this one is left as it was. Pixels are now in units of one standard
            deviation and no longer lie in [0, 1].

        Examples
        --------
        >>> from batchnorm_lab.data import load
        >>> images = load("digits").standardized().train_images
        >>> abs(images.mean().item()) < 1e-5, round(images.std(correction=0).item(), 4)
        (True, 1.0)
        """
        pixels = self.train_images.double()
        mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
        std = pixels.var(dim=(0, 2, 3), keepdim=True, correction=0).sqrt()
        if not bool((std > 0).all()):
            raise DataError(
                f"a colour channel of the training images of {self.name!r} is constant.",
                why="a constant has variance 0 and cannot be brought to variance 1.",
                mend="check that the files hold pictures.",
            )
        return replace(
            self,
            train_images=((pixels - mean) / std).float(),
            test_images=((self.test_images.double() - mean) / std).float(),
        )

    def subset(self, train: int | None = None, test: int | None = None) -> ImageData:
        """Return the first ``train`` training and the first ``test`` test images.

        The images are in a shuffled order already (digits) or in the order of the files (MNIST,
        CIFAR-10, which were written in a shuffled order), so the first ones are a fair sample.

        Parameters
        ----------
        train, test : int or None, default None
            How many images to keep; None keeps all, and so does a number larger than there are.

        Returns
        -------
        ImageData
            Views of the same memory.

        Raises
        ------
        ArgumentError
            A number below 1.

        Examples
        --------
        >>> from batchnorm_lab.data import load
        >>> load("digits").subset(train=100).train_labels.shape
        torch.Size([100])
        """
        for label, value in (("train", train), ("test", test)):
            if value is not None and value < 1:
                raise ArgumentError(
                    f"subset: {label}={value} images.",
                    why="a part needs at least one image.",
                    mend="a number >= 1.",
                )
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def with_validation(self, share: float = 0.25) -> tuple[ImageData, ImageData]:
        """Set a part of the training images aside, on which to choose what is not learned.

        Rates, priors and the like are chosen on the validation part; the test part is looked at with what
        was chosen, and chooses nothing. The images set aside are the last ones: see `subset`.

        Parameters
        ----------
        share : float, default 0.25
            Of the training images, in (0, 1).

        Returns
        -------
        (ImageData, ImageData)
            To choose with, whose test part is the validation part; and to report with, whose test part is
            this object's. Both have the same training part, without the validation images.

        Raises
        ------
        ArgumentError
            A share that leaves no image in one of the parts.

        Examples
        --------
        >>> from batchnorm_lab.data import load
        >>> choose, report = load("digits").with_validation()
        >>> len(choose.train_labels), len(choose.test_labels), len(report.train_labels), len(report.test_labels)
        (898, 299, 898, 600)
        """
        count = round(share * len(self.train_labels))
        if not 0 < count < len(self.train_labels):
            raise ArgumentError(
                f"with_validation: a share of {share} of {len(self.train_labels)} images.",
                why="both parts need an image.",
                mend="a share between 0 and 1, such as 0.25.",
            )
        report = self.subset(train=len(self.train_labels) - count)
        choose = replace(
            report, test_images=self.train_images[-count:], test_labels=self.train_labels[-count:]
        )
        return choose, report


def load(name: str = "digits", directory: str | Path | None = None) -> ImageData:
    """Load a data set by its name.

    Parameters
    ----------
    name : {"digits", "mnist", "cifar10"}, default "digits"
        Which data set.
    directory : path or None, default None
        Where its files are; required for "mnist" and "cifar10", meaningless for "digits".

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


def load_digits() -> ImageData:
    """Load the 1,797 handwritten digits that scikit-learn ships: 1,197 to train on, 600 to test.

    The split is drawn once with a fixed seed and keeps the share of each class (stratified).

    Returns
    -------
    ImageData
        Images of shape (1, 8, 8), ten classes.

    Raises
    ------
    DataError
        scikit-learn is not installed.

    References
    ----------
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (its test part).

    Examples
    --------
    >>> from batchnorm_lab.data import load_digits
    >>> load_digits().image_shape
    (1, 8, 8)
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise DataError(
            "the digits need scikit-learn, which is not installed.",
            why="the images are part of that package; nothing is downloaded.",
            mend='pip install batchnorm-lab; or give your own files: load("mnist", directory).',
        ) from error
    bunch = datasets.load_digits()
    train, test = model_selection.train_test_split(
        np.arange(len(bunch.target)),
        test_size=DIGITS_TEST_IMAGES,
        random_state=DIGITS_SPLIT_SEED,
        stratify=bunch.target,
    )
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16.0).unsqueeze(1)  # 17 grey levels
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return ImageData(
        "digits", images[train], labels[train], images[test], labels[test], tuple(str(c) for c in range(10))
    )


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
    folder = _folder(directory)
    parts: list[Tensor] = []
    for prefix in ("train", "t10k"):
        image_file = _find(folder, f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte")
        label_file = _find(folder, f"{prefix}-labels-idx1-ubyte", f"{prefix}-labels.idx1-ubyte")
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.dtype != np.uint8 or images.ndim != 3:
            raise _not_in_format(
                image_file, f"{images.ndim} axes of {images.dtype}", "3 axes of unsigned bytes"
            )
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise _not_in_format(
                label_file, f"{labels.ndim} axes of {labels.dtype}", "1 axis of unsigned bytes"
            )
        if len(images) != len(labels):
            raise _not_in_format(label_file, f"{len(labels)} labels", f"{len(images)}, one for each image")
        parts += [_pixels(images[:, None]), torch.from_numpy(labels.astype(np.int64))]
    train_images, train_labels, test_images, test_labels = parts
    largest = max((int(part.max()) for part in (train_labels, test_labels) if len(part)), default=0)
    classes = tuple(str(c) for c in range(max(largest + 1, 2)))
    return ImageData("mnist", train_images, train_labels, test_images, test_labels, classes)


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
    folder = _folder(directory)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    train = [read_cifar10(_find(folder, f"data_batch_{i}.bin")) for i in range(1, 6)]
    test_images, test_labels = read_cifar10(_find(folder, "test_batch.bin"))
    return ImageData(
        "cifar10",
        _pixels(np.concatenate([images for images, _ in train])),
        torch.from_numpy(np.concatenate([labels for _, labels in train])),
        _pixels(test_images),
        torch.from_numpy(test_labels),
        CIFAR10_CLASSES,
    )


READERS: dict[str, Callable[[str | Path], ImageData]] = {"mnist": load_mnist, "cifar10": load_cifar10}
DATA_SETS = ("digits", *READERS)


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
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise _not_in_format(
            path, f"the first bytes {content[:4].hex(' ') or '(none)'}", "two zero bytes (IDX)"
        )
    if content[2] not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise _not_in_format(path, f"element type 0x{content[2]:02x}", f"one of {known}")
    dtype, axes = np.dtype(IDX_TYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise _not_in_format(
            path, f"a header of {axes} axes in {len(content)} bytes", "one length for each axis"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", axes, offset=4))
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise _not_in_format(path, f"{len(content)} bytes", f"{expected} for the shape {shape} in its header")
    elements = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return elements.astype(dtype.newbyteorder("="))


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
    content = _content(path)
    if not content or len(content) % CIFAR10_RECORD:
        raise _not_in_format(
            path, f"{len(content)} bytes", f"a multiple of {CIFAR10_RECORD} (label and image)"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD)
    labels = rows[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise _not_in_format(path, f"class {labels.max()} in record {int(labels.argmax())}", "classes 0 to 9")
    return rows[:, 1:].reshape(-1, 3, 32, 32), labels


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32) / np.float32(255.0))


def _check_part(name: str, part: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.ndim != 4 or images.numel() == 0 or len(images) != len(labels):
        raise DataError(
            f"the {part} part of {name!r} has images of shape {tuple(images.shape)}, {len(labels)} labels.",
            why="it must be (N, C, H, W) with nothing empty, and one label an image.",
            mend="check the files; an empty one is a sign of a copy that stopped.",
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"the {part} part of {name!r} has a label {int(labels.max())} and only {classes} classes.",
            why="a label is the number of its class.",
            mend="check the label file.",
        )


def _folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a directory.",
            why="the files are looked for in it.",
            mend="give the path of the directory.",
        )
    return folder


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        for suffix in ("", ".gz"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    raise DataError(
        f"{folder} holds no file {names[0]}, gzipped or not.",
        why="the data set consists of all its files.",
        mend="check the directory's name and that every file was copied into it.",
    )


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} can't be read: {error}.",
            why="it is missing, not permitted, or a gzip file that was cut short.",
            mend="copy the file again.",
        ) from error


def _not_in_format(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"{path} holds {found}; expected: {expected}.",
        why="a file that does not fit its format would give wrong images or labels.",
        mend="copy the file again from its source, and check that its name says what it is.",
    )
