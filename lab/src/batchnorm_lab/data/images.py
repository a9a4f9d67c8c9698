"""Labelled images in two parts, to learn from and to test on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from batchnorm.errors import ArgumentError, DataError


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
