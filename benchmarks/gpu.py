"""What a GPU should show in half an hour, each figure beside that of the papers or of the hardware.

    python benchmarks/gpu.py [--parts parity speed predict evaluate resume] [--device cuda] [--steps 5] [--tiny]

parity: gradients of a step in float32, of each encoder, beside those of the CPU; at most 1e-4 apart, relative to the
largest of a parameter. speed: seconds of a step, peak memory beside the estimate, operator calls and waits of a step,
share of the time that the device computes; beside them forward and backward of the same networks with ordinary
parameters, which no training can leave out, and PPUDA's seconds on a V100 (Table 13). predict: parameters of ResNet-50
and ViT-L, beside the time to read the hypernetwork and write the result once. evaluate: an epoch of 10,000 images.
resume: a training stopped half-way and resumed, beside one that was not. ``--tiny``: small shapes, for a CPU.
"""

import argparse
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from counting import counted
from timing import medians, seconds
from torch.profiler import ProfilerActivity, profile

from ghnlib import GHN, DeepNets
from ghnlib.architectures.vision import network_by_name
from ghnlib.config import PRESETS, Recipe
from ghnlib.data.images import Images
from ghnlib.graphs.graph import Graph
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.training.loop import sample_meta_batch, train_ghn
from ghnlib.training.memory import describe, training_bytes
from ghnlib.training.step import MetaTrainer, allow_tf32

ENCODERS = {"MLP": "mlp", "GHN-1": "ghn1", "GHN-2": "ghn2", "GHN-3-T": "ghn3-t"}
SIZES = ["ghn2", "ghn3-t", "ghn3-s", "ghn3-l", "ghn3-xl"]
SHAPES = {"cifar10": (64, 32, 10, 11), "imagenet": (128, 224, 1000, 16)}
"""Images a step, pixels a side, classes, side of the largest kernel."""
PAPER = {("cifar10", "ghn2", 1): "1.16", ("cifar10", "ghn2", 8): "7.17", ("imagenet", "ghn2", 1): "1.54",
         ("imagenet", "ghn2", 8): "out of memory"}  # fmt: skip
"""PPUDA Table 13, seconds of a step on one V100; its ImageNet batches have 256 images."""
LIMIT = 1e-4
TINY = {"hid": 16, "layers": 1, "heads": 2, "max_shape": (16, 16, 11, 11), "num_classes": 10}


@dataclass
class Options:
    device: torch.device
    steps: int
    tiny: bool


def hypernetwork(preset: str, classes: int, side: int, options: Options, device: str | None = None) -> GHN:
    shape = (*PRESETS[preset]["max_shape"][:2], side, side)
    torch.manual_seed(0)
    values = {**PRESETS[preset], "num_classes": classes, "max_shape": shape}
    with torch.device(device or options.device):  # GHN-3-XL takes a minute on a CPU
        return GHN({**values, **TINY} if options.tiny else values)


def batch_of(options: Options, count: int, side: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    return images.to(options.device), torch.randint(classes, (count,), generator=generator).to(options.device)


def parity(options: Options) -> None:
    """Gradients of a step on the device and on the CPU."""
    allow_tf32(False)
    pool = DeepNets("train", space="small")
    for name, preset in ENCODERS.items():
        found = {}
        for device in ("cpu", options.device):
            ghn = hypernetwork(preset, 10, 11, options, "cpu").to(device)
            images, labels = (values.to(device) for values in batch_of(options, 16, 16, 10))
            MetaTrainer(ghn, Recipe(meta_batch=4, dropout=False, clip=1e9), 1).step(
                [pool[i] for i in range(4)], images, labels, 0
            )
            found[str(device)] = [
                (p.grad if p.grad is not None else torch.zeros_like(p)).cpu() for p in ghn.parameters()
            ]
        ours, expected = found[str(options.device)], found["cpu"]
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected) if b.any()]
        print(f"{name:8} largest error of a gradient {max(errors):.1e}, limit {LIMIT:.0e}: "
              f"{'as it should be' if max(errors) <= LIMIT else 'TOO LARGE'}", flush=True)  # fmt: skip


def speed(options: Options) -> None:
    """Steps of training."""
    allow_tf32(True)
    for data, (count, side, classes, kernel) in SHAPES.items():
        if options.tiny:
            count, side, classes = 2, 16 if data == "cifar10" else 32, 10
        images, labels = batch_of(options, count, side, classes)
        for preset in SIZES[:2] if options.tiny else SIZES:
            for m in (1, 2) if options.tiny else (1, 8):
                try:
                    speed_of(data, preset, m, images, labels, hypernetwork(preset, classes, kernel, options), options)
                except torch.OutOfMemoryError:
                    print(
                        f"{data} {preset} m = {m}: out of memory, paper {PAPER.get((data, preset, m), '-')}", flush=True
                    )


def speed_of(data: str, preset: str, m: int, images, labels, ghn: GHN, options: Options) -> None:
    """The lines of one hypernetwork, shape and size of the meta-batch."""
    device, side = options.device, images.shape[-1]
    precision = "bfloat16" if device.type == "cuda" else "float32"
    recipe = Recipe(meta_batch=m, batch_size=len(images), precision=precision, gamma=3e-5)
    pool = DeepNets(
        "train", space="small" if options.tiny else "paper", num_classes=ghn.config.num_classes, input_size=side
    )
    batch, _ = sample_meta_batch(pool, recipe, 0, 0)
    trainer = MetaTrainer(ghn, recipe, 1)
    told = describe(training_bytes(ghn, recipe, batch, images))
    step = partial(trainer.step, batch, images, labels, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    (taken,) = medians([step], options.steps)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else "not measured"
    with counted() as counts:
        step()
    nets = [architecture.build(device="cpu").to(device).train() for architecture in batch]

    def alone() -> None:
        for net in nets:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = net(images)
            F.cross_entropy(logits.float(), labels).backward()

    (floor,) = medians([alone], options.steps)
    waits = f"{counts['waits']} wait{'s' * (counts['waits'] != 1)}"
    lines = [
        f"{data} {preset} m = {m}: {1 / taken:.2f} steps a second, {taken:.3f} s (networks alone {floor:.3f}, ratio "
        f"{taken / floor:.2f}; paper {PAPER.get((data, preset, m), '-')})",
        f"peak {peak}, {told}",
        f"{counts['calls']} operator calls, {counts['launches']} of them no views, {waits} (limit 1), device busy "
        f"{busy(step, device)}",
    ]
    print("\n    ".join(lines), flush=True)


def busy(step, device: torch.device) -> str:
    """Share of a step in which a kernel runs (limit: 100%)."""
    if device.type != "cuda":
        return "not measured"
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        taken = seconds(step)
    kernels = sum(event.self_device_time_total for event in profiled.key_averages())
    return f"{100 * kernels / 1e6 / taken:.0f}%"


def predict(options: Options) -> None:
    """Parameters of networks of torchvision."""
    whole = torch.empty(2**24 if options.tiny else 2**29, dtype=torch.uint8, device=options.device)
    bandwidth = 2 * whole.numel() / medians([whole.clone], 5)[0]
    for preset in SIZES[1:2] if options.tiny else SIZES:
        ghn = hypernetwork(preset, 1000, 16, options)
        for name in ("resnet18",) if options.tiny else ("resnet50", "vit_l_16"):
            graph = Graph.from_module(
                network_by_name(f"torchvision.models.{name}", 1000), (3, 224, 224), ghn.config.convention
            )
            graph.distances  # noqa: B018  kept, and not timed
            with torch.no_grad():
                (taken,) = medians([lambda: ghn.predict(graph)], options.steps)
                values = ghn.predict(graph).values()
            size = sum(t.numel() * t.element_size() for t in (*values, *ghn.parameters()))
            print(f"{preset} {name}: {1000 * taken:.1f} ms (read and write once at {bandwidth / 1e9:.0f} GB/s: "
                  f"{1000 * size / bandwidth:.1f})", flush=True)  # fmt: skip


def random_images(options: Options, count: int, side: int) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return Images(labels, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, pixels).to(options.device)


def evaluate(options: Options) -> None:
    """One pass over CIFAR-10's test images, which here are noise."""
    count, side = (128, 16) if options.tiny else (10_000, 32)
    images, ghn = random_images(options, count, side), hypernetwork("ghn3-t", 10, 11, options)
    architecture = DeepNets("test", space="small" if options.tiny else "paper", input_size=side)[0]
    with torch.no_grad():
        (parameters,) = ghn([architecture.graph])
    net, found = architecture.build(device="meta"), []
    (taken,) = medians([lambda: found.append(top_accuracies(net, images, 64, parameters))], 1)
    print(f"evaluation of {count} images: {taken:.2f} s, accuracy {found[-1]['accuracy']:.1f}% (noise: 10)", flush=True)


class Stopped(Exception):
    """In place of a kill."""


def resume(options: Options) -> None:
    """A training that was stopped against one that was not."""
    allow_tf32(False)
    recipe = Recipe(steps=8, batch_size=8, meta_batch=2, log_every=2, validate_every=4)
    images, pool = random_images(options, 64, 16), list(DeepNets("train", space="small", size=12))

    def stop(_: GHN) -> dict[str, float]:
        raise Stopped

    histories = []
    with tempfile.TemporaryDirectory() as folder:
        for name, stopping in ("whole", False), ("part", True):
            if stopping:
                with suppress(Stopped):
                    train_ghn(start_of(options), pool, images, recipe, f"{folder}/{name}", 0, validate=stop)
            histories.append(train_ghn(start_of(options), pool, images, recipe, f"{folder}/{name}", 0))
    whole, part = (history["loss"] for history in histories)
    error = float(((whole - part) / whole).abs().max())
    print(f"losses of a resumed training: relative error {error:.1e} (CPU: 0; GPUs add up in any order)", flush=True)


def start_of(options: Options) -> GHN:
    torch.manual_seed(0)
    return GHN(TINY).to(options.device)


PARTS = {part.__name__: part for part in (parity, speed, predict, evaluate, resume)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    options = Options(torch.device(given.device), given.steps, given.tiny)
    for part in given.parts:
        print(f"--- {part}: {PARTS[part].__doc__}", flush=True)
        PARTS[part](options)


if __name__ == "__main__":
    main()
