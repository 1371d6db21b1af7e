"""From nodes to their first states. Shapes: N nodes of all graphs of a meta-batch, d hidden size."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import PRIMITIVES, Node, as_planes

NO_SHAPE = -1


def _nearest(values: np.ndarray, limit: int) -> np.ndarray:
    """Index of the nearest value for 0, 1, ...; ties go to the smaller one. A number over the limit, if it is no value
    itself, has the limit's; the last index is that of all larger numbers."""
    numbers = np.arange(values[-1] + 2)
    rows = np.searchsorted((values[1:] + values[:-1]) / 2, numbers.clip(max=limit))
    rows[values] = np.arange(len(values))
    return rows


class NodeEmbedding(nn.Module):
    """Primitive and shape embeddings, x_v = E_op + [E_out; E_in; E_h; E_w] (PPUDA appendix B).

    The last row of each shape table stands for "no shape". Channels 4 to 7 read the row of 8, side 2 that of 3.
    Without ``shapes`` there are only the primitives. ``anytime`` adds embeddings of scale and exit, see ``Node``.
    ``primitives``: registered ones, whose rows follow those of the papers.
    """

    def __init__(
        self, hid: int, num_classes: int, max_side: int, shapes: bool = True, anytime: bool = False,
        primitives: Sequence[str] = (),
    ):  # fmt: skip
        super().__init__()
        wide = *range(64, 4096, 16), *range(4096, 8193, 32)
        self.channels = channels = np.unique([1, 3, num_classes, *range(8, 64, 8), *wide])
        sides = np.unique([*range(1, max(12, max_side), 2), 14, 16])
        self.primitives = (*PRIMITIVES, *primitives)
        self.op = nn.Embedding(len(self.primitives), hid)
        self.shapes, self.anytime = shapes, anytime
        if anytime:
            self.scale, self.exit = nn.Embedding(8, hid), nn.Embedding(2, hid)  # scales 1, 2, 4, ..., 64
        if not shapes:
            return
        self.channel = nn.Embedding(len(channels) + 1, hid // 4)
        self.spatial = nn.Embedding(len(sides) + 1, hid // 4)
        self._channel_row = _nearest(channels, 8192)
        self._channel_row[4:8] = np.searchsorted(channels, 8)
        self._spatial_row = _nearest(sides, 16)
        self._spatial_row[2] = np.searchsorted(sides, 3)

    @torch.no_grad()
    def take_channels(self, other: Self) -> None:
        """Take over the rows of another's channel table by the number of channels that they stand for: a number of
        classes that one of the two tables has alone moves the rows above it."""
        rows = {value: row for row, value in enumerate([*other.channels, NO_SHAPE])}
        for row, value in enumerate([*self.channels, NO_SHAPE]):
            if value in rows:
                self.channel.weight[row] = other.channel.weight[rows[value]]

    def forward(self, graphs: Sequence[Graph]) -> Tensor:
        """(N, d) for the nodes of all graphs, one graph after the other. ValueError: a primitive without a row."""
        device = self.op.weight.device
        nodes = [node for graph in graphs for node in graph.nodes]
        rows = lambda values: torch.as_tensor(values).to(device, non_blocking=True)  # the device is not waited for
        if unknown := {node.op for node in nodes} - {*self.primitives}:
            known = ", ".join(self.primitives)
            raise ValueError(f"the graph has {', '.join(unknown)}, the hypernetwork knows {known}: trace without, or "
                             "train one whose config.primitives has them")  # fmt: skip
        ops = self.op(rows([self.primitives.index(node.op) for node in nodes]))
        if self.anytime:
            ops = ops + self.scale(rows([node.shrink.bit_length() for node in nodes]))
            ops = ops + self.exit(rows([int(node.exit) for node in nodes]))
        if not self.shapes:
            return ops
        channel, spatial = self._rows(np.array([_four_dimensional(node) for node in nodes]))
        return ops + torch.cat([self.channel(rows(channel)).flatten(1), self.spatial(rows(spatial)).flatten(1)], 1)

    def _rows(self, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        channel = self._channel_row[shapes[:, :2].clip(0, len(self._channel_row) - 1)]
        spatial = self._spatial_row[shapes[:, 2:].clip(0, len(self._spatial_row) - 1)]
        missing = shapes[:, :2] == NO_SHAPE
        channel[missing] = self.channel.num_embeddings - 1
        spatial[missing] = self.spatial.num_embeddings - 1
        return channel, spatial


def _four_dimensional(node: Node) -> tuple[int, int, int, int]:
    """(out, in, h, w) of a tensor; a positional encoding (1, n, c) reads as (1, c, sqrt(n), sqrt(n))."""
    if node.shape is None:
        return (NO_SHAPE,) * 4
    shape = as_planes(node.role, node.shape)
    if len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] > 1:
        side = int(shape[1] ** 0.5)
        return 1, shape[2], side, side
    return (*shape, 1, 1, 1)[:4]  # type: ignore[return-value]
