"""From a plan to its graph and number of parameters, without building a module."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ghnlib.architectures.layers import Block, bias, chain_block, layer_node, make_block, weight
from ghnlib.architectures.operations import Spec, operation
from ghnlib.architectures.plan import Plan, PlannedCell, PlannedOp
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node, Role
from ghnlib.graphs.recording import UNUSED

JOINS = {"sum": Node("sum"), "concat": Node("concat")}


@lru_cache(maxsize=1 << 14)  # architectures share most of what stands at a given place; these are some 20 MB
def placed(name: str, spec: Spec, prefix: str) -> Block:
    """The block of the operation ``name``, with the full names of its parameters."""
    block = operation(name, spec).block
    nodes = (
        Node(op, prefix + name, shape, role, prefix + norm_bias if norm_bias else "") if name else Node(op, "", shape)
        for op, name, shape, role, norm_bias, *_ in block.nodes
    )
    return block._replace(nodes=tuple(nodes))


class Composer:
    """Nodes and edges in the order of the forward pass. A value of the network is the index of the node it leaves, -1
    where there is none. ``skipped``: names of parameters without a node.
    """

    def __init__(self) -> None:
        self.nodes = [Node("input")]
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.skipped: list[str] = []

    def run(self, op: PlannedOp, prefix: str, values: Sequence[int]) -> int:
        """Append an operation that reads one of the values; returns the value that leaves it."""
        name, source, spec, live = op
        block = placed(name, spec, prefix)
        return self.add(block, values[source]) if live else self.skip(block)

    def add(self, block: Block, source: int) -> int:
        """Append a block that reads ``source``; returns the value that leaves it."""
        nodes, edges, output, _ = block
        base = len(self.nodes)
        self.nodes += nodes
        for a, b in edges:
            self.sources.append(source if a < 0 else base + a)
            self.targets.append(base + b)
        return source if output < 0 else base + output

    def skip(self, block: Block) -> int:
        """Note the parameters of a block that nothing reads."""
        self.skipped += [name for node in block.nodes for name in (node.name, node.norm_bias) if name]
        return -1

    def join(self, op: str, values: Sequence[int]) -> int:
        """Append a sum or a concatenation; one that joins a value with itself is no node."""
        distinct = dict.fromkeys(values)
        if len(distinct) < 2:
            return max(distinct, default=-1)
        self.sources += distinct
        self.targets += [len(self.nodes)] * len(distinct)
        self.nodes.append(JOINS[op])
        return len(self.nodes) - 1


def compose(plan: Plan) -> Graph:
    """The graph of a planned network: equal to tracing its module."""
    composer = Composer()
    s0, s1 = _add_stem(composer, plan)
    for k, cell in enumerate(plan.cells):
        s0, s1 = s1, _add_cell(composer, cell, f"cells.{k}.", s0, s1)
    if plan.glob_avg:
        s1 = composer.add(make_block([Node("glob_avg")]), s1)
    composer.add(head_block(plan), s1)
    edges = np.array((composer.sources, composer.targets)).T
    return Graph(composer.nodes, edges, dict.fromkeys(composer.skipped, UNUSED))


def _add_stem(composer: Composer, plan: Plan) -> tuple[int, int]:
    """The two values that the first cell reads."""
    blocks = stem_blocks(plan)
    if "pos_enc" in blocks:
        patches = composer.add(blocks["stem0"], 0)
        position = composer.add(blocks["pos_enc"], patches)
        total = composer.join("sum", (patches, position))
        return total, total
    if "stem1" not in blocks:
        stem = composer.add(blocks["stem"], 0)
        return stem, stem
    s0 = composer.add(blocks["stem0"], 0)
    return s0, composer.add(blocks["stem1"], s0) if plan.uses_stem1 else composer.skip(blocks["stem1"])


def _add_cell(composer: Composer, cell: PlannedCell, prefix: str, s0: int, s1: int) -> int:
    """The value that leaves the cell."""
    inputs = (s0, s1)
    states = [composer.run(op, f"{prefix}preprocess{i}.", inputs) for i, op in enumerate(cell.preprocess)]
    for j in range(0, len(cell.ops), 2):
        first = composer.run(cell.ops[j], f"{prefix}_ops.{j}.", states)
        second = composer.run(cell.ops[j + 1], f"{prefix}_ops.{j + 1}.", states)
        both = first >= 0 and second >= 0
        states.append(composer.join("sum", (first, second)) if both else max(first, second))
    return composer.join("concat", [states[i] for i in cell.concat if states[i] >= 0])


def stem_blocks(plan: Plan) -> dict[str, Block]:
    """Pieces of graph of the stem, with full names."""
    if plan.positions is None:
        return {name: chain_block(layers, f"{name}.") for name, layers in plan.stem.items()}
    channels, side = plan.positions
    position = weight("pos_enc", 1, channels, side, side, op="pos_enc", role=Role.POSITION)
    patches = layer_node(plan.stem["stem0"][0], "stem0")
    return {"stem0": make_block([patches]), "pos_enc": make_block([position], edges=[])}


def head_block(plan: Plan) -> Block:
    """The classifier's piece of graph; its last weight and bias carry the class roles."""
    nodes = []
    for name, inputs, outputs in plan.head:
        nodes += [weight(name, outputs, inputs, role=Role.LINEAR), bias(name, outputs)]
    nodes[-2:] = nodes[-2]._replace(role=Role.CLASS_WEIGHT), nodes[-1]._replace(role=Role.CLASS_BIAS)
    return make_block(nodes)


def count_parameters(plan: Plan) -> int:
    """Number of scalars in the network's parameters, those of unused operations included."""
    parts = *stem_blocks(plan).values(), head_block(plan), *plan.cells
    return sum(part.size for part in parts)


def parameter_nodes(plan: Plan) -> dict[str, Node]:
    """Nodes of all parameters by name, those of unused operations included."""
    blocks = [*stem_blocks(plan).values(), head_block(plan)]
    for k, cell in enumerate(plan.cells):
        blocks += [placed(op.name, op.spec, f"cells.{k}.preprocess{i}.") for i, op in enumerate(cell.preprocess)]
        blocks += [placed(op.name, op.spec, f"cells.{k}._ops.{j}.") for j, op in enumerate(cell.ops)]
    return {node.name: node for block in blocks for node in block.nodes if node.name}
