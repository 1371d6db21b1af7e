"""From an architecture of DeepNets-1M to a plain module (PPUDA appendix A.1).

A ``Plan`` spells out channels, strides and which operations lead to the output; the module below and the composed
graph (``ghnlib.compose``) both follow it. Shapes: B images of size H x W, C channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ghnlib.layers import IDENTITY, RELU, Flatten, Layer, Linear, PosEnc, conv, make_chain, norm, pool
from ghnlib.primitives import Spec, build, primitive

if TYPE_CHECKING:
    from ghnlib.architectures import Architecture, Genotype

Operations = tuple[tuple[str, int], ...]
"""A cell's operations: (name, index of the state that it reads)."""
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
    """``sides``: pixels a side of each cell's output. ``features``: inputs of the classifier. ``stem1``: whether the
    second part of the stem is used.
    """

    cells: tuple[PlannedCell, ...]
    sides: tuple[int, ...]
    features: int
    stem1: bool


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


@lru_cache
def reduction_cells(n_cells: int) -> tuple[int, ...]:
    """The cells that halve the resolution: a third and two thirds down the network, never the first."""
    return tuple(sorted({n_cells // 3, 2 * n_cells // 3} - {0}))


@lru_cache(maxsize=16)  # an architecture is planned for several widths and sizes of images
def _network_liveness(genotype: Genotype, n_cells: int) -> tuple[list[Liveness], list[bool]]:
    """Per cell its liveness; per source (stem twice, then the cells) whether the output depends on it."""
    present, cells, reductions = [True, True], [], reduction_cells(n_cells)
    known: dict[tuple, tuple[Liveness, bool]] = {}  # most cells repeat, and a genotype is slow to hash
    for k in range(n_cells):
        key = reduction, first, second = k in reductions, present[k], present[k + 1]
        if key not in known:
            ops, concat = genotype.cell(reduction)
            cell = cell_liveness(ops, concat, (first, second))
            known[key] = cell, True in [cell.present[i] for i in concat]
        cells.append(known[key][0])
        present.append(known[key][1])
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


def plan(arch: Architecture) -> Plan:
    """Channels, strides and use of every operation.

    Raises:
        ValueError: the output does not depend on the input, since 'none' cuts the network in two.
    """
    channels, side = stem_output(arch.stem)
    shared = (arch.preproc, arch.norm is not None, arch.naming)
    cells, stem1 = _plan_cells(arch.genotype, arch.n_cells, arch.C, arch.C_mult, channels, arch.stem_type == 1, shared)
    reductions = () if arch.is_vit else reduction_cells(arch.n_cells)
    sides = [side := -(-side // 2) if k in reductions else side for k in range(arch.n_cells)]
    features = cells[-1].channels if arch.glob_avg else cells[-1].channels * side * side
    return Plan(cells, tuple(sides), features, stem1)


@lru_cache(maxsize=16)  # sizes of images mostly leave the cells the same
def _plan_cells(
    genotype: Genotype, n_cells: int, width: int, C_mult: int, stem: int, halved: bool, shared: tuple[bool, bool, str]
) -> tuple[tuple[PlannedCell, ...], bool]:
    """The cells, and whether they use the second part of the stem. ``stem``: its channels. ``halved``: whether its
    second part has half the side.
    """
    reductions, stride = reduction_cells(n_cells), 1 if "msa" in genotype.names else 2
    liveness, needed = _network_liveness(genotype, n_cells)
    before_last, last, halved = stem, stem, halved and stride == 2
    cells: list[PlannedCell] = []
    known: dict[tuple, PlannedCell] = {}
    for k in range(n_cells):
        reduction = k in reductions
        width *= C_mult if reduction else 1
        channels, live = (before_last, last, width), needed[k + 2]
        key = reduction, halved, channels, live, id(liveness[k])
        if key not in known:
            cell, strided = genotype.cell(reduction), stride if reduction else 1
            known[key] = _plan_cell(cell, strided, halved, channels, liveness[k], live, shared)
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
    shared: tuple[bool, bool, str],
) -> PlannedCell:
    """A genotype's cell. ``channels``: of its two inputs and its own. ``halve``: its first input has twice the side.
    ``live``: whether the network uses the cell. ``shared`` by all cells: preproc, norm and naming.
    """
    before_last, last, width = channels
    (ops, concat), (preproc, *rest) = cell, shared
    inner, outer = Spec(width, width, 1, *rest), Spec(width if preproc else last, width, stride, *rest)
    uses = zip(ops, liveness.ops)
    planned = tuple([PlannedOp(op, i, outer if i < 2 else inner, live and used) for (op, i), used in uses])
    project, shrink = ("conv_1x1", "skip_connect") if preproc else ("subsample", "subsample")
    first = Spec(before_last, width, 2 if halve else 1, *rest)
    preprocess = (
        PlannedOp(shrink if halve else project, 0, first, live and liveness.inputs[0]),
        PlannedOp(project, 1, Spec(last, width, 1, *rest), live and liveness.inputs[1]),
    )
    size = sum([primitive(op.name, op.spec).block.size for op in (*preprocess, *planned)])
    return PlannedCell(preprocess, planned, concat, live, len(concat) * width, size)


# Stems and heads -----------------------------------------------------------------------------------------------------


class Stem(NamedTuple):
    """The arguments of an architecture that its stem depends on; ``width``: C, ``imagenet``: whether in that form."""

    width: int
    ks: int
    stem_type: int
    stem_pool: bool
    norm: bool
    preproc: bool
    is_vit: bool
    imagenet: bool
    imagenet_stride: int
    input_size: int


@lru_cache
def stem_layers(stem: Stem) -> dict[str, list[Layer]]:
    """Layers of the stem's parts by module name; the second part, if any, continues the first."""
    imagenet, present, width = stem.imagenet, stem.norm, stem.width
    if stem.is_vit:
        return {"stem0": [conv(3, width, 16, 16, 0) if imagenet else conv(3, width, 3, 3, 1)]}
    if stem.stem_type == 0:
        out = width if imagenet or not stem.preproc else 3 * width
        first = conv(3, out, stem.ks, stem.imagenet_stride if imagenet else 1)
        return {"stem": [first, norm(out, present), pool("max_pool", 2) if stem.stem_pool else IDENTITY]}
    stride = 2 if imagenet else 1
    stem0 = [conv(3, width // 2, stem.ks, stride), norm(width // 2, present), RELU]
    stem0 += [conv(width // 2, width, 3, stride), norm(width, present)]
    return {"stem0": stem0, "stem1": [RELU, conv(width, width, 3, 2), norm(width, present)]}


@lru_cache
def stem_output(stem: Stem) -> tuple[int, int]:
    """Channels of the stem's output, and pixels a side of the map that the first cell works on."""
    side, channels = stem.input_size, 3
    for layers in stem_layers(stem).values():
        for layer in layers:
            if layer.kind in ("conv", "max_pool"):
                side = (side + 2 * layer.padding[0] - layer.kernel[0]) // layer.stride[0] + 1
            channels = layer.c_out or channels
    return channels, side


def head_sizes(arch: Architecture) -> tuple[tuple[str, int, int], ...]:
    """(name, inputs, outputs) of the classifier's linear layers."""
    features = arch.plan.features
    if arch.fc_layers == 2:
        return ("classifier.0", features, arch.fc_dim), ("classifier.3", arch.fc_dim, arch.num_classes)
    return (("classifier.0", features, arch.num_classes),)


def make_classifier(arch: Architecture, device) -> nn.Sequential:
    """One linear layer, or two with ReLU and dropout between."""
    linears = [Linear(a, b, device=device) for _, a, b in head_sizes(arch)]
    if len(linears) == 1:
        return nn.Sequential(*linears)
    return nn.Sequential(linears[0], nn.ReLU(), nn.Dropout(0.5), linears[1])


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds down the network, for training: (B, C, side, side) -> (B, classes)."""

    def __init__(self, arch: Architecture, channels: int, side: int, track: bool, device):
        super().__init__()
        imagenet, present = arch.input_size >= IMAGENET_FORM, arch.norm is not None
        self.resize = nn.AdaptiveAvgPool2d(8) if arch.is_vit and not imagenet else nn.Identity()
        side = 8 if arch.is_vit and not imagenet else side
        layers = [RELU, IDENTITY, conv(channels, 128), norm(128, present), RELU, conv(128, 768, 2, 1, 0)]
        layers += [RELU] if imagenet else [norm(768, present), RELU]
        self.features = make_chain(layers, track, device)
        # DARTS' overlapping windows for its two sizes; the 2x2 map that the next convolution needs for the others
        windows = {8: nn.AvgPool2d(5, 3), 7: nn.AvgPool2d(5, 2)}
        self.features[1] = windows.get(side, nn.AdaptiveAvgPool2d(2))
        self.classifier = Linear(768, arch.num_classes, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.resize(x)).flatten(1))


# Network -------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A cell: two inputs (B, C, H, W) -> their states, concatenated (B, states * width, H', W').

    Operations that do not lead to the output own parameters, as in DeepNets-1M, but are never run.
    """

    def __init__(self, cell: PlannedCell, track: bool, device):
        super().__init__()
        self.plan = cell
        self.preprocess0, self.preprocess1 = (build(op.name, op.spec, track, device) for op in cell.preprocess)
        self._ops = nn.ModuleList(build(op.name, op.spec, track, device) for op in cell.ops)

    def forward(self, s0: Tensor | None, s1: Tensor | None, drop_path: float = 0.0) -> Tensor:
        first, second = self.plan.preprocess
        states = [self.preprocess0(s0) if first.live else None, self.preprocess1(s1) if second.live else None]
        for j in range(0, len(self._ops), 2):
            left, right = self._term(j, states, drop_path), self._term(j + 1, states, drop_path)
            states.append(right if left is None else left if right is None else left + right)
        output = [states[i] for i in self.plan.concat]
        if len(output) == 1:
            return output[0]
        like = next(state for state in output if state is not None)
        return torch.cat([torch.zeros_like(like) if state is None else state for state in output], 1)

    def _term(self, j: int, states: list[Tensor | None], drop_path: float) -> Tensor | None:
        op = self.plan.ops[j]
        if not op.live:
            return None
        out = self._ops[j](states[op.source])
        if drop_path and self.training and not (op.name == "skip_connect" and op.spec.stride == 1):
            keep = torch.empty(len(out), 1, 1, 1, device=out.device, dtype=out.dtype).bernoulli_(1 - drop_path)
            out = out * (keep / (1 - drop_path))
        return out


class Network(nn.Module):
    """An architecture of DeepNets-1M: (B, 3, H, W) -> logits (B, classes).

    With ``auxiliary``, training mode returns (logits, auxiliary logits), unless no operation of the output's path is
    in the cell that the auxiliary head reads. Parameter names are those of DeepNets-1M.
    ``drop_path``: probability of dropping an operation's output for an image, in training mode; may be changed later.
    """

    def __init__(
        self, arch: Architecture, device=None, track: bool = True, auxiliary: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        steps = arch.plan
        self.expected_input_sz = arch.input_size
        self.drop_path, self.runs_stem1 = drop_path, steps.stem1
        for name, layers in stem_layers(arch.stem).items():
            self.add_module(name, make_chain(layers, track, device))
        if arch.is_vit:
            self.stem0 = self.stem0[0]  # the patch convolution has no container
            channels, side = stem_output(arch.stem)
            self.pos_enc = PosEnc(channels, side, device)
        self.cells = nn.ModuleList(Cell(cell, track, device) for cell in steps.cells)
        self.auxiliary_after = 2 * arch.n_cells // 3
        self.auxiliary_head = None
        if auxiliary:
            cell = steps.cells[self.auxiliary_after]
            self.auxiliary_head = AuxiliaryHead(arch, cell.channels, steps.sides[self.auxiliary_after], track, device)
        self.global_pooling = Flatten(arch.glob_avg)
        self.classifier = make_classifier(arch, device)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0, s1 = self._stem(x)
        auxiliary = None
        for k, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path) if cell.plan.live else None
            if k == self.auxiliary_after and self.auxiliary_head is not None and self.training and s1 is not None:
                auxiliary = self.auxiliary_head(s1)
        logits = self.classifier(self.global_pooling(s1))
        return logits if auxiliary is None else (logits, auxiliary)

    def _stem(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "pos_enc"):
            x = self.pos_enc(self.stem0(x))
        elif hasattr(self, "stem1"):
            x = self.stem0(x)
            return x, self.stem1(x) if self.runs_stem1 else None
        else:
            x = self.stem(x)
        return x, x
