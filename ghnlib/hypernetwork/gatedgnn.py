"""The gated graph network of GHN-1 and GHN-2.

Shapes: n nodes of one graph, N = sum of n over the graphs of a meta-batch, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ghnlib.config import GHNConfig
from ghnlib.graphs.graph import Graph
from ghnlib.hypernetwork.encoders import truncated_distances, two_layer_mlp

GROUP_NODES = 4096
"""Nodes of the graphs that are propagated together: their matrix of distances grows with the square."""


class GatedGNN(nn.Module):
    """Gated graph network with a forward and a backward sweep over the DAG (GHN 2018 eq. 3-4, PPUDA eq. 3-4).

    ``m_v = sum_{u->v} mlp(h_u) + sum_{u~>v} mlp_ve(h_u) / distance(u, v)``, ``h_v = GRU(m_v, h_v)``, where the
    second sum (virtual edges) includes the one-hop neighbours, as in the released hypernetworks. All nodes of
    one topological level are updated at once: equal to updating node by node in any topological order.

    Stacked (GHN 2018, PPUDA Table 8), the parts of ``cells_of`` a graph are propagated one after the other, without the
    edges between them; in forward sweeps, nodes of a part that receive no other message (its inputs) receive the mean
    of the states of the part before. Without ``passing`` they receive none; with ``modules`` > 1 the parts take that
    many sets of weights in turn.

    Synchronous: all nodes at once hear of the neighbours at both ends of their edges, as they were before the step.
    """

    def __init__(self, config: GHNConfig):
        super().__init__()
        hid = config.hid
        hidden = hid // 2 if config.virtual_edges else hid
        self.mlp = two_layer_mlp((hid, hidden, hid))
        self.mlp_ve = two_layer_mlp((hid, hidden, hid)) if config.virtual_edges else None
        self.gru = nn.GRUCell(hid, hid)
        self.others = nn.ModuleList(GatedGNN(replace(config, modules=1)) for _ in range(config.modules - 1))
        self.config = config

    def forward(self, x: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) -> (N, d)."""
        if self.config.stacked:
            states = x.split([len(graph) for graph in graphs])
            return torch.cat([self._cell_by_cell(state, graph) for state, graph in zip(states, graphs)])
        groups = _in_groups(graphs)
        states = x.split([sum(map(len, group)) for group in groups])
        return torch.cat([self._propagate(state, group) for state, group in zip(states, groups)])

    def _cell_by_cell(self, x: Tensor, graph: Graph) -> Tensor:
        message, states, cells, modules = None, [], cells_of(graph), [self, *self.others]
        for k, (nodes, cell) in enumerate(cells):
            states.append(modules[k % len(modules)]._propagate(x[nodes], [cell], message))
            message = states[-1].mean(0) if self.config.passing else None
        return torch.cat(states)[np.argsort(np.concatenate([nodes for nodes, _ in cells]))]

    def _propagate(self, x: Tensor, graphs: Sequence[Graph], message: Tensor | None = None) -> Tensor:
        """All sweeps, (N, d) -> (N, d). ``message`` (d,): to the nodes without predecessors."""
        c = self.config
        distances = torch.block_diag(*(truncated_distances(graph, c.cutoff) for graph in graphs))
        if c.directions == "synchronous":
            return self._together(x, distances, message)
        forward = _Sweep(distances, _levels(graphs, forward=True), c.virtual_edges)
        if c.directions == "both":
            backward = _Sweep(distances.T, _levels(graphs, forward=False), c.virtual_edges)
        for _ in range(c.layers):
            x = self._run(forward, x, message)
            if c.directions == "both":
                x = self._run(backward, x)
        return x

    def _together(self, x: Tensor, distances: Tensor, message: Tensor | None) -> Tensor:
        """All steps in which every node of (N, d) is updated at once."""
        sweep = _Sweep(distances + distances.T, np.zeros(len(x), int), self.config.virtual_edges)
        weights = sweep.weights.to(x, non_blocking=True)
        received = torch.zeros_like(x)
        if message is not None:
            received[~(distances == 1).any(0)] = message
        w1, b1, w2, b2 = self._message_layers()
        for _ in range(self.config.layers):
            sent = F.linear(F.linear(x, w1, b1).relu(), w2, b2).relu()
            x = self.gru(torch.addmm(received, weights, sent.view(-1, x.shape[1])), x)
        return x

    def _run(self, sweep: _Sweep, x: Tensor, message: Tensor | None = None) -> Tensor:
        """Update all nodes of (N, d), level by level."""
        x, gru = x[sweep.order.to(x.device, non_blocking=True)], self.gru
        gates, new = F.linear(x, gru.weight_hh, gru.bias_hh).split([2 * len(x[0]), len(x[0])], 1)
        bias = gru.bias_ih.expand(len(x), -1) + F.pad(gates, (0, len(x[0])))
        received = torch.zeros_like(x)
        if message is not None:
            received = torch.cat([message.expand(sweep.sizes[0], -1), received[sweep.sizes[0] :]])
        weights = sweep.weights.to(x, non_blocking=True)
        states = _Levels.apply(x, bias, new, received, gru.weight_ih, *self._message_layers(), weights, sweep.sizes)
        return states[sweep.inverse.to(x.device, non_blocking=True)]

    def _message_layers(self) -> list[Tensor]:
        """Weights and biases of two layers, (n, d) -> (n, d), or (n, 2d) with the message along virtual edges beside
        that along edges."""
        mlps = [self.mlp] if self.mlp_ve is None else [self.mlp, self.mlp_ve]
        first, second = [mlp[0] for mlp in mlps], [mlp[2] for mlp in mlps]
        return [
            torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first]),
            torch.block_diag(*(layer.weight for layer in second)), torch.cat([layer.bias for layer in second]),
        ]  # fmt: skip


def _in_groups(graphs: Sequence[Graph]) -> list[list[Graph]]:
    """In their order, with at most GROUP_NODES nodes, or of one graph."""
    groups: list[list[Graph]] = []
    for graph in graphs:
        if groups and sum(map(len, groups[-1])) + len(graph) <= GROUP_NODES:
            groups[-1].append(graph)
        else:
            groups.append([graph])
    return groups


@lru_cache(maxsize=1024)
def cells_of(graph: Graph) -> list[tuple[np.ndarray, Graph]]:
    """The parts stem, cells, head in this order: indices of a part's nodes, and the graph that they form.

    Parameters "cells.K...." are part of cell K, others of the stem, or of the head where one of a cell precedes them;
    operations belong to the latest part that they read. Other networks are one part.
    """
    before: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges.tolist():
        before[target].append(source)
    parts: list[int] = []  # 0: stem, K + 1: cell K, len(graph) + 1: head
    for node, sources in zip(graph.nodes, before):
        cell, latest = re.match(r"cells\.(\d+)\.", node.name), max((parts[i] for i in sources), default=0)
        parts.append(int(cell[1]) + 1 if cell else len(graph) + 1 if node.name and latest else latest)
    found = []
    for part in sorted(set(parts)):
        rows = np.flatnonzero(np.array(parts) == part)
        edges = graph.edges[np.isin(graph.edges, rows).all(1)]
        found.append((rows, Graph([graph.nodes[i] for i in rows], np.searchsorted(rows, edges))))
    return found


class _Sweep:
    """What one direction needs: nodes sorted by their ``levels`` (N,) and the weights of messages between them, by
    ``distances`` (N, N), sender x receiver; those along virtual edges by 1 / distance."""

    def __init__(self, distances: Tensor, levels: np.ndarray, virtual: bool):
        self.sizes = np.bincount(levels).tolist()
        self.order = torch.from_numpy(np.argsort(levels, kind="stable"))
        self.inverse = torch.argsort(self.order)
        distances = distances.T[self.order][:, self.order]
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


class _Levels(torch.autograd.Function):
    """The recurrence of a sweep: GRU cells level by level, each level sends its messages to all later ones at once.

    Its gradients are written down because the state's gradient is all that must go back level by level: those of the
    parameters are one product each at the end, and a gate's is the state's times a factor known beforehand.

    Args (nodes sorted by level):
        x: (N, d) states.
        bias: (N, 3d) what reset, update and new gates add to the message's part: all but, in the last, ``own``.
        own: (N, d) the state's part of the new gate, before the reset gate.
        received: (N, d) messages from outside.
        w, w1, b1, w2, b2: of the GRU's message part and the layers that make messages (d -> h -> d or 2d).
        weights: (N, N) or (N, 2N), receiver x messages.
        sizes: of the levels.
    """

    @staticmethod
    def forward(ctx, x, bias, own, received, w, w1, b1, w2, b2, weights, sizes):
        gates, inbox, states = bias.clone(), received.clone(), torch.empty_like(x)
        hidden, messages = x.new_zeros(len(x), len(w1)), x.new_zeros(len(x), len(w2))
        columns = weights.split([size * len(w2) // len(w[0]) for size in sizes], 1)
        split = zip(*(values.split(sizes) for values in (x, own, gates, inbox, states, hidden, messages)), columns)
        done = 0
        for old, part, gate, message, state, middle, sent, column in split:
            reset, update, new = gate.addmm_(message, w.T).chunk(3, 1)
            gate[:, : -len(w[0])].sigmoid_()
            torch.lerp(new.addcmul_(reset, part).tanh_(), old, update, out=state)
            done += len(old)
            if done < len(x):
                torch.addmm(b1, state, w1.T, out=middle).relu_()
                torch.addmm(b2, middle, w2.T, out=sent).relu_()
                inbox[done:].addmm_(column[done:], sent.view(-1, len(w[0])))
        ctx.save_for_backward(x, own, w, w1, w2, weights, gates, inbox, states, hidden, messages)
        ctx.sizes = sizes
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, own, w, w1, w2, weights, gates, inbox, states, hidden, messages = ctx.saved_tensors
        reset, update, new = gates.chunk(3, 1)
        to_new = (1 - update) * (1 - new * new)
        factors = torch.stack([to_new * own * reset * (1 - reset), (x - new) * update * (1 - update), to_new], 1)
        to_states, to_gates, to_inbox = gradient.clone(), torch.empty_like(factors), torch.empty_like(x)
        to_hidden, to_messages = (hidden > 0).to(x), (messages > 0).to(x)
        columns = weights.split([size * len(w2) // len(w[0]) for size in ctx.sizes], 1)
        values = to_messages, to_hidden, to_states, factors, to_gates, to_inbox
        end = len(x)
        for sent, middle, to_state, factor, to_gate, message, column in reversed(
            [*zip(*(part.split(ctx.sizes) for part in values), columns)]
        ):
            if end < len(x):
                sent.mul_((column[end:].T @ to_inbox[end:]).view(len(message), -1))
                to_state.addmm_(middle.mul_(sent @ w2), w1)
            torch.mul(factor, to_state.unsqueeze(1), out=to_gate)
            torch.mm(to_gate.flatten(1), w, out=message)
            end -= len(message)
        to_bias = to_gates.flatten(1)
        to_own = to_gates[:, 2] * reset
        of_message = to_hidden.T @ states, to_hidden.sum(0), to_messages.T @ hidden, to_messages.sum(0)
        return to_states * update, to_bias, to_own, to_inbox, to_bias.T @ inbox, *of_message, None, None
