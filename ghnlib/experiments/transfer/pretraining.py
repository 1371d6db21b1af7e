"""What networks know before they are transferred: a hypernetwork, and networks, trained on source images; the runs that
start from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import nan
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NamedNetwork
from ghnlib.data.images import DataError
from ghnlib.data.sources import ImageSplits
from ghnlib.experiments.families import DEEPNETS, class_layers, family_networks
from ghnlib.experiments.setup import Setup, training_name
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.training.jobs import run_job
from ghnlib.training.networks import Run, TrainingRecipe, initial_runs, on_cpu, run_all

Start = dict[str, Tensor] | None
"""Parameters by name that a network starts with; None if they could not be made."""


@dataclass(frozen=True)
class Source:
    """What networks are transferred from, and to. ``images``: that the hypernetwork has seen; ``targets``: that it has
    not, by name; ``name``: its variant; ``trainings``: it, trained on the images once for each of ``training_seeds``;
    ``accuracies``: percent, of unseen architectures with the predictions of each on validation images of the source."""

    images: ImageSplits
    targets: dict[str, ImageSplits]
    name: str
    trainings: Sequence[GHN]
    accuracies: Sequence[float]

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
    """Train the hypernetwork of ``setup.transfer`` on the source classes with each seed, or resume that. Raises
    DataError, see ``source_and_targets``, and TrainingError."""
    images, targets = source_and_targets(setup)
    transfer, classes = setup.transfer, tuple(range(setup.transfer.source_classes))
    length = {"steps": transfer.train_steps, "validate_every": transfer.train_steps}
    jobs = [setup.job(transfer.variant, seed, setup.folder / training_name(transfer.variant, seed), classes, **length)
            for seed in training_seeds(setup)]  # fmt: skip
    histories = [run_job(job, setup.train.devices) for job in jobs]
    trainings = [setup.pretrained(Path(job.folder) / "model") for job in jobs]
    accuracies = [float(history["validation_accuracy"].iloc[-1]) for history in histories]
    return Source(images, targets, transfer.variant, trainings, accuracies)


def training_seeds(setup: Setup) -> tuple[int, ...]:
    """Of ``train.seeds`` as many as runs start from, here or in detection."""
    return setup.train.seeds[: max(len(setup.transfer.seeds), len(setup.transfer.detection.seeds))]


def source_and_targets(setup: Setup) -> tuple[ImageSplits, dict[str, ImageSplits]]:
    """What the hypernetwork is trained on, and by name what networks are transferred to: the datasets of
    ``setup.transfer.targets``, without any the classes that are not the source's. Raises DataError if there are fewer
    classes than the source should have, or none is left to transfer to."""
    images, count, targets = setup.images, setup.transfer.source_classes, setup.transfer.targets
    classes = len(images.classes)
    if count > classes or (count == classes and not targets):
        raise DataError(
            f"transfer.source_classes = {count}: {setup.data.source} has {classes} classes, of which at most "
            f"{classes if targets else classes - 1} can be the source{'' if targets else ' without transfer.targets'}."
        )
    others = {name: setup.other_images(target) for name, target in targets.items()}
    return images.subset(range(count)), others or {"other classes": images.subset(range(count, classes))}


class Learnt(NamedTuple):
    """Architectures for the source, and for each training of the hypernetwork the parameters that the first of them
    have learnt there, by name of the start."""

    architectures: Sequence[Architecture | NamedNetwork]
    starts: Sequence[Mapping[str, Sequence[Start]]]


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
    count = len(source.trainings)
    learn = lambda networks, count: Learnt(
        networks, [starts_from_source(setup, networks, source, training) for training in range(count)]
    )
    families = {DEEPNETS: Family(learn(tuning, 1), learn(test, count))}
    side, ghn = test[0].input_size, source.trainings[0]
    networks, refused = family_networks(transfer.families, len(images.classes), side, ghn)
    for name, network in networks.items():
        learnt = learn([network], count)
        families[name] = Family(learnt, learnt)
    return families, refused


def starts_from_source(
    setup: Setup, architectures: Sequence[Architecture], source: Source, training: int = 0
) -> dict[str, list[Start]]:
    """Parameters of networks that have learnt from the source, without classification layers (``given`` of
    ``initial_runs``): from what a training of the hypernetwork predicts, the others with the seed of that training.
    "NAME, 1 epoch" of each initialisation, if ``source_epoch``; "trained" of the first ``oracle_networks``
    architectures, from random initialisation for ``oracle_epochs``.

    All are trained by SGD with ``source_lr``. One that diverges is named, and its parameters are NaN, so that what
    starts from them diverges too; one that fails is named, and None.
    """
    transfer, images, seed = setup.transfer, source.images.train, setup.train.seeds[training]
    epoch = images.steps_per_epoch(transfer.batch_size)
    recipe = TrainingRecipe(epoch, transfer.source_lr, transfer.batch_size, augment=setup.augment)
    longer = replace(recipe, steps=epoch * transfer.oracle_epochs)
    runs = [
        Run(architecture, longer, seed, labels={"initialisation": "trained", "network": network})
        for network, architecture in enumerate(architectures[: transfer.oracle_networks])
    ]
    if transfer.source_epoch:
        once = initial_runs(architectures, recipe, [seed], {source.name: [source.trainings[training]]})
        named = [{**run.labels, "initialisation": f"{run.labels['initialisation']}, 1 epoch"} for run in once]
        runs = [*(replace(run, labels=labels) for run, labels in zip(once, named)), *runs]
    if not runs:
        return {}
    rows = run_all(runs, images, parameters_of, **setup.kept)
    starts: dict[str, list[Start]] = {}
    for run, row in zip(runs, rows.to_dict("records")):
        starts.setdefault(run.labels["initialisation"], []).append(_start(run, row))
    return starts


def parameters_of(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    """``parameters``: a copy of all, by name, on the CPU."""
    return {"parameters": on_cpu(net.named_parameters())}


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


Processing = Mapping[str, float]
"""Of GHN-orth: ``orth_from``, share of the layers that are left as they are; ``noise``, beta before it."""


def processings(setup: Setup) -> list[dict[str, float]]:
    """All that are tried; settings are tuned with the first."""
    choices = product(setup.transfer.orth_from, setup.transfer.noise)
    return [{"orth_from": orth_from, "noise": noise} for orth_from, noise in choices]


def runs_from(
    setup: Setup,
    source: Source,
    learnt: Learnt,
    seeds: Sequence[int],
    target: ImageSplits | None = None,
    tuned: Mapping[str, Mapping[str, object]] | None = None,
    processing: Mapping[str, Processing] | None = None,
) -> list[Run]:
    """``initial_runs`` on a target (None: on the source), classification layers random: from random, orthogonal and
    predicted parameters, from what the networks have learnt, and from predicted and "trained" ones with GHN-orth. On a
    target also "NAME-head", from predicted parameters with the classification layer, resized.

    The runs of the i-th seed start from the i-th training of the hypernetwork, in turn if there are more seeds; their
    label ``training`` says which. ``processing``: by initialisation; None: the first of ``processings``.
    """
    transfer, networks, runs = setup.transfer, learnt.architectures, []
    if target:
        networks = [network.adapted(len(target.classes), target.side) for network in networks]
    recipe = TrainingRecipe(transfer.steps, lr=1.0, batch_size=transfer.batch_size, augment=setup.augment)
    for i, seed in enumerate(seeds):
        training = i % len(learnt.starts)
        predicting, given = {source.name: [source.trainings[training]]}, learnt.starts[training]
        own = initial_runs(networks, recipe, [seed], predicting, tuned, class_layers=False, given=given)
        for run in [run for run in own if run.labels["initialisation"] in (source.name, "trained")]:
            name = "{initialisation}-orth".format(**run.labels)
            settings = replace(run.recipe, **tuned[name]) if tuned else run.recipe
            sources = replace(run.sources, **(processing[name] if processing else processings(setup)[0]))
            labels = {**run.labels, "initialisation": name}
            own.append(Run(run.architecture, settings, seed, "ghn-orth", sources, labels))
        if target:
            head = {f"{source.name}-head": predicting[source.name]}
            whole = initial_runs(networks, recipe, [seed], head, tuned, class_layers="resize")
            own += [run for run in whole if run.labels["initialisation"] in head]
        runs += [replace(run, labels={**run.labels, "training": training}) for run in own]
    return runs
