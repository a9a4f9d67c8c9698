"""The handwritten digits that come with scikit-learn: 1,797 real ones of 8 x 8 pixels, without a download."""

from __future__ import annotations

import numpy as np
import torch

from batchnorm.errors import DataError
from batchnorm_lab.data.images import ImageData

# the share of the digits held out, and the seed of the split: fixed, so that figures compare
DIGITS_TEST_IMAGES = 600
DIGITS_SPLIT_SEED = 0


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
