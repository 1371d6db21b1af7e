"""The nodes of computational graphs: primitives (PPUDA appendix A), each with what its tensor is for."""

from enum import StrEnum
from math import prod
from typing import NamedTuple

PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input",
    "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""The vocabulary of PPUDA; a primitive's index is its row in the op embedding."""


class Role(StrEnum):
    """What a node's tensor is for. Decoding, tiling and normalisation dispatch on it."""

    CONV = "convolution"
    TRANSPOSED = "transposed convolution"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    SLOPE = "slope of an activation"
    BIAS = "bias"
    CLASS_WEIGHT = "class weight"
    CLASS_BIAS = "class bias"
    POSITION = "positional encoding"
    BOTTLENECK = "bottleneck of one input"
    OPERATION = "operation"


CLASS_ROLES = (Role.CLASS_WEIGHT, Role.CLASS_BIAS)
"""Of the class layer's tensors."""


class Node(NamedTuple):
    """One primitive. ``op``: a name of PRIMITIVES or a registered one. ``name``: the parameter's qualified name, "" for
    operations. ``shape``: the parameter's shape; (1, 1, kh, kw) for pooling; None otherwise.
    ``norm_bias``: name of the norm layer's bias, which is predicted from the weight's node. ``shrink``, ``exit``: of
    anytime networks, the image's side over that of the map (0: does not apply), whether a classifier reads it.
    """

    op: str
    name: str = ""
    shape: tuple[int, ...] | None = None
    role: Role = Role.OPERATION
    norm_bias: str = ""
    shrink: int = 0
    exit: bool = False


def as_planes(role: Role, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in, kh, kw) of the two-dimensional convolution as which any other is embedded and decoded: a kernel of one
    axis is a row (1, k), one of three has its planes one below the other (kt * kh, kw), transposed ones change sides.
    Shapes of other tensors are as they are.
    """
    if role not in (Role.CONV, Role.TRANSPOSED):
        return shape
    ends = shape[:2] if role is Role.CONV else shape[1::-1]
    return (*ends, prod(shape[2:-1]), shape[-1])
