"""Each key of an ablation changes what it says and nothing else."""

import numpy as np
import pytest
import torch
from shared import SHAPE, Residual, swept, tiny

from ghnlib import DeepNets, GHNConfig
from ghnlib.config import Recipe
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node, Role
from ghnlib.hypernetwork.decoders import weight_scale
from ghnlib.hypernetwork.encoders import truncated_distances
from ghnlib.hypernetwork.gatedgnn import cells_of


def chain(*nodes, edges=None):
    return Graph([Node("input"), *nodes], edges or [(i, i + 1) for i in range(len(nodes))])


def conv(width, name="a"):
    return Node("conv", name, (width, width, 3, 3), Role.CONV)


def changed(ghn, graph, other):
    """Which node states differ between two graphs."""
    with torch.no_grad():
        return [not torch.allclose(a, b, atol=1e-6) for a, b in zip(ghn.encode([graph]), ghn.encode([other]))]


@pytest.mark.parametrize("shapes", [True, False])
def test_without_shape_encoding_states_depend_on_operations_alone(shapes):
    ghn = tiny(shape_encoding=shapes)
    assert any(changed(ghn, chain(conv(8)), chain(conv(16)))) == shapes
    assert any(changed(ghn, chain(conv(8)), chain(Node("sep_conv", "a", (8, 1, 3, 3), Role.CONV))))


def test_forward_sweeps_alone_leave_nodes_unaware_of_their_successors():
    early, late = chain(conv(8), conv(8), conv(8)), chain(conv(8), conv(8), conv(16))
    assert changed(tiny("gated_gnn"), early, late) == [True] * 4
    ghn = tiny("gated_gnn", directions="forward")
    assert changed(ghn, early, late) == [False, False, False, True]
    x = ghn.embedding([early])
    torch.testing.assert_close(ghn.encoder(x, [early]), swept(ghn.encoder, x, early, ["forward"]))


@pytest.mark.parametrize(("shape", "expected"), [
    ((8, 4, 3, 3), (2 / 72) ** 0.5), ((8, 4, 1, 7), (1 / 56) ** 0.5), ((8, 1, 3, 3), (1 / 72) ** 0.5), ((8, 4), (2 / 8) ** 0.5),
    ((1, 8, 14, 14), 1.0),
])  # fmt: skip
def test_weights_can_be_scaled_by_fan_out(shape, expected):
    assert weight_scale(shape, fan="out") == pytest.approx(expected)


def test_fan_out_rescales_weights_and_nothing_else():
    by_in, by_out = (tiny(fan=fan).predict(Residual(), SHAPE) for fan in ("in", "out"))
    for name, value in by_in.items():
        ratio = (value.shape[1] / value.shape[0]) ** 0.5 if value.ndim > 1 else 1
        torch.testing.assert_close(by_out[name], value * ratio)


def test_the_mlp_decoder_predicts_everything_and_learns_with_all_its_parameters():
    ghn = tiny("gated_gnn", decoder="mlp", initialization="ghn3")
    assert not ghn.weight_decoder.fc2.bias.any()
    predicted = ghn.predict(Residual(width=24), SHAPE)
    assert {name: p.shape for name, p in Residual(width=24).named_parameters()} == {
        n: p.shape for n, p in predicted.items()
    }
    torch.testing.assert_close(predicted["stem.weight"][16:], predicted["stem.weight"][:8])  # tiled
    sum(p.square().sum() for p in predicted.values()).backward()
    assert all(p.grad is not None for p in ghn.parameters())


def test_parts_of_an_architecture_are_stem_cells_and_head():
    architecture = DeepNets("train", space="small", size=3)[2]
    graph = architecture.graph
    assert len(cells_of(graph)) == architecture.n_cells + 2
    assert sorted(np.concatenate([rows for rows, _ in cells_of(graph)])) == list(range(len(graph)))
    for k, (rows, part) in enumerate(cells_of(graph)):
        names = [graph.nodes[i].name for i in rows]
        assert names == [node.name for node in part.nodes]
        assert {name.startswith(f"cells.{k - 1}.") for name in names if name} == {0 < k <= architecture.n_cells}
    inner = sum(len(part.edges) for _, part in cells_of(graph))
    assert inner < len(graph.edges)


def two_cells(*edges):
    nodes = [
        conv(8, "stem"),
        conv(8, "cells.0.a"),
        Node("max_pool", "", (1, 1, 3, 3)),
        conv(16, "cells.1.a"),
        Node("sum"),
        conv(8, "head"),
    ]
    return Graph([Node("input"), *nodes], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), *edges])


def test_a_stacked_hypernetwork_passes_the_mean_of_one_cell_to_the_inputs_of_the_next():
    ghn = tiny("gated_gnn", stacked=True)
    graph = two_cells()
    x = ghn.embedding([graph])
    expected, message = [], None
    assert [rows.tolist() for rows, _ in cells_of(graph)] == [[0, 1], [2, 3], [4, 5], [6]]
    for rows, cell in cells_of(graph):
        expected.append(swept(ghn.encoder, x[rows], cell, message=message))
        message = expected[-1].mean(0)
    torch.testing.assert_close(ghn.encoder(x, [graph]), torch.cat(expected))
    both = ghn.encoder(ghn.embedding([graph] * 2), [graph] * 2)
    torch.testing.assert_close(both, torch.cat(expected * 2))
    assert not any(changed(ghn, graph, two_cells((1, 5))))  # edges between cells are not read


def test_a_stacked_hypernetwork_of_one_cell_is_the_plain_one():
    stacked, plain = tiny("gated_gnn", stacked=True), tiny("gated_gnn")
    assert stacked.state_dict().keys() == plain.state_dict().keys()
    graph = Graph.from_module(Residual(), SHAPE)
    torch.testing.assert_close(stacked.encode([graph]), plain.encode([graph]))
    assert not torch.allclose(stacked.encode([two_cells()]), plain.encode([two_cells()]))


@pytest.mark.parametrize(("directions", "tables"), [("both", 2), ("forward", 1), ("none", 0)])
def test_edge_embeddings_are_read_in_the_chosen_directions(directions, tables):
    encoder = tiny(directions=directions).encoder
    distances = torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 0]])
    bias = encoder._attention_bias([distances])[0]
    for i in range(3):
        for j in range(3):
            pair = [distances[i, j] + 2, distances[j, i] + 2][:tables]
            expected = encoder.edge_bias(encoder.edge(torch.stack(pair)).flatten()) if tables else torch.zeros(1)
            torch.testing.assert_close(bias[:, i, j], expected)


@pytest.mark.parametrize("kept", ["directions", "centrality", "input_distance", None])
def test_without_node_and_edge_embeddings_edges_are_not_read(kept):
    off = {"directions": "none", "centrality": False, "input_distance": False}
    off.pop(kept, None)
    nodes = [conv(8, name) for name in "abc"]
    line, star = chain(*nodes), chain(*nodes, edges=[(0, 1), (0, 2), (0, 3)])
    assert any(changed(tiny(**off), line, star)) == (kept is not None)


def test_without_attention_nodes_are_on_their_own_but_keep_their_embeddings():
    short, long = chain(conv(8), conv(8), conv(8)), chain(conv(8), conv(8), conv(16))
    ghn = tiny(attention=False)
    assert changed(ghn, short, long) == [False, False, False, True]
    assert all(changed(tiny(), short, long))
    states = ghn.encode([short])
    assert not torch.allclose(states[1], states[2])  # same operation and shape, but farther from the input


def test_a_misaligned_meta_batch_reads_the_padded_states_at_the_wrong_rows():
    small, large = chain(conv(8)), chain(conv(8), conv(16), conv(24))
    aligned, misaligned = tiny(), tiny(batching="misaligned")
    padded = []
    misaligned.encoder.layers[-1].register_forward_hook(lambda layer, inputs, output: padded.append(output))
    for graphs in ([small], [large], [large, small], [large, large]):
        torch.testing.assert_close(misaligned.encode(graphs), aligned.encode(graphs))
    states = misaligned.encode([small, large])
    torch.testing.assert_close(states, misaligned.norm(padded[-1].flatten(0, 1)[: len(small) + len(large)]))
    torch.testing.assert_close(states[: len(small)], aligned.encode([small]))
    assert not torch.allclose(states[len(small) :], aligned.encode([large]))


def test_padding_attends_to_all_nodes_alike():
    small, large = chain(conv(8)), chain(conv(8), conv(16), conv(24))
    ghn = tiny()
    bias = ghn.encoder._attention_bias([torch.from_numpy(g.distances).long() for g in (small, large)])[0]
    scores = torch.randn_like(bias) * 30 + bias
    assert (scores.softmax(-1)[:, len(small) :] == 1 / len(large)).all()
    assert (scores.softmax(-1)[:, : len(small), len(small) :] == 0).all()


def together(encoder, x, graph, message=None):
    """A synchronous step of a gated GNN written node by node."""
    distances, states = truncated_distances(graph, encoder.config.cutoff), []
    both = distances + distances.T
    for v in range(len(graph)):
        m = torch.zeros_like(x[v])
        if message is not None and not (distances[:, v] == 1).any():
            m = m + message
        for u in (both[:, v] > 0).nonzero().flatten():
            m = m + (encoder.mlp(x[u]) if both[u, v] == 1 else 0)
            m = m + (encoder.mlp_ve(x[u]) / both[u, v] if encoder.mlp_ve is not None else 0)
        states.append(encoder.gru(m[None], x[v][None])[0])
    return torch.stack(states)


@pytest.mark.parametrize("virtual_edges", [True, False])
def test_synchronous_steps_update_all_nodes_from_their_neighbours_before(virtual_edges):
    encoder = tiny("gated_gnn", directions="synchronous", virtual_edges=virtual_edges, layers=2).encoder
    graph = two_cells((2, 5))
    x = torch.randn(len(graph), 16)
    torch.testing.assert_close(encoder(x, [graph]), together(encoder, together(encoder, x, graph), graph))
    torch.testing.assert_close(encoder(torch.cat([x, x]), [graph] * 2)[: len(graph)], encoder(x, [graph]))


def test_stacked_synchronous_steps_pass_the_mean_on_to_inputs():
    encoder = tiny("gated_gnn", directions="synchronous", stacked=True).encoder
    graph = two_cells()
    x, expected, message = torch.randn(len(graph), 16), [], None
    for rows, cell in cells_of(graph):
        expected.append(together(encoder, x[rows], cell, message))
        message = expected[-1].mean(0)
    torch.testing.assert_close(encoder(x, [graph]), torch.cat(expected))


def test_stacked_modules_may_have_weights_of_their_own_and_pass_nothing():
    encoder = tiny("gated_gnn", stacked=True, passing=False, modules=3).encoder
    graph = two_cells()
    x, sets = torch.randn(len(graph), 16), [encoder, *encoder.others, encoder]
    expected = [swept(module, x[rows], cell) for module, (rows, cell) in zip(sets, cells_of(graph), strict=True)]
    torch.testing.assert_close(encoder(x, [graph]), torch.cat(expected))
    passing = tiny("gated_gnn", stacked=True, modules=3).encoder(x, [graph])
    assert torch.allclose(passing[:2], torch.cat(expected)[:2]) and not torch.allclose(passing, torch.cat(expected))


@pytest.mark.parametrize("decoder", ["conv", "mlp"])
def test_identity_adds_a_multiple_of_the_identity_to_every_decoded_matrix(decoder):
    graph = chain(conv(8), Node("conv", "b", (4, 6, 1, 1), Role.CONV))
    plain = tiny(decoder=decoder).predict(graph)
    begun = tiny(decoder=decoder, initialization="identity").predict(graph)
    for name, value in plain.items():
        added = (begun[name] - value) / weight_scale(tuple(value.shape))
        expected = 3 * torch.eye(*value.shape[:2])[..., None, None].expand(value.shape)
        np.testing.assert_allclose(added.detach(), expected, atol=1e-5)


@pytest.mark.parametrize("options", [GHNConfig, Recipe])
def test_unknown_options_are_errors(options):
    with pytest.raises(ValueError, match="stepz"):
        options(stepz=3)
