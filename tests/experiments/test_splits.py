"""Statistics of splits, each against its definition."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment
from shared import params
from torch import nn

from ghnlib import DeepNets
from ghnlib.experiments import splits
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node
from ghnlib.reporting.publish import SPLITS, published


@pytest.fixture(scope="module")
def setup():
    read = params("tiny")
    sections = {name: getattr(read, name) for name in ("data", "deepnets", "architectures")}
    return Setup("architectures", read.profile, read.seed, Path("unused"), **sections)


@pytest.fixture(scope="module")
def statistics(setup):
    return splits.statistics_of_splits(setup)


def test_statistics_of_a_chain():
    chain = Graph([Node("input"), Node("conv"), Node("bn"), Node("sum")], [(0, 1), (1, 2), (2, 3)])
    found = splits.graph_statistics(chain)
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
    rows = splits.split_statistics("test", dataset)
    assert splits.assignment_cost(rows, rows) == pytest.approx(np.mean(costs))
    assert splits.assignment_cost(rows[:1], rows[:1]) == 0
    both = pd.concat([rows[:1].assign(split="train"), rows[1:2]])
    assert splits.distances_to_training(both).to_dict() == {"train": 0.0, "test": round(costs[1], 1)}


def test_split_statistics_have_a_row_for_each_architecture():
    rows = splits.split_statistics("bnfree", DeepNets("bnfree", space="small", size=4))
    assert rows["bn_free"].all()
    assert list(rows["index"]) == [0, 1, 2, 3]


def test_networks_are_described_by_what_accuracy_is_drawn_against():
    (architecture,) = DeepNets("val", space="small", input_size=32, size=1)
    row, net = splits.describe("val", [architecture]).iloc[0], architecture.build()
    assert row["parameters"] == sum(p.numel() for p in net.parameters())
    assert row["batch_norm"] == any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert (row["depth"], row["width"]) == (architecture.n_cells, architecture.C)
    assert list(splits.describe("predefined", list(DeepNets("predefined", input_size=32)))["depth"].isna()) == [
        True,
        False,
    ]


def test_splits_are_those_of_the_profile_and_of_the_paper(setup, statistics):
    sizes = statistics.groupby("split", sort=False).size()
    assert list(sizes.index) == list(SPLITS) and sizes["train"] == setup.deepnets.train_pool
    paper = splits.statistics_at_paper_scale(setup)
    assert (paper.groupby("split").size() == setup.architectures.networks).all()
    assert paper["parameters"][paper["split"] == "test"].min() >= 2_500_000 > statistics["parameters"].max()


def test_a_summary_has_means_and_population_deviations(statistics):
    table, nodes = splits.summarise(statistics), statistics["nodes"][statistics["split"] == "val"]
    assert table["nodes"]["val"] == f"{nodes.mean():.1f} ± {nodes.std(ddof=0):.1f}"
    assert table["without batch norm (%)"]["bnfree"] == 100 and table["networks"]["train"] == 8
    assert table["parameters (millions)"]["val"] == round(
        statistics["parameters"][statistics["split"] == "val"].mean() / 1e6, 2
    )
    assert np.allclose(splits.composition(statistics).sum(axis=1), 100)


def test_agreement_is_the_largest_difference_from_the_published_means():
    degree = published("architectures/degree").astype(float)
    nodes = published("architectures/nodes").str.split().str[0].astype(float)
    rows = pd.DataFrame({"split": degree.index, "degree": degree.values, "nodes": nodes[degree.index].values})
    assert splits.agreement(rows) == pytest.approx((0, 0))
    off = rows.assign(
        degree=rows["degree"] + 0.06 * (rows["split"] == "wide"),
        nodes=rows["nodes"] * np.where(rows["split"] == "val", 0.9, 1),
    )
    assert splits.agreement(off) == pytest.approx((0.06, 0.1))


def test_design_spaces_list_what_splits_change():
    table = splits.design_spaces("paper", "small", "small")
    assert list(table) == ["paper", "small"]
    assert table.loc["cells", "small"] == "2, 4" and table.loc["deep: cells", "small"] == "5, 8"
    assert table.loc["train: width_rule"].tolist() == ["narrow", "narrow"]
    assert "conv_3x3 (4 times)" in table.loc["operations", "small"], "what is drawn more often than the rest"


def test_kinds_of_test_networks_are_looked_up_among_those_of_training():
    few, many = (splits.kinds_seen("small", 0, train, 10) for train in (5, 100))
    assert 0 < few["kinds seen (%)"] < many["kinds seen (%)"] < 100
    assert few["networks of seen kinds (%)"] <= many["networks of seen kinds (%)"] < 100


def test_the_smallest_of_the_first_architectures():
    dataset = list(DeepNets("test", space="small", size=6))
    sizes = [len(a.graph) for a in dataset]
    assert len(splits.smallest(dataset, among=4).graph) == min(sizes[:4])
    most = max(len(a.genotype.normal) for a in dataset)
    assert len(splits.smallest(dataset, most_sums=True).graph) == min(
        n for n, a in zip(sizes, dataset) if len(a.genotype.normal) == most
    )


def test_predefined_networks_have_the_published_graphs_at_32_pixels(setup):
    table = splits.predefined_statistics(setup)
    assert table["nodes"].to_dict() == published("architectures/predefined-nodes").to_dict()
    assert table["degree"].to_dict() == pytest.approx(published("architectures/predefined-degree").to_dict(), abs=0.01)


def test_torchvision_is_summarised_in_one_column():
    rows = pd.DataFrame(
        {"network": ["a", "b"], "degree": [2.0, 4.0], "nodes": [100, 200], "path": [1.0, 3.0], "parameters": [1e6, 3e6]}
    )
    assert splits.summarise_torchvision(rows)["torchvision"].to_dict() == {
        "networks": 2, "degree": "3.0 ± 1.0", "degree, range": "2.0 to 4.0", "nodes": "150 ± 50", "mean path": "2.0 ± 1.0",
        "parameters (millions)": 2.0,
    }  # fmt: skip
