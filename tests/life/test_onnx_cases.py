"""The BatchNormalization cases of the ONNX standard's own test suite, training mode too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from batchnorm.functional import batch_norm

onnx = pytest.importorskip("onnx")


def _cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        # the suite computes the cases of every operator, some of which divide by zero on purpose
        warnings.simplefilter("ignore")
        return [c for c in collect_testcases("BatchNormalization") if "batchnorm" in c.name]


CASES = _cases()


def run_node(node, x, scale, bias, mean, var):
    """ONNX counts momentum as the share that is kept, and its running variance has divisor m."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    tensors = [torch.tensor(v) for v in (x, mean, var, scale, bias)]
    y = batch_norm(
        *tensors,
        training=bool(given.get("training_mode", 0)),
        momentum=1 - given.get("momentum", 0.9),
        eps=given.get("epsilon", 1e-5),
        running_var_correction=0,
    )
    return [y, *tensors[1:3]][: len(node.output)]


def test_the_suite_has_the_cases_we_mean_to_run():
    assert {c.name for c in CASES} >= {
        "test_batchnorm_example",
        "test_batchnorm_epsilon",
        "test_batchnorm_example_training_mode",
        "test_batchnorm_epsilon_training_mode",
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_case_comes_out_as_the_standard_says(case):
    (node,) = case.model.graph.node
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        answers = run_node(node, *inputs)
        assert len(answers) == len(outputs)
        for answer, wanted in zip(answers, outputs, strict=True):
            np.testing.assert_allclose(answer.numpy(), wanted, rtol=case.rtol, atol=case.atol)
