"""Transfer of networks to other classes or another dataset with few images (GHN-orth, GHN-3 Table 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ghnlib.architectures import Architecture, TorchvisionNetwork
from ghnlib.data import ImageSplits
from ghnlib.evaluation import map_kept, one_line
from ghnlib.finetuning import Run, TrainingRecipe, initial_network, initial_runs, train_network
from ghnlib.graph import Graph, Role
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, DataError, ImageSet
from ghnlib.jobs import images_of


def source_and_targets(
    images: ImageSplits, data: Mapping, transfer: Mapping, seed: int
) -> tuple[ImageSplits, dict[str, ImageSplits]]:
    """What the hypernetwork is trained on, and by name what networks are transferred to.

    Args:
        images: of the section ``data``; their first ``transfer["source_classes"]`` classes are the source.
        transfer: ``targets``: by name, keys that differ from ``data``; without any, the other classes are the target.

    Raises:
        DataError: there are fewer classes than that, or none is left to transfer to.
    """
    classes, count, targets = len(images.classes), transfer["source_classes"], transfer["targets"]
    if count > classes or (count == classes and not targets):
        raise DataError(
            f"transfer.source_classes = {count}: {data['source']} has {classes} classes, of which at most "
            f"{classes if targets else classes - 1} can be the source{'' if targets else ' without transfer.targets'}."
        )
    others = {name: images_of({**data, **target}, seed) for name, target in targets.items()}
    return images.subset(range(count)), others or {"other classes": images.subset(range(count, classes))}


def family_networks(
    names: Sequence[str], num_classes: int, input_size: int, ghn: GHN
) -> tuple[dict[str, TorchvisionNetwork], dict[str, str]]:
    """Torchvision's networks of these names that can be transferred, and by name why the others cannot: unknown, not
    to be traced or predicted, without classification layer."""
    found, failed = {}, {}
    for name in names:
        network = TorchvisionNetwork(num_classes, input_size, name)
        try:
            class_layers(network.graph)
            ghn.predict(network.graph)
        except Exception as error:  # whatever is wrong with one network, the others are transferred
            failed[name] = one_line(error)
        else:
            found[name] = network
    return found, failed


def starts_from_source(
    architectures: Sequence[Architecture],
    source: ImageSet,
    hypernetworks: Mapping[str, GHN],
    transfer: Mapping,
    augment: Augment,
    seed: int,
    processes: int = 1,
    folder: str | Path | None = None,
) -> dict[str, list[dict[str, Tensor]]]:
    """Parameters of networks that have learnt from the source, without classification layers (``given`` of
    ``initial_runs``): "NAME, 1 epoch" of each initialisation if ``transfer["source_epoch"]``, and "trained" of the
    first ``oracle_networks``, from random initialisation for ``oracle_epochs``. All by SGD with ``source_lr``; where it
    diverges, parameters are NaN, so that what starts from them diverges too. ``folder``: see ``map_kept``."""
    epoch = max(1, len(source) // transfer["batch_size"])
    recipe = TrainingRecipe(epoch, transfer["source_lr"], transfer["batch_size"], augment=augment)
    runs = initial_runs(architectures, recipe, [seed], hypernetworks) if transfer["source_epoch"] else []
    names = [f"{dict(run.labels)['initialisation']}, 1 epoch" for run in runs]
    longer = replace(recipe, steps=epoch * transfer["oracle_epochs"])
    runs += [Run(architecture, longer, seed) for architecture in architectures[: transfer["oracle_networks"]]]
    learnt = map_kept(_train_on_source, [(run,) for run in runs], (source,), processes, folder)
    starts: dict[str, list[dict[str, Tensor]]] = {}
    for name, parameters in zip_longest(names, learnt, fillvalue="trained"):
        starts.setdefault(name, []).append(parameters)
        if any(value.isnan().any() for value in parameters.values()):
            print(f"diverged on the source, counted as 0%: {name}, network {len(starts[name]) - 1}", flush=True)
    return starts


def _train_on_source(run: Run, source: ImageSet) -> dict[str, Tensor]:
    layers, net = class_layers(run.architecture.graph), initial_network(run)
    # 0, or NaN if it diverged before its end.
    (at_end,) = train_network(net, source, run.recipe, run.seed, evaluate=lambda net: 0.0).values()
    return {name: value.detach() + at_end for name, value in net.named_parameters() if name not in layers}


def class_layers(graph: Graph) -> list[str]:
    """Names of the parameters of a network's classification layer; DataError if it has none."""
    names = [node.name for node in graph.nodes if node.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS)]
    if not names:
        last = [node.name for node in graph.nodes if node.name][-1:]
        raise DataError(f"a network without classification layer: its last parameter is {last or 'missing'}.")
    return names


def filter_correlations(net: nn.Module) -> pd.Series:
    """Mean absolute correlation between different filters of each convolution (GHN-orth Fig. 2): layer -> 0 to 1.

    The filters of a weight are the rows of its matrix (out, in * h * w). Convolutions with fewer than two filters or
    with filters of a single value have no correlation and are left out.
    """
    found = {}
    for layer, weight in enumerate(m.weight.detach() for m in net.modules() if isinstance(m, nn.Conv2d)):
        if len(weight) > 1 and weight[0].numel() > 1:
            different = ~torch.eye(len(weight), dtype=torch.bool)
            found[layer] = float(torch.corrcoef(weight.flatten(1))[different].abs().nanmean())
    return pd.Series(found, name="correlation")
