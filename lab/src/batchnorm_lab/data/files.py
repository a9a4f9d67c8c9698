"""Files that are not trusted: nothing is unpickled, and one that does not fit raises with what was found."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import DataError


def existing(directory: str | Path) -> Path:
    """The path of a directory that is there."""
    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a directory.",
            why="the files are looked for in it.",
            mend="give the path of the directory.",
        )
    return folder


def find(folder: Path, *names: str) -> Path:
    """The first file that is there under one of the names, gzipped or not."""
    for name in names:
        for suffix in ("", ".gz"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    raise DataError(
        f"{folder} holds no file {names[0]}, gzipped or not.",
        why="the data set consists of all its files.",
        mend="check the directory's name and that every file was copied into it.",
    )


def content_of(path: Path) -> bytes:
    """What a file holds; gzip is recognized by its content."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} can't be read: {error}.",
            why="it is missing, not permitted, or a gzip file that was cut short.",
            mend="copy the file again.",
        ) from error


def not_in_format(path: Path, found: str, expected: str) -> DataError:
    """Make the error for a file that is not what its name says."""
    return DataError(
        f"{path} holds {found}; expected: {expected}.",
        why="a file that does not fit its format would give wrong images or labels.",
        mend="copy the file again from its source, and check that its name says what it is.",
    )


def pixels(images: np.ndarray) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / np.float32(255.0))
