import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghnlib import DeepNets
from ghnlib.data.sources import load_images
from ghnlib.experiments.search import PROXIES, one_shot_scores, search_costs, train_one_shot
from ghnlib.reporting.statistics import rank_correlations, tau_interval, top_against_random

IMAGES, LABELS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def network(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 36, 4, bias=False))


def test_proxies_of_gradients_follow_their_definitions():
    net = network()
    F.cross_entropy(net(IMAGES), LABELS).backward()
    pairs = [(layer.weight.detach(), layer.weight.grad) for layer in (net[0], net[4])]
    expected = {
        "grad_norm": sum(g.norm() for _, g in pairs),
        "snip": sum((w * g).abs().sum() for w, g in pairs),
        "plain": sum((w * g).sum() for w, g in pairs),
    }
    for name, value in expected.items():
        assert PROXIES[name](network(), IMAGES, LABELS) == pytest.approx(float(value), rel=1e-5)


def test_fisher_sums_over_positions_before_it_squares():
    net = network()
    out = net[0](IMAGES).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net[1:](out), LABELS), out)
    products = (out * gradient).detach().numpy()
    expected = sum(0.5 * np.mean([products[b, c].sum() ** 2 for b in range(6)]) for c in range(5))
    assert PROXIES["fisher"](network(), IMAGES, LABELS) == pytest.approx(expected, rel=1e-4)


def test_synflow_of_a_chain_is_its_output_once_for_each_layer():
    """A network without biases and norms is linear in each layer's weights; absolute values make every path count."""
    net = network(norm=False)
    with torch.no_grad():
        hidden = F.relu(F.conv2d(torch.ones(1, 3, 8, 8), net[0].weight.abs()))
        total = float((hidden.flatten(1) @ net[4].weight.abs().T).sum())
    assert PROXIES["synflow"](network(), IMAGES, LABELS) == pytest.approx(2 * total, rel=1e-5)
    assert PROXIES["synflow_bn"](network(norm=False), IMAGES, LABELS) == pytest.approx(2 * total, rel=1e-5)


def test_jacob_cov_reads_the_eigenvalues_of_correlations():
    class Squares(nn.Module):
        def forward(self, x):
            return x.square().flatten(1)  # its gradient is the image itself, twice

    values = np.linalg.eigvalsh(np.corrcoef(IMAGES.flatten(1).double().numpy()))
    expected = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    assert PROXIES["jacob_cov"](Squares(), IMAGES, LABELS) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(PROXIES["jacob_cov"](Squares(), torch.zeros(2, 3, 4, 4), LABELS[:2]))


@pytest.mark.parametrize("proxy", PROXIES)
def test_proxies_leave_a_sampled_network_as_it_was(proxy):
    architecture = DeepNets("train", space="small")[0]
    net = architecture.build(device="cpu")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    assert math.isfinite(PROXIES[proxy](net, images, torch.arange(4)))
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in net.modules())


def test_rank_correlations_leave_out_what_is_missing():
    accuracy = [10.0, 20.0, 30.0, 40.0, 50.0]
    scores = pd.DataFrame({"same": [1, 2, 3, 4, 5], "reversed": [5, 4, 3, 2, 1], "holes": [1, None, 3, None, 9]})
    table = rank_correlations(scores, accuracy)
    assert table["tau"].to_dict() == pytest.approx({"same": 1.0, "reversed": -1.0, "holes": 1.0})
    assert table.loc["same", "r"] == pytest.approx(1.0)
    assert table["n"].tolist() == [5, 5, 3]
    best = rank_correlations(scores, accuracy, top=3)
    assert best["n"].tolist() == [3, 3, 2] and math.isnan(best.loc["holes", "tau"])


def test_costs_of_ranking_count_what_happens_before_and_for_each_architecture():
    training = pd.DataFrame({"ghn1": {"steps": 100, "meta_batch": 2, "flops": 3e12}}).T
    analysis = {"checkpoints": [10], "one_shot_steps": 20, "images": 64}
    costs = search_costs(training, image=1e9, analysis=analysis, batch_size=32, validation=500)
    assert costs.loc["ghn1"].tolist() == pytest.approx([200, 3, 0, 500])
    assert costs.loc["SGD, 10 steps"].tolist() == pytest.approx([0, 0, 10, 10 * 3 * 32 + 500])
    assert costs.loc["one-shot"].tolist() == pytest.approx([20, 20 * 3 * 32 / 1000, 0, 500])
    assert costs.loc["snip", "GFLOPs each"] == 64 * costs.loc["synflow", "GFLOPs each"]


def test_the_interval_of_tau_is_that_of_its_normalised_value():
    assert tau_interval(0.3, 40) == (pytest.approx(0.0933, abs=1e-3), pytest.approx(0.482, abs=1e-3))
    low, high = tau_interval(0.0, 40)
    assert low == -high < 0
    assert all(math.isnan(bound) for bound in tau_interval(0.5, 4))


def test_the_interval_of_tau_covers_its_expectation():
    """Of normal pairs with correlation 0.6 the expected tau is 2 / pi arcsin(0.6)."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        x, noise = rng.normal(size=(2, 30))
        tau = rank_correlations(pd.DataFrame({"x": x}), 0.6 * x + 0.8 * noise).loc["x"]
        covered += tau["low"] < 2 / math.pi * math.asin(0.6) < tau["high"]
    assert 0.9 < covered / 300 < 0.99


def test_a_surrogate_is_compared_with_random_choice():
    accuracy = np.arange(10.0)
    found = top_against_random(accuracy, accuracy, k=2, seed=0)
    assert (found["top"], found["random"], found["lead"]) == (8.5, 4.5, 4.0)
    assert 0 <= found["low"] < found["lead"] < found["high"] <= 8
    assert top_against_random(-accuracy, accuracy, k=2, seed=0)["high"] <= 0
    everyone = top_against_random(accuracy, accuracy, k=10, seed=0)
    assert everyone["low"] == everyone["high"] == 0


def test_a_one_shot_model_learns_what_architectures_share():
    images = load_images("digits", seed=0, image_size=8)
    few = list(DeepNets("train", space="small", input_size=8, size=2))
    trained, untrained = (train_one_shot(few[:1], images.train, steps, 32, 0.05, seed=0) for steps in (25, 1))
    assert trained.keys() == untrained.keys()
    own, other = one_shot_scores(trained, few, images.val, seed=0).itertuples(index=False)
    assert own.accuracy > one_shot_scores(untrained, few[:1], images.val, seed=0)["accuracy"][0] + 10
    assert own.shared == 1 > other.shared > 0
    again = train_one_shot(few[:1], images.train, 1, 32, 0.05, seed=0)
    assert all(torch.equal(value, again[key]) for key, value in untrained.items())
