"""Computational graphs of neural networks, as graph hypernetworks read them.

Shapes used throughout: N nodes, E one-hop edges.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import networkx as nx
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path
from torch import nn

from ghnlib.graphs.nodes import CLASS_ROLES, Node
from ghnlib.graphs.tracing import trace

MAX_DISTANCE = 250
"""Longer paths are taken for none; hypernetworks read distances up to 50."""


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
        classes = [node.name for node in self.nodes if node.role in CLASS_ROLES]
        layer = f"class layer {', '.join(classes)}" if classes else "no class layer"
        return f"Graph({len(self)} nodes, {len(self.edges)} edges, {layer})"

    @classmethod
    def from_module(
        cls,
        net: nn.Module,
        input_shape: int | tuple[int, ...] | None = None,
        convention: str = "correct",
        example: Any = None,
        no_grad: bool = True,
        primitives: Sequence[str] = (),
    ) -> Self:
        """Trace any network on the meta device (PPUDA appendix A).

        Args:
            net: any module whose forward pass autograd can follow; it is not touched. Its mode counts: auxiliary
                heads that run in training mode only are nodes in that mode only. Weights that are computed from
                parameters (``torch.nn.utils.parametrize``, weight and spectral norm, pruning) are nodes under the
                name that they have without.
            input_shape: (channels, height, width), or the side of images with three channels; None: the module's
                ``expected_input_sz``, 299 pixels for Inception-v3, else 224.
            convention: "correct", or "ghn3" / "ppuda" for the graphs that the released hypernetworks expect.
            example: what to call the network with instead of one image: a tensor, a tuple of arguments, or a
                dictionary (by keyword if its keys are names of arguments, else it is the only argument).
            no_grad: what runs under ``torch.no_grad()``, as a frozen backbone may, is no part of the graph; False: it
                is like all else.
            primitives: registered ones that are known besides the papers', see ``vocabulary``.

        Raises:
            ValueError: an unknown convention or primitive, or an impossible ``input_shape``.
            TypeError: not a network.
            TraceError: the network cannot be traced; the message names the module or operation.
        """
        return cls(*trace(net, input_shape, convention, example, no_grad, primitives))

    @cached_property
    def distances(self) -> np.ndarray:
        """uint8 (N, N): directed shortest path length i -> j; 0 = itself, unreachable, or over ``MAX_DISTANCE``."""
        n = len(self)
        adjacency = csr_array((np.ones(len(self.edges)), self.edges.T), shape=(n, n))
        paths = shortest_path(adjacency, unweighted=True)
        return np.where(paths <= MAX_DISTANCE, paths, 0).astype(np.uint8)

    def to_networkx(self) -> nx.DiGraph:
        """The graph with node attributes ``op``, ``name``, ``shape`` and ``role``."""
        graph = nx.DiGraph()
        for i, node in enumerate(self.nodes):
            graph.add_node(i, op=node.op, name=node.name, shape=node.shape, role=str(node.role))
        graph.add_edges_from(self.edges.tolist())
        return graph

    def plot(self, ax=None):
        """Draw the graph coloured by primitive, in layers from the input (PPUDA Fig. 1, 5). Returns the axes."""
        from ghnlib.graphs.drawing import draw_graph

        return draw_graph(self.to_networkx(), ax)
