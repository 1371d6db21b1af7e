"""Memory that a training needs on its device, told beforehand: shapes alone are computed, nothing is allocated."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ghnlib.architectures.architecture import Architecture
from ghnlib.config import Recipe
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import exits_of
from ghnlib.training.step import PREDICTED_TOGETHER

STATES = 4
"""Tensors of the size of the parameters: these, their gradients, Adam's two means."""


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass of what a function computes, parameters too; each
    storage counts once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result  # the graph was alive until here: no address stands for two storages
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_bytes(ghn: GHN, recipe: Recipe, architectures: Sequence[Architecture], data: Tensor) -> dict[str, int]:
    """What training steps with these architectures and data (of any batch size) need, by part: ``hypernetwork``
    (parameters, gradients, Adam's states), ``predictions`` (of the networks predicted together: what the backward pass
    reads, the parameters and their gradients), ``network`` (activations of the largest). Kernels' workspaces and what
    the allocator holds in reserve come on top, half precision saves up to half of the activations."""
    with torch.device("meta"):
        shadow = GHN(ghn.config)
    together = PREDICTED_TOGETHER if ghn.config.batching == "aligned" else recipe.meta_batch
    parts = [architectures[i : i + together] for i in range(0, len(architectures), together)]
    predicted = max(_prediction_bytes(shadow, part) for part in parts)
    batch = data.new_empty(recipe.batch_size, *data.shape[1:], device="meta")
    parameters = sum(p.nbytes for p in ghn.parameters())
    return {
        "hypernetwork": STATES * parameters,
        "predictions": predicted,
        "network": max(_network_bytes(architecture, recipe, batch) for architecture in architectures),
    }


def describe(parts: dict[str, int]) -> str:
    """In one line, in GiB."""
    by_part = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"memory: about {sum(parts.values()) / 2**30:.2f} GiB ({by_part})"


def _prediction_bytes(ghn: GHN, architectures: Sequence[Architecture]) -> int:
    found: list[dict[str, Tensor]] = []
    saved = saved_bytes(lambda: found.extend(ghn([architecture.graph for architecture in architectures])))
    own = sum(p.nbytes for p in ghn.parameters())
    values = sum(value.nbytes for prediction in found for value in prediction.values())
    return max(0, saved - own) + 2 * values


def _network_bytes(architecture: Architecture, recipe: Recipe, batch: Tensor) -> int:
    net = architecture.build(device="meta").train(recipe.dropout)

    def lost() -> Tensor:
        return sum(F.cross_entropy(logits, logits.argmax(1)) for logits in exits_of(net(batch)))

    own = sum(p.nbytes for p in net.parameters())
    return max(0, saved_bytes(lost) - own)
