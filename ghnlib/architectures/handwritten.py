"""Small networks as people write them by hand, for images of 8 pixels and more: a ResNet, a VGG, a ConvNeXt, a ViT.

Each function can be named where networks of one's own can, such as ``ghnlib.architectures.handwritten:resnet``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of basic blocks, each with twice the channels and half the resolution of the one before."""

    def __init__(self, num_classes: int, blocks: Sequence[int], width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        layers, inputs = [], width
        for stage, count in enumerate(blocks):
            for i in range(count):
                outputs = width * 2**stage
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not i else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and an MLP over channels (Liu et al. 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(x).permute(0, 2, 3, 1)
        out = self.project(F.gelu(self.expand(self.norm(out))))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stages of ConvNeXt blocks behind convolutions that halve the resolution."""

    def __init__(self, num_classes: int, depths: Sequence[int], width: int):
        super().__init__()
        stages, inputs = [], 3
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage
            blocks = [ConvNeXtBlock(outputs) for _ in range(depth)]
            stages.append(nn.Sequential(nn.Conv2d(inputs, outputs, 2, 2), *blocks))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(inputs)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(x).mean((2, 3))))


class EncoderBlock(nn.Module):
    """Attention and an MLP, each behind its LayerNorm (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attention(own, own, own, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """4x4 patches of the image, positions, encoder blocks, the mean over patches."""

    def __init__(self, num_classes: int, image_size: int, depth: int, width: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, image_size // 4, image_size // 4)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.pos_embedding
        return self.head(self.norm(self.blocks(x)).mean(1))


def resnet(num_classes: int) -> nn.Module:
    """Two stages of one block."""
    return ResNet(num_classes, [1, 1], 16)


def resnet_deep(num_classes: int) -> nn.Module:
    """Two stages of two blocks."""
    return ResNet(num_classes, [2, 2], 16)


def vgg(num_classes: int) -> nn.Module:
    """Pairs of convolutions between poolings, two linear layers (Simonyan and Zisserman 2015)."""
    layers, inputs = [], 3
    for outputs in 16, 32:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = outputs
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, 64), nn.ReLU(), nn.Linear(64, num_classes)]
    return nn.Sequential(*layers, *head)


def convnext(num_classes: int) -> nn.Module:
    """Two stages of one block."""
    return ConvNeXt(num_classes, [1, 1], 16)


def vit(num_classes: int, image_size: int) -> nn.Module:
    """Two blocks of 32 channels."""
    return ViT(num_classes, image_size, 2, 32)


def vit_deep(num_classes: int, image_size: int) -> nn.Module:
    """Three blocks of 32 channels."""
    return ViT(num_classes, image_size, 3, 32)


def vit_wide(num_classes: int, image_size: int) -> nn.Module:
    """Two blocks of 48 channels."""
    return ViT(num_classes, image_size, 2, 48)
