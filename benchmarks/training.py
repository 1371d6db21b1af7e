"""Cost of a meta-training step beside its floor: forward and backward of the same networks with ordinary parameters.

    python benchmarks/training.py [--meta-batch 8] [--batch-size 64] [--image-size 32] [--steps 5] [--processes 2]
    python benchmarks/training.py --memory [--meta-batch 32]

Floor: float32, contiguous images. Floor and step run in the same processes of one thread, which share the networks as
in ``run_job``, and take turns over the same networks; prints medians, the median of the ratios, and where
the first process's time goes: processor seconds, so that others on the machine change little. ``--memory``: peak
resident memory of a step with the whole meta-batch beside that of steps with one network at a time, each in a process
of its own.
"""

import argparse
import multiprocessing
import tempfile
from collections import Counter
from functools import partial
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F
from memory import forget_peak, peak_bytes
from timing import seconds
from torch import distributed

from ghnlib import GHN, DeepNets
from ghnlib.config import PRESETS, Recipe
from ghnlib.training.loop import sample_meta_batch
from ghnlib.training.ranks import share_of_rank
from ghnlib.training.step import MetaTrainer

processor_seconds = partial(seconds, clock=process_time)


def train_networks(networks, images, labels) -> None:
    for net in networks:
        F.cross_entropy(net(images), labels).backward()


def timed(owner, name: str, spent: Counter, label: str) -> None:
    """Make a method add its seconds to ``spent[label]``."""
    method = getattr(owner, name)

    def call(*arguments, **options):
        start = process_time()
        try:
            return method(*arguments, **options)
        finally:
            spent[label] += process_time() - start

    setattr(owner, name, call)


def new_trainer(preset: str, precision: str = "float32", meta_batch: int = 1) -> MetaTrainer:
    shape = (*PRESETS[preset]["max_shape"][:2], 11, 11)
    ghn = GHN({**PRESETS[preset], "num_classes": 10, "max_shape": shape})
    return MetaTrainer(ghn, Recipe(meta_batch=meta_batch, precision=precision), 1)


def batch_of(options) -> tuple[torch.Tensor, torch.Tensor]:
    size = options.image_size
    return torch.randn(options.batch_size, 3, size, size), torch.randint(10, (options.batch_size,))


def pool_of(options, count: int) -> DeepNets:
    size = options.image_size
    return DeepNets("train", space="small" if size < 32 else "paper", size=count, input_size=size)


def compare(rank: int, options, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=options.processes)
    torch.manual_seed(0)
    images, labels = batch_of(options)
    last = images.contiguous(memory_format=torch.channels_last)  # as ImageSet gives them
    m = options.meta_batch
    for preset in options.hypernetworks:
        trainers = {p: new_trainer(preset, p, m) for p in ("float32", "bfloat16")}
        spent = {p: Counter() for p in trainers}
        for precision, trainer in trainers.items():
            for owner, name, label in (
                (trainer.ghn, "encode", "encoder"), (trainer.ghn, "forward", "predict"),
                (trainer, "_run_child", "children"), (trainer, "_add_part", "parts"), (trainer, "step", "step"),
            ):  # fmt: skip
                timed(owner, name, spent[precision], label)
        floors, steps, sampling, graphs, position = [], {p: [] for p in trainers}, [], [], 0
        pool = pool_of(options, 50 * m)
        for i in range(options.steps):
            start, position_before = process_time(), position
            batch, position = sample_meta_batch(pool, Recipe(meta_batch=m), 0, position_before)
            sampling.append(process_time() - start)
            graphs.append(processor_seconds(lambda: [a.graph.distances for a in batch]))
            mine = share_of_rank(batch, cost=lambda architecture: len(architecture.graph))
            networks = [a.build(device="cpu").train() for a in mine]
            train_networks(networks, images, labels)  # warms up the kernels
            distributed.barrier()
            floors.append(processor_seconds(lambda: (train_networks(networks, images, labels), distributed.barrier())))
            for precision, trainer in trainers.items():
                kept = dict(spent[precision])
                trainer.step(batch, last, labels, seed=i)  # builds and caches the meta networks; not counted
                spent[precision].clear()
                spent[precision].update(kept)
                distributed.barrier()
                steps[precision].append(processor_seconds(lambda: trainer.step(batch, last, labels, seed=i)))
        if rank == 0:
            report(preset, floors, steps, spent, median(sampling), median(graphs))
    distributed.destroy_process_group()


def report(preset, floors, steps, spent, sampling: float, graphs: float) -> None:
    for precision, values in steps.items():
        ratio = median(step / floor for step, floor in zip(values, floors))
        times = f"floor {median(floors):6.2f} s  step {median(values):6.2f} s  ratio {ratio:5.2f}"
        print(f"{preset:8} {precision:9} {times}")
        part = spent[precision]
        rows = {"encoder": part["encoder"], "decoder": part["predict"] - part["encoder"], "children": part["children"],
                "backward of the hypernetwork": part["parts"] - part["predict"] - part["children"],
                "optimiser and waiting for other processes": part["step"] - part["parts"]}  # fmt: skip
        whole = sum(rows.values()) or 1
        print("         " + ", ".join(f"{name} {100 * value / whole:.1f}%" for name, value in rows.items()))
    print(f"         beside the step: sampling {1000 * sampling:.0f} ms, graphs {1000 * graphs:.0f} ms", flush=True)


def peak(arguments) -> float:
    """MiB that steps need at most, over parts of a meta-batch."""
    options, preset, part = arguments
    torch.set_num_threads(1)
    images, labels = batch_of(options)
    pool = pool_of(options, 64)
    architectures = [pool[i] for i in range(options.meta_batch)]
    trainer = new_trainer(preset)
    trainer.step([pool[options.meta_batch]], images[:2], labels[:2], 0)  # the optimiser's state is there from now on
    forget_peak()
    for start in range(0, options.meta_batch, part):
        trainer.step(architectures[start : start + part], images, labels, 0)
    return peak_bytes() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("meta-batch", None), ("batch-size", 64), ("image-size", 32), ("steps", 5), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--hypernetworks", nargs="+", default=["ghn2", "ghn3-t"], choices=sorted(PRESETS))
    options = parser.parse_args()
    options.meta_batch = options.meta_batch or (32 if options.memory else 8)
    shapes = f"{options.batch_size} images of {options.image_size} pixels"
    if options.memory:
        for preset in options.hypernetworks:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as workers:
                one, whole = workers.map(peak, [(options, preset, p) for p in (1, options.meta_batch)], chunksize=1)
            print(f"{preset:8} peak at m = 1 {one:.0f} MiB, at m = {options.meta_batch} {whole:.0f} MiB, "
                  f"ratio {whole / one:.2f}   {shapes}", flush=True)  # fmt: skip
        return
    print(f"m = {options.meta_batch}, {shapes}, {options.processes} cores")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(compare, (options, f"{folder}/rendezvous"), nprocs=options.processes)


if __name__ == "__main__":
    main()
