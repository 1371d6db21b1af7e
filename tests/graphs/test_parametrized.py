"""Layers whose weight is computed are the layers that they would be without."""

import warnings

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from shared import Net, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune

from ghnlib import Graph
from ghnlib.graphs.parametrized import unfold

SMALL = (3, 8, 8)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


class Doubled(Halved):
    def right_inverse(self, x):
        return 2 * x


def old(norm):
    def wrap(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return wrap


WAYS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
    "own with inverse": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "old weight norm": old(nn.utils.weight_norm),
    "old spectral norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruning twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 2), "weight", 2),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


def net_of(way: str = "") -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    if way:
        WAYS[way](net[2])
    return net


@pytest.mark.parametrize("convention", ["correct", "ghn3"])
@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_that_of_the_plain_network(way, convention):
    net, plain = net_of(way), Graph.from_module(net_of(), SMALL, convention)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = Graph.from_module(net, SMALL, convention)
    assert graph.nodes == plain.nodes and graph.edges.tolist() == plain.edges.tolist()
    parts = {name for name, _ in net.named_parameters()} - {node.name for node in graph.nodes}
    reason = f"part of 2.{'bias' if 'bias' in way else 'weight'}, which was not written"
    assert graph.skipped == dict.fromkeys(parts, reason)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(torch.randn(2, *SMALL))  # its class has kept what the copy's has lost


EFFECT = {
    "weight norm": 1, "own": 0.5, "own with inverse": 1, "old weight norm": 1, "pruning": "masked",
    "pruning twice": "masked", "pruned bias": "masked", "spectral norm": "normalised", "old spectral norm": "normalised",
}  # fmt: skip


@pytest.mark.parametrize("way", EFFECT)
def test_predicted_weights_are_written_through_the_parts(way):
    ghn = tiny()
    net, plain = net_of(way), ghn.predict(net_of(), SMALL)
    predicted = ghn.predict(net, SMALL)
    assert predicted.keys() == plain.keys()
    assert all(torch.equal(predicted[name], plain[name]) for name in plain)
    report = ghn.initialize(net, SMALL)
    assert not report.skipped and set(report.predicted) == {name for name, _ in net.named_parameters()}
    attribute = "bias" if "bias" in way else "weight"
    target = plain[f"2.{attribute}"]
    if EFFECT[way] == "masked":
        target = target * getattr(net[2], f"{attribute}_mask")
    elif EFFECT[way] == "normalised":
        target = target / torch.linalg.matrix_norm(target.flatten(1), 2)
    else:
        target = EFFECT[way] * target
    torch.testing.assert_close(getattr(net.eval()[2], attribute), target, rtol=0.02, atol=1e-6)  # iterated


@pytest.mark.parametrize("way", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_an_orthogonal_weight_is_made_of_the_prediction(way, shape):
    ghn = tiny()
    layers = nn.Linear(192, shape[1]), nn.ReLU(), nn.Linear(*shape[::-1]), nn.Linear(shape[0], 10)
    net = nn.Sequential(nn.Flatten(), *layers)
    values = ghn.predict(net, SMALL)["3.weight"]
    parametrizations.orthogonal(net[3], orthogonal_map=way)
    state = torch.random.get_rng_state()
    report = ghn.initialize(net, SMALL)
    assert not report.skipped and torch.equal(state, torch.random.get_rng_state())
    tall = values if shape[0] >= shape[1] else values.T
    q, r = torch.linalg.qr(tall)
    expected = q * r.diagonal().sign()
    torch.testing.assert_close(net[3].weight, expected if shape[0] >= shape[1] else expected.T)


class Squares(nn.Module):
    """Of positive weights alone there is a way back, to a tensor of another shape."""

    def forward(self, x):
        return x[0] ** 2

    def right_inverse(self, weight):
        if (weight < 0).any():
            raise ValueError("negative")
        return weight.sqrt()[None]


def test_a_computed_weight_that_cannot_be_written_is_kept_with_the_reason():
    ghn = tiny()
    net = net_of()
    net[2].weight.data.abs_()
    parametrize.register_parametrization(net[2], "weight", Squares(), unsafe=True)
    weight = net[2].weight.clone()
    report = ghn.initialize(net, SMALL)
    assert torch.equal(net[2].weight, weight)
    part = "2.parametrizations.weight.original"
    assert report.skipped.keys() == {part} and "part of 2.weight, whose parametrization" in report.skipped[part]
    parametrizations.weight_norm(net[5])
    report = ghn.initialize(net, SMALL, predict_class_layers=False)
    parts = [f"5.parametrizations.weight.original{i}" for i in (0, 1)]
    assert {report.skipped[part] for part in parts} == {"class layer; predict_class_layers=False"}


def test_values_of_plain_layers_stay():
    values = {"0.weight": torch.ones(4, 3, 3, 3), "5.bias": torch.ones(10)}
    assert unfold(net_of("weight norm"), values) == values


def test_a_computed_class_layer_is_the_class_layer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), parametrizations.weight_norm(nn.Linear(16, 10)))
    graph = Graph.from_module(net, SMALL)
    roles = {node.name: str(node.role) for node in graph.nodes if node.name}
    assert roles["3.weight"] == "class weight" and roles["1.weight"] == "linear"


def test_shared_parts_are_one_node():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(2)))
    for layer in net:
        parametrize.register_parametrization(layer, "weight", Halved())
    net[1].parametrizations.weight.original = net[0].parametrizations.weight.original
    with pytest.warns(UserWarning, match=r"ties 1 weights \(0\.weight = 1\.weight"):
        graph = Graph.from_module(net, SMALL)
    assert [node.name for node in graph.nodes] == ["", "0.weight"]


def test_weight_norm_of_a_recurrent_layer():
    rnn = parametrizations.weight_norm(nn.LSTM(4, 4, batch_first=True), "weight_hh_l0")
    net = Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=rnn, fc=nn.Linear(4, 2))
    assert "rnn.weight_hh_l0" in [node.name for node in Graph.from_module(net, (5, 4)).nodes]
