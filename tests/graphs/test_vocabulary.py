"""Graphs with registered primitives, against what can be read off the code of small networks."""

import pytest
import torch
import torch.nn.functional as F
from shared import Net, edges
from torch import nn

from ghnlib import Graph
from ghnlib.graphs.nodes import Role, as_planes
from ghnlib.graphs.vocabulary import EXTENDED, REGISTERED, register

TOKENS = torch.zeros(2, 5, dtype=torch.long)


def trace(net, *shape, primitives=EXTENDED):
    return Graph.from_module(net, example=TOKENS if not shape else torch.zeros(2, *shape), primitives=primitives)


def nodes(graph):
    return [(node.op, node.name, node.shape, node.role) for node in graph.nodes if node.name]


def test_a_network_of_signals_has_its_convolutions_in_order():
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.PReLU(8), nn.MaxPool1d(2), nn.Conv1d(8, 4, 5, groups=4, bias=False),
                        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))  # fmt: skip
    graph = trace(net, 2, 30)
    assert [node.op for node in graph.nodes] == [
        "input", "conv1d", "bias", "prelu", "max_pool", "conv1d", "glob_avg", "conv", "bias",
    ]  # fmt: skip
    assert nodes(graph)[:4] == [
        ("conv1d", "0.weight", (8, 2, 3), Role.CONV), ("bias", "0.bias", (8,), Role.BIAS),
        ("prelu", "1.weight", (8,), Role.SLOPE), ("conv1d", "3.weight", (4, 2, 5), Role.CONV),
    ]  # fmt: skip
    assert [role for *_, role in nodes(graph)[4:]] == [Role.CLASS_WEIGHT, Role.CLASS_BIAS] and not graph.skipped
    assert graph.edges.tolist() == [[i, i + 1] for i in range(8)]
    legend = [text.get_text() for text in graph.plot().get_legend().get_texts()]
    assert legend == ["max_pool", "conv", "input", "bias", "glob_avg", "conv1d", "prelu"]


def test_a_network_of_volumes_has_its_pools():
    net = nn.Sequential(nn.Conv3d(1, 4, (1, 3, 3)), nn.MaxPool3d(2), nn.AvgPool3d(2), nn.ConvTranspose3d(4, 2, 2))
    graph = trace(net, 1, 8, 10, 10)
    ops = ["input", "conv3d", "bias", "max_pool", "avg_pool", "conv_transpose", "bias"]
    assert [node.op for node in graph.nodes] == ops
    assert graph.nodes[3].shape == (1, 1, 2, 2, 2)
    assert nodes(graph)[2] == ("conv_transpose", "3.weight", (4, 2, 2, 2, 2), Role.TRANSPOSED)


def test_recurrent_layers_and_norms():
    net = Net(lambda m, x: m.fc(m.norm(m.rnn(m.words(x))[0])), words=nn.Embedding(9, 4), rnn=nn.GRU(4, 6, batch_first=True),
              norm=nn.RMSNorm(6), fc=nn.Linear(6, 9, bias=False))  # fmt: skip
    graph = trace(net)
    ops = ["input", "embedding", "recurrent", "recurrent", "bias", "bias", "ln", "conv"]
    assert [node.op for node in graph.nodes] == ops
    assert nodes(graph)[0] == ("embedding", "words.weight", (9, 4), Role.EMBEDDING)
    assert nodes(graph)[-1][-1] == Role.CLASS_WEIGHT


@pytest.mark.parametrize(("position", "read"), [
    (lambda m, x: m.at(torch.arange(x.shape[1])), False), (lambda m, x: m.at.weight[: x.shape[1]], False),
    (lambda m, x: m.at((x + 1)[:, :5] // 2), True), (lambda m, x: m.at.weight[x], True),
])  # fmt: skip
def test_only_tables_that_tokens_are_looked_up_in_hear_of_the_input(position, read):
    net = Net(lambda m, x: m.fc(m.words(x) + position(m, x)),
              words=nn.Embedding(9, 4), at=nn.Embedding(9, 4), fc=nn.Linear(4, 2))  # fmt: skip
    graph = trace(net)
    assert ("input", "words.weight") in edges(graph) and (("input", "at.weight") in edges(graph)) == read
    assert {("words.weight", "sum"), ("at.weight", "sum"), ("sum", "fc.weight")} <= edges(graph)


def by_hand(mask):
    def forward(m, x):
        scores = mask(m.q(x) @ m.k(x).transpose(1, 2))
        return scores.softmax(-1) @ m.v(x)

    return forward


TRIANGLE = torch.full((5, 5), -torch.inf).triu(1)


@pytest.mark.parametrize(("forward", "op"), [
    (by_hand(lambda s: s), "msa"), (by_hand(lambda s: s / 2), "msa"),
    (by_hand(lambda s: s.masked_fill(torch.ones(5, 5).triu(1).bool().to(s.device), -torch.inf)), "masked_msa"),
    (by_hand(lambda s: s + TRIANGLE.to(s.device)), "masked_msa"),
    (lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)), "msa"),
    (lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), is_causal=True), "masked_msa"),
    (lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), m.q(x)[..., :1]), "msa"),
    (lambda m, x: m.attention(x, x, x)[0], "msa"),
    (lambda m, x: m.attention(x, x, x, attn_mask=TRIANGLE)[0], "masked_msa"),
    (lambda m, x: m.attention(x, x, x, attn_mask=TRIANGLE, need_weights=False, is_causal=True)[0], "masked_msa"),
])  # fmt: skip
def test_attention_whose_scores_are_masked_is_told_from_others(forward, op):
    layers = {name: nn.Linear(4, 4) for name in "qkv"} | {"attention": nn.MultiheadAttention(4, 2, batch_first=True)}
    graph = trace(Net(forward, **layers), 5, 4)
    assert [node.op for node in graph.nodes if "msa" in node.op] == [op]
    papers = trace(Net(forward, **layers), 5, 4, primitives=())
    assert [node.op for node in papers.nodes if "msa" in node.op] == ["msa"]


def test_without_primitives_graphs_are_as_the_papers_have_them():
    net = Net(lambda m, x: m.fc(m.words(x)), words=nn.Embedding(9, 4), fc=nn.Linear(4, 2))
    graph = trace(net, primitives=())
    assert nodes(graph)[0] == ("pos_enc", "words.weight", (9, 4), Role.LINEAR)
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="0.weight: unsupported layer Conv3d"):
        graph = trace(net, 1, 2, 2, 2, primitives=())
    assert [node.op for node in graph.nodes] == ["input", "conv", "bias"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.offset, self.odd = (nn.Parameter(torch.ones(size)) for size in ((4, 3), (4,), (1, 1, 1)))

    def forward(self, x):
        return x @ self.kernel.T * self.odd + self.offset


@pytest.fixture
def scaled():
    """Registered for one test."""
    register("scaled", Scaled, role=Role.LINEAR, weights=("kernel",), biases=("offset",))
    yield ("scaled",)
    del REGISTERED["scaled"]


def test_an_own_layer_is_known_once_registered(scaled):
    net = nn.Sequential(Scaled(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="0.odd: unsupported parameter of Scaled"):
        graph = trace(net, 3, primitives=scaled)
    assert nodes(graph)[:2] == [("scaled", "0.kernel", (4, 3), Role.LINEAR), ("bias", "0.offset", (4,), Role.BIAS)]
    assert set(graph.skipped) == {"0.odd"}
    with pytest.warns(UserWarning, match="0.offset: unsupported layer Scaled"):
        unregistered = trace(net, 3)
    assert nodes(unregistered)[0] == ("conv", "0.kernel", (4, 3), Role.LINEAR)  # by its use in a matrix product
    assert set(unregistered.skipped) == {"0.offset", "0.odd"}
    with pytest.raises(ValueError, match="'scaled' exists"):
        register("scaled", Scaled, role=Role.LINEAR)


@pytest.mark.parametrize(("arguments", "role", "said"), [
    (("conv", Scaled), Role.LINEAR, "'conv' exists"), (("new",), Role.LINEAR, "0 layers"),
    (("new", Scaled), Role.CLASS_WEIGHT, "one of Role.CONV"),
])  # fmt: skip
def test_impossible_registrations_are_errors(arguments, role, said):
    with pytest.raises(ValueError, match=said):
        register(*arguments, role=role)


def test_an_unregistered_primitive_is_an_error():
    with pytest.raises(ValueError, match="'conv4d' is not registered.*conv1d"):
        trace(nn.Sequential(nn.Conv1d(1, 1, 1)), 1, 3, primitives=("conv4d",))


@pytest.mark.parametrize(("role", "shape", "planes"), [
    (Role.CONV, (8, 4, 3, 5), (8, 4, 3, 5)), (Role.CONV, (8, 4, 5), (8, 4, 1, 5)),
    (Role.CONV, (8, 4, 2, 3, 5), (8, 4, 6, 5)), (Role.TRANSPOSED, (8, 4, 5), (4, 8, 1, 5)),
    (Role.TRANSPOSED, (8, 4, 2, 3, 5), (4, 8, 6, 5)), (Role.LINEAR, (8, 4), (8, 4)), (Role.POSITION, (1, 5, 4), (1, 5, 4)),
])  # fmt: skip
def test_convolutions_are_read_as_those_of_planes(role, shape, planes):
    assert as_planes(role, shape) == planes
