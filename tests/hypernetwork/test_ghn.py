"""The hypernetwork's rules, each pinned by a small test that states it."""

import numpy as np
import pytest
import torch
import torchvision
from shared import SHAPE, Residual, swept, tiny
from torch import nn

from ghnlib import GHN
from ghnlib.config import PRESETS
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node, Role
from ghnlib.hypernetwork.decoders import ConvDecoder, MLPDecoder, Slice, positions, tile, weight_scale
from ghnlib.hypernetwork.embedding import NodeEmbedding

ENCODERS = ("mlp", "gated_gnn", "graphormer")


@pytest.mark.parametrize(("preset", "classes", "side", "expected"), [
    ("ghn1", 10, 11, 1_620_668), ("ghn1", 1000, 16, 2_319_624), ("ghn2", 10, 11, 1_620_764), ("ghn2", 1000, 16, 2_319_720),
    ("mlp", 10, 11, 1_614_396), ("mlp", 1000, 16, 2_313_352), ("ghn3-t", 1000, 16, 6_906_632), ("ghn3-t", 10, 11, 4_531_500),
    ("ghn3-s", 1000, 16, 35_810_368), ("ghn3-l", 1000, 16, 214_668_960), ("ghn3-xl", 1000, 16, 654_365_184),
])  # fmt: skip
def test_presets_have_the_published_parameter_counts(preset, classes, side, expected):
    config = PRESETS[preset]
    with torch.device("meta"):
        ghn = GHN({**config, "num_classes": classes, "max_shape": (*config["max_shape"][:2], side, side)})
    assert sum(p.numel() for p in ghn.parameters()) == expected


@pytest.mark.parametrize(("classes", "size", "nearest"), [
    (1000, 2, 1), (1000, 5, 8), (1000, 12, 8), (1000, 20, 16), (1000, 60, 56), (1000, 72, 64), (1000, 1004, 1000), (1000, 4112, 4096),
    (1000, 9999, 8192), (10, 9, 8), (10, 13, 10), (10, 1000, 992), (10, 4, 8),
])  # fmt: skip
def test_channels_read_the_row_of_the_nearest_value_and_ties_go_down(classes, size, nearest):
    embedding = NodeEmbedding(16, classes, 16)
    channel, _ = embedding._rows(np.array([[size, nearest, 1, 1]]))
    assert channel[0, 0] == channel[0, 1]
    assert embedding.channel.num_embeddings == 392


def test_numbers_beyond_the_tables_that_are_values_have_their_rows():
    channel, spatial = NodeEmbedding(16, 9000, 18)._rows(np.array([[9000, 8192, 17, 16], [9001, 8999, 18, 19]]))
    assert channel.tolist() == [[390, 389], [389, 389]] and spatial.tolist() == [[10, 9], [9, 9]]


@pytest.mark.parametrize(("side", "rows", "pairs"), [
    (16, 11, {2: 3, 4: 3, 12: 11, 32: 16}), (11, 9, {2: 3, 6: 5, 13: 14, 15: 14}),
])  # fmt: skip
def test_kernel_sides_read_the_row_of_the_nearest_value(side, rows, pairs):
    embedding = NodeEmbedding(16, 10, side)
    assert embedding.spatial.num_embeddings == rows
    for size, nearest in pairs.items():
        _, spatial = embedding._rows(np.array([[1, 1, size, nearest]]))
        assert spatial[0, 0] == spatial[0, 1]


def test_operations_read_the_last_row_of_the_shape_tables():
    embedding = NodeEmbedding(16, 10, 11)
    channel, spatial = embedding._rows(np.full((1, 4), -1))
    assert channel.tolist() == [[391, 391]] and spatial.tolist() == [[8, 8]]


@pytest.mark.parametrize(("side", "size", "expected"), [
    (16, 1, (8, 9)), (16, 2, (7, 9)), (16, 3, (7, 10)), (16, 4, (6, 10)), (16, 7, (5, 12)), (16, 14, (1, 15)), (16, 16, (0, 16)),
    (16, 32, (0, 16)), (11, 3, (4, 7)), (11, 11, (0, 11)),
])  # fmt: skip
def test_ghn3_reads_kernels_from_the_centre(side, size, expected):
    assert positions(size, side, "centre") == slice(*expected)


def test_ghn2_reads_kernels_from_the_corner():
    assert positions(3, 11, "corner") == slice(0, 3)


DECODERS = {"conv": ConvDecoder, "mlp": MLPDecoder}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_compute_the_slice_of_the_full_map(kind):
    torch.manual_seed(0)
    decoder = DECODERS[kind](8, (6, 5, 11, 11), 10, "centre")
    states = torch.randn(2, 8)
    (_, full), (_, part) = decoder([Slice((11, 11), 6, 5), Slice((3, 1), 4, 2)], [states, states])
    torch.testing.assert_close(part.view(2, 3, 1, 4, 2), full.view(2, 11, 11, 6, 5)[:, 4:7, 5:6, :4, :2])


def test_the_mlp_decoder_reads_a_class_layer_instead_of_its_second_layer():
    torch.manual_seed(0)
    decoder = MLPDecoder(8, (6, 5, 11, 11), 10, "corner")
    states = torch.randn(2, 8)
    (_, plain), (_, classes) = decoder([Slice((2, 1), 6, 5), Slice((1, 1), 6, 3, classes=True)], [states, states])
    whole = decoder.fc2(decoder.fc1(states).relu()).view(2, 6, 5, 11, 11)
    torch.testing.assert_close(plain, whole[..., :2, 0].permute(0, 3, 1, 2))
    torch.testing.assert_close(classes[:, 0], decoder.class_layer(decoder.fc1(states).relu()).view(2, 10, 5)[..., :3])


def test_tiling_repeats_whole_blocks_and_truncates():
    source = torch.arange(6.0).view(1, 3, 2)
    tiled = tile(source, (5, 3))
    assert tiled.shape == (1, 5, 3)
    for r in range(5):
        for c in range(3):
            assert tiled[0, r, c] == source[0, r % 3, c % 2]


@pytest.mark.parametrize(("shape", "expected"), [
    ((8, 4, 3, 3), (2 / 36) ** 0.5), ((8, 4, 1, 7), (1 / 28) ** 0.5), ((8, 4, 7, 1), (2 / 28) ** 0.5), ((8, 1, 3, 3), (1 / 9) ** 0.5),
    ((8, 4), (2 / 4) ** 0.5), ((8, 1), 2**0.5), ((1, 8, 14, 14), 1.0), ((1, 8, 3, 3), (2 / 72) ** 0.5),
])  # fmt: skip
def test_weights_are_scaled_by_fan_in(shape, expected):
    assert weight_scale(shape) == pytest.approx(expected)


def test_vectors_are_bounded_and_norm_layers_take_both_rows():
    ghn = tiny()
    net = Residual()
    predicted = ghn.predict(net, SHAPE)
    assert set(predicted) == {name for name, _ in net.named_parameters()}
    assert (predicted["blocks.0.1.weight"] > 0).all() and (predicted["blocks.0.1.weight"] < 2).all()
    assert predicted["blocks.0.1.bias"].abs().max() < 1


def test_class_scores_reduce_over_the_output_channels_after_relu():
    torch.manual_seed(0)
    decoder = ConvDecoder(8, (6, 5, 11, 11), 10, "centre")
    (_, plain), (_, classes) = decoder(
        [Slice((1, 1), 6, 4), Slice((1, 1), 6, 4, classes=True)], [torch.randn(1, 8)] * 2
    )
    expected = decoder.class_layer.weight @ plain[0, 0].relu() + decoder.class_layer.bias[:, None]
    torch.testing.assert_close(classes[0, 0], expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_meta_batch_equals_single_predictions(encoder):
    ghn = tiny(encoder)
    nets = [Residual(blocks=1), Residual(width=24, blocks=3), Residual(blocks=2)]
    for net, together in zip(nets, ghn.predict(nets, SHAPE)):
        torch.testing.assert_close(together, ghn.predict(net, SHAPE))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_predictions_without_gradients_are_the_same(encoder):
    ghn = tiny(encoder)
    with torch.no_grad():
        without = ghn.predict(Residual(width=24), SHAPE)
    torch.testing.assert_close(
        without, {name: p.detach() for name, p in ghn.predict(Residual(width=24), SHAPE).items()}
    )


def reordered(graph):
    """Another topological order, with node 0 and the last two in place."""
    remaining, order = set(range(1, len(graph) - 2)), [0]
    while remaining:
        ready = [n for n in remaining if all(s in order for s, t in graph.edges.tolist() if t == n)]
        order.append(max(ready))
        remaining.remove(order[-1])
    order += [len(graph) - 2, len(graph) - 1]
    position = {n: i for i, n in enumerate(order)}
    return Graph([graph.nodes[n] for n in order], [(position[s], position[t]) for s, t in graph.edges.tolist()])


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_topological_order_gives_the_same_parameters(encoder):
    ghn = tiny(encoder)
    graph = Graph.from_module(TwoBranches(), SHAPE)
    other = reordered(graph)
    assert [n.name for n in other.nodes] != [n.name for n in graph.nodes]
    torch.testing.assert_close(ghn.predict(other), ghn.predict(graph))


@pytest.mark.parametrize("virtual_edges", [True, False])
def test_gated_gnn_updates_node_by_node_in_both_directions(virtual_edges):
    encoder = tiny("gated_gnn", virtual_edges=virtual_edges).encoder.double()
    graph = Graph.from_module(TwoBranches(), SHAPE)
    x = torch.randn(len(graph), 16, dtype=torch.float64, requires_grad=True)
    ours, expected = encoder(x, [graph]), swept(encoder, x, graph)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    weights, inputs = torch.randn_like(x), [x, *encoder.parameters()]
    gradients = [torch.autograd.grad((states * weights).sum(), inputs) for states in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_device_of_new_tensors_does_not_matter(encoder):
    ghn, net, other = tiny(encoder, anytime=True), Residual(), Residual()
    expected, embedded = ghn.predict(net, SHAPE), ghn.embed(net, SHAPE)
    with torch.device("meta"):
        torch.testing.assert_close(ghn.predict(net, SHAPE), expected, rtol=0, atol=0)
        torch.testing.assert_close(ghn.embed(net, SHAPE), embedded, rtol=0, atol=0)
        ghn.initialize(other, SHAPE)
    torch.testing.assert_close(dict(other.named_parameters()), expected)


def test_a_meta_batch_may_be_any_iterable():
    ghn, nets = tiny(), [Residual(), Residual(classes=7)]
    torch.testing.assert_close(ghn.predict(net for net in nets), ghn.predict(nets), rtol=0, atol=0)
    assert ghn.predict([]) == [] and len(ghn.initialize(net for net in nets)) == 2


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_reach_every_parameter(encoder):
    ghn = tiny(encoder)
    sum(p.square().sum() for p in ghn.predict(Residual(), SHAPE).values()).backward()
    without = {name for name, p in ghn.named_parameters() if p.grad is None}
    assert without == set()


def test_class_layers_are_predicted_iff_class_counts_agree():
    ghn = tiny()
    assert "fc.weight" in ghn.predict(Residual(classes=10), SHAPE)
    assert "fc.weight" not in ghn.predict(Residual(classes=7), SHAPE)
    forced = ghn.predict(Residual(classes=7), SHAPE, predict_class_layers=True)
    assert forced["fc.weight"].shape == (7, 8)
    assert "fc.bias" not in ghn.predict(Residual(classes=10), SHAPE, predict_class_layers=False)


@pytest.mark.parametrize("decoder", ["conv", "mlp", "lowrank"])
@pytest.mark.parametrize("classes", [4, 23])
def test_class_layers_of_other_classes_have_the_rows_of_the_hypernetworks_classes_in_turn(decoder, classes):
    ghn, net = tiny(decoder=decoder), Residual(classes=classes)
    report = ghn.initialize(net, SHAPE, predict_class_layers="resize")
    assert not report.skipped and len(net.fc.weight.unique(dim=0)) == min(classes, 10)
    for name in ("fc.weight", "fc.bias"):
        value = net.get_parameter(name)
        assert torch.equal(value, value[torch.arange(classes) % 10])
    torch.testing.assert_close(ghn.predict(net, SHAPE, "resize"), ghn.predict(net, SHAPE, True))
    with pytest.raises(ValueError, match=r"predict_class_layers='shrink': None, True, False or 'resize'"):
        ghn.predict(net, SHAPE, predict_class_layers="shrink")


def test_initialize_writes_the_prediction_and_reports_what_it_kept():
    ghn = tiny()
    net = Residual(classes=7)
    before = net.fc.weight.clone()
    report = ghn.initialize(net, SHAPE)
    for name, value in ghn.predict(net, SHAPE).items():
        torch.testing.assert_close(dict(net.named_parameters())[name], value)
    assert torch.equal(net.fc.weight, before)
    assert set(report.skipped) == {"fc.weight", "fc.bias"} and "10 classes" in report.skipped["fc.weight"]


def test_initialize_refuses_networks_without_storage():
    with torch.device("meta"):
        net = Residual()
    with pytest.raises(ValueError, match="to_empty"):
        tiny().initialize(net, SHAPE)


@pytest.mark.parametrize(("changes", "message"), [
    ({"encoder": "lstm"}, "'mlp', 'gated_gnn' or 'graphormer'"), ({"hid": 30}, "multiple of 4"), ({"heads": 3}, "multiple of heads"),
    ({"max_shape": (8, 8, 3, 5)}, "max_shape"), ({"layers": 0}, "greater than 0"),
    ({"fan": "both"}, "'in' or 'out'"), ({"encoder": "gated_gnn", "directions": "none"}, "directions='none'"),
    ({"directions": "synchronous"}, "directions='synchronous' is not for the graphormer"),
])  # fmt: skip
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_positions_of_tokens_start_with_a_reproducible_random_row():
    ghn = tiny()
    graph = Graph([Node("input"), Node("pos_enc", "pos", (1, 10, 24), Role.POSITION)], [])
    first, second = ghn.predict(graph)["pos"], ghn.predict(graph)["pos"]
    assert first.shape == (1, 10, 24)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[:, :, 16:], first[:, :, :8])  # channels repeat with period 16


def test_kernels_larger_than_the_decoder_are_resized():
    graph = Graph([Node("input"), Node("conv", "patch", (8, 3, 32, 32), Role.CONV)], [(0, 1)])
    assert tiny().predict(graph)["patch"].shape == (8, 3, 32, 32)


def test_torchvision_network_is_initialized_and_runs():
    net = torchvision.models.resnet18(num_classes=10).eval()
    report = tiny().initialize(net)
    assert not report.skipped
    assert net(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_other_classes_keep_the_precision():
    assert tiny().half().for_classes(5).embedding.op.weight.dtype == torch.float16


@pytest.mark.parametrize(("side", "factor"), [(11, 1.0), (6, (2 / (8 * 36)) ** 0.5)])
def test_released_hypernetworks_leave_maps_of_positions_from_11_rows_on_as_they_are(side, factor):
    graph = Graph([Node("input"), Node("pos_enc", "pos", (1, 8, side, side), Role.POSITION)], [])
    own, released = tiny(), tiny(convention="ghn3")
    released.load_state_dict(own.state_dict())
    torch.testing.assert_close(released.predict(graph)["pos"], own.predict(graph)["pos"] * factor)
