"""Graphs of real networks against known ones, and of small networks against what can be read off their code."""

import gzip
import json
import random
import warnings
from collections import Counter
from contextlib import nullcontext

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from shared import Net, edges, names
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghnlib import Graph
from ghnlib.architectures.vision import NamedNetwork, WeightsOnMeta
from ghnlib.graphs.nodes import Role
from ghnlib.graphs.parameters import CONVENTIONS
from ghnlib.graphs.recording import TraceError, kind_of, recorded_steps

REFERENCE_GRAPHS = (
    "convnext_tiny", "densenet121", "mobilenet_v3_small", "resnet18", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16",
)  # fmt: skip
SMALL = (3, 32, 32)
trace = Graph.from_module
PARAMETRIC = {"conv", "sep_conv", "dil_conv", "bias", "bn", "ln", "pos_enc"}


def torchvision_model(name: str, training: bool = False) -> nn.Module:
    with WeightsOnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name).train(training)


def ops(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


def role_of(graph: Graph, name: str) -> Role:
    return next(node.role for node in graph.nodes if node.name == name)


# --- known graphs ----------------------------------------------------------------------------------------------------

MEASURED = {  # nodes, edges, composition measured with the released code of GHN-3 (every graph has one input besides)
    "alexnet": (21, 20, "conv 8, bias 8, max_pool 3, glob_avg 1"),
    "vgg11_bn": (37, 36, "conv 11, bias 11, bn 8, max_pool 5, glob_avg 1"),
    "vgg16": (39, 38, "conv 16, bias 16, max_pool 5, glob_avg 1"),
    "squeezenet1_1": (65, 72, "conv 26, bias 26, max_pool 3, concat 8, glob_avg 1"),
    "resnet18": (53, 60, "conv 21, bn 20, sum 8, max_pool 1, glob_avg 1, bias 1"),
    "resnet50": (127, 142, "conv 54, bn 53, sum 16, max_pool 1, glob_avg 1, bias 1"),
    "resnet101": (246, 278, "conv 105, bn 104, sum 33, max_pool 1, glob_avg 1, bias 1"),
    "resnext50_32x4d": (127, 142, "conv 38, sep_conv 16, bn 53, sum 16, max_pool 1, glob_avg 1, bias 1"),
    "densenet121": (307, 841, "conv 121, bn 121, concat 58, avg_pool 3, max_pool 1, glob_avg 1, bias 1"),
    "googlenet": (140, 166, "conv 58, bn 57, max_pool 13, concat 9, glob_avg 1, bias 1"),
    "inception_v3": (220, 254, "conv 95, bn 94, concat 15, avg_pool 9, max_pool 4, glob_avg 1, bias 1"),
    "mobilenet_v2": (118, 127, "conv 36, sep_conv 17, bn 52, sum 10, glob_avg 1, bias 1"),
    "mobilenet_v3_small": (125, 139, "conv 43, sep_conv 11, bn 34, bias 20, cse 9, sum 6, glob_avg 1"),
    "mnasnet0_5": (118, 127, "conv 36, sep_conv 17, bn 52, sum 10, glob_avg 1, bias 1"),
    "shufflenet_v2_x1_0": (133, 148, "conv 38, sep_conv 19, bn 56, concat 16, max_pool 1, glob_avg 1, bias 1"),
    "efficientnet_b0": (191, 215, "conv 66, sep_conv 16, bn 49, bias 33, cse 16, sum 9, glob_avg 1"),
    "regnet_y_400mf": (206, 237, "conv 70, sep_conv 16, bn 53, bias 33, cse 16, sum 16, glob_avg 1"),
    "vit_b_16": (164, 187, "conv 50, bias 50, ln 25, sum 25, msa 12, pos_enc 1"),
    "swin_t": (170, 193, "conv 53, bias 50, ln 29, sum 24, msa 12, glob_avg 1"),
    "convnext_tiny": (161, 178, "conv 41, sep_conv 18, bias 59, ln 23, sum 18, glob_avg 1"),
}
MEASURED_SLOW = {
    "resnet152": (365, 414, "conv 156, bn 155, sum 50, max_pool 1, glob_avg 1, bias 1"),
    "wide_resnet50_2": (127, 142, "conv 54, bn 53, sum 16, max_pool 1, glob_avg 1, bias 1"),
    "efficientnet_v2_s": (409, 473, "conv 141, sep_conv 30, bn 110, bias 61, cse 30, sum 35, glob_avg 1"),
    "swin_b": (326, 373, "conv 101, bias 98, ln 53, sum 48, msa 24, glob_avg 1"),
    "convnext_base": (305, 340, "conv 77, sep_conv 36, bias 113, ln 41, sum 36, glob_avg 1"),
}


def composition(text: str) -> dict[str, int]:
    return {"input": 1} | {op: int(count) for op, count in (part.split() for part in text.split(", "))}


def assert_measured(name: str, expected: tuple[int, int, str], training: bool) -> None:
    net = torchvision_model(name, training)
    for convention in ("correct", "ghn3"):
        graph = trace(net, convention=convention)
        assert (len(graph), len(graph.edges), ops(graph)) == (*expected[:2], composition(expected[2]))


@pytest.mark.parametrize("name", MEASURED)
def test_known_networks_have_the_published_structure(name):
    assert_measured(name, MEASURED[name], training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED_SLOW)
def test_large_networks_have_the_published_structure(name):
    assert_measured(name, MEASURED_SLOW[name], training=False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "swin_t"])
def test_training_mode_changes_nothing_without_auxiliary_heads(name):
    assert_measured(name, MEASURED[name], training=True)


def test_auxiliary_heads_are_traced_in_training_mode_only():
    net = torchvision_model("googlenet", training=True)
    graph = trace(net)
    assert (len(graph), len(graph.edges), ops(graph)["glob_avg"], graph.skipped) == (154, 180, 3, {})
    assert [node.role for node in graph.nodes[-2:]] == [Role.CLASS_WEIGHT, Role.CLASS_BIAS]
    assert graph.nodes[-1].name == "fc.bias"
    skipped = trace(net.eval()).skipped
    assert "runs in training mode only" in skipped["aux1.fc2.weight"] and "net.train()" in skipped["aux1.fc2.weight"]


def labelled(rows) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from((i, {"label": row}) for i, row in enumerate(rows))
    return graph


def reference_row(node: dict) -> tuple:
    name = node["raw"] if node["op"] in PARAMETRIC else ""
    return node["op"], name.removesuffix(".weight"), tuple(node["sz"] or ())


def row(node) -> tuple:
    """As the reference files have it: shapes of positions and of SqueezeNet's classifier as they are encoded."""
    shape = node.shape or ()
    if node.op == "pos_enc":
        side = int((shape[1]) ** 0.5)
        shape = (1, shape[2], side, side)
    if node.role is Role.CLASS_WEIGHT:
        shape = shape[:2]
    return node.op, node.name.removesuffix(".weight"), shape


@pytest.mark.reference
@pytest.mark.parametrize("name", REFERENCE_GRAPHS)
def test_graphs_equal_those_of_the_released_code(reference, name):
    known = json.loads(gzip.decompress((reference / "graphs" / f"{name}.json.gz").read_bytes()))
    graph = trace(torchvision_model(name), convention="ghn3")
    theirs = labelled(reference_row(node) for node in known["nodes"])
    theirs.add_edges_from(map(tuple, known["edges_1hop"]))
    ours = labelled(row(node) for node in graph.nodes)
    ours.add_edges_from(graph.edges.tolist())
    assert nx.is_isomorphic(theirs, ours, node_match=lambda a, b: a["label"] == b["label"])
    distances = np.where(graph.distances > 50, 0, graph.distances)
    histogram = {int(k): v for k, v in Counter(distances.ravel().tolist()).items()}
    assert histogram == {int(k): v for k, v in known["dist_hist"].items()}
    flags = {i: (weight, bias) for cell in known["node_info"] for i, *_, weight, bias in cell if weight or bias}
    roles = {i: (node.role is Role.CLASS_WEIGHT, node.role is Role.CLASS_BIAS) for i, node in enumerate(graph.nodes)}
    assert flags == {i: role for i, role in roles.items() if any(role)}


@pytest.mark.reference
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "squeezenet1_1", "vgg11_bn"])
def test_ppuda_graphs_have_a_node_for_all_that_its_code_predicts(reference, name):
    path = reference / "predictions" / f"ghn2_tiny.via_ppuda__{name}.json.gz"
    known = json.loads(gzip.decompress(path.read_bytes()))
    graph = trace(torchvision_model(name), convention="ppuda")
    predicted = {node.name for node in graph.nodes} | {node.norm_bias for node in graph.nodes}
    assert predicted - {""} == {row["name"] for row in known["params"]}
    related = (graph.distances > 0) & (graph.distances <= 50)
    assert (len(graph), related.sum()) == (known["n_nodes"], known["n_edges"])


# --- structure, read off the code ------------------------------------------------------------------------------------


def test_layers_chain_weight_then_bias_and_norms_are_one_node():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))
    graph = trace(net, SMALL)
    assert names(graph) == ["input", "0.weight", "0.bias", "1.weight", "4.weight", "4.bias"]
    assert graph.edges.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert graph.nodes[3].norm_bias == "1.bias"
    assert [node.role for node in graph.nodes[1:]] == [
        Role.CONV, Role.BIAS, Role.NORM, Role.CLASS_WEIGHT, Role.CLASS_BIAS,
    ]  # fmt: skip
    assert [node.shape for node in graph.nodes] == [None, (4, 3, 3, 3), (4,), (4,), (5, 3600), (5,)]


def test_linear_layers_without_bias_stand_between_producer_and_consumer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8, bias=False), nn.GELU(), nn.Linear(8, 5, bias=False))
    graph = trace(net, SMALL)
    assert names(graph) == ["input", "1.weight", "3.weight"]
    assert graph.edges.tolist() == [[0, 1], [1, 2]]
    assert role_of(graph, "3.weight") is Role.CLASS_WEIGHT


@pytest.mark.parametrize("spatial", [False, True])
def test_a_bias_added_apart_from_its_weight_still_follows_it(spatial):
    net = Net(lambda m, x: F.linear(x, m.fc.weight) + m.fc.bias, fc=nn.Linear(32, 7))
    assert ("fc.weight", "fc.bias") in edges(trace(net, SMALL if spatial else (32,)))


def test_sums_and_concatenations_need_two_producers():
    def forward(m, x):
        y = m.stem(x)
        y = y + F.relu(y)  # both from the stem: nothing is joined
        left, right = m.left(y), m.right(y)
        return torch.cat([left + right, left], 1)

    layers = {name: nn.Conv2d(3 if name == "stem" else 4, 4, 1, bias=False) for name in ("stem", "left", "right")}
    graph = trace(Net(forward, **layers), SMALL)
    assert edges(graph) == {
        ("input", "stem.weight"), ("stem.weight", "left.weight"), ("stem.weight", "right.weight"),
        ("left.weight", "sum"), ("right.weight", "sum"), ("sum", "concat"), ("left.weight", "concat"),
    }  # fmt: skip


def test_pooling_keeps_its_kernel_and_global_pooling_has_no_shape():
    pools = nn.Sequential(nn.MaxPool2d((3, 2)), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), *pools, nn.Linear(4, 2)), SMALL)
    shapes = {node.op: node.shape for node in graph.nodes if "pool" in node.op or node.op == "glob_avg"}
    assert shapes == {"max_pool": (1, 1, 3, 2), "avg_pool": (1, 1, 2, 2), "glob_avg": None}


@pytest.mark.parametrize(
    ("groups", "dilation", "op"), [(1, 1, "conv"), (1, 2, "conv"), (3, 1, "sep_conv"), (3, 2, "dil_conv")]
)
def test_convolutions_are_named_by_groups_then_dilation(groups, dilation, op):
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups, dilation=dilation), nn.BatchNorm2d(6)), SMALL)
    assert graph.nodes[1].op == op


def squeeze(m, x, gate_first):
    pooled = m.fc2(F.relu(m.fc1(x.mean((2, 3)))))
    gate = torch.sigmoid(pooled)[:, :, None, None]
    return gate * x if gate_first else x * gate.expand_as(x)


@pytest.mark.parametrize("size", [32, 1])
@pytest.mark.parametrize("gate_first", [False, True])
def test_squeeze_and_excitation_is_found_by_its_structure(gate_first, size):
    net = Net(
        lambda m, x: m.head(squeeze(m, m.stem(x), gate_first).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 1, bias=False), fc1=nn.Linear(8, 4), fc2=nn.Linear(4, 8), head=nn.Linear(8, 2),
    )  # fmt: skip
    graph = trace(net, (3, size, size))
    expected = {("stem.weight", "fc1.weight"), ("fc2.bias", "cse"), ("stem.weight", "cse"), ("cse", "glob_avg")}
    assert expected <= edges(graph)
    assert (ops(graph)["glob_avg"], ops(graph)["cse"]) == (1, 1)


def test_a_product_of_two_branches_is_contracted():
    layers = {name: nn.Conv2d(3, 3, 1, bias=False) for name in ("a", "b", "out")}
    net = Net(lambda m, x: m.out(m.a(x) * m.b(x)), **layers)
    assert edges(trace(net, SMALL)) == {
        ("input", "a.weight"), ("input", "b.weight"), ("a.weight", "out.weight"), ("b.weight", "out.weight"),
    }  # fmt: skip


def attention(m, x, fused):
    q, k, v = (layer(x.flatten(2).transpose(1, 2)) for layer in (m.q, m.k, m.v))
    if fused:
        return m.out(F.scaled_dot_product_attention(q, k, v))
    scores = torch.einsum("bnc,bmc->bnm", q, k) / 2
    return m.out(F.dropout(scores.softmax(-1), 0.1) @ v)


@pytest.mark.parametrize("fused", [False, True])
def test_query_key_and_value_flow_into_one_attention_node(fused):
    sizes = {"q": (3, 4), "k": (3, 4), "v": (3, 4), "out": (4, 5)}
    net = Net(lambda m, x: attention(m, x, fused), **{k: nn.Linear(*size, bias=False) for k, size in sizes.items()})
    assert edges(trace(net, SMALL)) == {
        ("input", "q.weight"), ("input", "k.weight"), ("input", "v.weight"), ("q.weight", "msa"),
        ("k.weight", "msa"), ("v.weight", "msa"), ("msa", "out.weight"),
    }  # fmt: skip


def test_blended_attention_maps_are_one_node():
    def forward(m, x):
        content, position = ((layer(x) @ x.transpose(1, 2)).softmax(-1) for layer in (m.content, m.position))
        blend = 0.7 * content + 0.3 * position  # as in ConViT
        return m.out(blend / blend.sum(-1, keepdim=True) @ m.v(x))

    net = Net(forward, **{name: nn.Linear(4, 4, bias=False) for name in ("content", "position", "v", "out")})
    assert edges(trace(net, (5, 4))) == {
        *(("input", f"{name}.weight") for name in ("content", "position", "v")), ("input", "msa"),
        *((f"{name}.weight", "msa") for name in ("content", "position", "v")), ("msa", "out.weight"),
    }  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_attention_is_the_same_with_and_without_the_fused_kernel(need_weights):
    def forward(m, x):
        tokens = x.flatten(2).transpose(1, 2)
        return m.attention(tokens, tokens, tokens, need_weights=need_weights)[0]

    net = Net(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    for module in (net, net.eval()):
        suffixes = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
        expected = [f"attention.{suffix}" for suffix in suffixes]
        assert names(trace(module, (4, 8, 8)))[1:] == [*expected[:2], "msa", *expected[2:]]


def test_cross_attention_shares_one_projection_node():
    def forward(m, x):
        left, right = m.left(x), m.right(x)
        return m.attention(left, right, right)[0]

    layers = {"left": nn.Linear(8, 8, bias=False), "right": nn.Linear(8, 8, bias=False)}
    net = Net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True), **layers)
    found = edges(trace(net, (5, 8)))
    assert {("left.weight", "attention.in_proj_weight"), ("right.weight", "attention.in_proj_weight")} <= found
    assert ("attention.in_proj_bias", "msa") in found


def test_a_softmax_over_classes_is_no_attention():
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Softmax(1)), SMALL)
    assert names(graph) == ["input", "1.weight", "1.bias"]
    assert graph.nodes[-1].role is Role.CLASS_BIAS


class PosEnc(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 4, 11, 11))

    def forward(self, x):
        return x + self.weight


def test_positional_encodings_are_sources_and_their_addition_a_sum():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3, padding=1), PosEnc(), nn.Conv2d(4, 2, 1))
    for convention in CONVENTIONS:
        graph = trace(net, SMALL, convention)
        assert role_of(graph, "1.weight") is Role.POSITION
        assert {("0.bias", "sum"), ("1.weight", "sum"), ("sum", "2.weight")} <= edges(graph)
        assert not any(target == "1.weight" for _, target in edges(graph))


def test_the_vision_transformer_keeps_its_names():
    graph = trace(torchvision_model("vit_b_16"))
    assert role_of(graph, "encoder.pos_embedding") is Role.POSITION
    assert {("conv_proj.bias", "sum"), ("encoder.pos_embedding", "sum")} <= edges(graph)
    assert graph.skipped == {"class_token": "class token"}


def test_embeddings_are_positional_encodings_of_linear_shape():
    def forward(m, x):
        tokens = m.proj(x).flatten(2).transpose(1, 2)
        return m.head(tokens + m.positions(torch.arange(64)))

    net = Net(forward, proj=nn.Conv2d(3, 8, 4, 4), positions=nn.Embedding(64, 8), head=nn.Linear(8, 2))
    graph = trace(net, SMALL)
    assert next(node for node in graph.nodes if node.name == "positions.weight")[0:4:3] == ("pos_enc", Role.LINEAR)
    assert {("positions.weight", "sum"), ("proj.bias", "sum")} <= edges(graph)


def test_an_embedding_may_be_all_there_is():
    net = Net(lambda m, x: m.words(x.long()), words=nn.Embedding(10, 4))
    assert names(trace(net, (6,))) == ["input", "words.weight"]


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
@pytest.mark.filterwarnings("ignore:.*are no nodes")
def test_other_norms_have_nodes_in_the_correct_graph_only(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layer)
    assert names(trace(net.eval(), SMALL)) == ["input", "0.weight", "1.weight"]
    assert trace(net, SMALL).nodes[2].op == "ln"
    released = trace(net, SMALL, "ghn3")
    assert names(released) == ["input", "0.weight"]
    assert set(released.skipped) == {"1.weight", "1.bias"}


def test_norms_written_by_hand_are_one_node_and_no_pooling():
    class ChannelNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            centred = x - x.mean(1, keepdim=True)
            scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
            return self.weight[:, None, None] * scaled + self.bias[:, None, None]

    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), ChannelNorm(), nn.Conv2d(4, 2, 1, bias=False)), SMALL)
    assert names(graph) == ["input", "0.weight", "1.weight", "2.weight"]
    assert (graph.nodes[2].op, graph.nodes[2].norm_bias) == ("ln", "1.bias")


class Functional(nn.Module):
    """Parameters of its own in calls of ``torch.nn.functional``."""

    def __init__(self):
        super().__init__()
        self.k, self.b = nn.Parameter(torch.ones(4, 3, 2, 2)), nn.Parameter(torch.ones(4))
        self.grouped = nn.ParameterList([nn.Parameter(torch.ones(4, 1, 3, 3))])
        self.g, self.o, self.s = (nn.Parameter(torch.ones(4)) for _ in range(3))
        self.place = nn.Parameter(torch.ones(1, 16, 4))
        self.heads = nn.ParameterDict({"w": nn.Parameter(torch.ones(5, 4)), "b": nn.Parameter(torch.ones(5))})

    def forward(self, x):
        x = F.batch_norm(F.conv2d(x, self.k, self.b, 2), None, None, self.g, self.o, True)
        centred = self.grouped[0] - self.grouped[0].mean((1, 2, 3), keepdim=True)  # a standardised weight
        x = F.conv2d(x, centred, padding=1, groups=4).flatten(2).mT + self.place
        return F.linear(F.layer_norm(x, (4,), self.s).mean(1), self.heads["w"], self.heads["b"])


@pytest.mark.parametrize("on_meta", [True, False])
def test_parameters_of_functional_calls_are_what_they_are_used_as(on_meta, recwarn):
    net = Functional()
    if not on_meta:  # the functions of torch themselves, which tracing on the meta device does not run
        net.register_forward_pre_hook(lambda module, inputs: float(inputs[0].sum()) and None)
    graph = trace(net, (3, 8, 8))
    assert not graph.skipped and bool(recwarn.list) is not on_meta
    assert [(node.op, node.name, node.role, node.norm_bias) for node in graph.nodes if node.name] == [
        ("conv", "k", Role.CONV, ""), ("bias", "b", Role.BIAS, ""), ("bn", "g", Role.NORM, "o"),
        ("sep_conv", "grouped.0", Role.CONV, ""), ("pos_enc", "place", Role.POSITION, ""), ("ln", "s", Role.NORM, ""),
        ("conv", "heads.w", Role.CLASS_WEIGHT, ""), ("bias", "heads.b", Role.CLASS_BIAS, ""),
    ]  # fmt: skip
    assert {("grouped.0", "sum"), ("place", "sum"), ("glob_avg", "heads.w")} <= set(edges(graph))
    assert set(names(trace(Functional(), (3, 8, 8), "ghn3"))) == {"input", "glob_avg"}


PRODUCTS = {
    "x @ w + b": lambda x, w, b: x @ w + b,
    "b + w @ x": lambda x, w, b: (b[:, None] + w @ x.mT).mT,
    "einsum": lambda x, w, b: torch.einsum("bnd,de->bne", x, w) + b,
    "einsum, out by in": lambda x, w, b: torch.einsum("bnd,ed->bne", x, w) + b,
    "tensordot": lambda x, w, b: torch.tensordot(x, w, 1) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x[:, 0], w)[:, None],
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1)),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_matrices_that_data_are_multiplied_with_are_linear_layers(product, recwarn):
    sides = (6, 4) if product in ("b + w @ x", "einsum, out by in") else (4, 6)
    net = Net(lambda m, x: m.fc(PRODUCTS[product](m.conv(x).flatten(2).mT, m.w, m.b).relu().mean(1)),
              conv=nn.Conv2d(3, 4, 4, 4), w=nn.Parameter(torch.ones(sides)), b=nn.Parameter(torch.ones(6)),
              fc=nn.Linear(6, 2))  # fmt: skip
    graph = trace(net, SMALL)
    known = {node.name: (node.op, node.role, node.shape) for node in graph.nodes if node.name in ("w", "b")}
    bias = {} if product == "b + w @ x" else {"b": ("bias", Role.BIAS, (6,))}  # a column: not what a layer adds
    assert known == {"w": ("conv", Role.LINEAR, sides)} | bias
    assert set(graph.skipped) == {"b"} - set(bias)


def test_products_of_parameters_alone_and_with_parts_of_one_are_no_layers():
    net = Net(lambda m, x: m.conv(x).mean((2, 3)) @ m.down @ m.table[:3] @ (m.a @ m.b), conv=nn.Conv2d(3, 4, 1),
              down=nn.Parameter(torch.ones(4, 3)), table=nn.Parameter(torch.ones(5, 4)),
              a=nn.Parameter(torch.ones(4, 2)), b=nn.Parameter(torch.ones(2, 7)))  # fmt: skip
    with pytest.warns(UserWarning, match="3 parameters are no nodes"):
        graph = trace(net, SMALL)
    assert names(graph) == ["input", "conv.weight", "conv.bias", "glob_avg", "down"]
    assert set(graph.skipped) == {"table", "a", "b"}


@pytest.mark.parametrize("use", [
    lambda x, p: x * p[:, None, None], lambda x, p: F.conv2d(x, p.view(3, 1, 1, 1).expand(3, 3, 1, 1)),
    lambda x, p: F.conv_transpose2d(x, p.view(3, 1, 1, 1).expand(3, 3, 1, 1)), lambda x, p: x + p[:, None, None],
])  # fmt: skip
def test_parameters_in_other_uses_have_no_nodes(use):
    net = Net(lambda m, x: use(m.conv(x), m.p), conv=nn.Conv2d(3, 3, 1), p=nn.Parameter(torch.ones(3)))
    with pytest.warns(UserWarning, match="1 parameters are no nodes"):
        assert trace(net, SMALL).skipped == {"p": "unsupported layer Net"}


def test_what_has_no_node_is_listed_with_its_reason():
    net = Net(lambda m, x: m.line(m.conv(m.gamma * m.up(x)).flatten(2)),
              up=nn.ConvTranspose2d(3, 3, 2), line=nn.Conv1d(3, 3, 1), unused=nn.Linear(2, 2),
              gamma=nn.Parameter(torch.ones(3, 1, 1)), conv=nn.Conv2d(3, 3, 1))  # fmt: skip
    graph = trace(net, SMALL)
    assert names(graph) == ["input", "conv.weight", "conv.bias"]
    assert graph.skipped == {
        "gamma": "layer scale",
        **dict.fromkeys(("up.weight", "up.bias"), "unsupported layer ConvTranspose2d"),
        **dict.fromkeys(("line.weight", "line.bias"), "unsupported layer Conv1d"),
        **dict.fromkeys(("unused.weight", "unused.bias"), "not used in the forward pass"),
    }


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "convnext_tiny", "vit_b_16"])
def test_every_parameter_is_a_node_a_norm_bias_or_skipped(name):
    net = torchvision_model(name)
    assert_sound(net, trace(net))


@pytest.mark.parametrize("name", ["cls", "cls_token_1", "register_tokens", "dist_token", "distillation_token"])
def test_tokens_beside_the_image_are_named_as_such_without_a_warning(name, recwarn):
    net = Net(lambda m, x: m.fc(torch.cat([getattr(m, name).expand(len(x), -1, -1), m.conv(x).flatten(2).mT], 1)),
              conv=nn.Conv2d(3, 4, 8, 8), fc=nn.Linear(4, 2), **{name: nn.Parameter(torch.zeros(1, 1, 4))})  # fmt: skip
    assert trace(net, SMALL).skipped == {name: "class token"} and not recwarn.list


def test_layers_on_constants_hang_on_the_input():
    net = Net(
        lambda m, x: m.conv(x) * torch.sigmoid(m.fc(torch.ones(4)))[0], conv=nn.Conv2d(3, 2, 1), fc=nn.Linear(4, 1)
    )
    assert ("input", "fc.weight") in edges(trace(net, SMALL))


def test_tied_weights_are_one_node_with_a_warning():
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    net[2].bias = net[0].bias
    with pytest.warns(UserWarning, match="ties") as caught:
        graph = trace(net, SMALL)
    assert {warning.filename for warning in caught} == {__file__}
    assert names(graph).count("0.bias") == 1
    assert graph.skipped["2.bias"] == "tied to 0.bias"


def test_a_tied_parameter_goes_by_a_name_under_which_its_layer_is_known():
    net = Net(lambda m, x: m.fc(x), table=nn.Parameter(torch.ones(2, 4)), fc=nn.Linear(4, 2))
    net.fc.weight = net.table
    with pytest.warns(UserWarning, match=r"fc\.weight = table"):
        graph = trace(net, (4,))
    assert names(graph) == ["input", "fc.weight", "fc.bias"] and graph.skipped == {"table": "tied to fc.weight"}


def test_a_layer_applied_twice_stands_at_its_first_use():
    net = Net(lambda m, x: m.head(m.conv(m.conv(x))), conv=nn.Conv2d(3, 3, 1), head=nn.Conv2d(3, 2, 1))
    with pytest.warns(UserWarning, match=r"conv\.weight repeatedly"):
        graph = trace(net, SMALL)
    assert names(graph) == ["input", "conv.weight", "conv.bias", "head.weight", "head.bias"]


def test_pooling_after_the_classifier_leaves_it_the_classifier():
    graph = trace(torchvision_model("squeezenet1_1"))
    assert names(graph)[-3:] == ["classifier.1.weight", "classifier.1.bias", "glob_avg"]
    assert role_of(graph, "classifier.1.weight") is Role.CLASS_WEIGHT


@pytest.mark.parametrize(
    ("join", "role"),
    [(torch.add, Role.CLASS_WEIGHT), (torch.mul, Role.LINEAR), (lambda a, b: torch.cat([a, b], 1), Role.LINEAR)],
)
def test_two_classifiers_are_both_if_they_are_added(join, role):
    net = Net(lambda m, x: join(m.head(x), m.distilled(x)) / 2, head=nn.Linear(32, 2), distilled=nn.Linear(32, 2))
    graph = trace(net, (32,))
    assert {role_of(graph, f"{name}.weight") for name in ("head", "distilled")} == {role}
    assert (role_of(graph, "head.bias") is Role.CLASS_BIAS) == (role is Role.CLASS_WEIGHT)


def test_a_sum_of_features_is_no_classifier():
    net = Net(lambda m, x: m.conv(x) + m.norm(x), conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    assert role_of(trace(net, SMALL), "conv.weight") is Role.CONV


def test_a_classifier_computed_early_still_comes_last():
    net = Net(lambda m, x: (m.head(x), m.other(x)), head=nn.Linear(32, 2), other=nn.Linear(32, 3))
    graph = trace(net, SMALL)
    assert names(graph)[-2:] == ["head.weight", "head.bias"]
    assert role_of(graph, "other.weight") is Role.LINEAR


# --- conventions -----------------------------------------------------------------------------------------------------


def test_ghn3_pools_squeezenet_before_its_classifier():
    graph = trace(torchvision_model("squeezenet1_1"), convention="ghn3")
    assert names(graph)[-3:] == ["glob_avg", "classifier.1.weight", "classifier.1.bias"]
    assert graph.edges[-2:].tolist() == [[62, 63], [63, 64]]


class Logits(nn.Module):
    """A network in a wrapper of somebody's own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"logits": self.net(x)}


def derived(net):
    net.__class__ = type("Derived", (torchvision.models.SqueezeNet,), {})
    return net


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, Logits, derived])
def test_networks_are_known_within_others_and_when_derived_from(wrap):
    net = torchvision_model("squeezenet1_1")
    expected = trace(net, convention="ghn3")
    graph = trace(wrap(net), convention="ghn3")
    assert [(n.op, n.role) for n in graph.nodes] == [(n.op, n.role) for n in expected.nodes]
    assert np.array_equal(graph.edges, expected.edges)


def test_ghn3_leaves_a_replaced_head_of_squeezenet():
    net = torchvision_model("squeezenet1_1")
    net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))
    assert names(trace(net, convention="ghn3"))[-3:] == ["glob_avg", "classifier.2.weight", "classifier.2.bias"]


def test_ppuda_sees_no_class_layer_in_squeezenet():
    graph = trace(torchvision_model("squeezenet1_1"), convention="ppuda")
    assert {Role.CLASS_WEIGHT, Role.CLASS_BIAS}.isdisjoint(node.role for node in graph.nodes)


def test_ppuda_takes_pooling_for_squeeze_and_excitation():
    graph = trace(torchvision_model("mobilenet_v3_small"), convention="ppuda")
    assert (len(graph), len(graph.edges), ops(graph)["glob_avg"], ops(graph).get("cse", 0)) == (125, 139, 10, 0)


def test_ppuda_sees_a_hard_gate_behind_a_reshape():
    def forward(m, x):
        y = m.stem(x)
        return m.head(y * F.hardswish(m.fc(y.mean((2, 3))))[:, :, None, None])

    net = Net(forward, stem=nn.Conv2d(3, 8, 1), fc=nn.Linear(8, 8), head=nn.Conv2d(8, 2, 1))
    assert ops(trace(net, SMALL, "ppuda"))["cse"] == 1


def test_ppuda_traces_the_first_output_only():
    graph = trace(torchvision_model("googlenet", training=True), convention="ppuda")
    assert (len(graph), len(graph.edges)) == (140, 166)
    assert graph.skipped["aux2.fc2.bias"] == "not used for the first output, and the convention has no other"


@pytest.mark.parametrize(("name", "convention"), [("maxvit_t", "ghn3"), ("swin_v2_t", "ghn3"), ("vit_b_16", "ppuda")])
def test_where_the_released_code_fails_the_graph_is_the_correct_one(name, convention):
    net = torchvision_model(name)
    with pytest.warns(UserWarning, match="correct graph") as caught:
        graph = trace(net, convention=convention)
    assert {warning.filename for warning in caught} == {__file__}
    assert names(graph) == names(trace(net))


def test_released_flags_need_weight_and_bias_at_the_end():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    assert role_of(trace(net, SMALL), "2.weight") is Role.CLASS_WEIGHT
    assert role_of(trace(net, SMALL, "ghn3"), "2.weight") is Role.CONV


def test_released_flags_are_by_position_on_the_correct_graph_too():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 32**2, 4, bias=False))
    assert role_of(trace(net, SMALL), "3.weight") is Role.CLASS_WEIGHT
    with pytest.warns(UserWarning, match="correct graph"):
        assert role_of(trace(net, SMALL, "ghn3"), "3.weight") is Role.LINEAR


# --- the caller's state ----------------------------------------------------------------------------------------------


def test_tracing_leaves_no_trace():
    calls = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(3600, 2)).train()
    net[0].weight.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: calls.append("hook"))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[1].eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trace(net, SMALL)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net] == [True, False, True, True, True]
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, *[True] * 5]
    assert net[0].weight.grad.eq(1).all()
    assert net[4].weight.grad is None
    assert not calls
    assert len(net[0]._forward_hooks) == 1
    assert torch.is_grad_enabled()


def test_random_numbers_drawn_on_the_cpu_are_given_back():
    def forward(m, x):
        random.random(), np.random.rand()
        return m.fc(x + torch.rand(32))

    net = Net(forward, fc=nn.Linear(32, 2))
    before = torch.get_rng_state(), random.getstate()
    assert names(trace(net, SMALL)) == ["input", "fc.weight", "fc.bias"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_callers_context_does_not_matter(context):
    expected = names(trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), SMALL))
    with context():
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        assert names(trace(net, SMALL)) == expected


def test_weights_are_neither_read_nor_copied():
    with torch.device("meta"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10**6), nn.ReLU(), nn.Linear(10**6, 10**6))
    assert len(trace(net, SMALL)) == 5


def test_frozen_and_half_precision_networks_trace_alike():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(32), nn.Conv2d(4, 2, 1)).requires_grad_(False).bfloat16()
    assert len(trace(net, SMALL)) == 6


def test_traces_are_repeatable():
    net = torchvision_model("vit_b_16")
    first, second = trace(net), trace(net)
    assert first.nodes == second.nodes
    assert np.array_equal(first.edges, second.edges)


def test_depth_is_not_limited_by_recursion():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(3000)))
    assert trace(net, SMALL).edges.tolist() == [[i, i + 1] for i in range(3000)]


def test_layers_that_write_into_their_input_trace():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Conv2d(3, 2, 1))
    assert names(trace(net, SMALL)) == ["input", "2.weight", "2.bias"]


def test_forwards_that_ask_for_the_inputs_gradient_trace():
    def forward(net, x):
        x.requires_grad = True
        return net.fc(x.requires_grad_().flatten(1))

    assert names(trace(Net(forward, fc=nn.Linear(12, 2)), (3, 2, 2))) == ["input", "fc.weight", "fc.bias"]


def test_attention_kernels_of_other_devices_are_attention():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    kinds = {step.kind for step in recorded_steps([F.scaled_dot_product_attention(q, q, q)])}
    assert kinds & {"Attention", "Softmax", "SafeSoftmax"}
    for kernel in ("FlashAttention", "EfficientAttention", "CudnnAttention", "FlashAttentionForCpu"):
        assert kind_of(f"ScaledDotProduct{kernel}Backward0") == "Attention"


# --- inputs and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (3, 32, 32)])
def test_networks_may_say_what_they_expect(size):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(TraceError, match="input_shape="):
        trace(net)
    net.expected_input_sz = size
    assert len(trace(net)) == len(trace(nn.DataParallel(net))) == 3


def test_errors_name_the_module_and_the_remedy():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(TraceError, match=r"'0' \(Conv2d\).*pass input_shape="):
        trace(net)
    assert len(trace(net, (1, 8, 8))) == 5


class Deciding(nn.Module):
    """A network behind a decision by values, which tensors on the meta device do not have."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.offsets = [torch.zeros(1)]  # where Module.to does not find it

    def forward(self, x):
        return self.net(x + self.offsets[0] if x.isfinite().all().item() else -x)


def test_a_decision_by_values_on_meta_is_an_error_that_names_the_module():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 3, 1), Deciding(nn.Conv2d(3, 3, 1)))
    with pytest.raises(TraceError, match=r"'1' \(Deciding\).*values of tensors.*off the meta device"):
        trace(net, SMALL)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "small-swin"])
def test_with_values_the_graph_is_the_same_and_the_caller_is_told(name):
    net = NamedNetwork(10, 64, name).build(device="cpu", track_running_stats=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}, torch.get_rng_state()
    with pytest.warns(UserWarning, match="needs values") as caught:
        graph = trace(Deciding(net), (3, 64, 64))
    assert caught[0].filename == __file__
    assert [name.removeprefix("net.") for name in names(graph)] == names(trace(net))
    assert np.array_equal(graph.edges, trace(net).edges)
    assert all(torch.equal(value, before[0][key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_hides_layers_from_autograd_is_an_error():
    body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    net = Net(lambda m, x: checkpoint(m.body, x, use_reentrant=m.reentrant), body=body, reentrant=False)
    assert names(trace(net, SMALL)) == ["input", "body.0.weight", "body.0.bias"]
    net.reentrant = True
    with pytest.raises(TraceError, match="use_reentrant=False"):
        trace(net, SMALL)
    with pytest.raises(TraceError, match="TorchScript"):
        trace(nn.Sequential(torch.jit.script(body)), SMALL)


def test_modules_that_cannot_be_copied_are_errors():
    with pytest.raises(TraceError, match="deepcopy"):
        trace(Net(lambda m, x: m.fc(x), fc=nn.Linear(32, 2), numbers=(i for i in range(3))), SMALL)


def test_detached_outputs_and_lazy_modules_are_errors():
    with pytest.raises(TraceError, match="no output depends"):
        trace(Net(lambda m, x: m.fc(x).detach(), fc=nn.Linear(32, 2)), SMALL)
    with pytest.raises(TraceError, match=r"'1' \(LazyLinear\)"):
        trace(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), SMALL)


def test_unknown_conventions_are_named():
    with pytest.raises(ValueError, match="'ghn4'.*correct, ghn3, ppuda"):
        trace(nn.Linear(2, 2), (2,), "ghn4")


# --- everything ------------------------------------------------------------------------------------------------------


def assert_sound(net: nn.Module, graph: Graph) -> None:
    """Every parameter is accounted for, all nodes lie between input and outputs, and names are unique."""
    parametric = [node.name for node in graph.nodes if node.name]
    assert len(set(parametric)) == len(parametric)
    accounted = {*parametric, *(node.norm_bias for node in graph.nodes), *graph.skipped}
    assert {name for name, _ in net.named_parameters()} <= accounted
    has_parents = set(graph.edges[:, 1].tolist())
    assert all(i in has_parents or node.op in ("input", "pos_enc") for i, node in enumerate(graph.nodes))
    shapes = dict(net.named_parameters())
    assert all(tuple(shapes[name].shape) == node.shape for node in graph.nodes if (name := node.name))


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_torchvision_classifier(name):
    for training in (False, True):
        net = torchvision_model(name, training)
        for convention in CONVENTIONS:
            graph = trace(net, convention=convention)
            assert_sound(net, graph)
            reasons = {
                "class token", "layer scale", "logit scale", "relative position bias",
                "runs in training mode only, as auxiliary heads do: net.train() before tracing gives it a node",
            }  # fmt: skip
            if convention == "ppuda":
                reasons.add("not used for the first output, and the convention has no other")
            assert set(graph.skipped.values()) <= reasons


def small_models_of_families():
    """A small model of each of timm's families, chosen by name."""
    import timm

    marks = ("atto", "nano", "pico", "femto", "tiny", "xxs", "small", "_s", "test", "18", "lite", "micro", "_b0")
    for family in filter(None, (timm.list_models(module=module) for module in timm.list_modules())):
        size = {name: next((i for i, mark in enumerate(marks) if mark in name), len(marks)) for name in family}
        yield min(family, key=lambda name, size=size: (size[name], len(name), name))


def timm_model(name: str) -> nn.Module:
    import timm

    try:
        with WeightsOnMeta():
            return timm.create_model(name).eval()
    except RuntimeError:  # a constructor that runs a part of the network
        return timm.create_model(name).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_timm_family():
    names = list(small_models_of_families())
    for net in map(timm_model, names):
        for convention in CONVENTIONS:
            assert_sound(net, trace(net, net.pretrained_cfg["input_size"], convention))
    assert len(names) > 80
