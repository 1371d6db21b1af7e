"""Diversity, copies and shapes of parameters, each against its definition."""

from itertools import permutations

import pytest
import torch

from ghnlib.diagnostics import common_shapes, duplicated_filters, matched_diversity, singular_values, tensors_of


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_matching_finds_the_order_of_channels_that_makes_two_tensors_most_alike():
    a, b = normal(2, 4, 3, 3, 3).unbind()
    assert matched_diversity([a, a[torch.tensor([2, 0, 3, 1])]]) == pytest.approx(0, abs=1e-6)
    cosines = [float((a.flatten() @ b[list(p)].flatten()) / a.norm() / b.norm()) for p in permutations(range(4))]
    assert matched_diversity([a, b]) == pytest.approx(1 - abs(max(cosines)), abs=1e-6)


def test_singular_values_are_relative_to_each_tensors_largest():
    left, right = (torch.linalg.qr(normal(n, n)).Q for n in (2, 4))
    tensors = [(left @ torch.diag(torch.tensor(values)) @ right[:2]).view(2, 1, 2, 2) for values in ((4.0, 1.0), (3.0, 3.0))]
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
