"""Hold the size of every source file: 400 lines, docstrings not counted; a part of ``make lint``."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT = 400
ROOT = Path(__file__).parents[1]
PRODUCT = "src/batchnorm/"


def size(path: Path) -> int:
    """Lines of a file, without the docstrings of Python."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if path.suffix != ".py":
        return lines
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= first.end_lineno - first.lineno + 1 if isinstance(first.value.value, str) else 0
    return lines


def main() -> int:
    """Print the files that are too long, and give their number."""
    kept = ["*.py", "*.cpp", "*.h", "*.sh", "*.j2"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *kept],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    sizes = {name: size(ROOT / name) for name in listed if (ROOT / name).exists()}
    long = {name: lines for name, lines in sizes.items() if lines > LIMIT}
    for name, lines in sorted(long.items(), key=lambda item: -item[1]):
        print(f"{name}: {lines} lines; {LIMIT} are allowed: a longer file is two things")
    product = [lines for name, lines in sizes.items() if name.startswith(PRODUCT)]
    print(
        f"sizes: {PRODUCT} {len(product)} files, median {statistics.median(product):g}, {len(long)} too long"
    )
    return len(long)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
