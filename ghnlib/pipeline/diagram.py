"""The pipeline as a picture: its stages in columns, arrows from what they write to what reads it."""

import textwrap
from collections.abc import Mapping
from html import escape
from itertools import permutations
from pathlib import PurePosixPath
from typing import Any

import networkx as nx

WIDTH, HEIGHT, ACROSS, DOWN = 215, 62, 265, 80
"""Of a stage's box, and from one box to the next, in pixels."""
BOX = """<a id="stage-{name}" href="{page}"><rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>
<text x="{middle}" y="{title}" class="name">{name}</text>{lines}</a>"""
SVG = """<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width: 100%" role="img"
 aria-label="stages of the pipeline"><style>
rect {{ fill: #eef3fa; stroke: #4c72b0 }} text {{ font: 11px sans-serif; text-anchor: middle; fill: #333 }}
.name {{ font: bold 14px sans-serif; fill: #1f3a68 }} path {{ fill: none; stroke: #888; marker-end: url(#head) }}
</style><defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z" style="fill: #888; stroke: none; marker-end: none"/></marker></defs>
{arrows}
{boxes}
</svg>"""


def stages_of(pipeline: Mapping[str, Any]) -> nx.DiGraph:
    """Stages of a parsed dvc.yaml, an edge where one reads a file or folder that another writes; edges that longer ways
    imply are left out."""
    graph = nx.DiGraph()
    for name, stage in pipeline["stages"].items():
        graph.add_node(name, desc=stage.get("desc", ""))
    for source, target in permutations(graph, 2):
        written = _paths(pipeline["stages"][source], "outs", "metrics")
        read = _paths(pipeline["stages"][target], "deps")
        if any(out.is_relative_to(dep) or dep.is_relative_to(out) for out in written for dep in read):
            graph.add_edge(source, target)
    reduced = nx.transitive_reduction(graph)
    reduced.add_nodes_from(graph.nodes(data=True))
    return reduced


def _paths(stage: Mapping[str, Any], *kinds: str) -> list[PurePosixPath]:
    entries = (entry for kind in kinds for entry in stage.get(kind, ()))
    return [PurePosixPath(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]


def svg(graph: nx.DiGraph, pages: Mapping[str, str]) -> str:
    """Inline SVG of ``stages_of``. ``pages``: stage -> address that its box links to."""
    columns = [sorted(column, key=list(graph).index) for column in nx.topological_generations(graph)]
    height = DOWN * max(map(len, columns))
    corners = {
        name: (i * ACROSS, (height - DOWN * len(column)) // 2 + j * DOWN + (DOWN - HEIGHT) // 2)
        for i, column in enumerate(columns) for j, name in enumerate(column)
    }  # fmt: skip
    arrows = "\n".join(_arrow(corners[source], corners[target]) for source, target in graph.edges)
    boxes = "\n".join(
        _box(name, *corners[name], graph.nodes[name]["desc"], pages.get(name, f"#stage-{name}")) for name in graph
    )
    return SVG.format(width=(len(columns) - 1) * ACROSS + WIDTH + 2, height=height, arrows=arrows, boxes=boxes)


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = source, target
    x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT // 2, y2 + HEIGHT // 2
    bend = x2 - (ACROSS - WIDTH) // 2
    return f'<path d="M{x1},{y1} L{bend - 25},{y1} C{bend},{y1} {bend},{y2} {x2},{y2}"/>'


def _box(name: str, x: int, y: int, desc: str, page: str) -> str:
    middle = x + WIDTH // 2
    lines = "".join(f'<text x="{middle}" y="{y + 36 + 14 * i}">{escape(line)}</text>'
                    for i, line in enumerate(textwrap.wrap(desc, 36)[:2]))  # fmt: skip
    return BOX.format(name=name, page=page, x=x + 1, y=y, width=WIDTH, height=HEIGHT, middle=middle, title=y + 19,
                      lines=lines)  # fmt: skip
