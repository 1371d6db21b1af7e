"""Number formats of the hypernetwork, of networks and of the code around a call."""

import pytest
import torch
from shared import SHAPE, Residual, tiny

from ghnlib.hypernetwork.coverage import coverage

FORMATS = {torch.float16: 0.005, torch.bfloat16: 0.04, torch.float64: 1e-5}
"""Relative errors of predictions that are allowed."""


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", [
    {}, {"directions": "none"}, {"attention": False}, {"decoder": "mlp"}, {"decoder": "lowrank"},
    {"encoder": "gated_gnn"}, {"encoder": "mlp"},
], ids=str)  # fmt: skip
def test_hypernetworks_predict_in_their_own_precision(changes, dtype):
    ghn, nets = tiny(**changes), [Residual(), Residual(width=24, blocks=3)]
    expected = ghn.predict(nets, SHAPE)
    for exact, values in zip(expected, ghn.to(dtype).predict(nets, SHAPE)):
        for name, value in values.items():
            assert value.dtype == dtype
            error = torch.linalg.vector_norm(value.double() - exact[name]) / torch.linalg.vector_norm(exact[name])
            assert error < FORMATS[dtype], name


@torch.no_grad()
@pytest.mark.parametrize("dtype", FORMATS)
def test_networks_keep_their_precision(dtype):
    ghn, net = tiny(), Residual().to(dtype)
    report = ghn.initialize(net, SHAPE)
    assert not report.skipped and {parameter.dtype for parameter in net.parameters()} == {dtype}
    for name, value in ghn.predict(Residual(), SHAPE).items():
        assert torch.equal(net.get_parameter(name), value.to(dtype))


def test_autocast_around_a_call_changes_nothing():
    ghn, plain, net = tiny(), Residual(), Residual()
    ghn.initialize(plain, SHAPE)
    expected, state, norm = ghn.predict(net, SHAPE), ghn.embed(net, SHAPE), coverage(ghn, net, SHAPE).norm
    with torch.autocast("cpu", torch.bfloat16):
        predicted = ghn.predict(net, SHAPE)
        ghn.initialize(net, SHAPE)
        assert torch.equal(ghn.embed(net, SHAPE), state) and coverage(ghn, net, SHAPE).norm == norm
        assert torch.is_autocast_enabled("cpu")
    for name, value in predicted.items():
        assert torch.equal(value, expected[name]) and torch.equal(net.get_parameter(name), plain.get_parameter(name))
