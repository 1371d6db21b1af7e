"""The graph itself: distances, exchange with networkx, drawing, refusal of what is not a sorted DAG."""

import matplotlib
import networkx as nx
import numpy as np
import pytest

from ghnlib import DeepNets, Graph
from ghnlib.graphs.nodes import PRIMITIVES, Node, Role

matplotlib.use("Agg")


def chain(n):
    return Graph([Node("input"), *[Node("sum")] * (n - 1)], [(i, i + 1) for i in range(n - 1)])


def test_the_vocabulary_has_the_order_of_the_released_embeddings():
    assert PRIMITIVES[:5] == ("max_pool", "avg_pool", "sep_conv", "dil_conv", "conv")
    assert PRIMITIVES[5:10] == ("msa", "cse", "sum", "concat", "input")
    assert PRIMITIVES[10:] == ("bias", "bn", "ln", "pos_enc", "glob_avg")


def test_distances_are_shortest_directed_paths():
    graph = DeepNets("test", space="small", size=1)[0].graph
    expected = np.zeros((len(graph), len(graph)), dtype=np.uint8)
    for source, lengths in nx.all_pairs_shortest_path_length(graph.to_networkx()):
        for target, length in lengths.items():
            expected[source, target] = length
    assert graph.distances.dtype == np.uint8
    np.testing.assert_array_equal(graph.distances, expected)


def test_distances_over_250_count_as_unreachable():
    distances = chain(260).distances
    assert distances[0, 250] == 250 and distances[0, 251] == 0 and distances[5, 0] == 0


def test_edges_have_two_columns_even_if_there_are_none():
    graph = Graph([Node("input")], [])
    assert graph.edges.shape == (0, 2) and graph.edges.dtype == np.int64


@pytest.mark.parametrize("edge", [(1, 0), (1, 1), (0, 7), (-1, 1)])
def test_edges_against_the_order_are_refused(edge):
    with pytest.raises(ValueError, match="topologically"):
        Graph([Node("input"), Node("sum")], [edge])


def test_networkx_nodes_carry_the_attributes():
    graph = Graph([Node("input"), Node("conv", "stem.weight", (8, 3, 3, 3), Role.CONV)], [(0, 1)])
    attributes = {"op": "conv", "name": "stem.weight", "shape": (8, 3, 3, 3), "role": "convolution"}
    assert graph.to_networkx().nodes[1] == attributes


def test_plot_draws_every_node_and_a_legend_of_the_primitives():
    graph = DeepNets("test", space="small", size=1)[0].graph
    ax = graph.plot()
    assert sum(len(c.get_offsets()) for c in ax.collections if c.get_offsets().shape[-1] == 2) >= len(graph)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {node.op for node in graph.nodes}
