"""Distances between architectures, as hypernetworks see them (PPUDA Tables 10 and 11, Fig. 12; GHN-orth Fig. 4), a part
of the report on analysis."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

from ghnlib.architectures.vision import NamedNetwork, without_skips
from ghnlib.experiments.analysis.properties import embed
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.reporting.publish import EVALUATED, OUT_OF_DISTRIBUTION
from ghnlib.reporting.statistics import Measured, finite

SINGLE = ("ResNet-34", "ResNet-50 without skips", "ViT")
"""Networks compared with ResNet-50, nearest first in the paper's order for GHN-2."""


def members_of(setup: Setup) -> dict[str, list[Graph]]:
    """Graphs to compare: equally many of each split, as many others of training ("reference"), single networks."""
    count, images = setup.analysis.distance_networks, setup.images
    # released files hold so many evaluation architectures and no more
    sizes = {"train": 2 * count} | dict.fromkeys(EVALUATED, None if setup.deepnets.path else count)
    members = {
        split: [a.graph for a in setup.split(split, sizes.get(split))] for split in ("train", *EVALUATED, "predefined")
    }
    members["reference"], members["train"] = members["train"][:count], members["train"][count:]
    classes, side = len(images.classes), images.side
    resnet50 = NamedNetwork(classes, side, "resnet50").build().eval()
    members["ResNet-34"] = [NamedNetwork(classes, side, "resnet34").graph]
    members["ResNet-50 without skips"] = [Graph.from_module(without_skips(resnet50), (3, side, side))]
    members["ViT"] = members["predefined"][1:2]
    members["ConvNeXt"] = [NamedNetwork(classes, max(32, side), "convnext_tiny").graph]
    return members


class Distances(NamedTuple):
    """Of one training of the hypernetworks. ``states``: hypernetwork -> members -> embeddings (networks, d); ``found``:
    hypernetwork -> "l2" to ResNet-50, mean over a split, and "frechet" to the reference; ``hungarian``: see
    ``hungarian_distance``, to ResNet-50."""

    members: dict[str, list[Graph]]
    states: dict[str, dict[str, np.ndarray]]
    found: dict[str, dict[str, dict[str, float]]]
    hungarian: dict[str, float]

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Tables 10 and 11 for GHN-2."""
        if "ghn2" not in self.found:
            return {}
        l2, frechet = self.found["ghn2"]["l2"], self.found["ghn2"]["frechet"]
        return finite({
            "distance-vit-resnet34": Measured(l2["ViT"] - l2["ResNet-34"]),
            "distance-order": Measured(float(np.diff([l2[name] for name in SINGLE]).min())),
            "frechet-nearest": Measured(frechet["nearest shifted"] - frechet["test"]),
        })  # fmt: skip

    @property
    def table(self) -> pd.DataFrame:
        """One row a split or network, columns by hypernetwork."""
        columns = {}
        for name, distances in self.found.items():
            columns[f"{name}: l2 to ResNet-50"] = distances["l2"]
            columns[f"{name}: Fréchet to train"] = distances["frechet"]
        return pd.DataFrame(columns).drop(index="nearest shifted", errors="ignore")


def orders_of(found: Sequence[Distances]) -> pd.DataFrame:
    """Single networks by their distance to ResNet-50, mean over trainings, nearest first: one row a measure."""
    measures = {"Hungarian": found[0].hungarian}
    for name in found[0].found:
        measures[name] = {single: np.mean([each.found[name]["l2"][single] for each in found]) for single in SINGLE}
    return pd.DataFrame({name: sorted(SINGLE, key=of.get) for name, of in measures.items()}).T


def compare_distances(setup: Setup) -> list[Distances]:
    """Distances between splits and single networks, for each training of the hypernetworks."""
    members = members_of(setup)
    hungarian = {name: hungarian_distance(members["predefined"][0], members[name][0]) for name in SINGLE}
    found = []
    for ghns in setup.trainings:
        states = {name: {part: embed(ghn, graphs) for part, graphs in members.items()} for name, ghn in ghns.items()}
        found.append(Distances(members, states, {name: _distances(of) for name, of in states.items()}, hungarian))
    return found


def hungarian_distance(a: Graph, b: Graph) -> int:
    """Cost of the best assignment between the nodes of two graphs (PPUDA Table 10, which leaves the cost open).

    A pair costs 1 unless its primitives and those of all neighbours agree, a node without partner 1. Neighbours count
    because only then is ResNet-34 nearer to ResNet-50 than ResNet-50 without skips, as published. The best assignment
    pairs as many equal nodes as both graphs have, so that no solver is needed.
    """
    ours, theirs = map(_neighbourhoods, (a, b))
    return max(ours.total(), theirs.total()) - (ours & theirs).total()


def _neighbourhoods(graph: Graph) -> Counter:
    before, after = ([[] for _ in graph.nodes] for _ in range(2))
    for source, target in graph.edges.tolist():
        after[source].append(graph.nodes[target].op)
        before[target].append(graph.nodes[source].op)
    return Counter((node.op, *map(tuple, map(sorted, ends))) for node, *ends in zip(graph.nodes, before, after))


def _distances(of: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    l2 = {part: float(cdist(of["predefined"][:1], of[part]).mean()) for part in ("train", *EVALUATED, *SINGLE)}
    frechet = {split: frechet_distance(of[split], of["reference"]) for split in ("train", *EVALUATED)}
    nearest = min(frechet[split] for split in OUT_OF_DISTRIBUTION)
    return {"l2": l2, "frechet": frechet | {"nearest shifted": nearest}}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` of two samples (n, d) of embeddings (PPUDA Table 11).

    Not a number for fewer than two networks; for few it is biased upwards, alike for samples of one size.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of the root is the sum of the roots of eigenvalues, also where few networks make the product singular
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum())


def two_components(
    states: Mapping[str, np.ndarray], members: Mapping[str, Sequence[Graph]]
) -> tuple[pd.DataFrame, float]:
    """Two principal components of the embeddings of splits and predefined networks: rows ``first``, ``second``,
    ``split``, ``nodes``; and the share of the variance that they hold."""
    parts = (*EVALUATED, "predefined")
    pca = PCA(2, svd_solver="full").fit(np.concatenate([states[part] for part in parts]))
    rows = [pd.DataFrame(pca.transform(states[part]), columns=["first", "second"])
            .assign(split=part, nodes=[len(graph) for graph in members[part]]) for part in parts]  # fmt: skip
    return pd.concat(rows), float(pca.explained_variance_ratio_.sum())


def extreme_pairs(states: np.ndarray) -> dict[str, tuple[int, int]]:
    """The least and the most similar two of the embeddings (networks, d), by index (PPUDA Fig. 12)."""
    between = cdist(states, states)
    others = between + np.diag([np.inf] * len(between))
    pairs = {"least similar": between.argmax(), "most similar": others.argmin()}
    return {kind: tuple(map(int, np.unravel_index(place, between.shape))) for kind, place in pairs.items()}
