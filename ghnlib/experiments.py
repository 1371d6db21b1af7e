"""Computations of single reports: statistics of splits, yardsticks trained from random initialisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path

from ghnlib.architectures import Architecture
from ghnlib.config import Recipe
from ghnlib.coverage import build, torchvision_classifiers
from ghnlib.data import ImageSplits
from ghnlib.evaluation import accuracy, flops, inference_flops, map_kept, one_line
from ghnlib.finetuning import EVALUATION_BATCH, Run, TrainingRecipe, run_all, train_network
from ghnlib.graph import PRIMITIVES, Graph
from ghnlib.hypernetwork import GHN
from ghnlib.images import ImageSet, mix
from ghnlib.initialization import INITIALIZATIONS, Sources, initialize
from ghnlib.jobs import augmentation_of

OUT_OF_DISTRIBUTION = ("wide", "deep", "dense", "bnfree")


def split_statistics(split: str, architectures: Iterable[Architecture]) -> pd.DataFrame:
    """One row an architecture: ``split``, ``index``, what ``graph_statistics`` returns, ``parameters``."""
    return pd.DataFrame(
        {"split": split, "index": index, **graph_statistics(a.graph), "parameters": a.num_params}
        for index, a in enumerate(architectures)
    )


def describe(split: str, architectures: Sequence[Architecture]) -> pd.DataFrame:
    """One row an architecture: ``split``, ``index``, ``nodes``, ``path`` (see ``graph_statistics``), ``depth`` (cells),
    ``width`` (channels C; both NaN for ResNet-50), ``parameters``, ``batch_norm``."""
    rows = split_statistics(split, architectures)
    depth, width = ([getattr(a, name, np.nan) for a in architectures] for name in ("n_cells", "C"))
    described = rows[["split", "index", "nodes", "path"]].assign(depth=depth, width=width)
    return described.assign(parameters=rows["parameters"], batch_norm=~rows["bn_free"])


def graph_statistics(graph: Graph) -> dict:
    """``nodes``, mean ``degree`` (undirected, 2E/N), ``path`` (mean shortest path between two nodes, undirected),
    ``depth`` (longest directed path), ``bn_free``, ``attention``, ``squeeze_excitation`` and the number of each
    primitive (PPUDA Fig. 6 and Table 1).
    """
    n, counts = len(graph), Counter(node.op for node in graph.nodes)
    adjacency = csr_array((np.ones(len(graph.edges)), graph.edges.T), shape=(n, n))
    path = shortest_path(adjacency, directed=False, unweighted=True).sum() / (n * (n - 1))
    shares = {"bn_free": not counts["bn"], "attention": counts["msa"] > 0, "squeeze_excitation": counts["cse"] > 0}
    depth = nx.dag_longest_path_length(graph.to_networkx())
    degree = 2 * len(graph.edges) / n
    return {"nodes": n, "degree": degree, "path": path, "depth": depth, **shares, **{p: counts[p] for p in PRIMITIVES}}


def torchvision_statistics(processes: int = 1) -> pd.DataFrame:
    """The same of torchvision's classifiers with 1000 classes, and ``network``, their name (GHN-3 Table 3)."""
    return pd.DataFrame(map_kept(_torchvision_row, [(name,) for name in torchvision_classifiers()], (), processes))


def _torchvision_row(name: str) -> dict:
    net = build(name, 1000)
    parameters = sum(p.numel() for p in net.parameters())
    statistics = graph_statistics(Graph.from_module(net))
    return {"network": name.rpartition(".")[2], **statistics, "parameters": parameters}


def summarise(statistics: pd.DataFrame, paper: Mapping[str, Mapping[str, object]]) -> pd.DataFrame:
    """One row a split of ``split_statistics``: means over its networks, some with their deviation.

    Args:
        paper: column -> split -> published value; "nodes" becomes the column "nodes, paper", beside ours.
    """
    splits = statistics.groupby("split", sort=False)
    spread = lambda column, digits: splits[column].agg(lambda n: f"{n.mean():.{digits}f} ± {n.std(ddof=0):.{digits}f}")
    share = lambda column: (100 * splits[column].mean()).round(1)
    columns = {
        "networks": splits.size(), "nodes": spread("nodes", 1), "degree": splits["degree"].mean().round(2),
        "mean path": spread("path", 1), "parameters (millions)": (splits["parameters"].mean() / 1e6).round(2),
        "without batch norm (%)": share("bn_free"), "attention (%)": share("attention"),
        "squeeze-and-excitation (%)": share("squeeze_excitation"),
    }  # fmt: skip
    table = pd.DataFrame(columns).rename_axis(None)
    for column, published in paper.items():
        (ours,) = (i for i, name in enumerate(table) if name.partition(" (")[0] == column)
        table.insert(ours + 1, f"{column}, paper", pd.Series(published))
    return table.astype(object).fillna("")


def assignment_cost(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Mean over pairs of the Hungarian distance of node sets (PPUDA Table 11), from rows of ``graph_statistics``.

    A pair of different primitives costs 1, a node without partner 1. The best assignment then pairs as many equal
    primitives as both graphs have, so that no solver is needed.
    """
    counts_a, counts_b = (rows[list(PRIMITIVES)].to_numpy() for rows in (a, b))
    equal = np.minimum(counts_a[:, None], counts_b).sum(-1)
    return float((np.maximum.outer(counts_a.sum(1), counts_b.sum(1)) - equal).mean())


def train_from_random(
    splits: Mapping[str, Sequence[Architecture]],
    images: ImageSplits,
    data: Mapping,
    evaluate: Mapping,
    seed: int,
    processes: int,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Yardsticks of the ``evaluate`` section: random parameters, one epoch, all. ``folder``: see ``map_kept``.

    Args:
        splits: of each the first architectures are trained, as many as the section asks for of "test" and of others.

    Returns:
        One row a network: ``method``, ``split``, ``index``, ``accuracy`` (percent; NaN if it diverged), ``error``.
    """
    epoch = len(images.train) // evaluate["train_batch_size"]
    runs = []
    for name, count, epochs in (
        ("random", evaluate["random_networks"], 0),
        ("SGD, 1 epoch", evaluate["trained_networks"], 1),
        (f"SGD, {evaluate['epochs']} epochs", evaluate["trained_networks"], evaluate["epochs"]),
    ):
        batch_size, augment = evaluate["train_batch_size"], augmentation_of(data)
        recipe = TrainingRecipe(epochs * epoch, evaluate["lr"], batch_size, augment=augment)
        for split, architectures in splits.items():
            few = architectures[: count if split == "test" else evaluate["ood_networks"]]
            labels = ((("method", name), ("split", split), ("index", i)) for i in range(len(few)))
            runs += [Run(a, recipe, seed, labels=label) for a, label in zip(few, labels)]
    results = run_all(runs, images.train, images.test, processes=processes, folder=folder)
    return results[["method", "split", "index", "accuracy", "error"]]


def train_chosen(
    architectures: Mapping[str, Architecture],
    images: ImageSplits,
    recipe: TrainingRecipe,
    chosen: Mapping,
    processes: int,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Train architectures plainly, and with cutout, auxiliary head and drop path (PPUDA Table 9).

    Args:
        recipe: of the plain training, with an ``augment``.
        chosen: of the section ``analysis``: ``cutout`` (pixels), ``drop_path`` (probability at the end, rises from 0),
            ``seeds``.
        folder: see ``map_kept``.

    Returns:
        One row a training: ``architecture``, ``training``, ``seed``, ``accuracy`` (percent, test images).
    """
    names = {False: "plain", True: "cutout, auxiliary head, drop path"}
    rows = [{"architecture": a, "training": names[more], "seed": seed}
            for a in architectures for more in names for seed in chosen["seeds"]]  # fmt: skip
    tasks = [(architectures[row["architecture"]], row["training"] != "plain", row["seed"]) for row in rows]
    accuracies = map_kept(_train_chosen, tasks, (images, recipe, chosen), processes, folder)
    return pd.DataFrame(rows).assign(accuracy=accuracies)


def _train_chosen(
    architecture: Architecture, more: bool, seed: int, images: ImageSplits, recipe: TrainingRecipe, chosen: Mapping
) -> float:
    torch.manual_seed(seed)
    net = architecture.build(device="cpu", track_running_stats=True, auxiliary=more)
    steps = iter(range(1, recipe.steps + 1))
    if more:
        recipe = replace(recipe, augment=replace(recipe.augment, cutout=chosen["cutout"]))
    rise = chosen["drop_path"] * more / recipe.steps
    log = lambda loss: setattr(net, "drop_path", rise * next(steps))
    test = lambda net: accuracy(net, images.test, EVALUATION_BATCH)
    return train_network(net, images.train, recipe, seed, test, log=log)[recipe.steps]


def compare_initializations(
    names: Iterable[str], architectures: Sequence[Architecture], tuning: Architecture, lrs: Sequence[float],
    images: ImageSplits, sources: Sources, recipe: TrainingRecipe, processes: int, folder: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """What initialisations (keys of ``INITIALIZATIONS``) cost and give (GHN-3 Table 6).

    Args:
        tuning, lrs: each initialisation takes the learning rate that is best for this validation architecture, on
            validation images after ``recipe.steps``.
        folder: see ``map_kept``.

    Returns:
        Rows ``initialisation``, ``network``, ``lr``, ``cost`` (FLOPs of convolutions and matrix products, in those of a
        training step; counting is slow: of the smallest graph, of GradInit and NIO one batch times their number),
        ``step`` (0 and ``recipe.steps``), ``accuracy`` (percent, test images), ``error`` ("" if none).
    """
    tasks = [(name, -1, tuning, False, lr) for name in names for lr in lrs]
    parts = map_kept(_initialised, tasks, (images.train, images.val, sources, recipe), processes, folder)
    tried = pd.DataFrame(part[-1] for part in parts)
    best = tried.loc[tried.fillna({"accuracy": 0.0}).groupby("initialisation", sort=False)["accuracy"].idxmax()]
    counted = min(range(len(architectures)), key=lambda i: len(architectures[i].graph))
    tasks = [(name, i, a, i == counted, lr)
             for name, lr in zip(best["initialisation"], best["lr"]) for i, a in enumerate(architectures)]  # fmt: skip
    rows = map_kept(_initialised, tasks, (images.train, images.test, sources, recipe), processes, folder)
    return pd.DataFrame([row for part in rows for row in part])


def _initialised(
    name: str, network: int, architecture: Architecture, counted: bool, lr: float, train: ImageSet, test: ImageSet,
    sources: Sources, recipe: TrainingRecipe,
) -> list[dict]:  # fmt: skip
    common = {"initialisation": name, "network": network, "lr": lr}
    try:
        seed = mix(sources.seed, network + 1)
        torch.manual_seed(seed)
        net = architecture.build(device="cpu", track_running_stats=True)
        own = replace(sources, graph=architecture.graph, seed=seed)
        if counted:
            batches = own.steps if "images" in INITIALIZATIONS[name][1] else 1
            once = flops(lambda: initialize(name, deepcopy(net), replace(own, steps=1)))
            common["cost"] = batches * once / (recipe.batch_size * step_flops([architecture]))
        initialize(name, net, own)
        score = lambda net: accuracy(net, test, EVALUATION_BATCH)
        values = train_network(net, train, replace(recipe, lr=lr), seed, score, (0,))
    except Exception as error:  # whatever is wrong with one network, the others are compared
        return [{**common, "step": step, "accuracy": np.nan, "error": one_line(error)} for step in (0, recipe.steps)]
    return [{**common, "step": step, "accuracy": value, "error": ""} for step, value in values.items()]


def training_costs(
    variants: Mapping[str, Mapping], hypernetworks: Mapping[str, GHN], architectures: Sequence[Architecture]
) -> pd.DataFrame:
    """What each trained hypernetwork of models/ took (GHN-3 Figs. 1 and 3, PPUDA Fig. 9).

    Returns:
        One row a variant: ``encoder``, ``hid``, ``layers``, ``steps``, ``meta_batch``, ``parameters``, ``flops`` of its
        training (of the average architecture), mean and deviation over all steps of the norm of its gradient.
    """
    rows, of_image, graphs = {}, step_flops(architectures), [a.graph for a in architectures]
    for variant, fields in variants.items():
        ghn, recipe = hypernetworks[variant], Recipe(**fields["recipe"])
        predicting = flops(lambda ghn=ghn: [ghn([graph], predict_class_layers=True) for graph in graphs])
        of_network = recipe.batch_size * of_image + 3 * predicting / len(graphs)
        history = pd.read_csv(f"models/{variant}/history.csv")
        mean = history["grad_norm"].mean()
        square = (history["grad_norm"] ** 2 + history["grad_norm_deviation"] ** 2).mean()
        rows[variant] = {
            "encoder": ghn.config.encoder,
            "hid": ghn.config.hid,
            "layers": ghn.config.layers,
            "steps": recipe.steps,
            "meta_batch": recipe.meta_batch,
            "parameters": sum(p.numel() for p in ghn.parameters()),
            "flops": recipe.steps * recipe.meta_batch * of_network,
            "grad_norm": mean,
            "grad_norm_deviation": max(0.0, square - mean**2) ** 0.5,
        }
    return pd.DataFrame(rows).T.infer_objects()


def step_flops(architectures: Sequence[Architecture]) -> float:
    """FLOPs of a training step of the average network, for each image: three forward passes (backward takes two)."""
    return 3 * sum(map(inference_flops, architectures)) / len(architectures)
