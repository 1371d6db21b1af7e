"""Torchvision's networks behind the interface of architectures, networks by their importable names."""

import pytest
import torch
from torch import nn
from torchvision import models

from ghnlib.architectures import handwritten
from ghnlib.architectures.vision import NamedNetwork, build_to_run, network_by_name, own_networks, without_skips
from ghnlib.data.images import DataError
from ghnlib.graphs.graph import Graph


@pytest.mark.parametrize(
    ("name", "first", "poolings"),
    [("resnet18", "conv1", 0), ("densenet121", "features.conv0", 0), ("alexnet", "features.0", 2),
     ("mobilenet_v2", "features.0.0", 0), ("mobilenet_v3_small", "features.4.block.1.0", 0), ("mnasnet0_5", "layers.0", 0),
     ("shufflenet_v2_x0_5", "conv1.0", 0), ("convnext_tiny", "features.0.0", 0), ("vgg11", "features.0", 3)],
)  # fmt: skip
def test_torchvisions_networks_keep_resolution_on_small_images(name, first, poolings):
    large, small = (NamedNetwork(10, side, name).build().eval() for side in (64, 32))
    assert small.get_submodule(first).stride == (1, 1)
    assert sum(isinstance(module, nn.MaxPool2d) for module in small.modules()) == poolings
    assert small(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    shapes = [{n: p.shape for n, p in net.named_parameters() if n != f"{first}.weight"} for net in (large, small)]
    assert shapes[0] == shapes[1]
    kept = name in ("alexnet", "mobilenet_v3_small", "convnext_tiny")
    assert kept or small.get_parameter(f"{first}.weight").shape[-1] == 3


def test_first_filters_are_cut_to_their_centre():
    torch.manual_seed(0)
    whole = NamedNetwork(10, 64, "resnet18").build(device="cpu").conv1.weight
    torch.manual_seed(0)
    assert torch.equal(NamedNetwork(10, 32, "resnet18").build(device="cpu").conv1.weight, whole[:, :, 2:5, 2:5])


def test_networks_are_built_without_weights_where_that_works():
    assert all(p.is_meta for p in network_by_name("torchvision.models.regnet_y_400mf", 10).parameters())
    assert not any(p.is_meta for p in network_by_name("shared.Reading", 10).parameters())


@pytest.mark.parametrize("name", ["regnet_y_400mf", "small-swin", "shared:Reading", "resnet18"])
def test_networks_on_meta_are_there_altogether_and_draw_nothing(name):
    state = torch.get_rng_state()
    net = NamedNetwork(10, 32, name).build()
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["torchvision.models.nothing", "nothing.at.all", "resnet18"])
def test_a_name_that_is_none_is_said(name):
    with pytest.raises(ValueError, match=f"{name}.*importable name"):
        network_by_name(name, 10)


def test_a_resnet_without_skips_adds_nothing():
    with torch.device("meta"):
        net = without_skips(models.resnet50())
    ops = [node.op for node in Graph.from_module(net, (3, 64, 64)).nodes]
    assert (ops.count("sum"), ops.count("conv"), ops.count("bn")) == (0, 50, 49)  # the classifier is a convolution too


HANDWRITTEN = "ghnlib.architectures.handwritten:"


def shouting(num_classes):
    """A function that makes no network."""
    return "NETWORK"


def headless(num_classes):
    """A network without classification layer."""
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid())


class Branching(nn.Module):
    """A network whose way depends on the values of images."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.head(x.mean((2, 3))) if x.sum() > 0 else self.head(x.amax((2, 3)))


class Masked(nn.Module):
    """A network with a buffer whose values count."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0]))
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)) * self.mask)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("name", ["resnet", "resnet_deep", "vgg", "convnext", "vit", "vit_deep", "vit_wide"])
def test_networks_written_by_hand_can_be_trained_on(name, side):
    (network,) = own_networks([HANDWRITTEN + name], 7, side)
    assert network.graph is network.graph and not network.graph.skipped
    with torch.device("meta"):
        sized = {"image_size": side} if name.startswith("vit") else {}
        own = getattr(handwritten, name)(7, **sized)
    shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (own, network.build())]
    assert shapes[0] == shapes[1]
    assert network.build().eval()(torch.empty(2, 3, side, side, device="meta")).shape == (2, 7)


def test_networks_of_ones_own_may_be_of_torchvision_and_have_buffers():
    networks = own_networks(["torchvision.models.resnet18", "small-swin", f"{__name__}:Masked"], 10, 16)
    assert networks[0].graph.nodes == NamedNetwork(10, 16, "resnet18").graph.nodes
    masked = build_to_run(networks[2], torch.device("cpu"))
    weight, x = torch.rand(10, 3), torch.rand(2, 3, 16, 16)
    found = torch.func.functional_call(masked, {"head.weight": weight, "head.bias": torch.zeros(10)}, (x,))
    torch.testing.assert_close(found, (x.mean((2, 3)) * torch.tensor([1.0, 0.0, 2.0])) @ weight.T)
    assert next(build_to_run(networks[0], torch.device("cpu")).parameters()).is_meta
    first, second = (build_to_run(networks[1], torch.device("cpu")) for _ in range(2))
    table = "features.1.0.attn.relative_position_bias_table"
    assert table in networks[1].graph.skipped and first.get_parameter(table).std() > 0
    assert torch.equal(first.get_parameter(table), second.get_parameter(table))


@pytest.mark.parametrize(
    ("name", "said"),
    [("resnet19", "Unknown model resnet19"), ("nowhere.nets:vit", "No module named 'nowhere'"),
     (HANDWRITTEN + "resnext", "no attribute 'resnext'"), (f"{__name__}:shouting", "returns a str, not a torch.nn.Module"),
     (f"{__name__}:headless", "no classification layer for 10 classes"), (f"{__name__}:Branching", "Branching"),
     ("torch.nn:Flatten", "num_classes")],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_named(name, said):
    with pytest.raises(DataError, match=f"deepnets.extra or evaluate.unseen: {name} cannot be trained on: .*{said}"):
        own_networks(["resnet18", name], 10, 16)
