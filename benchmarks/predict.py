"""Time and memory to predict torchvision networks, beside a floor.

    python benchmarks/predict.py [--models resnet50 vit_b_16 swin_t] [--hypernetworks ghn2 ghn3-t] [--repeats 9]

The floor is what no implementation can leave out: the matrix products that the values need, on operands of their
sizes, and all predicted tensors written once. Decoder: one product a kernel size for the features, at its positions
only; one a slice of channels for the values, of all tensors that read this slice, from the matrix in place; the
class layers; the vectors. Graphormer: the layers and their attention. Gated GNN: the gates' and messages' products
of one level of the DAG after the other, since each level's need the previous one's. Biases, element-wise functions,
transposition, tiling and bookkeeping do not count.

"slice" and "all" decode one 64 x 64 x 3 x 3 convolution: the decoder's matrices sliced before multiplying, against
every channel and position computed and sliced afterwards. "trace" makes the graph with its distances. "memory" is
the peak resident set of a process that loads the weights and predicts once, less what it held before, relative to
weights and result. Random weights serve. Prints medians measured alternately in one run after a warm-up.
"""

import argparse
from collections import Counter
from multiprocessing import get_context

import numpy as np
import psutil
import torch
from memory import forget_peak, peak_bytes
from timing import medians
from torch import Tensor

from ghnlib import GHN, Graph
from ghnlib.architectures.vision import network_by_name
from ghnlib.config import PRESETS
from ghnlib.graphs.nodes import Role
from ghnlib.hypernetwork.decoders import Slice, positions
from ghnlib.hypernetwork.encoders import Graphormer
from ghnlib.hypernetwork.gatedgnn import _levels


def hypernetwork(preset: str) -> GHN:
    """Filled after construction: the initialisers of 654M parameters would take a minute."""
    with torch.device("meta"):
        ghn = GHN({**PRESETS[preset], "num_classes": 1000})
    ghn.to_empty(device="cpu")
    for parameter in ghn.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    return ghn


def product(rows: int, matrix: Tensor) -> Tensor:
    """(rows, a) @ (..., b, a)^T."""
    return torch.zeros(rows, matrix.shape[-1]) @ matrix.mT


def floor(ghn: GHN, graph: Graph) -> list[Tensor]:
    encoder_floor(ghn, graph)
    decoder_floor(ghn, graph)
    named = [node for node in graph.nodes if node.name]
    return [torch.zeros(node.shape) for node in named for _ in range(1 + bool(node.norm_bias))]


def encoder_floor(ghn: GHN, graph: Graph) -> None:
    encoder, d, n = ghn.encoder, ghn.config.hid, len(graph)
    if isinstance(encoder, Graphormer):
        for layer in encoder.layers:
            heads = torch.zeros(layer.heads, n, d // layer.heads)
            heads @ heads.mT @ heads
            for linear in (layer.qkv, layer.out, layer.feed_forward[0], layer.feed_forward[2]):
                product(n, linear.weight)
        return
    mlps = list(filter(None, (encoder.mlp, encoder.mlp_ve)))
    for forward in (True, False):
        product(n, encoder.gru.weight_hh)
        later = n
        for size in np.bincount(_levels([graph], forward)).tolist():
            product(size, encoder.gru.weight_ih)
            for mlp in mlps:
                product(size, mlp[0].weight)
                product(size, mlp[2].weight)
            later -= size
            product(later, torch.zeros(d, len(mlps) * size))  # from this level to all later ones


def decoder_floor(ghn: GHN, graph: Graph) -> None:
    decoder, vectors, largest = ghn.weight_decoder, ghn.vector_decoder, ghn.config.max_shape
    kernels: Counter = Counter()
    slices: Counter = Counter()
    for node in graph.nodes:
        if node.role == Role.POSITION and len(node.shape) == 3:  # (1, tokens, channels)
            out, in_, kernel = 1, node.shape[2], (int(node.shape[1] ** 0.5),) * 2
        elif node.name and len(node.shape) > 1:
            (out, in_), kernel = node.shape[:2], node.shape[2:] or (1, 1)
        else:
            continue
        if node.role == Role.CLASS_WEIGHT:
            out = largest[0]
            product(min(in_, largest[1]), decoder.class_layer.weight)
        kernel = min(kernel[0], largest[2]), min(kernel[1], largest[3])
        kernels[kernel] += 1
        slices[min(out, largest[0]), min(in_, largest[1])] += kernel[0] * kernel[1]
    maps = decoder.fc.weight.unflatten(0, (-1, *largest[2:]))
    for (height, width), nodes in kernels.items():
        for row in maps[:, :height, :width].unbind(1):
            product(nodes, row.transpose(0, 1))
        product(nodes * height * width, decoder.conv1.weight)
    matrices = decoder.conv2.weight.unflatten(0, largest[:2])
    for (out, in_), count in slices.items():
        product(count, matrices[:out, :in_])
    rows = sum(node.role in (Role.NORM, Role.BIAS, Role.CLASS_BIAS) for node in graph.nodes)
    product(rows, vectors.fc1.weight)
    product(rows, vectors.fc2.weight)


def sliced_before(ghn: GHN, state: Tensor) -> Tensor:
    ((_, values),) = ghn.weight_decoder([Slice((3, 3), 64, 64)], [state])
    return values


def sliced_afterwards(ghn: GHN, state: Tensor) -> Tensor:
    out, in_, *kernel = ghn.config.max_shape
    ((_, values),) = ghn.weight_decoder([Slice(tuple(kernel), out, in_)], [state])
    at = positions(3, kernel[0], ghn.config.window)
    return values.unflatten(1, kernel)[:, at, at, :64, :64]


def peak_memory(preset: str, model: str) -> float:
    """Linux only. Call it in a fresh process, whose allocator holds no memory yet."""
    graph = Graph.from_module(network_by_name(f"torchvision.models.{model}", 1000))
    before = psutil.Process().memory_info().rss
    forget_peak()
    ghn = hypernetwork(preset)
    with torch.no_grad():
        predicted = ghn.predict(graph)
    return (peak_bytes() - before) / sum(tensor.nbytes for tensor in [*ghn.parameters(), *predicted.values()])


def measure(ghn: GHN, model: str, repeats: int) -> list[float]:
    """Milliseconds: trace, floor, predict, slice, all."""
    net, state = network_by_name(f"torchvision.models.{model}", 1000), torch.randn(1, ghn.config.hid)
    graph = Graph.from_module(net)
    functions = [
        lambda: Graph.from_module(net).distances,
        lambda: floor(ghn, graph),
        lambda: ghn.predict(graph),
        lambda: sliced_before(ghn, state),
        lambda: sliced_afterwards(ghn, state),
    ]
    return [1000 * taken for taken in medians(functions, repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "swin_t"])
    parser.add_argument(
        "--hypernetworks", nargs="+", default=["ghn2", "ghn3-t"], choices=sorted({*PRESETS} - {"mlp", "ghn"})
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print("network        hypernetwork     trace    floor  predict  ratio    slice      all   ms  memory")
    for preset in options.hypernetworks:
        for model in options.models:
            with get_context("spawn").Pool(1) as pool:
                memory = pool.apply(peak_memory, (preset, model))
            with torch.no_grad():
                trace, bottom, predict, before, afterwards = measure(hypernetwork(preset), model, options.repeats)
            times = f"{trace:8.1f} {bottom:8.1f} {predict:8.1f} {predict / bottom:6.2f} {before:8.2f} {afterwards:8.1f}"
            print(f"{model:14} {preset:13} {times}      {memory:6.2f}")


if __name__ == "__main__":
    main()
