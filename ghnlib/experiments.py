"""Computations of single reports: statistics of splits, yardsticks trained from random initialisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import networkx as nx
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor

from ghnlib.architectures import Architecture
from ghnlib.data import ImageSplits
from ghnlib.deepnets import DeepNets
from ghnlib.finetuning import Run, SGDRecipe, initial_network, run_all, train_network
from ghnlib.graph import PRIMITIVES
from ghnlib.images import ImageSet, mix
from ghnlib.jobs import augmentation_of

OUT_OF_DISTRIBUTION = ("wide", "deep", "dense", "bnfree")


def split_statistics(split: str, architectures: DeepNets) -> pd.DataFrame:
    """One row an architecture: ``split``, ``index``, ``nodes``, mean ``degree`` (undirected, 2E/N), ``depth`` (longest
    path), ``parameters``, ``bn_free``, ``attention``, ``squeeze_excitation``, and the number of each primitive.
    """
    rows = []
    for index, architecture in enumerate(architectures):
        graph = architecture.graph
        counts = Counter(node.op for node in graph.nodes)
        rows.append({
            "split": split, "index": index, "nodes": len(graph), "degree": 2 * len(graph.edges) / len(graph),
            "depth": nx.dag_longest_path_length(graph.to_networkx()), "parameters": architecture.num_params,
            "bn_free": architecture.norm is None, "attention": "msa" in counts, "squeeze_excitation": "cse" in counts,
            **{op: counts[op] for op in PRIMITIVES},
        })  # fmt: skip
    return pd.DataFrame(rows)


def train_from_random(
    architectures: Sequence[Architecture],
    images: ImageSplits,
    data: Mapping,
    evaluate: Mapping,
    seed: int,
    processes: int,
) -> pd.DataFrame:
    """Yardsticks of the ``evaluate`` section on the first test architectures: random parameters, one epoch, all.

    Returns:
        Rows like those of ``evaluate_predictions``, with ``method`` and ``split``.
    """
    epoch = len(images.train) // evaluate["train_batch_size"]
    results = []
    for name, count, epochs in (
        ("random", evaluate["random_networks"], 0),
        ("SGD, 1 epoch", evaluate["trained_networks"], 1),
        (f"SGD, {evaluate['epochs']} epochs", evaluate["trained_networks"], evaluate["epochs"]),
    ):
        recipe = SGDRecipe(epochs * epoch, evaluate["lr"], evaluate["train_batch_size"], augment=augmentation_of(data))
        runs = [
            Run(a, recipe, seed, labels=(("method", name), ("index", i))) for i, a in enumerate(architectures[:count])
        ]
        results.append(run_all(runs, images.train, images.test, processes=processes))
    return pd.concat(results)[["method", "index", "accuracy"]].assign(split="test")


def random_and_trained_parameters(
    architectures: Sequence[Architecture], images: ImageSet, recipe: SGDRecipe, seed: int, processes: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Parameters of each architecture before and after training; every network has random numbers of its own."""
    tasks = (delayed(_before_and_after)(a, images, recipe, mix(seed, i)) for i, a in enumerate(architectures))
    before, after = zip(*Parallel(processes)(tasks))
    return list(before), list(after)


def _before_and_after(architecture: Architecture, images: ImageSet, recipe: SGDRecipe, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    net = initial_network(Run(architecture, recipe, seed))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train_network(net, images, recipe, seed, evaluate=lambda net: 0.0)
    return [before, {name: p.detach() for name, p in net.named_parameters()}]
