"""Graphs and cells as pictures."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import networkx as nx
import seaborn as sns
from matplotlib.lines import Line2D

from ghnlib.graphs.nodes import PRIMITIVES

PRIMITIVE_COLOURS = dict(zip(PRIMITIVES, sns.color_palette("tab20", len(PRIMITIVES))))
OTHER = "black"
"""Of registered primitives: the legend names them."""


def draw_graph(network: nx.DiGraph, ax=None):
    """Draw ``Graph.to_networkx()`` in layers from the input, coloured by primitive (PPUDA Fig. 1 and 5). Returns the
    axes."""
    positions = _layered_positions(network)
    if ax is None:
        _, ax = plt.subplots(figsize=(min(16, 8 + 0.1 * max(layer for layer, _ in positions.values())), 3.2))
    ops = list(network.nodes.data("op"))
    colours = [PRIMITIVE_COLOURS.get(op, OTHER) for _, op in ops]
    ends = {(i, j): (positions[i], positions[j]) for i, j in network.edges}
    over = [edge for edge, ((x1, y1), (x2, y2)) in ends.items() if x2 - x1 > 1 and y1 == y2]
    straight = [edge for edge in network.edges if edge not in set(over)]
    for edges, curve in ((straight, "arc3"), (over, "arc3,rad=-0.3")):  # a straight one would hide behind its nodes
        style = {"edgelist": edges, "connectionstyle": curve, "edge_color": "0.6", "node_size": 24}
        nx.draw_networkx_edges(network, positions, ax=ax, width=0.7, arrowsize=5, **style)
    nx.draw_networkx_nodes(network, positions, ax=ax, node_size=24, node_color=colours)
    found = {own for _, own in ops}
    present = [op for op in PRIMITIVES if op in found] + sorted(found.difference(PRIMITIVES))
    handles = [
        Line2D([], [], marker="o", linestyle="", color=PRIMITIVE_COLOURS.get(op, OTHER), label=op) for op in present
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=8, frameon=False, fontsize=8)
    ax.axis("off")
    return ax


def draw_cell(operations: Sequence[tuple[str, int]], concat: Sequence[int], ax=None):
    """Draw a cell as ``Genotype.cell`` gives it (PPUDA Fig. 5): its states, c[k-2] and c[k-1] the cells before, and the
    operations between them. Returns the axes."""
    names = ["c[k-2]", "c[k-1]", *map(str, range(len(operations) // 2)), "c[k]"]
    cell = nx.DiGraph([(names[source], names[2 + i // 2]) for i, (_, source) in enumerate(operations)])
    cell.add_edges_from((names[state], "c[k]") for state in concat)
    labels: dict[tuple[str, str], str] = {}
    for i, (name, source) in enumerate(operations):
        edge = names[source], names[2 + i // 2]
        labels[edge] = f"{labels[edge]}\n{name}" if edge in labels else name
    positions = _layered_positions(cell)
    ax = ax or plt.subplots(figsize=(9, 3))[1]
    curve = "arc3,rad=-0.12"  # an edge that passes over a state stays visible
    style = {"node_size": 900, "node_color": "0.92", "edge_color": "0.6", "font_size": 8}
    nx.draw_networkx(cell, positions, ax=ax, connectionstyle=curve, **style)
    # Not in the middle: there an edge that passes over a state meets it.
    nx.draw_networkx_edge_labels(cell, positions, labels, 0.3, ax=ax, font_size=7, connectionstyle=curve)
    ax.axis("off")
    return ax


def _layered_positions(network: nx.DiGraph) -> dict[int, tuple[float, float]]:
    """x: longest path from a source; y: in the order of the senders' heights, spread around the middle."""
    positions: dict[int, tuple[float, float]] = {}
    for layer, members in enumerate(nx.topological_generations(network)):
        heights = {n: [positions[s][1] for s in network.predecessors(n)] or [0.0] for n in members}
        order = sorted(members, key=lambda n: (sum(heights[n]) / len(heights[n]), n))
        for rank, node in enumerate(order):
            positions[node] = (float(layer), rank - (len(order) - 1) / 2)
    return positions
