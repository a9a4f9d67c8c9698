"""The command line, of the extra ``batchnorm[cli]``: arguments only; what is done is elsewhere."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an error of ours is printed without a traceback.

    Without typer or rich it says how to get them, and exits with 2.
    """
    try:
        from batchnorm.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"The command line needs {error.name}.\n  mend: pip install 'batchnorm[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    run()
