"""``python -m batchnorm.cli``: the command line."""

from batchnorm.cli import main

main()
