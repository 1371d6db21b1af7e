"""Genotypes: the two cells that a network of DeepNets-1M repeats (PPUDA appendix A.1)."""

from __future__ import annotations

from typing import NamedTuple

Operations = tuple[tuple[str, int], ...]
"""A cell's operations: (name, index of the state that it reads)."""


class Genotype(NamedTuple):
    """Two cells. Each operation is (name, index of the state that it reads); two consecutive ones sum to a state.
    States 0 and 1 are the outputs of the cells before; ``*_concat``: the states that form the cell's output.
    """

    normal: Operations
    normal_concat: tuple[int, ...]
    reduce: Operations
    reduce_concat: tuple[int, ...]

    @classmethod
    def from_lists(cls, normal, normal_concat, reduce, reduce_concat) -> Genotype:
        """A genotype from any nested sequences, such as those of a JSON file."""
        cells = [tuple((str(name), int(source)) for name, source in cell) for cell in (normal, reduce)]
        concats = [tuple(int(state) for state in concat) for concat in (normal_concat, reduce_concat)]
        return cls(cells[0], concats[0], cells[1], concats[1])

    def cell(self, reduction: bool) -> tuple[Operations, tuple[int, ...]]:
        """Operations and concatenated states of the normal or the reduction cell."""
        return self[2:] if reduction else self[:2]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all operations."""
        return tuple(name for name, _ in self.normal + self.reduce)


def _parse(cell: str) -> Operations:
    pairs = (item.rsplit(":", 1) for item in cell.split())
    return tuple((name, int(source)) for name, source in pairs)


GENOTYPES = {
    "DARTS": Genotype(
        _parse(
            "sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 "
            "sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2"
        ),
        (2, 3, 4, 5),
        _parse(
            "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 "
            "max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1"
        ),
        (2, 3, 4, 5),
    ),
    "PDARTS": Genotype(
        _parse(
            "skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 "
            "sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4"
        ),
        (2, 3, 4, 5),
        _parse(
            "avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 "
            "max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3"
        ),
        (2, 3, 4, 5),
    ),
    "ViT": Genotype(_parse("none:0 msa:1"), (2,), _parse("none:0 avg_pool_3x3:1"), (2,)),
}
"""Published genotypes by name (DARTS, P-DARTS, and the transformer of PPUDA)."""
