"""Distances of embeddings against their definitions."""

import math

import numpy as np
import pytest
from shared import pool

from ghnlib.experiments.distances import SINGLE, SPLITS, Distances, extreme_pairs, frechet_distance, two_components


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
    assert distances.orders.loc["ghn2"].tolist() == ["ResNet-34", "ViT", "ResNet-50 without skips"]
    assert distances.orders.loc["Hungarian"].tolist() == [*SINGLE][::-1]
    values = {name: measured.value for name, measured in distances.claims.items()}
    assert values == {"distance-vit-resnet34": 1.0, "distance-order": -1.0, "frechet-nearest": 3.0}


def test_components_are_of_all_splits_and_hold_their_variance():
    graphs, rng = [a.graph for a in pool()], np.random.default_rng(0)
    states = {part: rng.normal(size=(3, 2)) for part in (*SPLITS, "predefined")}
    points, share = two_components(states, dict.fromkeys(states, graphs))
    assert share == pytest.approx(1.0) and len(points) == 3 * len(states)
    assert points["nodes"].tolist() == [len(graph) for graph in graphs] * len(states)
