"""Speed of sampling architectures with their graphs, and what a training step waits for them.

    python benchmarks/architectures.py [--count 3000] [--space paper] [--steps 3] [--batch-size 64] [--duplicates 0]

Processor time on one core, medians over tenths of the count after a warm-up; each part is the difference between runs
that end after it and before it. Then meta-training of GHN-2 on CIFAR-10 shapes with meta-batches of 8 that one worker
process makes; the memory that a split of a million takes in training; with --duplicates N, architectures of N that
equal an earlier one of the same split.
"""

import argparse
import os
from collections.abc import Callable
from itertools import islice
from statistics import median
from time import perf_counter, process_time

import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset

from ghnlib import GHN, DeepNets
from ghnlib.config import PRESETS, Recipe
from ghnlib.deepnets.splits import fingerprint
from ghnlib.training.loop import sample_meta_batch
from ghnlib.training.step import MetaTrainer

SPLITS = ("train", "val", "test", "deep", "dense", "bnfree", "search")


def microseconds(function: Callable[[int], object], indices: range) -> float:
    start = process_time()
    for i in indices:
        function(i)
    return 1e6 * (process_time() - start) / len(indices)


def speed(dataset: DeepNets, count: int) -> None:
    """Each architecture is sampled, composed and left behind before the next, as in training."""
    upto = {
        "sampling": lambda i: dataset[i],
        "graph": lambda i: dataset[i].graph,
        "distances": lambda i: dataset[i].graph.distances,
    }
    blocks = [range(block * count // 10, (block + 1) * count // 10) for block in range(11)]
    times = [[microseconds(function, block) for function in upto.values()] for block in blocks]
    sums = [median(block[i] for block in times[1:]) for i in range(len(upto))]
    for part, before, after in zip(upto, [0.0, *sums], sums):
        print(f"{part} {after - before:.0f} microseconds", end=", ")
    print(f"together {1e6 / sums[-1]:.0f} architectures a second")


class MetaBatches(IterableDataset):
    """Endless meta-batches as pairs (architecture, graph), with distances."""

    def __init__(self, architectures: DeepNets, recipe: Recipe):
        self.architectures, self.recipe = architectures, recipe

    def __iter__(self):
        position = 0
        while True:
            chosen, position = sample_meta_batch(self.architectures, self.recipe, 0, position)
            assert all(len(arch.graph.distances) for arch in chosen)
            yield [(arch, arch.graph) for arch in chosen]


def waiting(dataset: DeepNets, steps: int, batch_size: int) -> None:
    """Of the loop that trains, with its meta-batches made by a worker."""
    recipe = Recipe(meta_batch=8)
    trainer = MetaTrainer(GHN(PRESETS["ghn2"]), recipe, 1)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    batches = iter(DataLoader(MetaBatches(dataset, recipe), batch_size=None, num_workers=1))
    waits, works = [], []
    for step in range(steps + 1):
        start = perf_counter()
        pairs = next(batches)
        for arch, graph in pairs:
            vars(arch)["graph"] = graph  # travels beside the architecture, whose cached values stay behind
        waits.append(perf_counter() - start)
        trainer.step([arch for arch, _ in pairs], images, labels, seed=step)
        works.append(perf_counter() - start - waits[-1])
    wait, work = sum(waits[1:]), sum(works[1:])
    print(
        f"training step of 8 networks, {batch_size} images: {work / steps:.2f} s, {100 * wait / (wait + work):.3f} % "
    )
    print(f"of the time spent waiting ({1e3 * wait / steps:.1f} ms a step; the first: {1e3 * waits[0]:.0f} ms)")


def memory(space: str, meta_batches: int) -> None:
    """Growth of this process by a split of a million architectures and its use."""
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    for _ in islice(MetaBatches(DeepNets("train", space=space, seed=1), Recipe(meta_batch=8)), meta_batches):
        pass
    grown = (process.memory_info().rss - before) / 2**20
    print(f"a split of 1,000,000: {grown:.0f} MiB after {8 * meta_batches} architectures in random order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 3000), ("steps", 3), ("batch-size", 64), ("duplicates", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--space", default="paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory(options.space, options.count // 8)
    dataset = DeepNets("train", space=options.space, input_size=32)
    speed(dataset, options.count)
    if options.steps:
        waiting(dataset, options.steps, options.batch_size)
    for split in SPLITS if options.duplicates else ():
        size = options.duplicates if split in ("train", "search") else None
        architectures = DeepNets(split, space=options.space, size=size)
        distinct = {fingerprint(architecture) for architecture in architectures}
        print(f"{split}: {len(architectures) - len(distinct)} of {len(architectures)} equal an earlier one")


if __name__ == "__main__":
    main()
