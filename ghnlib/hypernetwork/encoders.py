"""Encoders: from a meta-batch of graphs to one state per node.

Shapes: B graphs, n nodes of one graph, N = sum of n, d hidden size, k heads, P = largest n.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.config import GHNConfig
from ghnlib.graphs.graph import Graph


def truncated_distances(graph: Graph, cutoff: int) -> Tensor:
    """int64 (n, n): ``graph.distances`` with everything beyond the cutoff (50; 1 without virtual edges) removed."""
    distances = torch.from_numpy(graph.distances).long()
    return distances.masked_fill_(distances > cutoff, 0)


def two_layer_mlp(sizes: tuple[int, int, int]) -> nn.Sequential:
    """Linear layers with a ReLU after each."""
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]), nn.ReLU())


class MLP(nn.Module):
    """The baseline without edges: two layers applied to each node (PPUDA section 4, "MLP")."""

    def __init__(self, hid: int):
        super().__init__()
        self.fc = two_layer_mlp((hid, hid, hid))

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        return self.fc(x)


class Graphormer(nn.Module):
    """Stack of pre-norm attention layers over the nodes of a graph (GHN-3 section 4.1).

    Node states gain embeddings of in-degree, out-degree and distance from the input; every attention score
    gains a bias learned from the distances in both directions, computed once and shared by all layers.
    Any of it can be left out (GHN-3 Tables 5, 11); an MLP in place of the layers reads no edges.

    Misaligned ``batching`` is an error of the released code: graphs are padded to P nodes each, but the states of
    graph b are read after as many rows as the graphs before it have nodes. Only meta-batches of one graph, or of
    graphs whose predecessors all have P nodes, are not affected.
    """

    def __init__(self, config: GHNConfig):
        super().__init__()
        c, hid = config, config.hid
        self.cutoff, self.aligned = c.cutoff, c.batching == "aligned"
        self.in_degree = nn.Embedding(101, hid) if c.centrality else None
        self.out_degree = nn.Embedding(101, hid) if c.centrality else None
        self.input_distance = nn.Embedding(1001, hid) if c.input_distance else None
        self.directions = {"both": 2, "forward": 1, "none": 0}[c.directions] if c.attention else 0
        if self.directions:
            self.edge = nn.Embedding(257, hid)
            self.edge_bias = nn.Sequential(nn.Linear(self.directions * hid, hid), nn.ReLU(), nn.Linear(hid, c.heads))
        self.layers = nn.ModuleList(GraphormerLayer(hid, c.heads) for _ in range(c.layers)) if c.attention else None
        self.mlp = None if c.attention else MLP(hid)

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        distances = [truncated_distances(graph, self.cutoff) for graph in graphs]
        for table, values in self._positions(distances):
            x = x + table(values.to(x.device, non_blocking=True))
        if self.mlp is not None:
            return self.mlp(x, graphs)
        sizes = [len(graph) for graph in graphs]
        bias = self._attention_bias(distances)
        x = nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)  # (B, P, d)
        for layer in self.layers:
            x = layer(x, bias)
        if self.aligned:
            return torch.cat([states[:size] for states, size in zip(x, sizes)])
        return x.flatten(0, 1)[: sum(sizes)]

    def _positions(self, distances: list[Tensor]) -> Iterator[tuple[nn.Embedding, Tensor]]:
        """Tables of nodes' places in the graph with the rows (N,) read. Only one-hop edges count as degree;
        unreachable nodes have distance 0."""
        if self.in_degree:
            yield self.in_degree, torch.cat([(d == 1).sum(0) for d in distances]).clamp(max=100)
            yield self.out_degree, torch.cat([(d == 1).sum(1) for d in distances]).clamp(max=100)
        if self.input_distance:
            yield self.input_distance, torch.cat([d[0] for d in distances]).clamp(max=1000)

    def _attention_bias(self, distances: list[Tensor]) -> Tensor:
        """(B, k, P, P), k = 1 without edge embeddings; -2^40 (half of the lowest number in float16) where a node is
        padding: no score is left beside it.

        In a DAG at most one of the distances i -> j and j -> i is non-zero, so the bias takes 2 * cutoff + 1
        values a head: they are computed once and looked up.
        """
        c, weight = self.cutoff, self.layers[0].out.weight
        device, dtype = weight.device, weight.dtype
        table = torch.zeros(2 * c + 1, 1, device=device, dtype=dtype)
        if self.directions:
            steps = torch.arange(1, c + 1, device=device)
            zeros = torch.zeros_like(steps)
            forward = torch.cat([zeros[:1], steps, zeros])
            backward = torch.cat([zeros[:1], zeros, steps])
            # Rows 0 and 1 of the table are unused: "no edge" is row 2, distance s is row s + 2.
            ends = [self.edge(ends + 2) for ends in (forward, backward)[: self.directions]]
            table = self.edge_bias(torch.cat(ends, 1))  # (2c + 1, k)
        lowest = max(-(2.0**40), torch.finfo(dtype).min / 2)  # float16 ends at -65504
        table = torch.cat([table, table.new_full((1, table.shape[1]), lowest)])
        largest = max(len(d) for d in distances)
        rows = torch.full((len(distances), largest, largest), 2 * c + 1)
        for row, d in zip(rows, distances):
            row[: len(d), : len(d)] = d + torch.where(d.T > 0, d.T + c, 0)
        return F.embedding(rows.to(device, non_blocking=True), table).permute(0, 3, 1, 2)


class GraphormerLayer(nn.Module):
    """``x + attention(norm1(x))``, then ``x + feed_forward(norm2(x))`` (GHN-3 eq. 5-7)."""

    def __init__(self, hid: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hid), nn.LayerNorm(hid)
        self.qkv = nn.Linear(hid, 3 * hid, bias=False)
        self.out = nn.Linear(hid, hid)
        self.feed_forward = nn.Sequential(nn.Linear(hid, 4 * hid), nn.GELU(), nn.Linear(4 * hid, hid))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, P, d), bias (B, k, P, P) -> (B, P, d)."""
        x = x + self.out(self._attention(self.norm1(x), bias))
        return x + self.feed_forward(self.norm2(x))

    def _attention(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, k, P, d / k)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
