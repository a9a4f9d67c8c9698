"""The packages of the package ``batchnorm-lab``, imported only when a study needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from batchnorm.errors import BatchNormError

__all__ = ["require"]

PACKAGES = {"matplotlib": "matplotlib", "jinja2": "Jinja2", "sklearn": "scikit-learn", "PIL": "Pillow"}


def require(module: str) -> ModuleType:
    """Import a module of the extra, or say how to install it.

    Parameters
    ----------
    module : str
        Dotted name, such as ``"matplotlib.figure"``.

    Returns
    -------
    module
        What was imported.

    Raises
    ------
    BatchNormError
        The package is not installed.

    Examples
    --------
    >>> from batchnorm_lab.studies.extra import require
    >>> require("json").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise BatchNormError(
            f"studies need {PACKAGES.get(top, top)}, which is not installed.",
            why="figures, reports and the embedded digits come from packages that batchnorm-lab brings.",
            mend="pip install batchnorm-lab",
        ) from error
