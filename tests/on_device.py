"""Every experiment runs on a device that refuses what a GPU refuses, and finds there what it finds on the CPU."""

from dataclasses import replace
from functools import cache, partial

import pandas as pd
import pytest
import torch
from device import DEVICE, OnDevice
from shared import digits, params, pool, tiny

from ghnlib import GHN, DeepNets
from ghnlib.config import Recipe
from ghnlib.data.images import Augment
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.ghn2018 import AnytimeSpace
from ghnlib.experiments import setup as setups
from ghnlib.experiments.analysis import diagnostics, properties, search
from ghnlib.experiments.anytime import blocks, exits
from ghnlib.experiments.evaluate import initialisations
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.transfer import detection, few_images
from ghnlib.experiments.transfer.pretraining import Learnt, Source, runs_from, starts_from_source
from ghnlib.hypernetwork import writing
from ghnlib.measuring.accuracy import evaluate_predictions, evaluate_torchvision
from ghnlib.params import Anytime, Transfer
from ghnlib.training import jobs
from ghnlib.training.initialization import INITIALIZATIONS, Sources
from ghnlib.training.networks import Accuracy, Run, TrainingRecipe, run_all

AUGMENT = Augment(shift=1, flip=True, cutout=2)
ENCODERS = {
    "mlp": {},
    "gated_gnn": {},
    "stacked": {"encoder": "gated_gnn", "stacked": True, "directions": "forward"},
    "synchronous": {"encoder": "gated_gnn", "directions": "synchronous"},
    "graphormer": {},
}


@cache
def images(device):
    splits = digits(image_size=8)
    return ImageSplits(*(part.few_shot(4, seed=0) for part in (splits.train, splits.val, splits.test))).to(device)


def networks(size=2, **options):
    """The smallest of the first eight."""
    return sorted(pool(size=8, input_size=8, **options), key=lambda network: len(network.graph))[:size]


def hypernetwork(device, encoder="graphormer", **changes):
    changes = {"encoder": encoder} | ENCODERS.get(encoder, {}) | changes
    return tiny(**changes).to(device)


def setup_on(device, folder, stage, **changes):
    """Of the tiny profile, with hypernetworks that are not trained."""
    own = params("tiny")
    section = getattr(own, stage).model_copy(update=changes)
    train = own.train.model_copy(update={"seeds": (0,)})
    setup = Setup(stage, "tiny", 0, folder, device=device, data=own.data, deepnets=own.deepnets, train=train,
                  **{stage: section})  # fmt: skip
    vars(setup)["images"] = images(device)
    vars(setup)["hypernetworks"] = {name: {0: hypernetwork(device, encoder)} for name, encoder in
                                    (("ghn2", "gated_gnn"), ("ghn3", "graphormer"))}  # fmt: skip
    return setup


def train(device, folder, encoder, steps=2):
    recipe = Recipe(steps=steps, batch_size=8, meta_batch=2, log_every=1, validate_every=1, gamma=1e-3)
    config = hypernetwork("cpu", encoder).config
    return jobs.train_on(networks(), networks(1), images(device), config, recipe, 0, folder, AUGMENT)


@pytest.fixture(autouse=True)
def other_tensors(monkeypatch):
    """Tensors of the device are wrapped: safetensors would ask for their memory, ``initialize`` takes them for packed
    ones."""
    save = GHN.save_pretrained
    monkeypatch.setattr(GHN, "save_pretrained", lambda ghn, folder: save(copy_on_cpu(ghn), folder))
    monkeypatch.setattr(writing, "_unwritable", lambda parameter: "")


def copy_on_cpu(ghn):
    copied = GHN(ghn.config)
    copied.load_state_dict({name: value.cpu() for name, value in ghn.state_dict().items()})
    return copied


@pytest.mark.parametrize("encoder", ENCODERS)
def test_trainings_and_what_resumes_them(encoder, tmp_path, monkeypatch):
    validate = jobs.validation_accuracy
    found = {}
    for device in ("cpu", DEVICE):
        folder, calls = tmp_path / str(device).partition(":")[0], iter(range(3))
        interrupted = partial(_interrupted, calls, validate)
        monkeypatch.setattr(jobs, "validation_accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(device, folder, encoder)
        ghn = train(device, folder, encoder)
        assert not [*calls] and next(ghn.parameters()).device == torch.device(device)
        weights = {name: weight.tolist() for name, weight in ghn.state_dict().items()}
        found[device] = pd.read_csv(folder / "history.csv"), weights
    assert_equal(found[DEVICE], found["cpu"])
    assert len(found["cpu"][0]) == 2


def _interrupted(calls, validate, *arguments):
    if next(calls) == 1:
        raise KeyboardInterrupt
    return validate(*arguments)


def evaluated(device, folder):
    common = images(device).test, 16, 1, folder
    for encoder in ENCODERS:
        yield evaluate_predictions(hypernetwork(device, encoder), networks(), *common)
    statistics = images(device).train, 2, 0
    yield evaluate_predictions(hypernetwork(device), networks(1), *common, statistics)
    yield evaluate_torchvision(hypernetwork(device), ["torchvision.models.resnet18"], *common)


def fine_tuned(device, folder):
    """From each initialisation, and what it costs."""
    sources = Sources(ghn=hypernetwork(device), peers=[networks()[1].graph], images=images(device).train,
                      held_out=images(device).val, steps=2, batch_size=12, graph=networks()[0].graph)  # fmt: skip
    recipe = TrainingRecipe(2, 0.05, batch_size=8, augment=AUGMENT)
    runs = [Run(networks()[0], recipe, 3, name, sources, {"initialisation": name}) for name in INITIALIZATIONS]
    chosen = replace(recipe, optimizer="adamw", drop_path=0.2)
    runs.append(Run(networks()[0], chosen, 3, labels={"initialisation": "regularised"}, auxiliary=True))
    yield run_all(runs, images(device).train, Accuracy(images(device).test), (0, 1), folder=folder, loss_every=1)
    yield [initialisations.initialisation_cost(name, runs[0])["cost"] for name in ("gradinit", "ghn")]
    learnt = initialisations._start(next(run for run in runs if run.initialisation == "gradinit"))
    yield [value.double().norm().item() for value in learnt.values()]


def transferred(device, folder):
    own = params("tiny").transfer.model_dump(mode="json", exclude_unset=True)
    few = {"source_classes": 6, "oracle_epochs": 1, "batch_size": 20, "source_epoch": True, "steps": 2, "per_class": 2}
    setup = setup_on(device, folder, "transfer")
    setup = replace(setup, transfer=Transfer.of(own | few))
    parts = [images(device).subset(classes) for classes in (range(6), range(6, 10))]
    source = Source(parts[0], {"others": parts[1]}, "ghn3", [hypernetwork(device, num_classes=6)], [50.0])
    members = networks(1, num_classes=6)
    starts = starts_from_source(setup, members, source)
    assert not any(isinstance(value, OnDevice) for start in starts["trained"] for value in start.values())
    learnt = Learnt(members, [starts])
    yield few_images.transfer_networks(setup, source, {"DeepNets": few_images.Family(learnt, learnt)}).rows
    runs = runs_from(setup, source, learnt, [0])
    waiting = [value for run in runs for value in (run.sources.parameters or {}).values()]
    assert waiting and not any(isinstance(value, OnDevice) for value in waiting)
    yield few_images.correlations_by_start(setup, source, learnt).drop(columns="counts")
    yield few_images.start_costs(setup, source, members[0], ["ghn3"])


def detected(device, folder):
    setup = setup_on(device, folder, "transfer", detection=params("tiny").transfer.detection.model_copy(
        update={"train_scenes": 2, "test_scenes": 1, "epochs": 1, "batch_size": 2, "backbones": (0,), "hidden": 16,
                "proposals": 20}))  # fmt: skip
    source = Source(images(device), {}, "ghn3", [hypernetwork(device)], [50.0])
    found = detection.detect(setup, source)
    yield found.rows
    yield str(found.scenes.device)  # they are drawn


def analysed(device, folder):
    changes = {"property_steps": 2, "checkpoints": (1,), "variants": ("ghn2", "ghn3"), "activation_steps": 1,
               "activations": ("vit",), "images": 8, "one_shot_steps": 2, "networks": 2, "repeated_networks": 2,
               "seconds": True}  # fmt: skip
    setup = setup_on(device, folder, "analysis", **changes)
    trained = properties.train_and_measure(setup, pool(size=2, input_size=8))
    yield trained.table.drop(columns="seconds")
    (ghns,), graphs = setup.trainings, trained.graphs
    with torch.no_grad():
        predictions = {name: ghn.predict(graphs) for name, ghn in ghns.items()}
    compared = diagnostics.networks_of(predictions, trained)
    assert not any(isinstance(p, OnDevice) for found in compared.values() for own in found for p in own.values())
    yield diagnostics.compare_diversity(compared)
    torch.manual_seed(0)
    yield diagnostics.compare_activations(setup, trained.recipe)["vit"]
    yield [properties.embed(ghn, graphs).tolist() for ghn in ghns.values()]
    scores, one_shot = search.ranking_scores(setup, trained)
    yield from (*scores, one_shot.scores, one_shot.constant)


def anytimes(device, folder):
    setup = setup_on(device, folder, "anytime")
    recipe = TrainingRecipe(2, 0.05, batch_size=8)
    network = DeepNets("val", space=AnytimeSpace(nodes=((3, 3), (2, 2), (2, 2)), exits=2, width=4), input_size=8)[0]
    yield exits._predicted_curve(network, hypernetwork(device, "gated_gnn", anytime=True), images(device).val)
    yield exits._trained_curve(Run(network, recipe, 0), images(device))
    raw = params("tiny").anytime.model_dump(mode="json", exclude_unset=True)
    few = {"variants": {"synchronous": {"directions": "synchronous", "layers": 1}}, "train_networks": 2, "seeds": [0]}
    few |= {"blocks": raw["blocks"] | {"networks": 3, "steps": 2, "one_shot_steps": 2, "shares": [0.5], "cells": 2}}
    few |= {
        "sgd": raw["sgd"] | {"batch_size": 8},
        "recipe": raw["recipe"] | {"steps": 1, "log_every": 1, "validate_every": 1},
    }
    setup = replace(setup, anytime=Anytime.of(raw | few))
    vars(setup)["images"] = images(device)
    hypernetworks = blocks.train_variants(setup)
    assert next(hypernetworks["synchronous"][0].parameters()).device == torch.device(device)
    yield from (ranking := blocks.rank_blocks(setup, hypernetworks)).scores
    yield from (ranking.baselines, ranking.trained)


EXPERIMENTS = [evaluated, fine_tuned, transferred, detected, analysed, anytimes]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.__name__)
def test_experiments_find_there_what_they_find_on_the_cpu(experiment, tmp_path):
    pairs = zip(experiment("cpu", tmp_path / "cpu"), experiment(DEVICE, tmp_path / "there"), strict=True)
    for expected, found in pairs:
        assert_equal(found, expected)


def assert_equal(found, expected):
    """But for rounding, which kernels decide; calls that failed are no finding."""
    if isinstance(expected, pd.DataFrame):
        failed = found["error"][found["error"] != ""].unique() if "error" in found else ()
        assert not len(failed), failed
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
    elif isinstance(expected, dict):
        assert_equal(list(found.items()), list(expected.items()))
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == (pytest.approx(expected, 1e-4, 1e-6, nan_ok=True) if isinstance(expected, float) else expected)


def test_networks_on_a_gpu_are_not_shared_out_among_processes(monkeypatch, tmp_path):
    values = {"seed": 0, "processes": 2, "device": "cuda", "folder": tmp_path}
    monkeypatch.setattr(setups, "device_of", lambda choice: {"cpu": torch.device("cpu"), "cuda": DEVICE}[choice])
    there, here = (Setup.of("evaluate", "tiny", **values | {"device": choice}) for choice in ("cuda", "cpu"))
    assert (there.device, there.kept["processes"]) == (DEVICE, 1)
    assert (here.device, here.kept["processes"]) == (torch.device("cpu"), 2)


def test_a_stage_has_its_images_and_hypernetworks_on_its_device(tmp_path):
    own = params("tiny")
    setup = Setup("analysis", "tiny", 0, tmp_path, device=DEVICE, data=own.data, analysis=own.analysis)
    tiny().save_pretrained(tmp_path / "model")
    assert next(setup.pretrained(tmp_path / "model").parameters()).device == DEVICE
    for splits in (setup.images, setup.other_images(own.analysis.second)):
        assert {part.device for part in (splits.train, splits.val, splits.test)} == {splits.device} == {DEVICE}


def test_the_device_refuses_what_a_gpu_refuses():
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    assert (there[torch.tensor([0, 2])] + torch.tensor(1.0)).tolist() == [2, 2] and (there.cpu() + here).sum() == 6
    mixed = [
        lambda: there + here,
        lambda: here[there.long()],
        lambda: here.add_(there),
        lambda: torch.stack([there, here]),
    ]
    for refused in (*mixed, there.numpy, there.normal_, lambda: there.bernoulli_(0.5, generator=torch.Generator())):
        with pytest.raises(RuntimeError):
            refused()
