"""Hypernetworks from files."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ghnlib.config import GHNConfig
from ghnlib.released.checkpoints import CheckpointError, locate, read_checkpoint

Net = TypeVar("Net", bound=nn.Module)


def load_pretrained(
    build: Callable[[GHNConfig], Net], source: str | Path, overrides: Mapping[str, Any], hub: Mapping[str, Any]
) -> Net:
    """A hypernetwork in evaluation mode, see ``GHN.from_pretrained``. ``build``: from a configuration to a
    hypernetwork; ``overrides``: fields of the configuration; ``hub``: arguments of ``hf_hub_download``. Raises
    CheckpointError as that does."""
    path = locate(source, **hub)
    stored, state = read_checkpoint(path)
    config = GHNConfig(**{**stored, **overrides})
    needed, held = least_values(config), sum(value.numel() for value in state.values())
    if needed > held:  # known before memory is set aside for them
        raise CheckpointError(f"{path} holds {held:,} values, but its configuration describes at least {needed:,}")
    try:
        ghn = build(config)
    except ValueError as error:  # of primitives that nobody has registered
        raise CheckpointError(f"{path}: {error}") from error
    try:
        ghn.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its configuration: {str(error)[:1000]}") from error
    for name, value in ghn.named_parameters():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return ghn.eval()


def least_values(config: GHNConfig) -> int:
    """Parameters of the large matrices of a hypernetwork: by far the most, never more than it has."""
    c, (out, in_, side, _) = config, config.max_shape
    encoder = {"mlp": 2 * c.hid**2, "gated_gnn": 7 * c.hid**2 * c.modules, "graphormer": 0}[c.encoder]
    if c.encoder == "graphormer" and c.attention:
        encoder = 12 * c.hid**2 * c.layers
    if c.decoder == "lowrank":
        return encoder + 36 * c.hid**2 + 16 * c.hid * c.rank**2 + c.rank * max(out, in_) * side
    if c.decoder == "mlp":
        decoder = 2 * c.hid * (prod(c.max_shape) + c.num_classes * in_)
    else:
        decoder = 4 * c.hid**2 * side**2 + 8 * c.hid * out * in_ + out * c.num_classes
    return encoder + decoder + max(out, in_) * (4 * c.hid + c.num_classes)
