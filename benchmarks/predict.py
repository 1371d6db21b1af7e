"""Time to trace and predict torchvision networks, beside a floor: the matrix products that the values need.

    python benchmarks/predict.py [--models resnet50 vit_b_16 swin_t] [--hypernetworks ghn2 ghn3-t] [--repeats 9]

Random weights serve. Prints medians measured alternately in one run after a warm-up.
"""

import argparse
from statistics import median
from time import perf_counter

import torch
import torchvision

from ghnlib import GHN, Graph
from ghnlib.config import PRESETS
from ghnlib.graph import Role


def seconds(function) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def floor(ghn: GHN, graph: Graph) -> None:
    """The decoder's last product for every tensor, and writing the tensors once."""
    decoder, (largest_out, largest_in) = ghn.weight_decoder, ghn.config.max_shape[:2]
    for node in graph.nodes:
        if node.role in (Role.CONV, Role.LINEAR):
            out, in_ = min(node.shape[0], largest_out), min(node.shape[1], largest_in)
            positions = torch.Size(node.shape[2:]).numel()
            torch.zeros(positions, 8 * ghn.config.hid) @ decoder.conv2.weight[: out * in_].T
        if node.name:
            torch.zeros(node.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "swin_t"])
    parser.add_argument("--hypernetworks", nargs="+", default=["ghn2", "ghn3-t"], choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(f"{'network':14} {'hypernetwork':13} {'trace':>8} {'floor':>8} {'predict':>8} {'ratio':>6}   ms")
    for preset in options.hypernetworks:
        ghn = GHN({**PRESETS[preset], "num_classes": 1000})
        for model in options.models:
            with torch.device("meta"):
                net = getattr(torchvision.models, model)().eval()
            graph = Graph.from_module(net)
            times = {"trace": [], "floor": [], "predict": []}
            with torch.no_grad():
                for _ in range(options.repeats + 1):
                    times["trace"].append(seconds(lambda: Graph.from_module(net)))
                    times["floor"].append(seconds(lambda: floor(ghn, graph)))
                    times["predict"].append(seconds(lambda: ghn.predict(graph)))
            trace, bottom, predict = (1000 * median(values[1:]) for values in times.values())
            print(f"{model:14} {preset:13} {trace:8.1f} {bottom:8.1f} {predict:8.1f} {predict / bottom:6.2f}")


if __name__ == "__main__":
    main()
