"""Seconds of a training step and hours of an epoch, the rows of PPUDA Table 13: ResNet-50 by SGD, hypernetworks.

    python benchmarks/speed.py [--data cifar10 imagenet] [--steps 5] [--batch-size 64] [--image-size 32]

On one device, a GPU where there is one; prints the median over steps beside the paper's seconds on a V100. What does
not fit into memory says so. Nothing is written: seconds are of this machine alone.
"""

import argparse

import torch
import torch.nn.functional as F
from timing import medians

from ghnlib import GHN, DeepNets
from ghnlib.architectures.vision import NamedNetwork
from ghnlib.config import PRESETS, Recipe
from ghnlib.training.loop import sample_meta_batch
from ghnlib.training.step import MetaTrainer

DATA = {"cifar10": (45_000, 64, 32, 10, 11), "imagenet": (1_231_167, 256, 224, 1000, 16)}
"""Training images, images a step, pixels a side, classes, side of the largest kernel."""
ROWS = [("mlp", 1), ("ghn2", 1), ("ghn2", 8)]
PAPER = {
    "cifar10": {"ResNet-50, SGD": "0.10", "mlp, m = 1": "0.32", "ghn2, m = 1": "1.16", "ghn2, m = 8": "7.17"},
    "imagenet": {"ResNet-50, SGD": "0.77", "mlp, m = 1": "0.67", "ghn2, m = 1": "1.54", "ghn2, m = 8": "out of memory"},
}


def resnet50_step(images: torch.Tensor, labels: torch.Tensor, classes: int):
    net = NamedNetwork(classes, images.shape[-1], "resnet50").build(device="cpu").to(images.device).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def meta_step(preset: str, m: int, images: torch.Tensor, labels: torch.Tensor, classes: int, side: int):
    shape = (*PRESETS[preset]["max_shape"][:2], side, side)
    ghn = GHN({**PRESETS[preset], "num_classes": classes, "max_shape": shape}).to(images.device)
    recipe = Recipe(meta_batch=m)
    trainer, pool = MetaTrainer(ghn, recipe, 1), DeepNets("train", num_classes=classes, input_size=images.shape[-1])
    position = 0

    def step() -> None:
        nonlocal position
        batch, position = sample_meta_batch(pool, recipe, 0, position)
        trainer.step(batch, images, labels, seed=position)

    return step


def report(data: str, options: argparse.Namespace) -> None:
    count, batch_size, size, classes, side = DATA[data]
    batch_size, size = options.batch_size or batch_size, options.image_size or size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)
    print(f"{data}: {batch_size} images of {size} pixels, {device}")
    steps = {"ResNet-50, SGD": lambda: resnet50_step(images, labels, classes)}
    for preset, m in ROWS:
        steps[f"{preset}, m = {m}"] = lambda preset=preset, m=m: meta_step(preset, m, images, labels, classes, side)
    for name, make in steps.items():
        try:
            (taken,) = medians([make()], options.steps)
        except torch.OutOfMemoryError:
            print(f"{name:16} out of memory   paper {PAPER[data][name]}", flush=True)
            continue
        hours = taken * (count // batch_size) / 3600
        print(f"{name:16} {taken:8.2f} s a step {hours:8.2f} h an epoch   paper {PAPER[data][name]} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    for data in options.data:
        report(data, options)


if __name__ == "__main__":
    main()
