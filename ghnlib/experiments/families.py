"""Networks of torchvision's families, trained beside those of DeepNets: fine-tuned, and transferred."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from typing import Self

import pandas as pd

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.data.images import DataError
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import CLASS_ROLES
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.kept import rows_kept
from ghnlib.reporting.statistics import counted
from ghnlib.training.networks import diverged

DEEPNETS = "DeepNets"
"""The family of the architectures that are drawn, beside torchvision's."""


@dataclass(frozen=True)
class TrainedFamilies:
    """Networks trained from several initialisations. ``rows``: of ``run_all``, with ``initialisation``, ``network``,
    ``family`` and ``training``: which training of the hypernetworks a run's seed stands for, on every side."""

    rows: pd.DataFrame

    def scored_by(self, metric: str) -> Self:
        """The same with another metric in the place of accuracy."""
        return replace(self, rows=self.rows.assign(accuracy=self.rows.get(metric, nan)))  # none has it if all diverged

    @cached_property
    def by_training(self) -> list[Self]:
        """For each training of the hypernetworks what starts from its predictions, beside the other sides' runs of the
        same seeds."""
        return [replace(self, rows=rows) for _, rows in self.rows.groupby("training")]

    @cached_property
    def failed(self) -> list[str]:
        """What the runs are called that diverged or failed."""
        return diverged(self.rows)

    @cached_property
    def counted(self) -> pd.DataFrame:
        """The rows that statistics are taken of, see ``counted``."""
        return counted(self.rows)

    @property
    def deepnets(self) -> pd.DataFrame:
        """Those of DeepNets."""
        return self.counted[self.counted["family"] == DEEPNETS]


def family_networks(
    names: Sequence[str], num_classes: int, input_size: int, ghn: GHN
) -> tuple[dict[str, NamedNetwork], dict[str, str]]:
    """Torchvision's networks of these names that can be transferred, and by name why the others cannot: unknown, not
    to be traced or predicted, without classification layer."""
    networks = {name: NamedNetwork(num_classes, input_size, name) for name in names}
    rows = rows_kept(_predicted, [({"network": name}, (network,)) for name, network in networks.items()], (ghn,))
    refused = {row.network: row.error for row in rows.itertuples() if row.error}
    return {name: network for name, network in networks.items() if name not in refused}, refused


def _predicted(network: NamedNetwork, ghn: GHN) -> dict[str, object]:
    class_layers(network.graph)
    ghn.predict(network.graph)
    return {}


def class_layers(graph: Graph) -> list[str]:
    """Names of the parameters of a network's classification layer; DataError if it has none."""
    names = [node.name for node in graph.nodes if node.role in CLASS_ROLES]
    if not names:
        last = [node.name for node in graph.nodes if node.name][-1:]
        raise DataError(f"a network without classification layer: its last parameter is {last or 'missing'}.")
    return names
