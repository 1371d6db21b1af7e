"""Weights of few bits: multiples of one step a channel, straight-through gradients."""

import math

import pytest
import torch

from ghnlib.hypernetwork.quantising import quantised


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_each_channel_has_a_step_of_its_own_and_vectors_keep_their_precision(bits):
    torch.manual_seed(0)
    weight, most = torch.randn(3, 50, 3, 3) * torch.tensor([1.0, 1e-3, 0.0]).view(3, 1, 1, 1), 2 ** (bits - 1) - 1
    found = quantised({"w": weight, "b": weight[0, :, 0, 0]}, bits)
    assert torch.equal(found["b"], weight[0, :, 0, 0]) and not found["w"][2].any()
    for exact, channel in zip(weight[:2], found["w"]):
        step = exact.abs().max() / most
        levels = channel / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert levels.abs().max().round() == most and (channel - exact).abs().max() <= 0.501 * step


def test_gradients_pass_as_if_nothing_had_been_rounded():
    weight, slope = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
    (quantised({"w": weight}, 2)["w"] * slope).sum().backward()
    torch.testing.assert_close(weight.grad, slope)


def test_what_is_not_finite_stays_so():
    found = quantised({"w": torch.tensor([[1.0, math.nan], [1.0, math.inf], [1.0, 0.5]])}, 4)["w"]
    assert found.isfinite().all(1).tolist() == [False, False, True]
