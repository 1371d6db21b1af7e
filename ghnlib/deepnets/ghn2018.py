"""The spaces of Graph HyperNetworks for Neural Architecture Search (Zhang, Ren & Urtasun, 2018), drawn like those of
DeepNets-1M: ``DeepNets(space="blocks")`` and ``DeepNets(space="anytime")``.

The paper leaves open how nodes are wired, how wide they are and where exits lie: each space states what it assumes.
Shapes: B images, C channels, s pixels a side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghnlib.architectures.architecture import Architecture, Buildable
from ghnlib.architectures.composing import compose, parameter_nodes
from ghnlib.architectures.genotypes import Genotype
from ghnlib.architectures.layers import RELU, Linear, conv, make_block, make_chain, make_layer, norm, pool
from ghnlib.architectures.network import Network
from ghnlib.deepnets.spaces import DesignSpace, Draws
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node, Role


def first_use(name: str) -> str:
    """Of a parameter of a state's operation on its second input the name that it has on the first; else itself."""
    return re.sub(r"(?<=_ops\.)\d*[13579](?=\.op\.)", lambda digits: str(int(digits[0]) - 1), name)


class BlockNetwork(Network):
    """A network of DeepNets-1M in which states apply the same parameters to both inputs."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._share()

    def _apply(self, *arguments, **options) -> BlockNetwork:
        super()._apply(*arguments, **options)
        self._share()  # another device has parameters of its own for each module
        return self

    def _share(self) -> None:
        own = dict(self.named_parameters(remove_duplicate=False))
        for name in own:
            if name != first_use(name):
                module, _, key = name.rpartition(".")
                setattr(self.get_submodule(module), key, own[first_use(name)])


class BlockArchitecture(Architecture):
    """An architecture whose nodes apply one set of weights to all their inputs and sum (GHN 2018 eq. 1).

    A state's second operation has the parameters of its first, and in the graph they are one node with both inputs. An
    identity has none; where it halves the resolution, it has convolutions for each input.
    """

    network = BlockNetwork

    @cached_property
    def graph(self) -> Graph:
        """That of the traced network."""
        graph = compose(self.plan)
        index = {node.name: i for i, node in enumerate(graph.nodes) if node.name}
        one = np.array([index.get(first_use(node.name), i) for i, node in enumerate(graph.nodes)])
        for i in [i for i, node in enumerate(graph.nodes) if node.op == "sum"]:
            sources = np.unique(one[graph.edges[graph.edges[:, 1] == i, 0]])
            if len(sources) == 1:  # a sum of one value is no node
                one[i] = sources[0]
        kept = np.flatnonzero(one == np.arange(len(one)))
        edges = np.unique(np.searchsorted(kept, one[graph.edges]), axis=0)
        names = [name for node in graph.nodes for name in (node.name, node.norm_bias)]
        tied = {name: f"tied to {first_use(name)}" for name in names if name != first_use(name)}
        nodes = [graph.nodes[i] for i in kept]
        return Graph(nodes, edges[edges[:, 0] != edges[:, 1]], graph.skipped | tied)

    @cached_property
    def num_params(self) -> int:
        """Number of scalars in the network's parameters, shared ones counted once."""
        nodes = parameter_nodes(self.plan)
        return make_block([node for name, node in nodes.items() if name == first_use(name)]).size


@dataclass(frozen=True)
class BlockSpace(DesignSpace):
    """18 equal blocks; 17 nodes each apply one operation to every input and sum (appendix, classification).

    A block reads the two blocks before it through bottlenecks and concatenates its leaves; blocks 7 and 13 halve the
    resolution and double the channels. In terms of DeepNets-1M: an architecture whose normal and reduction cell are
    equal, a node being a state that sums the same operation on one or two inputs ("none" stands for the second).

    Assumed: each node reads 1 or 2 earlier ones, uniform; separable convolutions are the double ones of DARTS, and
    nodes on a block's input halve the resolution, not its bottlenecks; the two input nodes are not among the 17. The
    paper lists nine operations and speaks of eight: identity is taken to be the one it does not count. Meta-training
    uses 7 nodes. With 32 channels these networks have about 7 million parameters, those of the paper 4.6: its wiring is
    sparser.
    """

    nodes: int = 17
    operations: tuple[str, ...] = (
        "skip_connect", "conv_1x1", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "conv_7x1_1x7",
        "max_pool_3x3", "avg_pool_3x3",
    )  # fmt: skip
    cells: tuple[int, int] = (18, 18)
    stem_pool: float = 0.0
    max_params: int = 100_000_000
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"train": {"nodes": 7}})

    def draw(self, draws: Draws) -> BlockArchitecture:
        """One architecture."""
        cell: list[tuple[str, int]] = []
        for states in range(2, self.nodes + 2):
            name = draws.pick(self.operations)
            cell += ([(name, i) for i in draw_inputs(states, draws)] + [("none", 0)])[:2]
        read = {source for name, source in cell if name != "none"}
        leaves = tuple(state for state in range(2, self.nodes + 2) if state not in read)
        genotype = Genotype(tuple(cell), leaves, tuple(cell), leaves)
        return BlockArchitecture(genotype, self.width, draws.integer(*self.cells), stem_pool=self.stem_pool > 0)


def draw_inputs(count: int, draws: Draws) -> tuple[int, ...]:
    """One or two distinct of the numbers below ``count``, in rising order."""
    first, second = draws.integer(0, count - 1), draws.integer(0, count - 1)
    return tuple(sorted({first, second} if draws.flip(0.5) else {first}))


class AnytimeNode(NamedTuple):
    """``inputs``: 0 for the cell's input, then the nodes before from 1 on. ``shrink``: the image's side over that of
    the node's map. ``exit``: whether a classifier reads it.
    """

    op: str
    inputs: tuple[int, ...]
    shrink: int
    exit: bool


@dataclass(frozen=True)
class AnytimeArchitecture(Buildable):
    """A network that predicts at several depths: cells of nodes at several scales. C: channels at full resolution."""

    cells: tuple[tuple[AnytimeNode, ...], ...]
    C: int = 16
    num_classes: int = 10
    input_size: int = 32

    @property
    def identity(self) -> tuple:
        """Everything but widths, classes and image size."""
        return self.cells

    @cached_property
    def graph(self) -> Graph:
        """The traced graph of all exits, each with a classifier."""
        net = self.build()
        graph = Graph.from_module(net, (3, self.input_size, self.input_size))
        return Graph([net.conditioned(node) for node in graph.nodes], graph.edges, graph.skipped)

    def build(self, num_classes=None, input_size=None, device="meta", track_running_stats=False) -> AnytimeNetwork:
        """The network as a plain module, see ``Architecture.build``."""
        return AnytimeNetwork(self.adapted(num_classes, input_size), track_running_stats, device)


class AnytimeNetwork(nn.Module):
    """(B, 3, s, s) -> list of logits (B, classes): one per exit, the last from the leaves of the last cell.

    ``sources``, ``shrinks``: of the maps, of which the stem's is the first; ``exits``: the maps that classifiers read.
    A bottleneck on concatenated inputs is a sum of bottlenecks, one an input: each is a node of the graph.
    """

    def __init__(self, arch: AnytimeArchitecture, track: bool, device):
        super().__init__()
        self.expected_input_sz, self.C = arch.input_size, arch.C
        self.stem = make_chain([conv(3, arch.C, 3), norm(arch.C), RELU], track, device)
        self.nodes = nn.ModuleList()
        self.sources, self.shrinks, self.exits = [], [1], []
        leaves = [0]
        for cell in arch.cells:
            first = len(self.shrinks)
            plan = [AnytimeNode("", (), min(node.shrink for node in cell), False), *cell]
            for node in plan:
                self.sources.append([first + i for i in node.inputs] or leaves)
                self.nodes.append(self._node(node, track, device))
                self.shrinks.append(node.shrink)
            self.exits += [[first + i] for i, node in enumerate(plan) if node.exit]
            read = {i for node in cell for i in node.inputs}
            leaves = [first + i for i in range(1, len(plan)) if i not in read]
        self.exits.append(leaves)
        self.classifiers = nn.ModuleList(
            Linear(self._channels(maps), arch.num_classes, device=device) for maps in self.exits
        )

    def _channels(self, maps: list[int]) -> int:
        return sum(self.C * self.shrinks[i] for i in maps)

    def _node(self, node: AnytimeNode, track: bool, device) -> nn.ModuleDict:
        """The bottlenecks on the last of ``sources``, and the operation; a cell's input has no operation."""
        width = self.C * node.shrink
        bottlenecks = [make_layer(conv(self._channels([i]), width), device=device) for i in self.sources[-1]]
        layers = [norm(width), RELU]
        if "pool" in node.op:
            layers.append(pool(node.op.removesuffix("_3x3"), 1))
        elif node.op:
            layers += [conv(width, width, int(node.op[-1])), norm(width), RELU]
        return nn.ModuleDict({"bottlenecks": nn.ModuleList(bottlenecks), "rest": make_chain(layers, track, device)})

    def conditioned(self, node: Node) -> Node:
        """A traced node with its role, and scale and exit of the map that it belongs to."""
        part, _, rest = node.name.partition(".")
        if part == "classifiers":
            chosen = self.exits[int(rest.split(".")[0])]
            role = Role.CLASS_WEIGHT if node.op == "conv" else Role.CLASS_BIAS
            return node._replace(role=role, shrink=self.shrinks[chosen[0]], exit=True)
        if part == "nodes":
            place = int(rest.split(".")[0]) + 1
            role = Role.BOTTLENECK if ".bottlenecks." in node.name else node.role
            return node._replace(role=role, shrink=self.shrinks[place], exit=[place] in self.exits)
        return node._replace(shrink=1) if node.name else node

    def forward(self, x: Tensor, exits: int | None = None) -> list[Tensor]:
        """Images (B, 3, s, s) -> logits (B, classes) of each exit. ``exits``: how many to go to, computing no node
        after them; None: all."""
        maps, logits = [self.stem(x)], []
        for classifier, chosen in zip(self.classifiers, self.exits[:exits]):
            while len(maps) <= max(chosen):
                maps.append(self._next(maps))
            logits.append(classifier(torch.cat([maps[i].mean((2, 3)) for i in chosen], 1)))
        return logits

    def _next(self, maps: list[Tensor]) -> Tensor:
        """The map after these; maps of other scales are averaged before their bottleneck, or repeated after it."""
        node, sources, shrink = self.nodes[len(maps) - 1], self.sources[len(maps) - 1], self.shrinks[len(maps)]
        parts = []
        for i, bottleneck in zip(sources, node["bottlenecks"]):
            ratio = shrink / self.shrinks[i]
            part = bottleneck(F.avg_pool2d(maps[i], int(ratio)) if ratio > 1 else maps[i])
            parts.append(F.interpolate(part, scale_factor=1 / ratio) if ratio < 1 else part)
        return node["rest"](reduce(torch.add, parts))


@dataclass(frozen=True)
class AnytimeSpace:
    """Three cells of nodes at several scales, inputs concatenated, early exits (section 5.4, anytime prediction).

    A node is a bottleneck on its concatenated inputs, brought to its scale, then its operation. Cell k's scales are
    those of ``shrinks[k]``: the image's side divided by 1, 2 or 4.

    Assumed: each node reads 1 or 2 earlier ones (or the cell's input), uniform; the leaves of a cell, concatenated at
    its finest scale, are the input of the next; channels grow as the side shrinks; exits are at ``exits`` nodes drawn
    uniformly, and one more reads the leaves of the last cell. The random number of nodes of meta-training: ``nodes``
    holds ranges.
    """

    nodes: tuple[tuple[int, int], ...] = ((24, 24), (16, 16), (8, 8))
    shrinks: tuple[tuple[int, ...], ...] = ((1, 2, 4), (2, 4), (4,))
    operations: tuple[str, ...] = ("conv_1x1", "conv_3x3", "conv_5x5", "max_pool_3x3", "avg_pool_3x3")
    exits: int = 5
    width: int = 16
    num_classes: int = 10
    input_size: int = 32

    def for_split(self, split: str) -> AnytimeSpace:
        """The space of one split: of "train", with cells of random size; of the others, the same."""
        ranges = tuple((2, high) for _, high in self.nodes)
        return replace(self, nodes=ranges) if split == "train" else self

    def draw(self, draws: Draws) -> AnytimeArchitecture:
        """One architecture."""
        sizes = [draws.integer(*limits) for limits in self.nodes]
        places = list(range(sum(sizes)))
        exits = {places.pop(draws.integer(0, len(places) - 1)) for _ in range(min(self.exits, len(places)))}
        cells, place = [], 0
        for size, shrinks in zip(sizes, self.shrinks):
            nodes = []
            for i in range(size):
                op, inputs = draws.pick(self.operations), draw_inputs(i + 1, draws)
                nodes.append(AnytimeNode(op, inputs, draws.pick(shrinks), place + i in exits))
            cells.append(tuple(nodes))
            place += size
        return AnytimeArchitecture(tuple(cells), self.width)

    def accepts(self, arch: AnytimeArchitecture) -> bool:
        """Always: leaves are concatenated, so that nothing is cut off."""
        return True

    def finish(self, arch: AnytimeArchitecture, draws: Draws, arguments: Mapping[str, Any]) -> AnytimeArchitecture:
        """The architecture for the classes and image size asked for."""
        return arch.adapted(arguments["num_classes"], arguments["input_size"])
