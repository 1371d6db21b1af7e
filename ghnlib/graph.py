"""Computational graphs of neural networks, as graph hypernetworks read them.

A node is a primitive (PPUDA appendix A): a weight, a bias, a pooling, a sum. Shapes used throughout:
N nodes, E one-hop edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import networkx as nx
import numpy as np

if TYPE_CHECKING:
    from torch import nn

PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input",
    "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""The vocabulary of PPUDA; a primitive's index is its row in the op embedding."""

MAX_DISTANCE = 250
FAR = MAX_DISTANCE + 1
"""A distance over the largest, or none at all, while distances are computed."""
ONE_MORE = bytes(min(distance + 1, FAR) for distance in range(256))
NONE_FAR = bytes(distance if distance < FAR else 0 for distance in range(256))


class Role(StrEnum):
    """What a node's tensor is for. Decoding, tiling and normalisation dispatch on it."""

    CONV = "convolution"
    LINEAR = "linear"
    NORM = "norm"
    BIAS = "bias"
    CLASS_WEIGHT = "class weight"
    CLASS_BIAS = "class bias"
    POSITION = "positional encoding"
    BOTTLENECK = "bottleneck of one input"
    OPERATION = "operation"


class Node(NamedTuple):
    """One primitive. ``op``: a name of PRIMITIVES. ``name``: the parameter's qualified name, "" for operations.
    ``shape``: the parameter's shape; (1, 1, kh, kw) for pooling; None otherwise.
    ``norm_bias``: name of the norm layer's bias, which is predicted from the weight's node. ``shrink``, ``exit``: of
    anytime networks, the image's side over that of the map (0: does not apply), whether a classifier reads it.
    """

    op: str
    name: str = ""
    shape: tuple[int, ...] | None = None
    role: Role = Role.OPERATION
    norm_bias: str = ""
    shrink: int = 0
    exit: bool = False


class Graph:
    """A directed acyclic graph of primitives in topological order; node 0 is the input.

    Args:
        nodes: N nodes.
        edges: (E, 2) one-hop edges (source, target), source < target.
        skipped: parameters of the network without a node: name -> reason.

    Raises:
        ValueError: an edge does not go from an earlier to a later node.
    """

    def __init__(self, nodes: Sequence[Node], edges, skipped: dict[str, str] | None = None):
        self.nodes = tuple(nodes)
        self.edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
        self.skipped = dict(skipped or {})
        source, target = self.edges.T
        if len(self.edges) and (source.min() < 0 or target.max() >= len(self.nodes) or (source >= target).any()):
            raise ValueError(
                "every edge must go from an earlier node to a later one: sort the nodes topologically first"
            )

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"Graph({len(self)} nodes, {len(self.edges)} edges)"

    @classmethod
    def from_module(
        cls, net: nn.Module, input_shape: tuple[int, ...] | None = None, convention: str = "correct"
    ) -> Graph:
        """Trace any network on the meta device (PPUDA appendix A).

        Args:
            net: any module whose forward pass autograd can follow; it is not touched.
            input_shape: (channels, height, width); None: the module's ``expected_input_sz``, 299 pixels for
                Inception-v3, else 224.
            convention: "correct", or "ghn3" / "ppuda" for the graphs that the released hypernetworks expect.

        Raises:
            TraceError: the network cannot be traced; the message names the module or operation.
        """
        from ghnlib.tracing import trace

        return trace(net, input_shape, convention)

    @cached_property
    def distances(self) -> np.ndarray:
        """uint8 (N, N): directed shortest path length i -> j; 0 = itself, unreachable, or over 250."""
        n = len(self)
        first, others = [n] * n, {}  # of the nodes that follow; most nodes have one
        for source, target in zip(*self.edges.T.tolist()):
            if first[source] == n:
                first[source] = target
            else:
                others.setdefault(source, []).append(target)
        rows = [bytearray([FAR]) * n] * (n + 1)  # row: source, column: target; bytes are faster than arrays this short
        for source in reversed(range(n)):
            nearest = rows[first[source]]
            if source in others:
                least = np.frombuffer(nearest, np.uint8)
                for target in others[source]:
                    least = np.minimum(least, np.frombuffer(rows[target], np.uint8))
                nearest = bytearray(least)
            rows[source] = row = nearest.translate(ONE_MORE)
            row[source] = 0
        return np.frombuffer(bytearray().join(rows[:n]).translate(NONE_FAR), np.uint8).reshape(n, n)

    def to_networkx(self) -> nx.DiGraph:
        """The graph with node attributes ``op``, ``name``, ``shape`` and ``role``."""
        graph = nx.DiGraph()
        for i, node in enumerate(self.nodes):
            graph.add_node(i, op=node.op, name=node.name, shape=node.shape, role=str(node.role))
        graph.add_edges_from(self.edges.tolist())
        return graph

    def plot(self, ax=None):
        """Draw the graph coloured by primitive, in layers from the input (PPUDA Fig. 1, 5). Returns the axes."""
        from ghnlib.plots import draw_graph

        return draw_graph(self, ax)
