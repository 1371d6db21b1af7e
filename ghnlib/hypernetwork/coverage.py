"""What a hypernetwork predicts of a network, what not and why, in what time and with what norm."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghnlib.graphs.parametrized import parts_in
from ghnlib.hypernetwork.ghn import GHN


@dataclass(frozen=True)
class Coverage:
    """What a hypernetwork predicts of one network.

    Attributes:
        nodes: of its graph.
        sizes: parameter name -> number of values; tensors that are shared count once.
        predicted: parameter name -> role.
        skipped: parameter name -> why it keeps its initial value.
        norm: of all predicted values together (l2).
        trace_seconds, predict_seconds: time for the graph, time for the parameters.
    """

    nodes: int
    sizes: dict[str, int]
    predicted: dict[str, str]
    skipped: dict[str, str]
    norm: float
    trace_seconds: float
    predict_seconds: float

    @property
    def parameters(self) -> int:
        """How many numbers the network's parameters are."""
        return sum(self.sizes.values())

    @property
    def share(self) -> float:
        """Of the parameters that are predicted, 0 to 1."""
        return sum(self.sizes[name] for name in self.predicted) / max(self.parameters, 1)

    def __str__(self) -> str:
        lines = [f"{self.share:.2%} of {self.parameters:,} parameters predicted"]
        for title, groups in (("", self.predicted), ("not predicted: ", self.skipped)):
            for group, tensors in Counter(groups.values()).most_common():
                values = sum(self.sizes[name] for name in groups if groups[name] == group)
                lines.append(f"{tensors:6} tensors {values:14,} values  {title}{group}")
        return "\n".join(lines)


@torch.no_grad()
def coverage(
    ghn: GHN, net: nn.Module, input_shape: int | tuple[int, ...] | None = None, *, example: Any = None
) -> Coverage:
    """Predict a network's parameters and report on them. The network is not touched; it may be on the meta device.
    ``input_shape``, ``example``: see ``Graph.from_module``. Raises TraceError if the network cannot be traced."""
    start = time.perf_counter()
    graph = ghn.graph_of(net, input_shape, example)
    traced = time.perf_counter()
    values = ghn.predict(graph)
    done = time.perf_counter()
    squares = (torch.linalg.vector_norm(value, dtype=torch.float64).item() ** 2 for value in values.values())
    roles = {name: str(node.role) for node in graph.nodes for name in (node.name, node.norm_bias)}
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    whole = {name: name for name in sizes} | parts_in(net)
    return Coverage(
        len(graph),
        sizes,
        predicted={name: roles[whole[name]] for name in sizes if whole[name] in values},
        skipped={name: ghn.why_skipped(name, graph) for name in sizes if whole[name] not in values},
        norm=sum(squares) ** 0.5,
        trace_seconds=traced - start,
        predict_seconds=done - traced,
    )
