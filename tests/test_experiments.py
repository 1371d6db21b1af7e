"""Statistics and yardsticks of single reports, each against its definition."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment

from ghnlib import DeepNets, experiments
from ghnlib.data import ImageSplits, load_images
from ghnlib.experiments import assignment_cost, graph_statistics, split_statistics, train_chosen
from ghnlib.finetuning import TrainingRecipe
from ghnlib.graph import Graph, Node
from ghnlib.images import Augment


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


def test_chosen_architectures_are_trained_plainly_and_regularised(monkeypatch):
    images = load_images("digits", seed=0, image_size=8)
    few = ImageSplits(*(part.few_shot(3, seed=0) for part in (images.train, images.val, images.test)))
    seen = []
    train = experiments.train_network

    def spy(net, train_set, recipe, *rest, **more):
        values = train(net, train_set, recipe, *rest, **more)
        seen.append((net.auxiliary_head is not None, net.drop_path, recipe.augment.cutout))
        return values

    monkeypatch.setattr(experiments, "train_network", spy)
    architecture = DeepNets("val", space="small", input_size=8)[0]
    chosen = {"seeds": [0], "cutout": 2, "drop_path": 0.3}
    rows = train_chosen({"one": architecture}, few, TrainingRecipe(2, 0.02, augment=Augment()), chosen, processes=1)
    assert seen == [(False, 0.0, 0), (True, pytest.approx(0.3), 2)]
    assert rows["accuracy"].between(0, 100).all() and rows["training"].nunique() == 2
