"""A hypernetwork that predicts the parameters of small language models, trained by the same loop as one for images.

``python examples/sequences.py`` takes about two minutes on a core. The task is the next character of numbers in words.
Of the next character, frequencies alone leave 2.76 nats, and frequencies after the character before 1.25.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from ghnlib import GHN, GHNConfig
from ghnlib.architectures.language import LanguageModel
from ghnlib.config import Recipe
from ghnlib.data.sequences import Sequences, numbers_in_words
from ghnlib.training.loop import train_ghn

LENGTH = 32
UNSEEN = [(1, 24, 2), (2, 48, 4), (3, 16, 4), (2, 40, 4), (4, 32, 2), (5, 48, 4)]
"""Layers, width and heads of the models that are evaluated; the last three have a width or depth that the training has
not."""
SEEN = [shape for shape in product((1, 2, 3), (16, 24, 32, 48, 64), (2, 4)) if shape not in UNSEEN]


@torch.no_grad()
def loss(net: torch.nn.Module, sequences: Sequences) -> float:
    """Nats a character."""
    return float(np.mean([F.cross_entropy(net.eval()(x), y).item() for x, y in sequences.batches(64)]))


def compare(seed: int, steps: int, folder: str) -> dict[str, list[float]]:
    """Mean loss of each of the unseen models: with predicted and with random parameters."""
    train, test = numbers_in_words(4096, LENGTH, seed=0), numbers_in_words(256, LENGTH, seed=1)
    models = [LanguageModel(len(train.classes), LENGTH, *shape) for shape in SEEN]
    torch.manual_seed(seed)
    ghn = GHN(GHNConfig(hid=32, layers=2, heads=4, max_shape=(64, 64, 3, 3), num_classes=len(train.classes),
                        initialization="identity", primitives=models[0].primitives))  # fmt: skip
    recipe = Recipe(steps=steps, batch_size=32, meta_batch=1, lr=3e-3, clip=1.0, log_every=max(1, steps // 4))
    train_ghn(ghn.train(), models, train, recipe, folder, seed)
    losses: dict[str, list[float]] = {"predicted": [], "random": []}
    for shape in UNSEEN:
        net = LanguageModel(len(train.classes), LENGTH, *shape).build("cpu")
        losses["random"].append(loss(net, test))
        ghn.eval().initialize(net, example=next(test.batches(1))[0])
        losses["predicted"].append(loss(net, test))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings")
    options = parser.parse_args()
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(seed, options.steps, folder))
    print(f"nats a character, {options.seeds} trainings; guessing: {math.log(22):.2f}")
    for i, (layers, width, heads) in enumerate(UNSEEN):
        cells = [[losses[side][i] for losses in found] for side in ("predicted", "random")]
        told = "   ".join(f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in cells)
        print(f"{layers} layers, width {width}, {heads} heads:   predicted, random {told}")


if __name__ == "__main__":
    main()
