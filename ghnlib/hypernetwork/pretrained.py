"""Hypernetworks from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ghnlib.config import GHNConfig
from ghnlib.released.checkpoints import CheckpointError, locate, read_checkpoint

Net = TypeVar("Net", bound=nn.Module)


def load_pretrained(
    build: Callable[[GHNConfig], Net], source: str | Path, overrides: Mapping[str, Any], hub: Mapping[str, Any]
) -> Net:
    """A hypernetwork in evaluation mode, see ``GHN.from_pretrained``. Memory is set aside for it once its configuration
    is known to fit the tensors that are there.

    Args:
        build: from a configuration to a hypernetwork.
        overrides: fields of the configuration. hub: arguments of ``hf_hub_download``.
    """
    path = locate(source, **hub)
    stored, state = read_checkpoint(path)
    config = GHNConfig(**{**stored, **overrides})
    try:
        with torch.device("meta"):
            empty = build(config)
        empty.load_state_dict({name: value.to("meta") for name, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its configuration: {str(error)[:1000]}") from error
    ghn = build(config)
    ghn.load_state_dict(state)
    for name, value in ghn.named_parameters():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return ghn.eval()
