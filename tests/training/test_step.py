"""One update of a hypernetwork: few operator calls, one wait for the device."""

import runpy

import pytest
import torch
from shared import ROOT, digits, pool, tiny

from ghnlib.config import Recipe
from ghnlib.training.step import MetaTrainer

counted = runpy.run_path(str(ROOT / "benchmarks" / "counting.py"))["counted"]
CALLS = {"mlp": 6200, "gated_gnn": 9000, "graphormer": 6700}
"""Operator calls of a step with five small networks, at most."""


@pytest.mark.parametrize("encoder", CALLS)
def test_a_step_waits_once_and_calls_few_operators(encoder):
    trainer, networks = MetaTrainer(tiny(encoder), Recipe(meta_batch=5, gamma=3e-5), 1), pool("train", 12)[:5]
    images, labels = next(digits().train.batches(8))
    trainer.step(networks, images, labels, seed=0)
    with counted() as counts:
        trainer.step(networks, images, labels, seed=1)
    assert counts["waits"] == 1
    assert CALLS[encoder] / 2 < counts["calls"] <= CALLS[encoder] and counts["launches"] < counts["calls"]


@pytest.mark.parametrize("encoder", CALLS)
def test_predictions_on_another_device_wait_for_no_copy(encoder):
    ghn = tiny(encoder).to("meta")
    with counted() as counts:
        for prediction in ghn([architecture.graph for architecture in pool("train", 12)[:3]]):
            assert all(value.device.type == "meta" for value in prediction.values())
    assert counts["waits"] == 0 < counts["launches"]


def test_what_waits_is_counted():
    with counted() as counts:
        values = torch.zeros(2)
        for wait in (values.tolist, values[0].item, lambda: bool(values[0] == 0), lambda: float(values[1])):
            wait()
        values.to("meta")
        values.to("meta", non_blocking=True)
    assert counts["waits"] == 5
