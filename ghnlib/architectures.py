"""Architectures of DeepNets-1M (PPUDA appendix A.1): what a network is built and a graph composed from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn

from ghnlib.compose import compose, count_parameters
from ghnlib.graph import Graph
from ghnlib.networks import IMAGENET_FORM, Network, Plan, Stem, plan

NAMINGS = ("ghn3", "ppuda")


class Genotype(NamedTuple):
    """Two cells. Each operation is (name, index of the state that it reads); two consecutive ones sum to a state.
    States 0 and 1 are the outputs of the cells before; ``*_concat``: the states that form the cell's output.
    """

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]

    @classmethod
    def from_lists(cls, normal, normal_concat, reduce, reduce_concat) -> Genotype:
        """A genotype from any nested sequences, such as those of a JSON file."""
        cells = [tuple((str(name), int(source)) for name, source in cell) for cell in (normal, reduce)]
        concats = [tuple(int(state) for state in concat) for concat in (normal_concat, reduce_concat)]
        return cls(cells[0], concats[0], cells[1], concats[1])

    def cell(self, reduction: bool) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...]]:
        """Operations and concatenated states of the normal or the reduction cell."""
        return self[2:] if reduction else self[:2]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all operations."""
        return tuple(name for name, _ in self.normal + self.reduce)


def _parse(cell: str) -> tuple[tuple[str, int], ...]:
    pairs = (item.rsplit(":", 1) for item in cell.split())
    return tuple((name, int(source)) for name, source in pairs)


GENOTYPES = {
    "DARTS": Genotype(
        _parse(
            "sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 "
            "sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2"
        ),
        (2, 3, 4, 5),
        _parse(
            "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 "
            "max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1"
        ),
        (2, 3, 4, 5),
    ),
    "PDARTS": Genotype(
        _parse(
            "skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 "
            "sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4"
        ),
        (2, 3, 4, 5),
        _parse(
            "avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 "
            "max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3"
        ),
        (2, 3, 4, 5),
    ),
    "ViT": Genotype(_parse("none:0 msa:1"), (2,), _parse("none:0 avg_pool_3x3:1"), (2,)),
}
"""Published genotypes by name (DARTS, P-DARTS, and the transformer of PPUDA)."""


@dataclass(frozen=True)
class Architecture:
    """One network of DeepNets-1M: the arguments it is built from (PPUDA appendix A.1).

    Args:
        C: channels of the first cells. C_mult: factor on them at each of the two reduction cells.
        ks: kernel size of the first convolution. stem_type: 0 (one convolution, then max pooling if ``stem_pool``)
            or 1 (three convolutions, the third halves the resolution); without effect on visual transformers.
        norm: "bn" or None. preproc: whether cells project their inputs to their own width.
        fc_layers: 1, or 2 with ``fc_dim`` hidden units. glob_avg: global average before the classifier, else flatten.
        imagenet_stride: of the first convolution on images of 64 pixels and more.
        naming: "ghn3" or "ppuda", how attention parameters are named.

    Raises:
        ValueError: the arguments contradict each other.
    """

    genotype: Genotype
    C: int = 32
    n_cells: int = 8
    ks: int = 3
    stem_type: int = 0
    stem_pool: bool = False
    norm: str | None = "bn"
    preproc: bool = True
    C_mult: int = 2
    fc_layers: int = 1
    fc_dim: int = 256
    glob_avg: bool = True
    imagenet_stride: int = 4
    num_classes: int = 10
    input_size: int = 32
    naming: str = "ghn3"

    def __post_init__(self) -> None:
        concats = (self.genotype.normal_concat, self.genotype.reduce_concat)
        if not self.preproc and (self.C_mult > 1 or max(map(len, concats)) > 1):
            raise ValueError("preproc=False needs C_mult=1 and cells that output one state: widths would not agree")
        if self.norm not in ("bn", None):
            raise ValueError(f"norm is 'bn' or None, not {self.norm!r}")
        if self.naming not in NAMINGS:
            raise ValueError(f"naming is one of {NAMINGS}, not {self.naming!r}")

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # leaves cached values behind

    @property
    def identity(self) -> tuple:
        """Everything but widths, classes and image size, the same whichever way round the terms of a sum are."""
        g = self.genotype
        cells = [tuple(tuple(sorted(cell[j : j + 2])) for j in range(0, len(cell), 2)) for cell in (g.normal, g.reduce)]
        # the first convolution of a transformer takes none of the stem's arguments
        stem = () if self.is_vit else (self.ks, self.stem_type, bool(self.stem_pool))
        rest = (self.n_cells, self.norm, bool(self.preproc), self.C_mult, self.fc_layers, bool(self.glob_avg))
        return cells, g.normal_concat, g.reduce_concat, stem, rest

    @cached_property
    def is_vit(self) -> bool:
        """Whether there is attention anywhere, which makes the whole network keep one resolution."""
        return "msa" in self.genotype.names

    @property
    def stem(self) -> Stem:
        """What the network's stem depends on."""
        return Stem(
            self.C, self.ks, self.stem_type, self.stem_pool, self.norm is not None, self.preproc, self.is_vit,
            self.input_size >= IMAGENET_FORM, self.imagenet_stride, self.input_size,
        )  # fmt: skip

    @cached_property
    def plan(self) -> Plan:
        """Channels, strides and use of every operation. Raises ValueError where 'none' cuts the network in two."""
        return plan(self)

    @cached_property
    def graph(self) -> Graph:
        """The graph, composed from the genotype without building a module; equal to that of the traced network."""
        return compose(self)

    @cached_property
    def num_params(self) -> int:
        """Number of scalars in the network's parameters."""
        return count_parameters(self)

    def build(
        self,
        num_classes: int | None = None,
        input_size: int | None = None,
        device: str | torch.device | None = "meta",
        track_running_stats: bool = False,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> Network:
        """The network as a plain module: (B, 3, H, W) -> logits (B, classes).

        Args:
            num_classes, input_size: other than the architecture's own.
            device: "meta" allocates nothing, for networks whose parameters are predicted.
            track_running_stats: for ordinary training; otherwise batch norms use the statistics of the batch.
            auxiliary: adds a second classifier; training mode then returns (logits, auxiliary logits).
            drop_path: probability of dropping an operation's output, in training mode.
        """
        return Network(self.adapted(num_classes, input_size), device, track_running_stats, auxiliary, drop_path)

    def adapted(self, num_classes: int | None = None, input_size: int | None = None) -> Architecture:
        """The architecture for another number of classes or size of images; None leaves as is."""
        changes = {"num_classes": num_classes or self.num_classes, "input_size": input_size or self.input_size}
        same = all(getattr(self, name) == value for name, value in changes.items())
        return self if same else replace(self, **changes)


def keep_resolution(net: nn.Module) -> None:
    """Make a torchvision network fit for images of 32 pixels, in place, before it is traced (GHN-3, CIFAR).

    First convolutions of ResNets and DenseNets become their central 3x3 positions; the first convolution (of MobileNets
    those of five blocks) has stride 1, the first max pooling (of VGG those of ten layers) is gone. Others stay.
    """
    from torchvision import models  # takes seconds, and only torchvision's networks need it

    strided: list[nn.Module] = []
    match net:
        case models.ResNet():
            net.conv1, net.maxpool = _central(net.conv1), nn.Identity()
        case models.DenseNet():
            net.features.conv0, net.features.pool0 = _central(net.features.conv0), nn.Identity()
        case models.VGG():
            for i in (i for i, layer in enumerate(net.features[:10]) if isinstance(layer, nn.MaxPool2d)):
                net.features[i] = nn.Identity()
        case models.AlexNet():
            strided, net.features[2] = [net.features[0]], nn.Identity()
        case models.ShuffleNetV2():
            strided, net.maxpool = [net.conv1], nn.Identity()
        case models.GoogLeNet():
            strided, net.maxpool1 = [net.conv1], nn.Identity()
        case models.MobileNetV2() | models.MobileNetV3():
            strided = [net.features[:5]]
        case models.MNASNet():
            strided = [net.layers[0]]
        case models.ConvNeXt():
            strided = [net.features[0]]
    for layer in (layer for part in strided for layer in part.modules() if isinstance(layer, nn.Conv2d)):
        layer.stride = (1, 1)


def _central(conv: nn.Conv2d) -> nn.Conv2d:
    """A 7x7 convolution cut to its central 3x3 positions, stride 1."""
    cut = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    cut.weight = nn.Parameter(conv.weight.detach()[:, :, 2:5, 2:5].clone())
    return cut


def _small_resnet(num_classes: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes)
    net.maxpool = nn.Identity()
    return net


def _small_convnext(num_classes: int) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)], num_classes=num_classes)


def _small_swin(num_classes: int) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"patch_size": [2, 2], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return SwinTransformer(**sizes, stochastic_depth_prob=0.0, num_classes=num_classes)


SMALL = {"small-resnet": _small_resnet, "small-convnext": _small_convnext, "small-swin": _small_swin}
"""Small networks of torchvision's families, for images of 16 pixels and more: name -> constructor."""


@dataclass(frozen=True)
class TorchvisionNetwork:
    """A classifier of torchvision, by name or a key of ``SMALL``, behind the interface of ``Architecture``.

    For images below 64 pixels those of torchvision ``keep_resolution``.
    """

    num_classes: int = 10
    input_size: int = 32
    name: str = "resnet50"

    @property
    def graph(self) -> Graph:
        """The traced graph."""
        return Graph.from_module(self.build().eval(), (3, self.input_size, self.input_size))

    @property
    def num_params(self) -> int:
        """Number of scalars in the network's parameters."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def build(self, num_classes=None, input_size=None, device="meta", track_running_stats=False, auxiliary=False,
              drop_path=0.0) -> nn.Module:  # fmt: skip
        """As ``Architecture.build``. Raises ValueError for an unknown name, an auxiliary head or drop path."""
        from torchvision import models  # takes seconds, and only this needs it

        if auxiliary or drop_path:
            raise ValueError(f"{self.name} has no auxiliary head and no drop path")
        size = input_size or self.input_size
        slow = {"init_weights": False} if self.name in ("googlenet", "inception_v3") else {}  # minutes of drawing
        make = SMALL.get(self.name, partial(models.get_model, self.name, **slow))
        with torch.device(device or "cpu"):
            net = make(num_classes=num_classes or self.num_classes)
            if size < IMAGENET_FORM and self.name not in SMALL:
                keep_resolution(net)
        if not track_running_stats:
            stop_tracking(net)
        net.expected_input_sz = size
        return net

    def adapted(self, num_classes: int, input_size: int) -> TorchvisionNetwork:
        """As ``Architecture.adapted``."""
        return replace(self, num_classes=num_classes, input_size=input_size)


def stop_tracking(net: nn.Module) -> None:
    """Make batch norms use the statistics of the batch in every mode."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _searched(name: str, input_size: int, **arguments) -> Architecture:
    """A published genotype as its paper trains it: 20 cells on CIFAR, 14 on ImageNet."""
    C, n_cells = (48, 14) if input_size >= IMAGENET_FORM else (36, 20)
    return Architecture(GENOTYPES[name], C, n_cells, stem_type=1, input_size=input_size, **arguments)


PREDEFINED = {
    0: lambda num_classes, input_size, naming: TorchvisionNetwork(num_classes, input_size),
    1: lambda **sizes: Architecture(GENOTYPES["ViT"], C=128, n_cells=12, preproc=False, C_mult=1, **sizes),
    2: partial(_searched, "DARTS"),
    3: partial(_searched, "PDARTS"),
}
"""The split "predefined" by index."""
