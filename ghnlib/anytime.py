"""Anytime prediction (GHN 2018 section 3.2): networks that are asked for an answer at any budget of FLOPs.

Networks here map images (B, 3, s, s) to a list of logits (B, classes), one an exit in order of cost, and go no further
than ``net(images, exits=k)`` asks: ``AnytimeNetwork`` and ``MSDNet``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ghnlib.data import ImageSplits
from ghnlib.evaluation import map_kept
from ghnlib.finetuning import EVALUATION_BATCH, TrainingRecipe, train_network
from ghnlib.hypernetwork import GHN
from ghnlib.images import ImageSet, mix
from ghnlib.layers import RELU, Linear, conv, make_chain, norm
from ghnlib.spaces2018 import AnytimeArchitecture


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


def exit_flops(build: Callable[..., nn.Module], side: int) -> list[int]:
    """FLOPs of an image of ``side`` pixels up to each exit. ``build``: takes ``device`` and ``track_running_stats``."""
    net, at_exits = build(device="meta", track_running_stats=True).eval(), []
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for classifier in net.classifiers:
            classifier.register_forward_hook(lambda *_: at_exits.append(counter.get_total_flops()))
        net(torch.empty(1, 3, side, side, device="meta"))
    return at_exits


def msdnet_of_flops(target: float, scales: int, layers: int, exits: int, num_classes: int, side: int) -> partial:
    """The multi-scale DenseNet with about a number of FLOPs up to its last exit, to be built: they grow about as the
    square of its growth."""
    of_growth = lambda growth: partial(MSDNet, growth, scales, layers, exits, num_classes)
    ratio = target / exit_flops(of_growth(8), side)[-1]
    return of_growth(max(1, round(8 * ratio**0.5)))


@torch.no_grad()
def exit_accuracies(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: Mapping[str, Tensor] | None = None
) -> list[float]:
    """Top-1 accuracy in percent of each exit, see ``top_accuracies``."""
    net.eval()
    correct = 0
    for x, y in images.batches(batch_size):
        logits = torch.func.functional_call(net, dict(parameters or {}), (x,))
        correct = correct + torch.stack([(exit.argmax(1) == y).sum() for exit in logits])
    return (100 * correct / len(images)).tolist()


def predicted_curves(
    ghn: GHN, architectures: Sequence[AnytimeArchitecture], images: ImageSet, processes: int = 1,
    folder: str | Path | None = None,
) -> list[pd.DataFrame]:  # fmt: skip
    """``FLOPs`` and ``accuracy`` (percent) of each exit of each network with predicted parameters. ``folder``: see
    ``map_kept``."""
    return map_kept(_predicted_curve, [(a,) for a in architectures], (ghn, images), processes, folder)


@torch.no_grad()
def _predicted_curve(architecture: AnytimeArchitecture, ghn: GHN, images: ImageSet) -> pd.DataFrame:
    accuracy = exit_accuracies(architecture.build(), images, parameters=ghn.predict(architecture.graph))
    return pd.DataFrame({"FLOPs": exit_flops(architecture.build, architecture.input_size), "accuracy": accuracy})


def trained_curves(
    builds: Sequence[Callable[..., nn.Module]], images: ImageSplits, recipe: TrainingRecipe, seed: int,
    processes: int = 1, folder: str | Path | None = None,
) -> list[pd.DataFrame]:  # fmt: skip
    """The same after training from random initialisation, on test images; NaN where the training diverged."""
    tasks = [(build, mix(seed, i)) for i, build in enumerate(builds)]
    return map_kept(_trained_curve, tasks, (images, recipe), processes, folder)


def _trained_curve(build: Callable, seed: int, images: ImageSplits, recipe: TrainingRecipe) -> pd.DataFrame:
    torch.manual_seed(seed)
    side, net = images.side, build(device="cpu", track_running_stats=True)
    test = lambda net: exit_accuracies(net, images.test, EVALUATION_BATCH)
    accuracy = train_network(net, images.train, recipe, seed, test)[recipe.steps]
    return pd.DataFrame({"FLOPs": exit_flops(build, side), "accuracy": accuracy})


def area_under(curve: pd.DataFrame, low: float, high: float, before: float) -> float:
    """Area under an accuracy-FLOPs curve from ``low`` to ``high`` FLOPs over their difference: a mean accuracy (%).

    Accuracy is ``before`` below the first exit's FLOPs, from exit to exit a straight line, then that of the last.
    """
    cost, accuracy = curve["FLOPs"].to_numpy(float), curve["accuracy"].to_numpy(float)
    budgets = np.linspace(low, high, 1001)
    return float(np.interp(budgets, cost, accuracy, left=before).mean())
