"""Statistics and yardsticks of single reports, each against its definition."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ghnlib import DeepNets
from ghnlib.data import load_images
from ghnlib.experiments import assignment_cost, graph_statistics, random_and_trained_parameters, split_statistics
from ghnlib.finetuning import SGDRecipe
from ghnlib.graph import Graph, Node


def test_statistics_of_a_chain():
    chain = Graph([Node("input"), Node("conv"), Node("bn"), Node("sum")], [(0, 1), (1, 2), (2, 3)])
    found = graph_statistics(chain)
    assert (found["nodes"], found["depth"], found["degree"]) == (4, 3, 1.5)
    assert found["path"] == pytest.approx((3 * 1 + 2 * 2 + 1 * 3) / 6)
    assert (found["conv"], found["msa"], found["bn_free"]) == (1, 0, False)


def test_assignment_cost_is_that_of_the_best_assignment():
    dataset = DeepNets("test", seed=3, space="small", size=3)
    graphs = [dataset[i].graph for i in range(3)]
    costs = []
    for a in graphs:
        for b in graphs:
            size = max(len(a), len(b))
            matrix = np.ones((size, size))
            matrix[: len(a), : len(b)] = [[x.op != y.op for y in b.nodes] for x in a.nodes]
            costs.append(matrix[linear_sum_assignment(matrix)].sum())
    rows = split_statistics("test", dataset)
    assert assignment_cost(rows, rows) == pytest.approx(np.mean(costs))
    assert assignment_cost(rows[:1], rows[:1]) == 0


def test_every_random_network_has_random_numbers_of_its_own():
    images = load_images("digits", seed=0, image_size=16)
    same = [DeepNets("val", space="small", input_size=16)[0]] * 2
    before, after = random_and_trained_parameters(same, images.train, SGDRecipe(steps=1, lr=0.01), 0, 1)
    name = next(iter(before[0]))
    assert not torch.equal(before[0][name], before[1][name])
    assert not torch.equal(before[0][name], after[0][name])
    again, _ = random_and_trained_parameters(same, images.train, SGDRecipe(steps=1, lr=0.01), 0, 1)
    assert torch.equal(before[0][name], again[0][name])


def test_split_statistics_has_a_row_for_each_architecture():
    rows = split_statistics("bnfree", DeepNets("bnfree", space="small", size=4))
    assert isinstance(rows, pd.DataFrame)
    assert rows["bn_free"].all()
    assert list(rows["index"]) == [0, 1, 2, 3]
