"""Which layer produces the logits, if any does."""

import pytest
import torch
import torch.nn.functional as F
from shared import Net
from torch import nn

from ghnlib import Graph

SMALL = (3, 16, 16)
BODY = nn.Conv2d(3, 8, 3), nn.ReLU()
POOL = nn.AdaptiveAvgPool2d(1), nn.Flatten()
pytestmark = pytest.mark.filterwarnings("ignore:.*are no nodes")


def class_layers(net: nn.Module, convention: str = "correct", shape=SMALL) -> list[str]:
    return [node.name for node in Graph.from_module(net, shape, convention).nodes if "class" in node.role]


class Own(nn.Module):
    """A linear layer of an own class."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(c_in, c_out)), nn.Parameter(torch.zeros(c_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor.exp() * x


HEADS = {
    "linear": ([nn.Linear(8, 4)], ["4.weight", "4.bias"]),
    "probabilities": ([nn.Linear(8, 4), nn.LogSoftmax(1)], ["4.weight", "4.bias"]),
    "scaled, dropped out": ([nn.Linear(8, 4), Scale(), nn.Dropout()], ["4.weight", "4.bias"]),
    "activated": ([nn.Linear(8, 4), nn.ReLU()], []),
    "generator": ([nn.Linear(8, 4), nn.Tanh()], []),
    "normalised": ([nn.Linear(8, 4), nn.LayerNorm(4)], []),
    "own class": ([nn.Linear(8, 4), nn.ReLU(), Own(4, 2)], []),
    "own class, nothing between": ([nn.Linear(8, 4), Own(4, 2)], []),
    "recurrent": ([nn.Linear(8, 4), nn.Unflatten(1, (2, 2)), nn.RNN(2, 2)], []),
    "parametric activation": ([nn.Linear(8, 4), nn.PReLU()], []),
}


@pytest.mark.parametrize("convention", ["correct", "ghn3"])
@pytest.mark.parametrize("head", HEADS)
def test_vectors(head, convention):
    layers, expected = HEADS[head]
    assert class_layers(nn.Sequential(*BODY, *POOL, *layers), convention) == expected


MAPS = {
    "features": ([nn.Conv2d(8, 4, 3)], []),
    "pooled features": ([nn.Conv2d(8, 4, 3), nn.ReLU(), *POOL], []),
    "dense": ([nn.Conv2d(8, 4, 1)], ["2.weight", "2.bias"]),
    "transposed": ([nn.Conv2d(8, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)], []),
    "as in SqueezeNet": ([nn.Conv2d(8, 4, 1), nn.ReLU(), *POOL], ["2.weight", "2.bias"]),
    "as in MobileNet without classifier": ([nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Hardswish()], []),
}


@pytest.mark.parametrize("head", MAPS)
def test_maps(head):
    layers, expected = MAPS[head]
    assert class_layers(nn.Sequential(*BODY, *layers)) == expected


def test_networks_without_classes_say_so():
    net = nn.Sequential(*BODY, nn.Conv2d(8, 4, 1), nn.ReLU(), *POOL)
    assert repr(Graph.from_module(net, SMALL)).endswith("class layer 2.weight, 2.bias)")
    net.num_classes = 0
    assert repr(Graph.from_module(net, SMALL)).endswith("no class layer)")


@pytest.mark.parametrize(("arrange", "layer"), [
    (lambda features, logits, aux: {"features": features, "logits": logits}, "fc"),
    (lambda features, logits, aux: {"aux": aux, "features": features, "logits": logits}, "fc"),
    (lambda features, logits, aux: {"out": aux, "more": {"logits": logits}}, "fc"),
    (lambda features, logits, aux: (features, logits), "fc"),
    (lambda features, logits, aux: (features, aux, logits), "aux"),
    (lambda features, logits, aux: [logits, [aux, features]], "fc"),
    (lambda features, logits, aux: (F.relu(features), logits), "fc"),
])  # fmt: skip
def test_of_several_outputs_the_logits_have_the_class_layer(arrange, layer):
    def forward(m, x):
        features = m.stem(x)
        pooled = F.relu(features).mean((2, 3))
        return arrange(features, m.fc(pooled), m.aux(pooled))

    net = Net(forward, stem=nn.Conv2d(3, 8, 1), fc=nn.Linear(8, 4), aux=nn.Linear(8, 4))
    graph = Graph.from_module(net, SMALL)
    assert [node.name for node in graph.nodes if "class" in node.role] == [f"{layer}.weight", f"{layer}.bias"]
    assert graph.nodes[-1].name == f"{layer}.bias"


def test_a_bias_of_its_own_belongs_to_the_class_layer():
    net = Net(lambda m, x: x @ m.fc.weight.T + m.fc.bias, fc=nn.Linear(4, 2))
    assert class_layers(net, shape=(4,)) == ["fc.weight", "fc.bias"]


def test_stacked_classifiers_are_all_class_layers():
    net = Net(lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    assert class_layers(net, shape=(4,)) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert class_layers(net, "ghn3", (4,)) == ["b.weight", "b.bias"]


def test_many_sums_are_followed_once():
    def forward(m, x):
        x = m.fc(x)
        for _ in range(60):
            x = x + x.exp()
        return x

    assert class_layers(Net(forward, fc=nn.Linear(4, 4)), shape=(4,)) == ["fc.weight", "fc.bias"]
