"""Language models: their graphs as they read from the code, and that no place sees what comes after it."""

import pytest
import torch

from ghnlib.architectures.language import LanguageModel
from ghnlib.graphs.nodes import Role

LAYERS = ["ln", *["conv", "bias"] * 3, "masked_msa", "conv", "bias", "sum", "ln", *["conv", "bias"] * 2, "sum"]
"""Of a block: norm, query, key, value, attention, out, sum, norm, two layers, sum."""
INNER = {(0, 1), (0, 3), (0, 5), (1, 2), (2, 7), (3, 4), (4, 7), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11),
         (11, 12), (12, 13), (13, 14), (14, 15), (15, 16), (10, 16)}  # fmt: skip


def test_the_graph_is_that_of_the_code():
    graph = LanguageModel(28, 16, layers=2, width=8).graph
    ops = [node.op for node in graph.nodes]
    assert ops == ["input", "embedding", "embedding", "sum", *LAYERS, *LAYERS, "ln", "conv"]
    first, second = 4, 4 + len(LAYERS)
    expected = {(0, 1), (1, 3), (2, 3), (second + 16, second + 17), (second + 17, second + 18)}
    for start in (first, second):  # what flows into a block goes to its norm and around its attention
        expected |= {(start + a, start + b) for a, b in INNER} | {(start - 1, start), (start - 1, start + 10)}
    assert set(map(tuple, graph.edges.tolist())) == expected
    roles = {node.name: (node.role, node.shape) for node in graph.nodes}
    assert roles["tokens.weight"] == (Role.EMBEDDING, (28, 8))
    assert roles["positions.weight"] == (Role.EMBEDDING, (16, 8))
    assert roles["blocks.1.key.weight"] == (Role.LINEAR, (8, 8)) and roles["norm.weight"] == (Role.NORM, (8,))
    assert roles["blocks.0.feed_forward.0.weight"] == (Role.LINEAR, (32, 8))
    assert roles["head.weight"] == (Role.CLASS_WEIGHT, (28, 8)) and not graph.skipped


def test_a_tied_head_is_the_table_of_tokens():
    model = LanguageModel(28, 16, tied=True)
    with pytest.warns(UserWarning, match="ties 1 weights"):
        graph = model.graph
    assert graph.skipped == {"head.weight": "tied to tokens.weight"} and graph.nodes[-1].name == "norm.weight"
    net = model.build("cpu")
    assert net.head.weight is net.tokens.weight


def test_no_place_sees_what_comes_after_it():
    torch.manual_seed(0)
    net, tokens = LanguageModel(9, 6).build("cpu"), torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = tokens.clone()
    changed[0, 3] = 8
    a, b = net(tokens), net(changed)
    assert a.shape == (1, 9, 6)
    assert torch.allclose(a[..., :3], b[..., :3], atol=1e-6) and not torch.allclose(a[..., 4], b[..., 4], atol=1e-3)
