"""Torchvision's networks behind the interface of architectures, networks by their importable names."""

import pytest
import torch
from torch import nn
from torchvision import models

from ghnlib.architectures.vision import TorchvisionNetwork, network_by_name, without_skips
from ghnlib.graphs.graph import Graph


@pytest.mark.parametrize(
    ("name", "first", "poolings"),
    [("resnet18", "conv1", 0), ("densenet121", "features.conv0", 0), ("alexnet", "features.0", 2),
     ("mobilenet_v2", "features.0.0", 0), ("mobilenet_v3_small", "features.4.block.1.0", 0), ("mnasnet0_5", "layers.0", 0),
     ("shufflenet_v2_x0_5", "conv1.0", 0), ("convnext_tiny", "features.0.0", 0), ("vgg11", "features.0", 3)],
)  # fmt: skip
def test_torchvisions_networks_keep_resolution_on_small_images(name, first, poolings):
    large, small = (TorchvisionNetwork(10, side, name).build().eval() for side in (64, 32))
    assert small.get_submodule(first).stride == (1, 1)
    assert sum(isinstance(module, nn.MaxPool2d) for module in small.modules()) == poolings
    assert small(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    shapes = [{n: p.shape for n, p in net.named_parameters() if n != f"{first}.weight"} for net in (large, small)]
    assert shapes[0] == shapes[1]
    assert (small.get_parameter(f"{first}.weight").shape[-1] == 3) or name in (
        "alexnet",
        "mobilenet_v3_small",
        "convnext_tiny",
    )


def test_first_filters_are_cut_to_their_centre():
    torch.manual_seed(0)
    whole = TorchvisionNetwork(10, 64, "resnet18").build(device="cpu").conv1.weight
    torch.manual_seed(0)
    assert torch.equal(TorchvisionNetwork(10, 32, "resnet18").build(device="cpu").conv1.weight, whole[:, :, 2:5, 2:5])


def test_networks_are_built_without_weights_where_that_works():
    assert all(p.is_meta for p in network_by_name("torchvision.models.regnet_y_400mf", 10).parameters())
    assert not any(p.is_meta for p in network_by_name("shared.Reading", 10).parameters())


@pytest.mark.parametrize("name", ["torchvision.models.nothing", "nothing.at.all", "resnet18"])
def test_a_name_that_is_none_is_said(name):
    with pytest.raises(ValueError, match=f"{name}.*importable name"):
        network_by_name(name, 10)


def test_a_resnet_without_skips_adds_nothing():
    with torch.device("meta"):
        net = without_skips(models.resnet50())
    ops = [node.op for node in Graph.from_module(net, (3, 64, 64)).nodes]
    assert (ops.count("sum"), ops.count("conv"), ops.count("bn")) == (0, 50, 49)  # the classifier is a convolution too
