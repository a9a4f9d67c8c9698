"""The claims about batch normalization, measured: one module for each question.

A study is a question, an experiment on real data, its records, a figure, and an answer with its
uncertainty. `run_studies` is what the command line calls::

    batchnorm study NAME... | all  [--quick | --full] [--data NAME DIR] [--html FILE] [--out DIR]

    run_studies(names, *, quick=False, full=False, data="digits", data_dir=None, html=None, out=..., markdown=None)

``names`` are names of `STUDIES`, or ``["all"]``. It prints progress and answers to the terminal,
returns the outcomes, and raises `batchnorm.errors.ArgumentError` for a request that makes no sense.
What needs scikit-learn, matplotlib or Jinja2 imports them when it runs: they come with the package
``batchnorm-lab``.
"""

from batchnorm_lab.studies.contract import Answer, Finding, Study
from batchnorm_lab.studies.registry import STUDIES, get_study
from batchnorm_lab.studies.runner import Outcome, run_studies

__all__ = ["STUDIES", "Answer", "Finding", "Outcome", "Study", "get_study", "run_studies"]
