"""Files that a command writes: checked before the work begins, and there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchnorm.errors import DataError


def check_folder(folder: Path) -> None:
    """Make sure that files can be written into a folder; it is made where it is missing.

    Parameters
    ----------
    folder : Path
        The folder.

    Raises
    ------
    DataError
        It cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"\0")
            trial.flush()
    except OSError as error:
        raise _not_written(folder, error) from error


def check_file(path: Path) -> None:
    """Make sure that a file can be written; one that is there stays as it is.

    Parameters
    ----------
    path : Path
        The file. Its folder is made where it is missing.

    Raises
    ------
    DataError
        It cannot be written.
    """
    if path.is_dir():
        raise DataError(
            f"{path} is a folder.", why="a file is to be written.", mend="give the name of a file."
        )
    check_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise _not_written(path, PermissionError(13, "it is there and must not be changed"))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Let a file be written beside its place, and put it there when it is complete.

    On an error (a full disk, Ctrl-C) nothing of it is left, and what stood there before still does.

    Parameters
    ----------
    path : Path
        Where the file is to be.

    Yields
    ------
    Path
        Where to write, with the same suffix.

    Raises
    ------
    DataError
        The system could not write it.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # mkstemp's is for the owner alone
        os.replace(part, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all.

    Parameters
    ----------
    path : Path
        The file.
    text : str
        What it is to hold.

    Raises
    ------
    DataError
        The system could not write it.
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written: {error.strerror or error}.",
        why="nothing was left there; what was there before is unchanged.",
        mend="another place, or room on the disk, or the right to write there.",
    )
