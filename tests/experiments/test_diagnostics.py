"""Diversity, copies and shapes of parameters, each against its definition."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from shared import digits, params, pool, tiny
from torch import nn

from ghnlib import GHN
from ghnlib.experiments.analysis import diagnostics
from ghnlib.experiments.setup import Setup
from ghnlib.training.initialization import Sources, initialize
from ghnlib.training.networks import TrainingRecipe


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_matching_finds_the_order_of_channels_that_makes_two_tensors_most_alike():
    a, b = normal(2, 4, 3, 3, 3).unbind()
    assert diagnostics.matched_diversity([a, a[torch.tensor([2, 0, 3, 1])]]) == pytest.approx(0, abs=1e-6)
    cosines = [float((a.flatten() @ b[list(p)].flatten()) / a.norm() / b.norm()) for p in permutations(range(4))]
    assert diagnostics.matched_diversity([a, b]) == pytest.approx(1 - abs(max(cosines)), abs=1e-6)


def test_singular_values_are_relative_to_each_tensors_largest():
    left, right = (torch.linalg.qr(normal(n, n)).Q for n in (2, 4))
    tensors = [
        (left @ torch.diag(torch.tensor(values)) @ right[:2]).view(2, 1, 2, 2) for values in ((4.0, 1.0), (3.0, 3.0))
    ]
    torch.testing.assert_close(diagnostics.singular_values(tensors), torch.tensor([1.0, (1 / 4 + 1) / 2]))


def test_copies_are_filters_parallel_to_an_earlier_one():
    filters = normal(4, 2, 3, 3)
    net = {"tiled": torch.cat([filters, 2 * filters]), "own": normal(8, 3, 3, 3), "small": torch.ones(4, 1, 1, 1)}
    assert diagnostics.duplicated_filters(net) == pytest.approx(4 / 16)


def test_common_shapes_are_those_of_most_tensors_and_all_of_them_count():
    one = {
        "a": normal(4, 1, 3, 3),
        "b": normal(4, 1, 3, 3),
        "c": normal(8, 3, 3, 3),
        "d": normal(9),
        "e": normal(1, 1, 1, 1),
    }
    other = {"a": normal(8, 3, 3, 3), "b": normal(4, 2, 1, 1), "c": normal(4, 1, 3, 3)}
    assert diagnostics.common_shapes([one, other], 2) == [(4, 1, 3, 3), (8, 3, 3, 3)]
    assert [len(diagnostics.tensors_of([one, other], shape)) for shape in ((4, 1, 3, 3), (8, 3, 3, 3))] == [3, 2]
    found = diagnostics.compare_diversity({"random": [with_stem(one), with_stem(other)]})
    assert list(found.by_shape)[:2] == ["4x1x3x3 (3 tensors)", "8x3x3x3 (2 tensors)"]
    tensors = [one["a"], one["b"], other["c"]]
    assert found.table.loc["random", "diversity"] == pytest.approx(diagnostics.diversity(tensors))


def with_stem(parameters):
    return parameters | {"stem.weight": normal(2, 3, 3, 3)}


def test_scale_from_he_is_one_for_he():
    net = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(256, 128))
    initialize("he", net, Sources(seed=0))
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    assert diagnostics.scale_from_he(parameters) == pytest.approx(1, abs=0.02)
    assert diagnostics.scale_from_he({name: p / 8 for name, p in parameters.items()}) == pytest.approx(1 / 8, abs=0.003)


def test_activations_of_each_training_beside_he_and_the_start():
    small = params("tiny")
    changes = {"variants": ("ghn2",), "activations": ("vit",), "activation_steps": 1, "images": 8}
    setup = Setup("analysis", "tiny", 0, folder=None, data=small.data, deepnets=small.deepnets,
                  train=small.train.model_copy(update={"seeds": (0, 3)}),
                  analysis=small.analysis.model_copy(update=changes))  # fmt: skip
    vars(setup)["images"] = digits(image_size=16)
    config = tiny("gated_gnn").config
    torch.manual_seed(3)
    untrained = GHN(config)
    vars(setup)["hypernetworks"] = {"ghn2": {0: tiny("gated_gnn", layernorm=False), 3: untrained}}
    first, second = diagnostics.compare_activations(setup, TrainingRecipe(1, 0.02, batch_size=8))["vit"]
    sources = [diagnostics.HE, diagnostics.TRAINED, "ghn2", "ghn2, start"]
    sources += ["ghn2, start, to scale", "ghn2, start, to scale, shuffled"]
    assert list(first.variances) == list(second.variances) == sources
    assert (
        first.variances[diagnostics.HE] == second.variances[diagnostics.HE]
        and first.variances[diagnostics.HE] != first.variances["ghn2"]
    )
    assert second.variances["ghn2"] == second.variances["ghn2, start"]  # its training began so
    table = second.table
    assert table.loc[diagnostics.HE, "factor from He"] == 1 and np.isnan(table.loc["ghn2", "weights' scale"])
    assert table.loc["ghn2, start", "weights' scale"] == second.scales["ghn2"] < 0.5
    shuffled = table.loc["ghn2, start, to scale, shuffled", "factor from He"]
    assert shuffled < table.loc[["ghn2, start", "ghn2, start, to scale"], "factor from He"].min()


def test_diversity_of_parallel_and_of_random_tensors():
    tensor = torch.randn(64, 3, 3)
    assert diagnostics.diversity([tensor, -2 * tensor]) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    random = [torch.randn(1152) for _ in range(200)]
    assert diagnostics.diversity(random) == pytest.approx(1 - math.sqrt(2 / (math.pi * 1152)), abs=0.002)


def test_sparsity():
    assert diagnostics.sparsity(torch.tensor([0.0, 0.04, 0.06, -1.0])) == 0.5


def test_activation_variances_are_those_of_each_layer_in_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    images = torch.randn(4, 3, 8, 8)
    assert diagnostics.activation_variances(net, images) == [pytest.approx(float(net(images).var()))]
    assert not net[0]._forward_hooks
    assert np.isfinite(diagnostics.activation_variances(pool()[0].build(device="cpu"), images)).all()
