"""Statistics and yardsticks of single reports, each against its definition."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment

from ghnlib import DeepNets
from ghnlib.experiments import assignment_cost, graph_statistics, split_statistics
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


def test_split_statistics_has_a_row_for_each_architecture():
    rows = split_statistics("bnfree", DeepNets("bnfree", space="small", size=4))
    assert isinstance(rows, pd.DataFrame)
    assert rows["bn_free"].all()
    assert list(rows["index"]) == [0, 1, 2, 3]
