"""Diversity, copies and shapes of parameters, each against its definition."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from shared import pool
from torch import nn

from ghnlib.experiments.diagnostics import (
    activation_variances,
    common_shapes,
    diversity,
    duplicated_filters,
    matched_diversity,
    singular_values,
    sparsity,
    tensors_of,
)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_matching_finds_the_order_of_channels_that_makes_two_tensors_most_alike():
    a, b = normal(2, 4, 3, 3, 3).unbind()
    assert matched_diversity([a, a[torch.tensor([2, 0, 3, 1])]]) == pytest.approx(0, abs=1e-6)
    cosines = [float((a.flatten() @ b[list(p)].flatten()) / a.norm() / b.norm()) for p in permutations(range(4))]
    assert matched_diversity([a, b]) == pytest.approx(1 - abs(max(cosines)), abs=1e-6)


def test_singular_values_are_relative_to_each_tensors_largest():
    left, right = (torch.linalg.qr(normal(n, n)).Q for n in (2, 4))
    tensors = [
        (left @ torch.diag(torch.tensor(values)) @ right[:2]).view(2, 1, 2, 2) for values in ((4.0, 1.0), (3.0, 3.0))
    ]
    torch.testing.assert_close(singular_values(tensors), torch.tensor([1.0, (1 / 4 + 1) / 2]))


def test_copies_are_filters_parallel_to_an_earlier_one():
    filters = normal(4, 2, 3, 3)
    net = {"tiled": torch.cat([filters, 2 * filters]), "own": normal(8, 3, 3, 3), "small": torch.ones(4, 1, 1, 1)}
    assert duplicated_filters(net) == pytest.approx(4 / 16)


def test_common_shapes_are_those_of_most_networks():
    one = {"a": normal(4, 1, 3, 3), "b": normal(4, 1, 3, 3), "c": normal(8, 3, 3, 3), "d": normal(9)}
    other = {"a": normal(8, 3, 3, 3), "b": normal(4, 2, 1, 1)}
    assert common_shapes([one, other], 2) == [(8, 3, 3, 3), (4, 1, 3, 3)]
    assert [len(tensors_of([one, other], shape)) for shape in ((8, 3, 3, 3), (4, 1, 3, 3))] == [2, 1]


def test_diversity_of_parallel_and_of_random_tensors():
    tensor = torch.randn(64, 3, 3)
    assert diversity([tensor, -2 * tensor]) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    random = [torch.randn(1152) for _ in range(200)]
    assert diversity(random) == pytest.approx(1 - math.sqrt(2 / (math.pi * 1152)), abs=0.002)


def test_sparsity():
    assert sparsity(torch.tensor([0.0, 0.04, 0.06, -1.0])) == 0.5


def test_activation_variances_are_those_of_each_layer_in_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    images = torch.randn(4, 3, 8, 8)
    assert activation_variances(net, images) == [pytest.approx(float(net(images).var()))]
    assert not net[0]._forward_hooks
    assert np.isfinite(activation_variances(pool()[0].build(device="cpu"), images)).all()
