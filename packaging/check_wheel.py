"""Install a wheel in an empty environment and see that it normalizes, with its core: ``check_wheel.py WHEEL``.

torch and NumPy are installed from the package index, or taken from an environment that has them with
``--torch-from PYTHON``; nothing else is there. ``--without-core`` is for wheels that have none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CHECK = Path(__file__).with_name("check_install.py")


def main() -> int:
    """Check every wheel that is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--torch-from", metavar="PYTHON", help="an interpreter whose torch and NumPy are used"
    )
    parser.add_argument("--without-core", action="store_true")
    given = parser.parse_args()
    for wheel in given.wheels:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = next(Path(folder).glob("[bS]*/python*"))
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            if given.torch_from:
                asked = [
                    given.torch_from,
                    "-c",
                    "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])",
                ]
                place = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
                subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
                site = next(
                    Path(folder).glob("[lL]ib/python*/site-packages"), Path(folder) / "Lib/site-packages"
                )
                (site / "torch_of_another.pth").write_text(place + "\n")
            else:
                subprocess.run([*pip, str(wheel)], check=True)
            expected = ["--without-core"] if given.without_core else []
            done = subprocess.run([str(python), "-I", str(CHECK), *expected], cwd=folder, check=False)
            print(f"{wheel.name}: {'right' if done.returncode == 0 else 'WRONG'}", flush=True)
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
