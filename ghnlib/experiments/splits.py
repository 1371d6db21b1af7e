"""The report on architectures: statistics of the splits and of torchvision's networks, distances between splits."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import network_by_name, torchvision_classifiers
from ghnlib.deepnets.dataset import SPACES, DeepNets
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import PRIMITIVES
from ghnlib.measuring.kept import map_kept
from ghnlib.reporting.publish import SPLITS, published
from ghnlib.reporting.statistics import with_deviation


def statistics_of_splits(setup: Setup) -> pd.DataFrame:
    """``split_statistics`` of all splits at the profile's scale."""
    return pd.concat([split_statistics(split, setup.split(split)) for split in SPLITS])


def statistics_at_paper_scale(setup: Setup) -> pd.DataFrame:
    """``split_statistics`` of all splits of the paper's space, sampled for 32 pixels and 10 classes."""
    size = setup.architectures.networks
    return pd.concat([split_statistics(split, DeepNets(split, setup.seed, size=size)) for split in SPLITS])


def split_statistics(split: str, architectures: Iterable[Architecture]) -> pd.DataFrame:
    """One row an architecture: ``split``, ``index``, what ``graph_statistics`` returns, ``parameters``."""
    return pd.DataFrame(
        {"split": split, "index": index, **graph_statistics(a.graph), "parameters": a.num_params}
        for index, a in enumerate(architectures)
    )


def kinds_seen(space: str, seed: int, train: int, test: int) -> dict[str, float]:
    """How far test networks are made of what training networks have: of the first ``test`` networks the percentage of
    kinds, (primitive, shape, role) of a tensor, that the first ``train`` of training have, and of networks of which all
    kinds are. What is seen can be stored by kind, without a graph."""
    kinds = [[{(node.op, node.shape, node.role) for node in architecture.graph.nodes if node.shape}
              for architecture in DeepNets(split, seed, space, size=size)]
             for split, size in (("train", train), ("test", test))]  # fmt: skip
    seen, of_test = set().union(*kinds[0]), set().union(*kinds[1])
    whole = sum(of_network <= seen for of_network in kinds[1])
    return {
        "kinds seen (%)": 100 * len(of_test & seen) / len(of_test),
        "networks of seen kinds (%)": 100 * whole / test,
    }


def describe(split: str, architectures: Sequence[Architecture]) -> pd.DataFrame:
    """One row an architecture: ``split``, ``index``, ``nodes``, ``path`` (see ``graph_statistics``), ``depth`` (cells),
    ``width`` (channels C; both NaN for ResNet-50), ``parameters``, ``batch_norm``."""
    rows = split_statistics(split, architectures)
    depth, width = ([getattr(a, name, np.nan) for a in architectures] for name in ("n_cells", "C"))
    described = rows[["split", "index", "nodes", "path"]].assign(depth=depth, width=width)
    return described.assign(parameters=rows["parameters"], batch_norm=~rows["bn_free"])


def graph_statistics(graph: Graph) -> dict[str, float]:
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


def summarise(statistics: pd.DataFrame) -> pd.DataFrame:
    """One row a split of ``split_statistics``: means over its networks, some ± their population deviation."""
    splits = statistics.groupby("split", sort=False)
    share = lambda column: (100 * splits[column].mean()).round(1)
    columns = {
        "networks": splits.size(), "nodes": splits["nodes"].agg(_with_deviation),
        "degree": splits["degree"].mean().round(2), "mean path": splits["path"].agg(_with_deviation),
        "parameters (millions)": (splits["parameters"].mean() / 1e6).round(2),
        "without batch norm (%)": share("bn_free"), "attention (%)": share("attention"),
        "squeeze-and-excitation (%)": share("squeeze_excitation"),
    }  # fmt: skip
    return pd.DataFrame(columns).rename_axis(None)


_with_deviation = partial(with_deviation, ddof=0)


class Agreement(NamedTuple):
    """The largest difference between a split's mean and the published one: of ``degree``; of ``nodes``, as a share."""

    degree: float
    nodes: float


def agreement(statistics: pd.DataFrame) -> Agreement:
    """How far ``split_statistics`` at the paper's scale are from PPUDA Table 1."""
    means = statistics.groupby("split")[["degree", "nodes"]].mean()
    degree = means["degree"].round(2) - published("architectures/degree").astype(float)
    nodes = means["nodes"] / published("architectures/nodes").str.split().str[0].astype(float) - 1
    return Agreement(float(degree.abs().max()), float(nodes.abs().max()))


def composition(statistics: pd.DataFrame) -> pd.DataFrame:
    """Share (%) of each primitive among the nodes of a split: rows are splits, columns primitives."""
    counts = statistics.groupby("split", sort=False)[list(PRIMITIVES)].sum()
    return 100 * counts.div(counts.sum(axis=1), axis=0)


def distances_to_training(statistics: pd.DataFrame) -> pd.Series:
    """``assignment_cost`` of each split of ``split_statistics`` to the split "train" (PPUDA Table 11)."""
    members = dict(tuple(statistics.groupby("split", sort=False)))
    return pd.Series({split: round(assignment_cost(rows, members["train"]), 1) for split, rows in members.items()})


def assignment_cost(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Mean over pairs of the Hungarian distance of node sets (PPUDA Table 11), from rows of ``graph_statistics``.

    A pair of different primitives costs 1, a node without partner 1. The best assignment then pairs as many equal
    primitives as both graphs have, so that no solver is needed.
    """
    counts_a, counts_b = (rows[list(PRIMITIVES)].to_numpy() for rows in (a, b))
    equal = np.minimum(counts_a[:, None], counts_b).sum(-1)
    return float((np.maximum.outer(counts_a.sum(1), counts_b.sum(1)) - equal).mean())


def design_spaces(*names: str) -> pd.DataFrame:
    """What spaces of ``SPACES`` are drawn from (PPUDA Table 7): a column a space, a row a field. Rows "SPLIT: FIELD"
    are what a split changes; blank where a space has nothing to say."""
    columns = {}
    for name in dict.fromkeys(names):
        fields = asdict(SPACES[name])
        variations = fields.pop("variations")
        changed = {f"{split}: {key}": value for split, own in variations.items() for key, value in own.items()}
        columns[name] = fields | changed
    return pd.DataFrame(columns).map(_in_words)


def _in_words(value: object) -> str:
    if isinstance(value, tuple) and isinstance(value[0], str):  # some operations are drawn more often
        return ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in Counter(value).items())
    if isinstance(value, tuple):
        return ", ".join(map(_in_words, value))
    return "" if value is None or value != value else f"{value:,}" if isinstance(value, int) else str(value)


def smallest(architectures: Iterable[Architecture], most_sums: bool = False, among: int = 20) -> Architecture:
    """The architecture of fewest nodes among the first ones; ``most_sums``: of those whose cells have most sums."""
    sums = lambda a: len(a.genotype.normal) if most_sums else 0
    return min(islice(architectures, among), key=lambda a: (-sums(a), len(a.graph)))


def torchvision_statistics(setup: Setup) -> pd.DataFrame:
    """One row a classifier of torchvision, with 1000 classes (GHN-3 Table 3): ``network``, its name, what
    ``graph_statistics`` returns, ``parameters``."""
    names = [(name,) for name in torchvision_classifiers()]
    return pd.DataFrame(map_kept(_torchvision_row, names, (), **setup.kept))


def _torchvision_row(name: str) -> dict[str, float | str]:
    net = network_by_name(name, 1000)
    parameters = sum(p.numel() for p in net.parameters())
    statistics = graph_statistics(Graph.from_module(net))
    return {"network": name.rpartition(".")[2], **statistics, "parameters": parameters}


def summarise_torchvision(statistics: pd.DataFrame) -> pd.DataFrame:
    """``torchvision_statistics`` in one column: number of networks, degree, nodes, path, parameters."""
    degree = statistics["degree"]
    figures = {
        "networks": len(statistics), "degree": _with_deviation(degree),
        "degree, range": f"{degree.min():.1f} to {degree.max():.1f}", "nodes": _with_deviation(statistics["nodes"], 0),
        "mean path": _with_deviation(statistics["path"]),
        "parameters (millions)": round(statistics["parameters"].mean() / 1e6, 1),
    }  # fmt: skip
    return pd.DataFrame({"torchvision": figures})


def predefined_statistics(setup: Setup) -> pd.DataFrame:
    """``nodes`` and ``degree`` of the split "predefined", ResNet-50 and ViT, for the images of the profile."""
    rows = split_statistics("predefined", setup.split("predefined"))
    return rows[["nodes", "degree"]].round(2).set_axis(["ResNet-50", "ViT"])
