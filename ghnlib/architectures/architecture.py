"""Architectures of DeepNets-1M (PPUDA appendix A.1): what a network is built and a graph composed from."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch

from ghnlib.architectures.composing import compose, count_parameters
from ghnlib.architectures.genotypes import Genotype
from ghnlib.architectures.layers import IDENTITY, RELU, Layer, conv, norm, pool
from ghnlib.architectures.network import Network
from ghnlib.architectures.plan import IMAGENET_FORM, Plan, plan_cells, reduction_cells, stem_output
from ghnlib.graphs.graph import Graph


class Buildable:
    """What a network is built from: a dataclass with ``num_classes`` and ``input_size``, and with ``build``."""

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # leaves cached values behind

    @cached_property
    def num_params(self) -> int:
        """Number of scalars in the network's parameters."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def adapted(self, num_classes: int | None = None, input_size: int | None = None) -> Self:
        """The same for another number of classes or size of images; None leaves as is."""
        changes = {"num_classes": num_classes or self.num_classes, "input_size": input_size or self.input_size}
        same = all(getattr(self, name) == value for name, value in changes.items())
        return self if same else replace(self, **changes)


@dataclass(frozen=True)
class Architecture(Buildable):
    """One network of DeepNets-1M: the arguments it is built from (PPUDA appendix A.1).

    Args:
        genotype: operations of the two kinds of cells. n_cells: how many there are.
        C: channels of the first cells. C_mult: factor on them at each of the two reduction cells.
        ks: kernel size of the first convolution. stem_type: 0 (one convolution, then max pooling if ``stem_pool``)
            or 1 (three convolutions, the third halves the resolution); without effect on visual transformers.
        norm: "bn" or None. preproc: whether cells project their inputs to their own width.
        fc_layers: 1, or 2 with ``fc_dim`` hidden units. glob_avg: global average before the classifier, else flatten.
        imagenet_stride: of the first convolution on images of 64 pixels and more.
        num_classes: logits. input_size: pixels a side of the images.

    Raises:
        ValueError: the arguments contradict each other.
    """

    network = Network
    """What it builds."""

    genotype: Genotype
    C: int = 32
    n_cells: int = 8
    ks: int = 3
    stem_type: int = 0
    stem_pool: bool = False
    norm: str | None = "bn"
    preproc: bool = True
    C_mult: int = 2
    fc_layers: int = 1
    fc_dim: int = 256
    glob_avg: bool = True
    imagenet_stride: int = 4
    num_classes: int = 10
    input_size: int = 32

    def __post_init__(self) -> None:
        concats = (self.genotype.normal_concat, self.genotype.reduce_concat)
        if not self.preproc and (self.C_mult > 1 or max(map(len, concats)) > 1):
            raise ValueError("preproc=False needs C_mult=1 and cells that output one state: widths would not agree")
        if self.norm not in ("bn", None):
            raise ValueError(f"norm is 'bn' or None, not {self.norm!r}")

    @property
    def identity(self) -> tuple:
        """Everything but widths, classes and image size, the same whichever way round the terms of a sum are."""
        g = self.genotype
        cells = [tuple(tuple(sorted(cell[j : j + 2])) for j in range(0, len(cell), 2)) for cell in (g.normal, g.reduce)]
        # the first convolution of a transformer takes none of the stem's arguments
        stem = () if self.is_vit else (self.ks, self.stem_type, bool(self.stem_pool))
        rest = (self.n_cells, self.norm, bool(self.preproc), self.C_mult, self.fc_layers, bool(self.glob_avg))
        return cells, g.normal_concat, g.reduce_concat, stem, rest

    @cached_property
    def is_vit(self) -> bool:
        """Whether there is attention anywhere, which makes the whole network keep one resolution."""
        return "msa" in self.genotype.names

    @cached_property
    def plan(self) -> Plan:
        """All that the network consists of. Raises ValueError where 'none' cuts the network in two."""
        imagenet = self.input_size >= IMAGENET_FORM
        stem = self._stem(imagenet)
        channels, side = stem_output(stem, self.input_size)
        positions = (channels, side) if self.is_vit else None
        cells, uses_stem1 = plan_cells(
            self.genotype, self.n_cells, self.C, self.C_mult, channels, self.stem_type == 1, self.preproc,
            self.norm is not None,
        )  # fmt: skip
        reductions = () if self.is_vit else reduction_cells(self.n_cells)
        sides = [side := -(-side // 2) if k in reductions else side for k in range(self.n_cells)]
        features = cells[-1].channels * (1 if self.glob_avg else side * side)
        sizes = (features, self.fc_dim, self.num_classes) if self.fc_layers == 2 else (features, self.num_classes)
        head = tuple(zip(("classifier.0", "classifier.3"), sizes, sizes[1:]))
        return Plan(
            stem, uses_stem1, positions, cells, tuple(sides), self.glob_avg, head, imagenet, self.norm is not None
        )

    def _stem(self, imagenet: bool) -> dict[str, list[Layer]]:
        """A transformer's patches, three convolutions of which the third halves the resolution, or one."""
        width, present = self.C, self.norm is not None
        if self.is_vit:
            return {"stem0": [conv(3, width, 16, 16, 0) if imagenet else conv(3, width, 3, 3, 1)]}
        if self.stem_type == 1:
            stride = 2 if imagenet else 1
            stem0 = [conv(3, width // 2, self.ks, stride), norm(width // 2, present), RELU]
            stem0 += [conv(width // 2, width, 3, stride), norm(width, present)]
            return {"stem0": stem0, "stem1": [RELU, conv(width, width, 3, 2), norm(width, present)]}
        out = width if imagenet or not self.preproc else 3 * width
        first = conv(3, out, self.ks, self.imagenet_stride if imagenet else 1)
        return {"stem": [first, norm(out, present), pool("max_pool", 2) if self.stem_pool else IDENTITY]}

    @cached_property
    def graph(self) -> Graph:
        """The graph, composed from the genotype without building a module; equal to that of the traced network."""
        return compose(self.plan)

    @cached_property
    def num_params(self) -> int:
        """Number of scalars in the network's parameters."""
        return count_parameters(self.plan)

    def build(
        self,
        num_classes: int | None = None,
        input_size: int | None = None,
        device: str | torch.device | None = "meta",
        track_running_stats: bool = False,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ) -> Network:
        """The network as a plain module: (B, 3, H, W) -> logits (B, classes).

        Args:
            num_classes, input_size: other than the architecture's own.
            device: "meta" allocates nothing, for networks whose parameters are predicted.
            track_running_stats: for ordinary training; otherwise batch norms use the statistics of the batch.
            auxiliary: adds a second classifier; training mode then returns (logits, auxiliary logits).
            drop_path: probability of dropping an operation's output, in training mode.
        """
        own = self.adapted(num_classes, input_size)
        return self.network(own.plan, own.input_size, device, track_running_stats, auxiliary, drop_path)
