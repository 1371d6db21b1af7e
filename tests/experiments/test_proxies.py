"""Zero-cost proxies against their definitions."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import pool
from torch import nn

from ghnlib.experiments.analysis.proxies import PROXIES

LABELS = torch.arange(6) % 4


@cache
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 36, 4, bias=False))


def test_proxies_of_gradients_follow_their_definitions():
    net = network()
    F.cross_entropy(net(images()), LABELS).backward()
    pairs = [(layer.weight.detach(), layer.weight.grad) for layer in (net[0], net[4])]
    expected = {
        "grad_norm": sum(g.norm() for _, g in pairs),
        "snip": sum((w * g).abs().sum() for w, g in pairs),
        "plain": sum((w * g).sum() for w, g in pairs),
    }
    for name, value in expected.items():
        assert PROXIES[name](network(), images(), LABELS) == pytest.approx(float(value), rel=1e-5)


def test_grasp_is_the_hessian_times_the_gradient_by_finite_differences():
    net = network().double()
    weights, step, batch = [net[0].weight, net[4].weight], 1e-5, images().double()

    def gradients():
        return torch.autograd.grad(F.cross_entropy(net(batch), LABELS), weights)

    before, ends = gradients(), []
    for sign in (1, -2):  # there and back beyond the start
        with torch.no_grad():
            for weight, gradient in zip(weights, before):
                weight.add_(sign * step * gradient)
        ends.append(gradients())
    with torch.no_grad():
        for weight, gradient in zip(weights, before):
            weight.add_(step * gradient)
    product = sum(float((w.detach() * (a - b)).sum()) for w, a, b in zip(weights, *ends)) / (2 * step)
    assert PROXIES["grasp"](net, batch, LABELS) == pytest.approx(-product, rel=1e-4)


def test_fisher_sums_over_positions_before_it_squares():
    net = network()
    out = net[0](images()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net[1:](out), LABELS), out)
    products = (out * gradient).detach().numpy()
    expected = sum(0.5 * np.mean([products[b, c].sum() ** 2 for b in range(6)]) for c in range(5))
    assert PROXIES["fisher"](network(), images(), LABELS) == pytest.approx(expected, rel=1e-4)


def test_synflow_of_a_chain_is_its_output_once_for_each_layer():
    """A network without biases and norms is linear in each layer's weights; absolute values make every path count."""
    net = network(norm=False)
    with torch.no_grad():
        hidden = F.relu(F.conv2d(torch.ones(1, 3, 8, 8), net[0].weight.abs()))
        total = float((hidden.flatten(1) @ net[4].weight.abs().T).sum())
    assert PROXIES["synflow"](network(), images(), LABELS) == pytest.approx(2 * total, rel=1e-5)
    assert PROXIES["synflow_bn"](network(norm=False), images(), LABELS) == pytest.approx(2 * total, rel=1e-5)


def test_jacob_cov_reads_the_eigenvalues_of_correlations():
    class Squares(nn.Module):
        def forward(self, x):
            return x.square().flatten(1)  # its gradient is the image itself, twice

    values = np.linalg.eigvalsh(np.corrcoef(images().flatten(1).double().numpy()))
    expected = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    assert PROXIES["jacob_cov"](Squares(), images(), LABELS) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(PROXIES["jacob_cov"](Squares(), torch.zeros(2, 3, 4, 4), LABELS[:2]))


@pytest.mark.parametrize("proxy", PROXIES)
def test_proxies_leave_a_sampled_network_as_it_was(proxy):
    (architecture,) = pool("train", 1)
    net = architecture.build(device="cpu")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = torch.randn(4, 3, 16, 16)
    assert math.isfinite(PROXIES[proxy](net, batch, torch.arange(4)))
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in net.modules())
