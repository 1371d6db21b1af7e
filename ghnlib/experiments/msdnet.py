"""The network for any budget that anytime networks are compared with, and what leads to each exit costs.

Shapes: images (B, 3, s, s), a list of logits (B, classes), one an exit in order of cost; ``net(images, exits=k)`` goes
no further than the first k, of ``MSDNet`` as of ``AnytimeNetwork``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ghnlib.architectures.layers import RELU, Linear, conv, make_chain, norm
from ghnlib.deepnets.ghn2018 import AnytimeArchitecture


class MSDNet(nn.Module):
    """A multi-scale DenseNet (Huang et al. 2018, section 4): at scale k, maps are 2^k times smaller than the image and
    a layer adds ``growth * 2^k`` channels made from all earlier ones, half of them (k > 0) from those of scale k - 1.

    Left out: bottlenecks, the removal of fine scales in later layers, and convolutions before the classifiers, which
    read the average of the coarsest maps after each of the last ``exits`` layers.
    """

    def __init__(self, growth: int, scales: int, layers: int, exits: int, num_classes: int,
                 track_running_stats: bool = False, device=None):  # fmt: skip
        super().__init__()
        block = lambda c_in, c_out, stride: make_chain(
            [conv(c_in, c_out, 3, stride), norm(c_out), RELU], track_running_stats, device
        )
        new = [growth * 2**scale for scale in range(scales)]
        inputs = [3, *new]
        self.first = nn.ModuleList(block(inputs[k], new[k], min(2, k + 1)) for k in range(scales))
        self.same, self.finer = nn.ModuleList(), nn.ModuleList()
        for layer in range(1, layers + 1):  # maps of scale k have layer * new[k] channels
            own = [new[0], *(width // 2 for width in new[1:])]
            self.same.append(nn.ModuleList(block(layer * new[k], own[k], 1) for k in range(scales)))
            halves = (block(layer * new[k - 1], new[k] - own[k], 2) for k in range(1, scales))
            self.finer.append(nn.ModuleList([nn.Identity(), *halves]))
        places = range(layers - exits + 1, layers + 1)
        self.classifiers = nn.ModuleList(Linear((n + 1) * new[-1], num_classes, device=device) for n in places)

    def forward(self, x: Tensor, exits: int | None = None) -> list[Tensor]:
        """``exits``: how many to go to; None: all."""
        maps, logits = [], []
        for block in self.first:
            maps.append(block(maps[-1] if maps else x))
        skipped = len(self.same) - len(self.classifiers)
        for n, (same, finer) in enumerate(zip(self.same, self.finer)):
            added = [[block(m)] for block, m in zip(same, maps)]
            for k in range(1, len(maps)):
                added[k].append(finer[k](maps[k - 1]))
            maps = [torch.cat([m, *parts], 1) for m, parts in zip(maps, added)]
            if n >= skipped:
                logits.append(self.classifiers[n - skipped](maps[-1].mean((2, 3))))
            if len(logits) == exits:
                break
        return logits


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
    def of_flops(
        cls, target: float, scales: int, layers: int, exits: int, num_classes: int, input_size: int
    ) -> MSDNetArchitecture:
        """The one with about so many FLOPs up to its last exit: they grow about as the square of its growth."""
        of_growth = lambda growth: cls(growth, scales, layers, exits, num_classes, input_size)
        ratio = target / exit_flops(of_growth(8))[-1]
        return of_growth(max(1, round(8 * ratio**0.5)))

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
