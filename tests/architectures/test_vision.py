"""Torchvision's networks behind the interface of architectures."""

import pytest
import torch
from torch import nn

from ghnlib.architectures.vision import TorchvisionNetwork


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
