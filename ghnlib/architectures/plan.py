"""What a network of DeepNets-1M consists of, spelled out from its genotype: layers of the stem, channels, strides and
use of every operation, sizes of the classifier (PPUDA appendix A.1).

The module (``network.py``), the composed graph and the number of parameters (``composing.py``) all follow a ``Plan``.
"""

from functools import lru_cache
from typing import NamedTuple

from ghnlib.architectures.genotypes import Genotype, Operations
from ghnlib.architectures.layers import Layer
from ghnlib.architectures.operations import Spec, operation

IMAGENET_FORM = 64
"""Images of at least this many pixels a side get the ImageNet form of a network."""


class PlannedOp(NamedTuple):
    """One operation of a cell: what it is, which state it reads (0, 1: the cell's inputs), whether it is used."""

    name: str
    source: int
    spec: Spec
    live: bool


class PlannedCell(NamedTuple):
    """Two preprocessing operations, two operations per state, the states to concatenate; ``channels`` of the output;
    ``size``: number of scalars in the parameters.
    """

    preprocess: tuple[PlannedOp, PlannedOp]
    ops: tuple[PlannedOp, ...]
    concat: tuple[int, ...]
    live: bool
    channels: int
    size: int


class Plan(NamedTuple):
    """A network in full.

    ``stem``: layers of its parts by module name, the second part, if any, continues the first; ``uses_stem1``: whether
    the output depends on that. ``positions``: (channels, side) of a positional encoding after the stem, None: there is
    none. ``sides``: pixels a side of each cell's output. ``glob_avg``: global average before the classifier, else
    flatten. ``head``: (name, inputs, outputs) of the classifier's linear layers. ``imagenet``, ``norm``: whether in the
    form for large images, whether with batch norm.
    """

    stem: dict[str, list[Layer]]
    uses_stem1: bool
    positions: tuple[int, int] | None
    cells: tuple[PlannedCell, ...]
    sides: tuple[int, ...]
    glob_avg: bool
    head: tuple[tuple[str, int, int], ...]
    imagenet: bool
    norm: bool


def stem_output(stem: dict[str, list[Layer]], side: int) -> tuple[int, int]:
    """Channels of a stem's output, and pixels a side of the map that the first cell works on."""
    channels = 3
    for layers in stem.values():
        for layer in layers:
            if layer.kind in ("conv", "max_pool"):
                side = (side + 2 * layer.padding[0] - layer.kernel[0]) // layer.stride[0] + 1
            channels = layer.c_out or channels
    return channels, side


class Liveness(NamedTuple):
    """Of one cell: which states have a value, which operations and inputs its output depends on."""

    present: tuple[bool, ...]
    ops: tuple[bool, ...]
    inputs: tuple[bool, bool]


def cell_liveness(ops: Operations, concat: tuple[int, ...], has_inputs: tuple[bool, bool]) -> Liveness:
    """What is left of a cell once 'none' and absent inputs are taken out."""
    has_value = [name != "none" for name, _ in ops]
    present = list(has_inputs)
    for j in range(0, len(ops), 2):
        for k in (j, j + 1):
            has_value[k] = has_value[k] and present[ops[k][1]]
        present.append(has_value[j] or has_value[j + 1])
    needed = [present[i] and i in concat for i in range(len(present))]
    live = [False] * len(ops)
    for j in reversed(range(len(ops))):
        if has_value[j] and needed[j // 2 + 2]:
            live[j] = needed[ops[j][1]] = True
    return Liveness(tuple(present), tuple(live), (needed[0], needed[1]))


def reduction_cells(n_cells: int) -> tuple[int, ...]:
    """The cells that halve the resolution: a third and two thirds down the network, never the first."""
    return tuple(sorted({n_cells // 3, 2 * n_cells // 3} - {0}))


@lru_cache(maxsize=16)  # an architecture is planned for several widths and sizes of images
def _network_liveness(genotype: Genotype, n_cells: int) -> tuple[list[Liveness], list[bool]]:
    """Per cell its liveness; per source (stem twice, then the cells) whether the output depends on it."""
    present, cells, reductions = [True, True], [], reduction_cells(n_cells)
    for k in range(n_cells):
        ops, concat = genotype.cell(k in reductions)
        cells.append(cell_liveness(ops, concat, (present[k], present[k + 1])))
        present.append(any(cells[k].present[i] for i in concat))
    if not present[-1]:
        raise ValueError("the last cell has no operation with a value: 'none' cuts this architecture in two")
    needed = [False] * len(present)
    needed[-1] = True
    for k in reversed(range(n_cells)):
        if needed[k + 2] and present[k + 2]:
            first, second = cells[k].inputs
            needed[k] |= first
            needed[k + 1] |= second
    return cells, [n and p for n, p in zip(needed, present)]


@lru_cache(maxsize=16)  # sizes of images mostly leave the cells the same
def plan_cells(
    genotype: Genotype, n_cells: int, width: int, C_mult: int, stem: int, two_stems: bool, preproc: bool, norm: bool
) -> tuple[tuple[PlannedCell, ...], bool]:
    """The cells, and whether they use the second part of the stem.

    Args:
        width: of the first cells; C_mult: factor at each reduction cell. stem: channels of the stem's output.
        two_stems: whether the stem's second part has half the side. preproc: whether cells project their inputs.

    Raises:
        ValueError: the output does not depend on the input, since 'none' cuts the network in two.
    """
    reductions, stride = reduction_cells(n_cells), 1 if "msa" in genotype.names else 2
    liveness, needed = _network_liveness(genotype, n_cells)
    before_last, last, halved = stem, stem, two_stems and stride == 2
    cells: list[PlannedCell] = []
    known: dict[tuple, PlannedCell] = {}
    for k in range(n_cells):
        reduction = k in reductions
        width *= C_mult if reduction else 1
        channels, live = (before_last, last, width), needed[k + 2]
        key = reduction, halved, channels, live, liveness[k]
        if key not in known:
            cell, strided = genotype.cell(reduction), stride if reduction else 1
            known[key] = _plan_cell(cell, strided, halved, channels, liveness[k], live, preproc, norm)
        cells.append(known[key])
        before_last, last, halved = last, cells[k].channels, reduction and stride == 2
    return tuple(cells), needed[1]


def _plan_cell(
    cell: tuple[Operations, tuple[int, ...]],
    stride: int,
    halve: bool,
    channels: tuple[int, int, int],
    liveness: Liveness,
    live: bool,
    preproc: bool,
    norm: bool,
) -> PlannedCell:
    """A genotype's cell. ``channels``: of its two inputs and its own. ``halve``: its first input has twice the side.
    ``live``: whether the network uses the cell.
    """
    before_last, last, width = channels
    ops, concat = cell
    inner, outer = Spec(width, width, 1, norm), Spec(width if preproc else last, width, stride, norm)
    uses = zip(ops, liveness.ops)
    planned = tuple([PlannedOp(op, i, outer if i < 2 else inner, live and used) for (op, i), used in uses])
    project, shrink = ("conv_1x1", "skip_connect") if preproc else ("subsample", "subsample")
    first = Spec(before_last, width, 2 if halve else 1, norm)
    preprocess = (
        PlannedOp(shrink if halve else project, 0, first, live and liveness.inputs[0]),
        PlannedOp(project, 1, Spec(last, width, 1, norm), live and liveness.inputs[1]),
    )
    size = sum([operation(op.name, op.spec).block.size for op in (*preprocess, *planned)])
    return PlannedCell(preprocess, planned, concat, live, len(concat) * width, size)
