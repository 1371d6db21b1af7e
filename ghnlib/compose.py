"""Graphs of DeepNets-1M architectures, written down from the genotype without building a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghnlib.graph import Graph, Node, Role
from ghnlib.layers import Block, bias, chain_block, layer_node, make_block, weight
from ghnlib.networks import PlannedCell, PlannedOp, head_sizes, stem_layers, stem_output
from ghnlib.primitives import primitive

if TYPE_CHECKING:
    from ghnlib.architectures import Architecture

_new_tuple = tuple.__new__  # makes a Node in half the time that its constructor takes
UNUSED = "not used in the forward pass"


def prefixed(node: Node, prefix: str) -> Node:
    """A block's node with the full names of its parameters."""
    op, name, shape, role, norm_bias = node
    values = (op, prefix + name, shape, role, prefix + norm_bias if norm_bias else "")
    return _new_tuple(Node, values)


class Composer:
    """Nodes and edges in the order of the forward pass. A value of the network is the index of the node it leaves."""

    def __init__(self) -> None:
        self.nodes = [Node("input")]
        self.edges: list[tuple[int, int]] = []

    def add(self, block: Block, prefix: str, source: int) -> int:
        """Append a block that reads ``source``; returns the node that leaves it."""
        base = len(self.nodes)
        self.nodes += [prefixed(node, prefix) if node[1] else node for node in block.nodes]
        self.edges += [(source if a < 0 else base + a, base + b) for a, b in block.edges]
        return source if block.output < 0 else base + block.output

    def join(self, op: str, sources: list[int]) -> int:
        """Append a sum or a concatenation; one that joins a value with itself is no node."""
        distinct = list(dict.fromkeys(sources))
        if len(distinct) == 1:
            return distinct[0]
        self.nodes.append(Node(op))
        self.edges += [(source, len(self.nodes) - 1) for source in distinct]
        return len(self.nodes) - 1


def compose(arch: Architecture) -> Graph:
    """The graph of an architecture: equal to tracing its network, without building it."""
    composer = Composer()
    s0, s1 = _add_stem(composer, arch)
    for k, cell in enumerate(arch.plan.cells):
        s0, s1 = s1, _add_cell(composer, cell, f"cells.{k}.", s0, s1) if cell.live else -1
    if arch.glob_avg:
        s1 = composer.add(make_block([Node("glob_avg")]), "", s1)
    composer.add(head_block(arch), "", s1)
    return Graph(composer.nodes, composer.edges, skipped_parameters(arch))


def _add_stem(composer: Composer, arch: Architecture) -> tuple[int, int]:
    """The two values that the first cell reads."""
    blocks = stem_blocks(arch)
    if arch.is_vit:
        patches = composer.add(blocks["stem0"], "", 0)
        position = composer.add(blocks["pos_enc"], "", patches)
        total = composer.join("sum", [patches, position])
        return total, total
    if "stem1" not in blocks:
        stem = composer.add(blocks["stem"], "", 0)
        return stem, stem
    s0 = composer.add(blocks["stem0"], "", 0)
    return s0, composer.add(blocks["stem1"], "", s0) if arch.plan.stem1 else -1


def _add_cell(composer: Composer, cell: PlannedCell, prefix: str, s0: int, s1: int) -> int:
    """The value that leaves the cell. Values that do not exist are -1."""

    def run(op: PlannedOp, name: str, values: list[int]) -> int:
        return composer.add(primitive(op.name, op.spec).block, prefix + name, values[op.source]) if op.live else -1

    states = [run(op, f"preprocess{i}.", [s0, s1]) for i, op in enumerate(cell.preprocess)]
    for j in range(0, len(cell.ops), 2):
        first, second = (run(cell.ops[i], f"_ops.{i}.", states) for i in (j, j + 1))
        both = first >= 0 and second >= 0
        states.append(composer.join("sum", [first, second]) if both else max(first, second))
    return composer.join("concat", [states[i] for i in cell.concat if states[i] >= 0])


def stem_blocks(arch: Architecture) -> dict[str, Block]:
    """Pieces of graph of the stem, with full names."""
    if not arch.is_vit:
        return {name: chain_block(layers, f"{name}.") for name, layers in stem_layers(arch).items()}
    channels, side = stem_output(arch)
    position = weight("pos_enc", 1, channels, side, side, op="pos_enc", role=Role.POSITION)
    patches = layer_node(stem_layers(arch)["stem0"][0], "stem0")
    return {"stem0": make_block([patches]), "pos_enc": make_block([position], edges=[])}


def head_block(arch: Architecture) -> Block:
    """The classifier's piece of graph; its last weight and bias carry the class roles."""
    nodes = []
    for name, inputs, outputs in head_sizes(arch, arch.plan.features):
        nodes += [weight(name, outputs, inputs, role=Role.LINEAR), bias(name, outputs)]
    nodes[-2:] = nodes[-2]._replace(role=Role.CLASS_WEIGHT), nodes[-1]._replace(role=Role.CLASS_BIAS)
    return make_block(nodes)


def count_parameters(arch: Architecture) -> int:
    """Number of scalars in the network's parameters, those of unused operations included."""
    ends = [*stem_blocks(arch).values(), head_block(arch)]
    return sum(block.size for block in ends) + sum(cell.size for cell in arch.plan.cells)


def _cell_operations(cell: PlannedCell) -> list[tuple[str, PlannedOp]]:
    """(name, operation) of everything in a cell, unused operations included."""
    preprocess = [(f"preprocess{i}.", op) for i, op in enumerate(cell.preprocess)]
    return preprocess + [(f"_ops.{j}.", op) for j, op in enumerate(cell.ops)]


def parameter_nodes(arch: Architecture) -> dict[str, Node]:
    """Nodes of all parameters by name, those of unused operations included."""
    blocks = [("", block) for block in (*stem_blocks(arch).values(), head_block(arch))]
    for k, cell in enumerate(arch.plan.cells):
        blocks += [(f"cells.{k}.{name}", primitive(op.name, op.spec).block) for name, op in _cell_operations(cell)]
    nodes = (prefixed(node, prefix) for prefix, block in blocks for node in block.nodes if node.name)
    return {node.name: node for node in nodes}


def skipped_parameters(arch: Architecture) -> dict[str, str]:
    """Parameters without a node: name -> reason."""
    blocks = [] if arch.plan.stem1 else [("", stem_blocks(arch).get("stem1", Block()))]
    for k, cell in enumerate(arch.plan.cells):
        if not all(op.live for op in cell.ops + cell.preprocess):
            unused = (item for item in _cell_operations(cell) if not item[1].live)
            blocks += [(f"cells.{k}.{name}", primitive(op.name, op.spec).block) for name, op in unused]
    names = ((prefix, name) for prefix, block in blocks for node in block.nodes for name in (node.name, node.norm_bias))
    return {prefix + name: UNUSED for prefix, name in names if name}
