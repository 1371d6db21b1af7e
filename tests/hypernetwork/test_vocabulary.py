"""Parameters of registered primitives: their shapes, their scale, what is not predicted and why."""

from collections import Counter
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from shared import SHAPE, Net, Residual, tiny
from torch import nn
from torchvision.models.video import r3d_18

from ghnlib import GHN, Graph
from ghnlib.graphs.nodes import Node, Role
from ghnlib.graphs.vocabulary import EXTENDED
from ghnlib.hypernetwork.coverage import coverage
from ghnlib.hypernetwork.decoders import weight_scale

WIDE = {"max_shape": (16, 16, 5, 5), "primitives": EXTENDED}


def decoded(ghn, op, shape, role):
    """The weight of a graph's only layer."""
    graphs = [Graph([Node("input"), Node(op, "a", shape, role)], [(0, 1)])]
    return ghn(graphs)[0]["a"].detach()


@pytest.mark.parametrize("decoder", ["conv", "mlp"])
@pytest.mark.parametrize("layer", [
    nn.Conv1d(24, 20, 7), nn.Conv1d(16, 16, 3, groups=16), nn.Conv3d(3, 20, (2, 3, 3)), nn.Conv3d(2, 4, 4),
    nn.ConvTranspose1d(20, 6, 3), nn.ConvTranspose2d(6, 20, (3, 2)), nn.ConvTranspose3d(3, 4, 2), nn.PReLU(20), nn.PReLU(),
    nn.Embedding(70, 24), nn.Embedding(5, 3), nn.LSTM(4, 5),
], ids=str)  # fmt: skip
def test_all_parameters_have_their_shapes_and_values_of_their_own(layer, decoder):
    sides = [9] * (layer.weight.dim() - 2) if hasattr(layer, "in_channels") else []
    example = torch.zeros(2, getattr(layer, "in_channels", 20 if isinstance(layer, nn.PReLU) else 4), *sides)
    example = example.long() if isinstance(layer, nn.Embedding) else example
    net = Net(lambda m, x: m.layer(x)[0] if isinstance(layer, nn.LSTM) else m.layer(x), layer=layer)
    report = tiny(decoder=decoder, **WIDE).initialize(net, example=example)
    assert not report.skipped
    for name, value in net.named_parameters():
        assert value.isfinite().all() and (value.numel() == 1 or len(value.unique()) > value.numel() // 20), name


def test_kernels_are_read_from_the_map_as_those_of_planes():
    ghn = tiny(**WIDE)
    of = lambda shape, role=Role.CONV: decoded(ghn, "conv", shape, role) / weight_scale(shape, role)
    plane = of((6, 4, 4, 2))
    assert torch.equal(of((6, 4, 2, 2, 2)), plane.view(6, 4, 2, 2, 2))
    assert torch.allclose(of((6, 4, 3)), of((6, 4, 1, 3)).squeeze(2))


def test_transposed_weights_are_those_of_a_convolution_with_its_sides_exchanged():
    """Where the spatial axes are one, both are the same linear layer; of channels beyond the largest, blocks repeat."""
    ghn, x = tiny(**WIDE), torch.randn(2, 4, 1, 1)
    weight = lambda shape, role: decoded(ghn, "conv", shape, role)
    plain, turned = weight((6, 4, 1, 1), Role.CONV), weight((4, 6, 1, 1), Role.TRANSPOSED)
    assert torch.allclose(F.conv_transpose2d(x, turned), F.conv2d(x, plain), atol=1e-6)
    wide = weight((20, 40, 2, 2), Role.TRANSPOSED)
    assert torch.equal(wide[:16, :16], wide[:16, 16:32]) and torch.equal(wide[16:], wide[:4])


@pytest.mark.parametrize(("layer", "channels"), [
    (nn.Conv1d(32, 64, 5), 32), (nn.Conv3d(16, 64, 3), 16), (nn.ConvTranspose2d(32, 64, 3), 32), (nn.Linear(32, 64), 32),
])  # fmt: skip
def test_signals_keep_their_size_through_relu_and_any_convolution(layer, channels):
    """Weights of unit deviation, scaled as predicted ones are: E[relu(x)^2] = 1/2 makes outputs of variance 1."""
    torch.manual_seed(0)
    role = Role.TRANSPOSED if "Transpose" in str(layer) else Role.CONV
    layer.weight.data.normal_().mul_(weight_scale(tuple(layer.weight.shape), role))
    nn.init.zeros_(layer.bias)
    x = torch.randn(16, channels, *[12] * (layer.weight.dim() - 2)).relu()
    y = layer(x)
    inner = y[(slice(None), slice(None), *(slice(3, -3),) * (y.dim() - 2))]  # borders of transposed ones hear of less
    assert inner.std().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("decoder", ["conv", "mlp", "lowrank"])
@pytest.mark.parametrize("rows", [100, 250, 400])
def test_rows_of_a_table_over_the_decoders_differ(decoder, rows):
    table = decoded(tiny(**WIDE, decoder=decoder), "embedding", (rows, 8), Role.EMBEDDING)
    assert len(table.unique(dim=0)) == rows


def test_rows_of_a_long_table_differ_until_there_are_more_than_decoded_values():
    ghn = tiny(**WIDE)
    table = decoded(ghn, "embedding", (16 * 25, 8), Role.EMBEDDING)
    assert len(table.unique(dim=0)) == 16 * 25
    assert torch.allclose(table[:16], decoded_block(ghn, (16 * 25, 8)), atol=1e-6)
    net = Net(lambda m, x: m.fc(m.words(x)), words=nn.Embedding(401, 8), fc=nn.Linear(8, 10))
    before = net.words.weight.detach().clone()
    report = ghn.initialize(net, example=torch.zeros(1, 3, dtype=torch.long))
    why = "embedding of more rows than the 400 that the hypernetwork can tell apart"
    assert report.skipped == {"words.weight": why} and torch.equal(net.words.weight, before)
    found = coverage(ghn, net, example=torch.zeros(1, 3, dtype=torch.long))
    assert found.skipped == {"words.weight": why} and found.predicted["fc.weight"] == "class weight"


def decoded_block(ghn, shape):
    """Rows of the first position of the map, computed without slices."""
    graph = Graph([Node("input"), Node("embedding", "a", shape, Role.EMBEDDING)], [(0, 1)])
    state, decoder = ghn.encode([graph])[1:], ghn.weight_decoder
    first = decoder.fc(state).unflatten(1, (-1, 5, 5))[:, :, 0, 0]
    values = decoder.conv2(F.relu(decoder.conv1(F.relu(first)))).view(16, 16)
    return values[:, : shape[1]].detach()


def test_a_network_for_videos_is_predicted_whole():
    with torch.device("meta"):
        net, clip = r3d_18(num_classes=10), torch.empty(1, 3, 4, 32, 32)
    found = coverage(tiny(**WIDE), net, example=clip)
    assert not found.skipped and Counter(found.predicted.values())["convolution"] == 20
    with pytest.warns(UserWarning, match="20 parameters are no nodes .*unsupported layer Conv3DSimple"):
        assert coverage(tiny(), net, example=clip).share < 0.01


def test_primitives_have_rows_of_their_own_and_the_papers_keep_theirs(tmp_path):
    torch.manual_seed(0)
    plain, extended = tiny(), tiny(primitives=("conv1d", "embedding"))
    assert (plain.embedding.op.num_embeddings, extended.embedding.op.num_embeddings) == (15, 17)
    extended.save_pretrained(tmp_path)
    loaded = GHN.from_pretrained(tmp_path)
    assert loaded.config.primitives == ("conv1d", "embedding") and asdict(plain.config)["primitives"] == ()
    shared = dict(extended.state_dict())
    shared["embedding.op.weight"] = shared["embedding.op.weight"][:15]
    plain.load_state_dict(shared)
    a, b = (ghn.predict(Residual(), SHAPE) for ghn in (plain, loaded))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_graph_with_other_primitives_is_an_error():
    graph = Graph.from_module(nn.Sequential(nn.Conv1d(1, 2, 1)), example=torch.zeros(1, 1, 3), primitives=("conv1d",))
    with pytest.raises(ValueError, match="the graph has conv1d, the hypernetwork knows .*glob_avg: trace without"):
        tiny().predict(graph)


@pytest.mark.parametrize(("changes", "said"), [
    ({"primitives": ("conv4d",)}, "'conv4d' is not registered"), ({"primitives": ("prelu", "prelu")}, "one twice"),
    ({"primitives": ("prelu",), "convention": "ghn3"}, "convention='correct'"),
])  # fmt: skip
def test_impossible_vocabularies_are_errors(changes, said):
    with pytest.raises(ValueError, match=said):
        tiny(**changes)
