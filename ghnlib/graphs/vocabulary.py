"""Primitives beyond the papers' vocabulary, for hypernetworks whose ``GHNConfig.primitives`` names them.

One line makes a layer known: ``register("my_layer", MyLayer, role=Role.LINEAR, weights=("kernel",))``.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ghnlib.graphs.nodes import PRIMITIVES, Role

RANKS = {
    Role.CONV: (3, 4, 5), Role.TRANSPOSED: (3, 4, 5), Role.LINEAR: (2,), Role.EMBEDDING: (2,), Role.NORM: (1,),
    Role.SLOPE: (1,),
}  # fmt: skip
"""Roles that a registered layer's weights may have, and the axes of such a weight."""


class Registered(NamedTuple):
    """The layers of one primitive, what their weights are for, the names of their weights and biases."""

    layers: tuple[type[nn.Module], ...]
    role: Role
    weights: tuple[str, ...] = ("weight",)
    biases: tuple[str, ...] = ("bias",)


REGISTERED: dict[str, Registered] = {
    "conv1d": Registered((nn.Conv1d,), Role.CONV),
    "conv3d": Registered((nn.Conv3d,), Role.CONV),
    "conv_transpose": Registered((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), Role.TRANSPOSED),
    "embedding": Registered((nn.Embedding,), Role.EMBEDDING),
    "recurrent": Registered((nn.RNNBase, nn.RNNCellBase), Role.LINEAR),
    "prelu": Registered((nn.PReLU,), Role.SLOPE),
    "masked_msa": Registered((), Role.OPERATION),  # attention whose scores are masked, as causal attention's are
}
EXTENDED = tuple(REGISTERED)
"""What ``GHNConfig(primitives=EXTENDED)`` adds to the papers' vocabulary."""


def register(
    primitive: str,
    *layers: type[nn.Module],
    role: Role,
    weights: tuple[str, ...] = ("weight",),
    biases: tuple[str, ...] = ("bias",),
) -> None:
    """Make layers (and classes derived from them) known as a primitive, in this process.

    Args:
        role: of the weights, a key of ``RANKS``; it decides how they are decoded. Linear weights are (out, in),
            convolutions (out, in, ...), transposed ones (in, out, ...), embeddings (rows, channels).
        weights, biases: names of the parameters; a norm's bias is predicted with its weight.

    Raises:
        ValueError: the name is taken, there is no layer, or weights cannot have the role.
    """
    if primitive in PRIMITIVES or primitive in REGISTERED:
        raise ValueError(f"primitive {primitive!r} exists: choose another name")
    if not layers or role not in RANKS:
        allowed = ", ".join(f"Role.{role.name}" for role in RANKS)
        raise ValueError(f"{primitive!r} has {len(layers)} layers and {role!r}: give layers and one of {allowed}")
    REGISTERED[primitive] = Registered(layers, role, weights, biases)


def check(primitives: Iterable[str]) -> None:
    """Raises ValueError for a primitive that nothing has registered."""
    for name in primitives:
        if name not in REGISTERED:
            known = ", ".join(REGISTERED)
            raise ValueError(f"primitive {name!r} is not registered ({known} are): call graphs.vocabulary.register")
