"""Records of runs that never were, whose truth is known."""

import random

from batchnorm_lab.studies import registry

SEEDS = range(6)


def jitter(seed, size=0.001, arm=""):
    """What differs between seeds, and from arm to arm in another way, so that differences vary too."""
    return random.Random(f"{seed} {arm}").uniform(-2 * size, 2 * size)


def record(result, **setting):
    return {"setting": setting, "result": result}


def verdicts(name, records, claim=None):
    findings = registry.get_study(name).answer(records).findings
    return [finding.verdict for finding in findings if claim is None or finding.claim == claim]
