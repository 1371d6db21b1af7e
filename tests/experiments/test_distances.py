"""Distances of embeddings against their definitions."""

import math

import numpy as np
import pytest
from shared import digits, params, pool, tiny

from ghnlib.architectures.vision import NamedNetwork, without_skips
from ghnlib.experiments.analysis.distances import (
    SINGLE,
    Distances,
    compare_distances,
    extreme_pairs,
    frechet_distance,
    hungarian_distance,
    orders_of,
    two_components,
)
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node
from ghnlib.reporting.publish import EVALUATED


def test_frechet_distance_of_gaussians_is_that_of_their_moments():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + [3.0, 4.0]) == pytest.approx(25)
    decorrelated = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # exactly unit covariance
    assert frechet_distance(decorrelated, 3 * decorrelated) == pytest.approx(2 * (3 - 1) ** 2)
    assert math.isnan(frechet_distance(a, a[:1]))


def test_the_most_and_the_least_similar_pair_are_found():
    states = np.array([[0.0, 0.0], [1.0, 0.0], [1.1, 0.0], [9.0, 0.0]])
    pairs = extreme_pairs(states)
    assert set(pairs["least similar"]) == {0, 3} and set(pairs["most similar"]) == {1, 2}


def test_orders_and_claims_follow_the_distances_to_resnet50():
    l2 = dict(zip(SINGLE, (1.0, 3.0, 2.0)))
    found = {"ghn2": {"l2": l2, "frechet": {"test": 1.0, "nearest shifted": 4.0}}}
    distances = Distances({}, {}, found, dict(zip(SINGLE, (3.0, 2.0, 1.0))))
    nearer = distances._replace(found={"ghn2": {"l2": l2 | {"ViT": 10.0}}})
    assert orders_of([distances]).loc["ghn2"].tolist() == ["ResNet-34", "ViT", "ResNet-50 without skips"]
    assert orders_of([distances, nearer]).loc["ghn2"].tolist() == [*SINGLE]  # the mean of both trainings
    assert orders_of([distances]).loc["Hungarian"].tolist() == [*SINGLE][::-1]
    values = {name: measured.value for name, measured in distances.claims.items()}
    assert values == {"distance-vit-resnet34": 1.0, "distance-order": -1.0, "frechet-nearest": 3.0}


def test_components_are_of_all_splits_and_hold_their_variance():
    graphs, rng = [a.graph for a in pool()], np.random.default_rng(0)
    states = {part: rng.normal(size=(3, 2)) for part in (*EVALUATED, "predefined")}
    points, share = two_components(states, dict.fromkeys(states, graphs))
    assert share == pytest.approx(1.0) and len(points) == 3 * len(states)
    assert points["nodes"].tolist() == [len(graph) for graph in graphs] * len(states)


def test_a_node_is_paired_where_it_and_its_neighbours_agree():
    def graph(edges, *ops):
        return Graph([Node(op) for op in ops], edges)

    chain = graph([(0, 1), (1, 2)], "input", "conv", "bn")
    skipping = graph([(0, 1), (1, 2), (2, 3), (0, 3)], "input", "conv", "bn", "sum")
    assert hungarian_distance(chain, chain) == 0
    assert hungarian_distance(chain, skipping) == 3  # only the convolution keeps its neighbours
    assert hungarian_distance(skipping, chain) == 3


def test_a_resnet34_is_nearer_to_a_resnet50_than_one_without_skips():
    resnet50 = NamedNetwork(10, 16, "resnet50")
    cut = Graph.from_module(without_skips(resnet50.build().eval()), (3, 16, 16))
    vit = pool("predefined", None, input_size=16)[1].graph
    others = (NamedNetwork(10, 16, "resnet34").graph, cut, vit)
    found = [hungarian_distance(resnet50.graph, other) for other in others]
    assert found == sorted(found) and len(set(found)) == 3


def test_distances_are_of_each_training(tmp_path):
    small = params("tiny")
    setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=small.data, deepnets=small.deepnets, train=small.train,
                  analysis=small.analysis.model_copy(update={"variants": ("ghn2",)}))  # fmt: skip
    vars(setup)["images"] = digits(image_size=16)
    vars(setup)["hypernetworks"] = {"ghn2": {0: tiny("gated_gnn"), 1: tiny("gated_gnn", layernorm=False)}}
    first, second = compare_distances(setup)
    assert first.states["ghn2"]["wide"].shape == (2, 16) and len(first.members["train"]) == 2
    assert not np.allclose(first.states["ghn2"]["test"], second.states["ghn2"]["test"])
    assert {"distance-order", "frechet-nearest"} <= first.claims.keys()
    assert list(first.table.index) == ["train", *EVALUATED, *SINGLE]
