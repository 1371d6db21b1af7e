"""The network for any budget that anytime networks are compared with, and what leads to each exit costs.

Shapes: images (B, 3, s, s), a list of logits (B, classes), one an exit in order of cost; ``net(images, exits=k)`` goes
no further than the first k, of ``MSDNet`` as of ``AnytimeNetwork``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ghnlib.architectures.layers import RELU, Linear, conv, make_chain, norm
from ghnlib.deepnets.ghn2018 import AnytimeArchitecture

Block = Callable[..., nn.Sequential]


class MSDNet(nn.Module):
    """A multi-scale DenseNet (Huang et al. 2018, section 4): at scale k, maps are 2^k times smaller than the image and
    a layer adds ``growth * 2^k`` channels made from all earlier ones, half of them from those of the next finer scale.

    As published: 1x1 bottlenecks, two strided convolutions before each classifier (with five times the channels that
    the coarsest scale grows by, about the paper's 128 for 24), and layers in as many parts as there are scales, from
    one to the next of which the finest scale goes and 1x1 convolutions halve the channels. Classifiers read the
    coarsest maps after each of the last ``exits`` layers, of a few layers instead of the paper's dozens.
    """

    def __init__(self, growth: int, scales: int, layers: int, exits: int, num_classes: int,
                 track_running_stats: bool = False, device=None):  # fmt: skip
        super().__init__()

        def block(*widths: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
            """A bottleneck of the middle width, if there are three, and a convolution."""
            chain = [layer for a, b in pairwise(widths[:-1]) for layer in (conv(a, b, 1), norm(b), RELU)]
            chain += [conv(*widths[-2:], kernel, stride), norm(widths[-1]), RELU]
            return make_chain(chain, track_running_stats, device)

        new = [growth * 2**scale for scale in range(scales)]
        self.first = nn.ModuleList(block(a, b, stride=min(2, k + 1)) for k, (a, b) in enumerate(pairwise([3, *new])))
        finest = [part for part, own in enumerate(np.array_split(range(layers), scales)) for _ in own]
        self.layers, widths, self.classifiers, self.heads = nn.ModuleList(), new, nn.ModuleList(), nn.ModuleList()
        for n, (before, k) in enumerate(pairwise([0, *finest])):
            layer = MSDLayer(widths, new[k:], k, block, drop=k > before)
            widths = layer.widths
            self.layers.append(layer)
            if n >= layers - exits:
                wide = 5 * new[-1]
                self.heads.append(nn.Sequential(block(widths[-1], wide, stride=2), block(wide, wide, stride=2)))
                self.classifiers.append(Linear(wide, num_classes, device=device))

    def forward(self, x: Tensor, exits: int | None = None) -> list[Tensor]:
        """Images (B, 3, s, s) -> logits (B, classes) of each exit. ``exits``: how many to go to; None: all."""
        maps, logits = [], []
        for block in self.first:
            maps.append(block(maps[-1] if maps else x))
        skipped = len(self.layers) - len(self.classifiers)
        for n, layer in enumerate(self.layers):
            maps = layer(maps)
            if n >= skipped:
                head, classifier = self.heads[n - skipped], self.classifiers[n - skipped]
                logits.append(classifier(head(maps[-1]).mean((2, 3))))
            if len(logits) == exits:
                break
        return logits


class MSDLayer(nn.Module):
    """Maps of several scales, finest first -> the same with more channels, ``widths``; ``drop``: without the finest,
    and halved before. ``new``: channels that it adds to each, the first of them of scale ``finest``."""

    def __init__(self, widths: list[int], new: list[int], finest: int, block: Block, drop: bool):
        super().__init__()
        halved = [width // 2 for width in widths[1:]] if drop else widths
        self.drop = nn.ModuleList(block(a, b, kernel=1) for a, b in zip(widths[1:], halved)) if drop else None
        own = [new[0], *(width // 2 for width in new[1:])]
        inner = [(width, min(width, 2**k * added)) for k, (width, added) in enumerate(zip(halved, own), start=finest)]
        self.same = nn.ModuleList(block(*bottleneck, added) for bottleneck, added in zip(inner, own))
        others = zip(inner, new[1:], own[1:])
        self.finer = nn.ModuleList(block(*bottleneck, whole - half, stride=2) for bottleneck, whole, half in others)
        self.widths = [width + added for width, added in zip(halved, new)]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.drop:
            maps = [halve(m) for halve, m in zip(self.drop, maps[1:])]
        added = [[same(m)] for same, m in zip(self.same, maps)]
        for parts, finer, m in zip(added[1:], self.finer, maps):
            parts.append(finer(m))
        return [torch.cat([m, *parts], 1) for m, parts in zip(maps, added)]


@dataclass(frozen=True)
class MSDNetArchitecture:
    """An ``MSDNet`` to be built, behind the interface of ``Architecture``."""

    growth: int
    scales: int
    layers: int
    exits: int
    num_classes: int = 10
    input_size: int = 32

    @classmethod
    def of_flops(cls, target: float, **others: int) -> Self:
        """The one whose FLOPs up to its last exit are nearest. ``others``: all fields but ``growth``."""
        away = lambda growth: abs(exit_flops(cls(growth, **others))[-1] - target)
        return cls(next(growth for growth in count(1) if away(growth) <= away(growth + 1)), **others)

    def build(self, device="meta", track_running_stats: bool = False) -> MSDNet:
        """The network as a plain module, see ``Architecture.build``."""
        return MSDNet(self.growth, self.scales, self.layers, self.exits, self.num_classes, track_running_stats, device)


def exit_flops(architecture: AnytimeArchitecture | MSDNetArchitecture) -> list[int]:
    """FLOPs of an image up to each exit."""
    net, side, at_exits = architecture.build(track_running_stats=True).eval(), architecture.input_size, []
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for classifier in net.classifiers:
            classifier.register_forward_hook(lambda *_: at_exits.append(counter.get_total_flops()))
        net(torch.empty(1, 3, side, side, device="meta"))
    return at_exits
