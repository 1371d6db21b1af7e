"""The design space of DeepNets-1M and how architectures are drawn from it (PPUDA appendix A.1, A.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import Genotype
from ghnlib.architectures.plan import IMAGENET_FORM
from ghnlib.deepnets.splits import SPLITS

OPERATIONS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
    "dil_conv_5x5", "conv_1x1", "conv_7x1_1x7", "conv_3x3", "conv_5x5", "conv_7x7", "msa", "cse",
)  # fmt: skip
WITHOUT_WEIGHTS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
LARGE_CONVS = ("conv_5x5", "conv_7x7")


class WidthRule(NamedTuple):
    """How training draws C and fc_dim. ``cap``: (millions of parameters, cells) above which C is the smallest;
    ``tiers``: (millions of parameters, cells, number of widths to draw from), first that holds.
    """

    cap: tuple[float, int]
    tiers: tuple[tuple[float, int, int], ...]
    draw_stride: bool = False


WIDTH_RULES = {
    "narrow": WidthRule((0.8, 12), ((0.4, 10, 2), (0.2, 8, 3))),  # PPUDA
    "wide": WidthRule((2.0, 14), ((0.4, 10, 4), (0.2, 8, 5)), draw_stride=True),  # GHN-3 on ImageNet
}
"""Rules for the widths of training networks; they need the grids ``widths`` and ``fc_dims`` of a space."""


@dataclass(frozen=True)
class DesignSpace:
    """What architectures are drawn from. The defaults are those of the paper's training split. A subclass with a
    ``draw_genotype`` or ``draw`` of its own is a space with other rules; add it to ``SPACES`` to know it by name.

    Args:
        cells: (min, max) number of cells. steps: (min, medium, max) number of sums in a cell; up to max in networks
            with no more cells than a threshold drawn from ``thresholds``, else up to medium.
        operations: candidates, each equally likely. Without "msa" there are no transformers.
        only_pool: probability that reduction cells draw from ``WITHOUT_WEIGHTS`` alone. drop_concat: that each inner
            state is left out of the output with probability 0.5.
        kernels, C_mults, fc_layers: candidates of the fields ks, C_mult and fc_layers of ``Architecture``.
        no_norm: probability of a network without batch norm, if it has few cells (at most min + ``no_norm_margin``).
        no_glob_avg: probability of flattening before the classifier, in networks that may.
        preproc: probability of projections where they may be left out: (without, with attention).
        stem_types, stem_pool: candidates; probability of max pooling after stem 0.
        max_params: at ``width``, 10 classes, for images of each of the sizes ``limit_inputs``, the smallest first.
        width, fc_dim: C and hidden units. width_rule: None (all networks have ``width``), or for training a key of
            WIDTH_RULES, with the grids ``widths`` and ``fc_dims``.
        min_params: networks are widened in steps of ``width_step`` channels until they have that many parameters; 0:
            they are not.
        width_factor: on C in the end, for (small, ImageNet) images.
        variations: split -> the fields that differ in it.
    """

    cells: tuple[int, int] = (4, 18)
    steps: tuple[int, int, int] = (1, 2, 4)
    thresholds: tuple[int, ...] = (7, 8, 9, 10)
    operations: tuple[str, ...] = OPERATIONS
    only_pool: float = 0.5
    drop_concat: float = 0.5
    kernels: tuple[int, ...] = (3, 5, 7)
    C_mults: tuple[int, ...] = (1, 2)
    preproc: tuple[float, float] = (1.0, 0.2)
    no_glob_avg: float = 0.1
    no_norm: float = 0.5
    no_norm_margin: int = 1
    stem_types: tuple[int, ...] = (0, 1)
    stem_pool: float = 0.5
    fc_layers: tuple[int, ...] = (1, 2)
    max_params: int = 10_000_000
    limit_inputs: tuple[int, ...] = (32, 224)
    width: int = 32
    fc_dim: int = 256
    width_rule: str | None = None
    widths: tuple[int, ...] = tuple(range(32, 129, 16))
    fc_dims: tuple[int, ...] = tuple(range(64, 513, 64))
    min_params: int = 0
    width_step: int = 16
    width_factor: tuple[int, int] = (1, 1)
    num_classes: int = 10
    input_size: int = 32
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_split(self, split: str) -> DesignSpace:
        """The space of one split."""
        return replace(self, **self.variations.get(split, SPLITS[split].variation))

    def draw(self, draws: Draws) -> Architecture | None:
        """One candidate, or None where its mixture of operations is not wanted."""
        n_cells, threshold = draws.integer(*self.cells), draws.pick(self.thresholds)
        low, medium, high = self.steps
        steps = draws.integer(low, high if n_cells <= threshold else medium)
        genotype = self.draw_genotype(steps, draws)
        ks = draws.pick(self.kernels)
        if not is_wanted(genotype):
            return None
        attention = "msa" in genotype.names
        C_mult = draws.pick(self.C_mults)
        preproc = steps > 1 or C_mult > 1 or draws.flip(self.preproc[attention])
        glob_avg = attention or n_cells > threshold or not draws.flip(self.no_glob_avg)
        few = n_cells <= self.cells[0] + self.no_norm_margin and (steps <= medium or self.no_norm == 1)
        norm = None if few and draws.flip(self.no_norm) else "bn"
        stem_type = draws.pick(self.stem_types)
        stem_pool = stem_type == 0 and draws.flip(self.stem_pool)
        return Architecture(
            genotype, self.width, n_cells, ks, stem_type, stem_pool, norm, preproc, C_mult, draws.pick(self.fc_layers),
            self.fc_dim, glob_avg,
        )  # fmt: skip

    def draw_genotype(self, steps: int, draws: Draws) -> Genotype:
        """Two cells of ``steps`` sums. Operations are uniform; a sum's two inputs are distinct and uniform."""
        only_pool = draws.flip(self.only_pool)
        drop_concat = steps > 1 and draws.flip(self.drop_concat)
        normal = _draw_cell(_candidates(self.operations, steps > 1, False), steps, draws)
        reduce = _draw_cell(_candidates(self.operations, steps > 1, only_pool), steps, draws)
        kept = tuple(s for s in range(2, steps + 1) if not drop_concat or draws.flip(0.5))
        concat = (*kept, steps + 1)
        return Genotype(normal, concat, reduce, concat)

    def accepts(self, arch: Architecture) -> bool:
        """Whether 'none' leaves the network in one piece and it has no more parameters than the space allows."""
        # Only the classifier after a map that is not averaged and positional encodings grow with the image.
        sizes = self.limit_inputs if arch.is_vit or not arch.glob_avg else self.limit_inputs[:1]
        try:
            return all(arch.adapted(10, size).num_params <= self.max_params for size in sizes)
        except ValueError:
            return False

    def finish(self, arch: Architecture, draws: Draws, arguments: Mapping[str, Any]) -> Architecture:
        """The architecture with the C and fc_dim of its split, and the other ``arguments`` of its network."""
        input_size, changes = arguments["input_size"], {}
        if self.min_params:
            changes["C"] = width_of_size(arch, self.min_params, self.width_step)
        if self.width_rule:
            changes = draw_width(arch, self, draws, input_size)
        C = changes.get("C", arch.C) * self.width_factor[input_size >= IMAGENET_FORM]
        return replace(arch, **{**arguments, **changes, "C": C})


_EVALUATED = {"min_params": 2_500_000}
_WITHOUT_NORM = {"no_norm": 1.0, "no_norm_margin": 1000}

PAPER = DesignSpace(
    variations={
        "train": {"width_rule": "narrow"},
        "val": _EVALUATED,
        "test": _EVALUATED,
        "wide": {**_EVALUATED, "width_factor": (4, 2)},
        "deep": {**_EVALUATED, "cells": (10, 36), "thresholds": (18,), "max_params": 100_000_000},
        "dense": {**_EVALUATED, "steps": (2, 6, 10), "max_params": 100_000_000},
        "bnfree": {**_EVALUATED, **_WITHOUT_NORM},
        "search": {"cells": (6, 20), "steps": (1, 3, 6), "thresholds": (10,), "no_norm": 0.0, "preproc": (0.8, 0.2)},
    }
)
_RARE = ("none", "cse", "msa")
_COMMON = tuple(name for name in OPERATIONS if name not in _RARE)
_EVALUATED_SMALL = {"min_params": 30_000}

SMALL = DesignSpace(
    cells=(2, 4),
    steps=(1, 2, 2),
    operations=_COMMON * 4 + ("none", "none", "cse", "cse", "msa"),  # one in ten of the rare: more is too slow to learn
    no_norm=0.25,
    stem_pool=1.0,
    max_params=150_000,
    limit_inputs=(16,),
    width=16,
    widths=(16, 24, 32),
    fc_dims=(32, 64, 96, 128),
    width_step=8,
    input_size=16,
    variations={
        "train": {"width_rule": "narrow"},
        "val": _EVALUATED_SMALL,
        "test": _EVALUATED_SMALL,
        "wide": {**_EVALUATED_SMALL, "width_factor": (2, 2)},
        "deep": {**_EVALUATED_SMALL, "cells": (5, 8), "max_params": 10_000_000},
        "dense": {**_EVALUATED_SMALL, "steps": (2, 5, 5), "max_params": 10_000_000},
        "bnfree": {**_EVALUATED_SMALL, **_WITHOUT_NORM},
        "search": {"steps": (1, 3, 3), "no_norm": 0.0, "preproc": (0.8, 0.2)},
    },
)


class Draws:
    """Uniform draws from one PCG64 stream, in reversed blocks of 128: architectures are pinned to this order."""

    def __init__(self, *entropy: int):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        blocks = (reversed(generator.random(128).tolist()) for _ in count())
        self.uniform = chain.from_iterable(blocks).__next__
        """A number in [0, 1)."""

    def flip(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return low + int(self.uniform() * (high + 1 - low))

    def pick(self, options: Sequence):
        """One of the options."""
        return options[int(self.uniform() * len(options))]


# Candidates ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _candidates(operations: tuple[str, ...], allow_none: bool, only_pool: bool) -> tuple[str, ...]:
    allowed = tuple(name for name in operations if allow_none or name != "none")
    return (tuple(name for name in allowed if name in WITHOUT_WEIGHTS) if only_pool else ()) or allowed


def _draw_cell(candidates: tuple[str, ...], steps: int, draws: Draws) -> tuple[tuple[str, int], ...]:
    cell = []
    for states in range(2, steps + 2):
        first = draws.integer(0, states - 1)
        second = draws.integer(0, states - 2)
        second += second >= first
        cell += [(draws.pick(candidates), first), (draws.pick(candidates), second)]
    return tuple(cell)


def is_wanted(genotype: Genotype) -> bool:
    """Whether the mixture of operations is one that DeepNets-1M keeps: something to learn, little of the heavy."""
    names = genotype.names
    has_conv = any("conv" in name for name in names)
    if not has_conv and ("cse" in names or "msa" not in names):
        return False
    for cell in (genotype.normal, genotype.reduce):
        inside = [name for name, _ in cell]
        if inside.count("cse") > 1 or sum(name in LARGE_CONVS for name in inside) > 1:
            return False
    return True


# Widths --------------------------------------------------------------------------------------------------------------


def width_of_size(arch: Architecture, min_params: int, step: int = 16) -> int:
    """The smallest C, in steps of channels from the architecture's, with at least ``min_params`` parameters."""
    while arch.num_params < min_params:
        arch = replace(arch, C=arch.C + step)
    return arch.C


def draw_width(arch: Architecture, space: DesignSpace, draws: Draws, input_size: int) -> dict[str, int]:
    """C and fc_dim for training: the smaller the network, the wider it may be (PPUDA appendix A.2)."""
    rule, imagenet = WIDTH_RULES[space.width_rule], input_size >= IMAGENET_FORM
    measured = arch.adapted(input_size=224) if imagenet and not rule.draw_stride else arch
    millions = measured.num_params / 1e6
    heavy = not arch.glob_avg or any(name in LARGE_CONVS for name in arch.genotype.names)
    choices = 1
    if not (heavy or millions > rule.cap[0] or arch.n_cells > rule.cap[1]):
        tiers = (count for p, cells, count in rule.tiers if millions > p or arch.n_cells > cells)
        choices = next(tiers, len(space.widths))
    free = choices == len(space.widths)
    C = draws.pick(space.widths[:choices])
    changes = {"C": C, "fc_dim": draws.pick(space.fc_dims if free and C <= 64 else space.fc_dims[:4])}
    if rule.draw_stride and imagenet and free and arch.stem_pool:
        changes["imagenet_stride"] = draws.pick((2, 4))
    return changes
