"""Networks of torchvision's families, fine-tuned and transferred beside those of DeepNets."""

from __future__ import annotations

from collections.abc import Sequence

from ghnlib.architectures.vision import TorchvisionNetwork
from ghnlib.data.images import DataError
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Role
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.kept import rows_kept


def family_networks(
    names: Sequence[str], num_classes: int, input_size: int, ghn: GHN
) -> tuple[dict[str, TorchvisionNetwork], dict[str, str]]:
    """Torchvision's networks of these names that can be transferred, and by name why the others cannot: unknown, not
    to be traced or predicted, without classification layer."""
    networks = {name: TorchvisionNetwork(num_classes, input_size, name) for name in names}
    rows = rows_kept(_predicted, [({"network": name}, (network,)) for name, network in networks.items()], (ghn,))
    refused = {row.network: row.error for row in rows.itertuples() if row.error}
    return {name: network for name, network in networks.items() if name not in refused}, refused


def _predicted(network: TorchvisionNetwork, ghn: GHN) -> dict[str, object]:
    class_layers(network.graph)
    ghn.predict(network.graph)
    return {}


def class_layers(graph: Graph) -> list[str]:
    """Names of the parameters of a network's classification layer; DataError if it has none."""
    names = [node.name for node in graph.nodes if node.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS)]
    if not names:
        last = [node.name for node in graph.nodes if node.name][-1:]
        raise DataError(f"a network without classification layer: its last parameter is {last or 'missing'}.")
    return names
