"""Encoders: from a meta-batch of graphs to one state per node.

Shapes: B graphs, n nodes of one graph, N = sum of n, d hidden size, k heads, P = largest n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.graph import PRIMITIVES, Graph

NO_SHAPE = -1


def truncated_distances(graph: Graph, cutoff: int) -> Tensor:
    """int64 (n, n): ``graph.distances`` with everything beyond the cutoff (50; 1 without virtual edges) removed."""
    distances = torch.from_numpy(graph.distances).long()
    return distances.masked_fill_(distances > cutoff, 0)


def _channel_values(num_classes: int) -> np.ndarray:
    return np.unique([1, 3, num_classes, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)])


def _spatial_values(max_side: int) -> np.ndarray:
    return np.unique([*range(1, max(12, max_side), 2), 14, 16])


def _nearest(values: np.ndarray, largest: int) -> np.ndarray:
    """Index of the nearest value for 0..largest; ties go to the smaller value."""
    return np.abs(np.arange(largest + 1)[:, None] - values[None]).argmin(1)


class NodeEmbedding(nn.Module):
    """Primitive and shape embeddings, x_v = E_op + [E_out; E_in; E_h; E_w] (PPUDA appendix B).

    The last row of each shape table stands for "no shape". Channels 4 to 7 read the row of 8, side 2 that of 3.
    """

    def __init__(self, hid: int, num_classes: int, max_side: int):
        super().__init__()
        channels, sides = _channel_values(num_classes), _spatial_values(max_side)
        self.op = nn.Embedding(len(PRIMITIVES), hid)
        self.channel = nn.Embedding(len(channels) + 1, hid // 4)
        self.spatial = nn.Embedding(len(sides) + 1, hid // 4)
        self._channel_row = _nearest(channels, 8192)
        self._channel_row[4:8] = np.searchsorted(channels, 8)
        self._spatial_row = _nearest(sides, 16)
        self._spatial_row[2] = np.searchsorted(sides, 3)

    def forward(self, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) for the nodes of all graphs, one graph after the other."""
        device = self.op.weight.device
        nodes = [node for graph in graphs for node in graph.nodes]
        ops = torch.tensor([PRIMITIVES.index(node.op) for node in nodes], device=device)
        shapes = np.array([_four_dimensional(node.shape) for node in nodes])
        channel, spatial = self._rows(shapes)
        channel = self.channel(torch.from_numpy(channel).to(device)).flatten(1)
        spatial = self.spatial(torch.from_numpy(spatial).to(device)).flatten(1)
        return self.op(ops) + torch.cat([channel, spatial], 1)

    def _rows(self, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        channel = self._channel_row[shapes[:, :2].clip(0, 8192)]
        spatial = self._spatial_row[shapes[:, 2:].clip(0, 16)]
        missing = shapes[:, :2] == NO_SHAPE
        channel[missing] = self.channel.num_embeddings - 1
        spatial[missing] = self.spatial.num_embeddings - 1
        return channel, spatial


def _four_dimensional(shape: tuple[int, ...] | None) -> tuple[int, int, int, int]:
    """(out, in, h, w) of a tensor; a positional encoding (1, n, c) reads as (1, c, sqrt(n), sqrt(n))."""
    if shape is None:
        return (NO_SHAPE,) * 4
    if len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] > 1:
        side = int(shape[1] ** 0.5)
        return 1, shape[2], side, side
    return (*shape, *(1,) * (4 - len(shape)))  # type: ignore[return-value]


def _two_layer_mlp(sizes: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]), nn.ReLU())


class MLP(nn.Module):
    """The baseline without edges: two layers applied to each node (PPUDA section 4, "MLP")."""

    def __init__(self, hid: int):
        super().__init__()
        self.fc = _two_layer_mlp((hid, hid, hid))

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        return self.fc(x)


class GatedGNN(nn.Module):
    """Gated graph network with a forward and a backward sweep over the DAG (GHN 2018 eq. 3-4, PPUDA eq. 3-4).

    ``m_v = sum_{u->v} mlp(h_u) + sum_{u~>v} mlp_ve(h_u) / distance(u, v)``, ``h_v = GRU(m_v, h_v)``, where the
    second sum (virtual edges) includes the one-hop neighbours, as in the released hypernetworks. All nodes of
    one topological level are updated at once: equal to updating node by node in any topological order.
    """

    def __init__(self, hid: int, virtual_edges: bool, cutoff: int, steps: int = 1):
        super().__init__()
        hidden = hid // 2 if virtual_edges else hid
        self.mlp = _two_layer_mlp((hid, hidden, hid))
        self.mlp_ve = _two_layer_mlp((hid, hidden, hid)) if virtual_edges else None
        self.gru = nn.GRUCell(hid, hid)
        self.cutoff, self.steps = cutoff, steps

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        distances = torch.block_diag(*(truncated_distances(graph, self.cutoff) for graph in graphs))
        sweeps = [_Sweep(distances, _levels(graphs, forward=True), self.mlp_ve is not None)]
        sweeps += [_Sweep(distances.T, _levels(graphs, forward=False), self.mlp_ve is not None)]
        for sweep in sweeps * self.steps:
            x = self._run(sweep, x)
        return x

    def _run(self, sweep: _Sweep, x: Tensor) -> Tensor:
        """Update all nodes, level by level; each level sends its messages to all later ones at once."""
        x, gru = x[sweep.order], self.gru
        d, sizes = x.shape[1], sweep.sizes
        w_gates, w_new = gru.weight_ih.T.split([2 * d, d], 1)
        b_gates, b_new = gru.bias_ih.split([2 * d, d])
        own_gates, own_new = F.linear(x, gru.weight_hh, gru.bias_hh).split([2 * d, d], 1)  # the state's part
        own = zip(x.split(sizes), (own_gates + b_gates).split(sizes), own_new.split(sizes))
        (w1, b1), (w2, b2) = self._message_layers()
        inbox, updated = torch.zeros_like(x), []
        for size, (state, gates, new), weights in zip(sizes, own, sweep.weights.to(x).split(sweep.widths, 1)):
            received, inbox = inbox[:size], inbox[size:]
            reset, update = torch.addmm(gates, received, w_gates).sigmoid_().chunk(2, 1)
            new = torch.addcmul(torch.addmm(b_new, received, w_new), reset, new).tanh_()
            updated.append(torch.lerp(new, state, update))
            if len(inbox):
                messages = torch.addmm(b2, torch.addmm(b1, updated[-1], w1).relu_(), w2).relu_()
                inbox = torch.addmm(inbox, weights[-len(inbox) :], messages.view(-1, d))
        return torch.cat(updated)[sweep.inverse]

    def _message_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Two layers, (n, d) -> (n, d), or (n, 2d) with the message along virtual edges beside that along edges."""
        if self.mlp_ve is None:
            return [(layer.weight.T, layer.bias) for layer in (self.mlp[0], self.mlp[2])]
        (first, second), (first_ve, second_ve) = ((mlp[0], mlp[2]) for mlp in (self.mlp, self.mlp_ve))
        return [
            (torch.cat([first.weight, first_ve.weight]).T, torch.cat([first.bias, first_ve.bias])),
            (torch.block_diag(second.weight, second_ve.weight).T, torch.cat([second.bias, second_ve.bias])),
        ]


class _Sweep:
    """What one direction needs: nodes sorted by level and the weights of messages between them.

    Args:
        distances: (N, N), sender x receiver.
        levels: (N,) of each node.
        virtual: whether there are messages along virtual edges, weighted by 1 / distance.
    """

    def __init__(self, distances: Tensor, levels: np.ndarray, virtual: bool):
        self.sizes = np.bincount(levels).tolist()
        self.order = torch.from_numpy(np.argsort(levels, kind="stable"))
        self.inverse = torch.argsort(self.order)
        distances = distances.T[self.order][:, self.order]
        self.widths = [size * (2 if virtual else 1) for size in self.sizes]  # columns of each level
        self.weights = (distances == 1).float()  # (N, N), or (N, 2N) with two columns a sender
        if virtual:
            inverse = torch.where(distances > 0, 1 / distances.float(), 0.0)
            self.weights = torch.stack([self.weights, inverse], 2).flatten(1)


def _levels(graphs: Sequence[Graph], forward: bool) -> np.ndarray:
    """(N,) length of the longest path from a source (or, backward, to a sink)."""
    levels = []
    for graph in graphs:
        level = [0] * len(graph)
        edges = graph.edges[np.argsort(graph.edges[:, 1], kind="stable")]
        if not forward:
            edges = graph.edges[np.argsort(-graph.edges[:, 0], kind="stable")][:, ::-1]
        for source, target in edges.tolist():
            level[target] = max(level[target], level[source] + 1)
        levels += level
    return np.array(levels)


class Graphormer(nn.Module):
    """Stack of pre-norm attention layers over the nodes of a graph (GHN-3 section 4.1).

    Node states gain embeddings of in-degree, out-degree and distance from the input; every attention score
    gains a bias learned from the distances in both directions, computed once and shared by all layers.
    """

    def __init__(self, hid: int, layers: int, heads: int, cutoff: int):
        super().__init__()
        self.in_degree = nn.Embedding(101, hid)
        self.out_degree = nn.Embedding(101, hid)
        self.input_distance = nn.Embedding(1001, hid)
        self.edge = nn.Embedding(257, hid)
        self.edge_bias = nn.Sequential(nn.Linear(2 * hid, hid), nn.ReLU(), nn.Linear(hid, heads))
        self.layers = nn.ModuleList(GraphormerLayer(hid, heads) for _ in range(layers))
        self.cutoff = cutoff

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        sizes = [len(graph) for graph in graphs]
        distances = [truncated_distances(graph, self.cutoff) for graph in graphs]
        x = x + self._centrality(distances)
        bias = self._attention_bias(distances)
        x = nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)  # (B, P, d)
        for layer in self.layers:
            x = layer(x, bias)
        return torch.cat([states[:size] for states, size in zip(x, sizes)])

    def _centrality(self, distances: list[Tensor]) -> Tensor:
        """(N, d). Only one-hop edges count as degree; unreachable nodes have distance 0."""
        device = self.edge.weight.device
        in_degree = torch.cat([(d == 1).sum(0) for d in distances]).clamp(max=100).to(device)
        out_degree = torch.cat([(d == 1).sum(1) for d in distances]).clamp(max=100).to(device)
        from_input = torch.cat([d[0] for d in distances]).clamp(max=1000).to(device)
        return self.in_degree(in_degree) + self.out_degree(out_degree) + self.input_distance(from_input)

    def _attention_bias(self, distances: list[Tensor]) -> Tensor:
        """(B, k, P, P), -2^15 where a node is padding.

        In a DAG at most one of the distances i -> j and j -> i is non-zero, so the bias takes 2 * cutoff + 1
        values a head: they are computed once and looked up.
        """
        c, device = self.cutoff, self.edge.weight.device
        steps = torch.arange(1, c + 1, device=device)
        zeros = torch.zeros_like(steps)
        forward = torch.cat([zeros[:1], steps, zeros])
        backward = torch.cat([zeros[:1], zeros, steps])
        # Rows 0 and 1 of the table are unused: "no edge" is row 2, distance s is row s + 2.
        table = self.edge_bias(torch.cat([self.edge(forward + 2), self.edge(backward + 2)], 1))  # (2c + 1, k)
        table = torch.cat([table, table.new_full((1, table.shape[1]), -(2.0**15))])
        largest = max(len(d) for d in distances)
        rows = torch.full((len(distances), largest, largest), 2 * c + 1)
        for row, d in zip(rows, distances):
            row[: len(d), : len(d)] = d + torch.where(d.T > 0, d.T + c, 0)
        return F.embedding(rows.to(device), table).permute(0, 3, 1, 2)


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
