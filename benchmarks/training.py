"""Cost of a meta-training step beside its floor: forward and backward of the same networks with ordinary parameters.

    python benchmarks/training.py [--meta-batch 4] [--batch-size 32] [--image-size 16] [--steps 20]

Prints medians over steps, measured alternately in one run after a warm-up, and their ratio. One thread.
"""

import argparse
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F

from ghnlib import GHN, DeepNets
from ghnlib.config import Recipe
from ghnlib.training import MetaTrainer

ENCODERS = {
    "mlp": {"encoder": "mlp", "window": "corner"},
    "ghn2": {"encoder": "gated_gnn", "layers": 1, "window": "corner"},
    "ghn3": {"encoder": "graphormer"},
}


def seconds(function) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def train_networks(networks, images, labels) -> None:
    for net in networks:
        F.cross_entropy(net(images), labels).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("meta-batch", 4), ("batch-size", 32), ("image-size", 16), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    m, size = options.meta_batch, options.image_size
    architectures = list(
        DeepNets("train", space="small" if size < 32 else "paper", size=m * options.steps, input_size=size)
    )
    images, labels = torch.randn(options.batch_size, 3, size, size), torch.randint(10, (options.batch_size,))
    print(f"{'':6} {'floor':>9} {'step':>9} {'ratio':>6}   ms, m = {m}, {options.batch_size} images of {size} pixels")
    for name, fields in ENCODERS.items():
        trainer = MetaTrainer(GHN({"hid": 32, "max_shape": (32, 32, 11, 11), **fields}), Recipe(), 1)
        floors, steps = [], []
        for i in range(options.steps):
            batch = architectures[m * i : m * (i + 1)]
            networks = [a.build(device="cpu").train() for a in batch]
            trainer.step(batch, images, labels, seed=i)  # builds and caches the meta networks, warms up the kernels
            floors.append(seconds(lambda: train_networks(networks, images, labels)))
            steps.append(seconds(lambda: trainer.step(batch, images, labels, seed=i)))
        floor, step = 1000 * median(floors), 1000 * median(steps)
        print(f"{name:6} {floor:9.1f} {step:9.1f} {step / floor:6.2f}")


if __name__ == "__main__":
    main()
