"""Orthogonal post-processing and the noise before it, by their definitions."""

import pytest
import torch
from torch import nn

from ghnlib.training.initialization import add_noise, correlation_deviation, orthogonalize


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(4, 10))


def test_orthogonalize_makes_columns_orthonormal_except_in_the_classifier():
    net = layers()
    classifier = net[3].weight.clone()
    orthogonalize(net)
    wide, tall = net[0].weight.flatten(1), net[2].weight.flatten(1)
    torch.testing.assert_close(wide @ wide.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(tall @ tall.T, torch.eye(4), atol=1e-5, rtol=0)
    assert torch.equal(net[3].weight, classifier)


def test_orthogonalize_is_the_orthogonal_initialisation_of_the_same_matrix():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    torch.manual_seed(3)
    net[0].weight.data.normal_()
    torch.manual_seed(3)
    expected = nn.init.orthogonal_(torch.empty(6, 4))
    orthogonalize(net)
    torch.testing.assert_close(net[0].weight, expected)


def test_orthogonalize_leaves_a_share_of_the_layers():
    net = layers()
    first = net[0].weight.clone()
    orthogonalize(net, orth_from=1 / 3)
    assert torch.equal(net[0].weight, first)
    assert not torch.equal(layers()[2].weight, net[2].weight)


@pytest.mark.parametrize(("share", "count", "first"), [(0.667, 54, 37), (0.823, 113, 94)])
def test_the_share_gives_the_papers_first_layer(share, count, first):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    before = [layer.weight.clone() for layer in net]
    orthogonalize(net, share)
    changed = [i for i, layer in enumerate(net, start=1) if not torch.equal(layer.weight, before[i - 1])]
    assert changed == list(range(first, count))


def test_noise_breaks_the_symmetry_of_tiled_channels_in_proportion_to_their_correlation():
    net = layers()
    net[0].weight.data = net[0].weight.data[:4].repeat(2, 1, 1, 1)
    before = net[0].weight.clone()
    sigma = correlation_deviation(before)
    rows = before.detach().flatten(1).T  # the taller orientation
    assert float(sigma) == pytest.approx(float(torch.corrcoef(rows).std()), rel=1e-4)
    add_noise(net, 0.1, torch.Generator().manual_seed(0))
    noise = net[0].weight - before
    assert not torch.equal(net[0].weight[0], net[0].weight[4])
    assert float(noise.detach().std()) == pytest.approx(0.1 * float(sigma), rel=0.2)


def test_noise_leaves_weights_of_one_column_alone():
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Linear(4, 10))
    before = net[0].weight.clone()
    add_noise(net, 0.1, torch.Generator())
    assert torch.equal(net[0].weight, before)
