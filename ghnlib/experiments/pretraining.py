"""What networks know before they are transferred: a hypernetwork, and networks, trained on source images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import nan
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import TorchvisionNetwork
from ghnlib.data.images import DataError
from ghnlib.data.sources import ImageSplits, images_of
from ghnlib.experiments.families import class_layers, family_networks
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.training.jobs import Job, train_in_processes
from ghnlib.training.networks import Run, TrainingRecipe, initial_runs, run_all

DEEPNETS = "DeepNets"
"""What the family of the profile's own architectures is called."""
Start = dict[str, Tensor] | None
"""Parameters by name that a network starts with; None if they could not be made."""


@dataclass(frozen=True)
class Source:
    """What networks are transferred from, and to.

    Attributes:
        images: that the hypernetwork has seen. targets: that it has not, by name.
        name: its variant. ghn: it, trained on the images.
        accuracy: percent, of unseen architectures with its predictions on validation images of the source.
    """

    images: ImageSplits
    targets: dict[str, ImageSplits]
    name: str
    ghn: GHN
    accuracy: float

    @property
    def hypernetworks(self) -> dict[str, GHN]:
        """The one there is, by name."""
        return {self.name: self.ghn}

    @property
    def table(self) -> pd.DataFrame:
        """One row the source and each target: classes, what the first are called, images of each split."""
        rows = {}
        for name, images in {"source": self.images, **self.targets}.items():
            more = ", ..." if len(images.classes) > 10 else ""
            counts = {"classes": len(images.classes), "called": ", ".join(images.classes[:10]) + more}
            rows[name] = counts | {f"{split} images": len(getattr(images, split)) for split in ("train", "val", "test")}
        return pd.DataFrame(rows).T


def train_on_source(setup: Setup) -> Source:
    """Train the hypernetwork of ``setup.transfer`` on the source classes, or resume that. Raises DataError, see
    ``source_and_targets``, and TrainingError."""
    images, targets = source_and_targets(setup)
    history = train_in_processes(job_of(setup), setup.train.devices)
    ghn = GHN.from_pretrained(setup.folder / "model")
    return Source(images, targets, setup.transfer.variant, ghn, float(history["validation_accuracy"].iloc[-1]))


def source_and_targets(setup: Setup) -> tuple[ImageSplits, dict[str, ImageSplits]]:
    """What the hypernetwork is trained on, and by name what networks are transferred to: the datasets of
    ``setup.transfer.targets``, without any the classes that are not the source's.

    Raises:
        DataError: there are fewer classes than the source should have, or none is left to transfer to.
    """
    images, count, targets = setup.images, setup.transfer.source_classes, setup.transfer.targets
    classes = len(images.classes)
    if count > classes or (count == classes and not targets):
        raise DataError(
            f"transfer.source_classes = {count}: {setup.data.source} has {classes} classes, of which at most "
            f"{classes if targets else classes - 1} can be the source{'' if targets else ' without transfer.targets'}."
        )
    differing = {name: target.model_dump(exclude_unset=True) for name, target in targets.items()}
    others = {name: images_of(setup.data.model_copy(update=own), setup.seed) for name, own in differing.items()}
    return images.subset(range(count)), others or {"other classes": images.subset(range(count, classes))}


def job_of(setup: Setup) -> Job:
    """The training of the hypernetwork on the source classes."""
    train, steps = setup.train, setup.transfer.train_steps
    recipe = replace(train.recipe_of(setup.transfer.variant), steps=steps, validate_every=steps)
    return Job(data=setup.data, deepnets=setup.deepnets, seed=setup.seed,
               classes=tuple(range(setup.transfer.source_classes)), ghn=train.config(setup.transfer.variant),
               recipe=recipe, folder=str(setup.folder))  # fmt: skip


class Learnt(NamedTuple):
    """Architectures for the source, and the parameters that the first of them have learnt there, by name of the
    start."""

    architectures: Sequence[Architecture | TorchvisionNetwork]
    starts: Mapping[str, Sequence[Start]]


class Family(NamedTuple):
    """Networks that are transferred, and those that optimiser, rate and weight decay are tuned on."""

    tuning: Learnt
    test: Learnt


def families_from_source(setup: Setup, source: Source) -> tuple[dict[str, Family], dict[str, str]]:
    """What is transferred: ``DEEPNETS``, test architectures tuned on validation ones, and each network of torchvision
    in ``setup.transfer.families``, tuned on itself; and by name why others are not."""
    transfer, images = setup.transfer, source.images
    tuning, test = (
        list(islice(setup.split(split, images=images), count))
        for split, count in (("val", transfer.tuning_networks), ("test", transfer.networks))
    )
    learn = lambda networks: Learnt(networks, starts_from_source(setup, networks, source))
    families = {DEEPNETS: Family(learn(tuning), learn(test))}
    networks, refused = family_networks(transfer.families, len(images.classes), test[0].input_size, source.ghn)
    for name, network in networks.items():
        learnt = learn([network])
        families[name] = Family(learnt, learnt)
    return families, refused


def starts_from_source(setup: Setup, architectures: Sequence[Architecture], source: Source) -> dict[str, list[Start]]:
    """Parameters of networks that have learnt from the source, without classification layers (``given`` of
    ``initial_runs``).

    All are trained by SGD with ``source_lr``. One that diverges is named, and its parameters are NaN, so that what
    starts from them diverges too; one that fails is named, and None.

    Returns:
        "NAME, 1 epoch" of each initialisation, if ``source_epoch``; "trained" of the first ``oracle_networks``
        architectures, from random initialisation for ``oracle_epochs``.
    """
    transfer, images = setup.transfer, source.images.train
    epoch = max(1, len(images) // transfer.batch_size)
    recipe = TrainingRecipe(epoch, transfer.source_lr, transfer.batch_size, augment=setup.augment)
    longer = replace(recipe, steps=epoch * transfer.oracle_epochs)
    runs = [
        Run(architecture, longer, setup.seed, labels={"initialisation": "trained", "network": network})
        for network, architecture in enumerate(architectures[: transfer.oracle_networks])
    ]
    if transfer.source_epoch:
        once = initial_runs(architectures, recipe, [setup.seed], source.hypernetworks)
        named = [{**run.labels, "initialisation": f"{run.labels['initialisation']}, 1 epoch"} for run in once]
        runs = [*(replace(run, labels=labels) for run, labels in zip(once, named)), *runs]
    if not runs:
        return {}
    rows = run_all(runs, images, parameters_of, processes=setup.processes, folder=setup.folder)
    starts: dict[str, list[Start]] = {}
    for run, row in zip(runs, rows.to_dict("records")):
        starts.setdefault(run.labels["initialisation"], []).append(_start(run, row))
    return starts


def parameters_of(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    """``parameters``: a copy of all, by name."""
    return {"parameters": {name: value.detach().clone() for name, value in net.named_parameters()}}


def _start(run: Run, row: Mapping[str, object]) -> Start:
    """The parameters in a row of ``run_all``, without classification layers."""
    name = "{initialisation}, network {network}".format(**run.labels)
    if row["error"]:
        print(f"failed on the source, left out: {name}: {row['error']}", flush=True)
        return None
    values = row.get("parameters")
    if not isinstance(values, dict):
        print(f"diverged on the source, counted as 0%: {name}", flush=True)
        values = {key: torch.full(value.shape, nan) for key, value in run.architecture.build().named_parameters()}
    layers = class_layers(run.architecture.graph)
    return {key: value for key, value in values.items() if key not in layers}
