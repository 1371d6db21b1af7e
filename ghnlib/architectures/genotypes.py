"""Genotypes: the two cells that a network of DeepNets-1M repeats (PPUDA appendix A.1)."""

from typing import NamedTuple, Self

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
    def parse(cls, normal: str, reduce: str, concat: tuple[int, ...]) -> Self:
        """From cells written as "OPERATION:STATE ..." that concatenate the same states."""
        items = [[item.split(":") for item in cell.split()] for cell in (normal, reduce)]
        cells = [tuple((name, int(source)) for name, source in cell) for cell in items]
        return cls(cells[0], concat, cells[1], concat)

    def cell(self, reduction: bool) -> tuple[Operations, tuple[int, ...]]:
        """Operations and concatenated states of the normal or the reduction cell."""
        return self[2:] if reduction else self[:2]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all operations."""
        return tuple(name for name, _ in self.normal + self.reduce)


GENOTYPES = {
    "DARTS": Genotype.parse(
        "sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 "
        "sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2",
        "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 "
        "max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1",
        (2, 3, 4, 5),
    ),
    "PDARTS": Genotype.parse(
        "skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 "
        "sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4",
        "avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 "
        "max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3",
        (2, 3, 4, 5),
    ),
    "ViT": Genotype.parse("none:0 msa:1", "none:0 avg_pool_3x3:1", (2,)),
}
"""Published genotypes by name (DARTS, P-DARTS, and the transformer of PPUDA)."""
