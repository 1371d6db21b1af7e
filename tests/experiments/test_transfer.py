"""Transfer to other classes and datasets: which images, what is carried over, how starts are compared."""

from dataclasses import replace
from math import nan

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from shared import params, pool, tiny
from torch import nn

from ghnlib.data.images import DataError
from ghnlib.experiments.families import DEEPNETS, class_layers, family_networks
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.transfer import pretraining
from ghnlib.experiments.transfer.few_images import (
    Transferred,
    channel_correlations,
    claims_of_correlations,
    correlations_by_start,
    deviation_table,
    distribution,
    start_costs,
    transfer_networks,
)
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node
from ghnlib.params import Transfer
from ghnlib.reporting.statistics import with_deviation
from ghnlib.training.initialization import orthogonalize
from ghnlib.training.networks import Accuracy, TrainingRecipe, initial_network, initial_runs, run_all


def setup_with(folder, **changes):
    """Of the tiny profile, six source classes, one epoch for whatever learns from them."""
    own = params("tiny")
    few = {"source_classes": 6, "oracle_epochs": 1, "batch_size": 128, "source_epoch": False, **changes}
    transfer = Transfer.of(own.transfer.model_dump(mode="json", exclude_unset=True) | few)
    return Setup("transfer", "tiny", 0, folder, metrics=own.metrics, data=own.data, deepnets=own.deepnets, train=own.train,
                 transfer=transfer)  # fmt: skip


def source_of(setup):
    """With two hypernetworks that are not trained."""
    images, targets = pretraining.source_and_targets(setup)
    trainings = [tiny(num_classes=len(images.classes)) for _ in range(2)]
    for value in trainings[1].parameters():
        value.data *= 0.5
    return pretraining.Source(images, targets, "ghn3", trainings, [50.0, 60.0])


def test_the_target_is_the_other_classes(tmp_path):
    source, targets = pretraining.source_and_targets(setup_with(tmp_path))
    assert source.classes == tuple("012345")
    assert {name: target.classes for name, target in targets.items()} == {"other classes": tuple("6789")}
    table = pretraining.Source(source, targets, "ghn3", [tiny()], [50.0]).table
    assert table["called"].to_dict() == {"source": "0, 1, 2, 3, 4, 5", "other classes": "6, 7, 8, 9"}
    assert table.loc["source", "train images"] == len(source.train)


def test_the_target_is_another_dataset_with_what_differs_from_data(tmp_path):
    for name in "cat", "dog", "eel":
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    pets = {"source": "folder", "root": str(tmp_path), "image_size": 8}
    setup = setup_with(tmp_path, source_classes=10, targets={"pets": pets, "few-pets": {**pets, "test_per_class": 1}})
    source, targets = pretraining.source_and_targets(setup)
    assert len(source.classes) == 10 and targets["pets"].classes == ("cat", "dog", "eel")
    assert targets["pets"].train.pixels.shape[1:] == (3, 8, 8)
    assert [len(targets[name].test) for name in ("pets", "few-pets")] == [6, 3]


@pytest.mark.parametrize(
    ("count", "said"), [(10, "10 classes, of which at most 9"), (11, "transfer.source_classes = 11")]
)
def test_too_many_source_classes_are_refused(tmp_path, count, said):
    with pytest.raises(DataError, match=said):
        pretraining.source_and_targets(setup_with(tmp_path, source_classes=count))


def test_the_hypernetwork_is_trained_on_the_source_classes_once_for_each_seed_that_starts_from_it(
    tmp_path, monkeypatch
):
    setup, jobs = setup_with(tmp_path, seeds=[0, 1], train_steps=7), []

    def train(job, devices):
        jobs.append(job)
        tiny(num_classes=6, hid=16 * len(jobs)).save_pretrained(tmp_path / f"ghn3-{job.training_seed}" / "model")
        return pd.DataFrame({"validation_accuracy": [nan, 10.0 * len(jobs)]})

    monkeypatch.setattr(pretraining, "run_job", train)
    setup = replace(setup, train=setup.train.model_copy(update={"seeds": (3, 5, 8)}))
    source = pretraining.train_on_source(setup)
    (job, _), recipe = jobs, params("tiny").train.recipe_of("ghn3")
    assert job.classes == (0, 1, 2, 3, 4, 5) and job.folder == str(tmp_path / "ghn3-3")
    assert (job.seed, job.recipe) == (0, replace(recipe, steps=7, validate_every=7)) and job.ghn.encoder == "graphormer"
    assert [job.training_seed for job in jobs] == [3, 5] and source.accuracies == [10.0, 20.0]
    assert [ghn.config.hid for ghn in source.trainings] == [16, 32]
    many = setup.transfer.detection.model_copy(update={"seeds": (0, 1, 2, 3)})
    more = replace(setup, transfer=setup.transfer.model_copy(update={"detection": many}))
    assert pretraining.training_seeds(more) == (3, 5, 8)


def test_what_the_source_teaches_is_carried_over_but_for_the_classes(tmp_path):
    setup = setup_with(tmp_path, source_epoch=True)
    networks, source = pool(size=2, num_classes=6), source_of(setup)
    starts = pretraining.starts_from_source(setup, networks, source)
    assert {name: len(found) for name, found in starts.items()} == {
        "random, 1 epoch": 2, "orthogonal, 1 epoch": 2, "ghn3, 1 epoch": 2, "trained": 1,
    }  # fmt: skip
    learnt = starts["trained"][0]
    assert not set(class_layers(networks[0].graph)) & set(learnt)
    fitted = [network.adapted(4) for network in networks]
    runs = initial_runs(fitted, TrainingRecipe(1, 0.1), [0], {}, given={"trained": starts["trained"]})
    runs.append(replace(runs[-1], initialisation="ghn-orth"))
    assert [run.labels["initialisation"] for run in runs] == ["random"] * 2 + ["orthogonal"] * 2 + ["trained"] * 2
    random, carried, processed = (dict(initial_network(runs[i]).named_parameters()) for i in (0, 4, 5))
    weight = next(name for name, value in learnt.items() if value.ndim == 4)
    assert torch.equal(carried[weight], learnt[weight]) and not torch.equal(carried[weight], random[weight])
    assert not torch.equal(processed[weight], learnt[weight])
    assert all(torch.equal(carried[name], random[name]) for name in class_layers(fitted[0].graph))


def test_an_epoch_from_random_initialisation_is_that_of_the_oracle(tmp_path):
    setup = setup_with(tmp_path, source_epoch=True)
    starts = pretraining.starts_from_source(setup, pool(size=1, num_classes=6), source_of(setup))
    (once,), (trained,) = starts["random, 1 epoch"], starts["trained"]
    assert all(torch.equal(once[name], value) for name, value in trained.items())


def test_what_is_learnt_starts_from_the_training_of_the_seed(tmp_path):
    setup = setup_with(tmp_path, source_epoch=True, oracle_networks=0)
    networks, source = pool(size=1, num_classes=6), source_of(setup)
    first, second = (pretraining.starts_from_source(setup, networks, source, training) for training in (0, 1))
    swapped = replace(source, trainings=source.trainings[::-1])
    assert all(
        any(not torch.equal(first[name][0][key], second[name][0][key]) for key in first[name][0]) for name in first
    )
    again = pretraining.starts_from_source(setup, networks, swapped, 0)
    assert all(
        torch.equal(again["random, 1 epoch"][0][key], value) for key, value in first["random, 1 epoch"][0].items()
    )
    assert any(
        not torch.equal(again["ghn3, 1 epoch"][0][key], value) for key, value in first["ghn3, 1 epoch"][0].items()
    )


def test_without_epoch_and_oracle_nothing_is_learnt(tmp_path):
    setup = setup_with(tmp_path, oracle_networks=0)
    assert pretraining.starts_from_source(setup, pool(size=1, num_classes=6), source_of(setup)) == {}


def test_what_diverged_on_the_source_is_named_and_does_not_go_on(tmp_path, capsys):
    setup = setup_with(tmp_path, source_lr=1e20)
    networks, source = pool(size=1, num_classes=6), source_of(setup)
    starts = pretraining.starts_from_source(setup, networks, source)
    assert "diverged on the source, counted as 0%: trained, network 0" in capsys.readouterr().out
    target = source.targets["other classes"]
    runs = initial_runs([networks[0].adapted(4)], TrainingRecipe(1, 0.1), [0], {}, given=starts)
    runs.append(replace(runs[-1], initialisation="ghn-orth", labels={"initialisation": "trained-orth"}))
    results = run_all(runs, target.train.few_shot(2, 0), lambda net: {"accuracy": 50.0})
    assert results.groupby("initialisation")["accuracy"].apply(lambda part: part.isna().all()).to_dict() == {
        "random": False, "orthogonal": False, "trained": True, "trained-orth": True,
    }  # fmt: skip
    assert (results["error"] == "").all()


class Broken:
    """An architecture that cannot be built."""

    def build(self, **options):
        raise RuntimeError("no such network")


def test_what_failed_on_the_source_is_named_and_left_out(tmp_path, capsys):
    setup = setup_with(tmp_path, oracle_networks=2)
    networks = pool(size=1, num_classes=6)
    starts = pretraining.starts_from_source(setup, [*networks, Broken()], source_of(setup))
    assert (
        "failed on the source, left out: trained, network 1: RuntimeError: no such network" in capsys.readouterr().out
    )
    assert starts["trained"][0] and starts["trained"][1] is None


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """Two networks and one of another family, transferred by three steps, with the setup and the source."""
    options = {"steps": 3, "seeds": [0, 1], "per_class": 4, "orth_from": [0.667, 0.0]}
    setup = setup_with(tmp_path_factory.mktemp("transfer"), **options)
    source = source_of(setup)
    networks = pool(size=2, num_classes=6, input_size=16)
    learnt = pretraining.Learnt(
        networks, [pretraining.starts_from_source(setup, networks, source, training) for training in (0, 1)]
    )
    small = family_networks(["small-convnext"], 6, 16, source.trainings[0])[0]["small-convnext"]
    other = pretraining.Learnt([small], [{"trained": [None]}] * 2)  # as if it had failed on the source
    families = {DEEPNETS: pretraining.Family(learnt, learnt), "small-convnext": pretraining.Family(other, other)}
    return setup, source, learnt, transfer_networks(setup, source, families)


def test_networks_are_transferred_from_each_start_and_measured_three_times(transferred):
    found = transferred[-1]
    rows = found.deepnets
    assert found.starts == ["random", "orthogonal", "ghn3", "trained", "ghn3-orth", "trained-orth", "ghn3-head"]
    assert rows.groupby("initialisation").size().to_dict() == {
        "random": 12, "orthogonal": 12, "ghn3": 12, "ghn3-orth": 12, "ghn3-head": 12, "trained": 6, "trained-orth": 6,
    }  # fmt: skip
    assert sorted(rows["step"].unique()) == [0, 1, 3] and rows["accuracy"].between(0, 100).all()
    table = found.table("other classes")
    assert list(table) == ["0 steps", "1 steps", "3 steps", "networks", "tuned"] and list(table.index) == found.starts
    assert table["networks"].to_dict()["trained"] == 1
    by_training = rows[rows["step"] == 3].groupby(["initialisation", "training"])["accuracy"].mean()
    assert table.loc["ghn3", "3 steps"] == with_deviation(by_training["ghn3"])
    words = "optimizer sgd, lr 0.01, weight_decay 0.0003"
    assert table.loc["ghn3", "tuned"] == words and table.loc["ghn3-orth", "tuned"].startswith(f"{words}, orth_from 0.")
    ends = rows[(rows["step"] == 3) & (rows["initialisation"] == "ghn3")].groupby("network")["accuracy"].mean()
    assert found.metrics["accuracy"]["other classes"]["ghn3"]["3 steps"]["mean"] == pytest.approx(ends.mean())


def test_another_metric_takes_the_place_of_accuracy(transferred):
    found = transferred[-1]
    by_area = found.scored_by("auc")
    ends = found.deepnets[(found.deepnets["step"] == 3) & (found.deepnets["initialisation"] == "ghn3")]
    table = by_area.table("other classes")
    assert table.loc["ghn3", "3 steps"] == with_deviation(ends.groupby("training")["auc"].mean())
    assert (table["tuned"] == found.table("other classes")["tuned"]).all()


def test_what_failed_is_left_out_of_its_family(transferred):
    found = transferred[-1]
    assert len(found.failed) == 4 and all("needs prediction" in name for name in found.failed)
    assert list(found.families) == ["random", "orthogonal", "ghn3", "ghn3-orth", "ghn3-head"]
    assert list(found.family_claims) == ["new-classes-convnext/other classes, small-convnext"]
    assert found.metrics["diverged"] == 4
    assert {lead.trainings for lead in [*found.claims.values(), *found.family_claims.values()]} == {2, None}
    assert [key for key, lead in found.claims.items() if lead.trainings is None] == ["orth-control/other classes"]


def test_runs_of_a_seed_start_from_the_training_of_it(transferred):
    setup, source, learnt, found = transferred
    rows = found.deepnets.groupby("seed")["training"].unique().map(list).to_dict()
    assert rows == {0: [0], 1: [1]}
    runs = pretraining.runs_from(setup, source, learnt, [0, 1, 2])
    predicted = [run for run in runs if run.labels["initialisation"] == "ghn3" and run.labels["network"] == 0]
    assert [(run.seed, run.labels["training"]) for run in predicted] == [(0, 0), (1, 1), (2, 0)]
    for run in predicted:
        expected = source.trainings[run.seed % 2].predict(learnt.architectures[0].graph, predict_class_layers=False)
        for name, value in run.sources.parameters.items():
            torch.testing.assert_close(value, expected[name])


def test_heads_are_those_of_the_sources_classes_in_turn_and_bodies_as_without_them(transferred):
    setup, source, learnt, _ = transferred
    runs = pretraining.runs_from(setup, source, learnt, [0], source.targets["other classes"])
    found = {run.labels["initialisation"]: run.sources.parameters for run in runs if run.labels["network"] == 0}
    bare, whole = found["ghn3"], found["ghn3-head"]
    assert whole.keys() - bare.keys() == {*class_layers(learnt.architectures[0].graph)}
    assert all(torch.equal(whole[name], value) for name, value in bare.items())
    graph = learnt.architectures[0].adapted(4, source.targets["other classes"].side).graph
    torch.testing.assert_close(whole, source.trainings[0].predict(graph, predict_class_layers="resize"))


def test_post_processing_is_what_was_tuned_for_the_start(transferred):
    setup, source, learnt, found = transferred
    how = {"ghn3-orth": {"orth_from": 0.0, "noise": 3e-3}, "trained-orth": {"orth_from": 1.0, "noise": 3e-5}}
    tuned = {start: {"lr": 0.1 * i} for i, start in enumerate(found.starts[:-1], start=1)}  # the head is for targets
    runs = pretraining.runs_from(
        setup, source, pretraining.Learnt(learnt.architectures[:1], learnt.starts), [0], None, tuned, how
    )
    by_start = {run.labels["initialisation"]: run for run in runs}
    assert {start: run.recipe.lr for start, run in by_start.items()} == {
        start: own["lr"] for start, own in tuned.items()
    }
    first = {start: next(m for m in initial_network(run).modules() if isinstance(m, nn.Conv2d)).weight.flatten(1)
             for start, run in by_start.items()}  # fmt: skip
    assert torch.equal(first["trained-orth"], first["trained"]), "all layers are left"
    gram = first["ghn3-orth"] @ first["ghn3-orth"].T
    gram = gram if len(gram) <= first["ghn3-orth"].shape[1] else first["ghn3-orth"].T @ first["ghn3-orth"]
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_post_processing_is_chosen_on_validation_images(transferred):
    setup, source, learnt, found = transferred
    chosen = found.tuned["other classes", DEEPNETS]
    ways = pretraining.processings(setup)
    assert [way["orth_from"] for way in ways] == [0.667, 0.0] and {way["noise"] for way in ways} == {3e-5}
    target, scores = source.targets["other classes"], []
    few = target.train.few_shot(4, 0)
    for way in ways:
        runs = pretraining.runs_from(
            setup, source, learnt, [0], target, chosen_settings(chosen), dict.fromkeys(chosen, way)
        )
        own = [run for run in runs if run.labels["initialisation"] == "ghn3-orth"]
        scores.append(run_all(own, few, Accuracy(target.val))["accuracy"].mean())
    best = {way["orth_from"] for way, score in zip(ways, scores) if score == max(scores)}
    assert chosen["ghn3-orth"]["orth_from"] in best


def chosen_settings(tuned):
    return {start: {key: own[key] for key in ("optimizer", "lr", "weight_decay")} for start, own in tuned.items()}


def test_correlations_are_those_before_fine_tuning(transferred):
    setup, source, learnt, found = transferred
    rows = correlations_by_start(setup, source, learnt)
    starts = [start for start in found.starts if start != "ghn3-head"]
    assert list(deviation_table(rows).index) == starts
    own = rows[(rows["initialisation"] == "ghn3") & (rows["network"] == 1) & (rows["training"] == 1)]
    run = next(run for run in pretraining.runs_from(setup, source, learnt, [0, 1])
               if run.labels == {"initialisation": "ghn3", "network": 1, "training": 1})  # fmt: skip
    expected = channel_correlations(initial_network(run))
    assert dict(zip(own["layer"], own["deviation"])) == pytest.approx({k: v.std() for k, v in expected.items()})
    assert own["counts"].map(sum).tolist() == [len(values) for values in expected.values()]
    shares = distribution(rows)
    assert list(shares) == starts and (shares.sum() * 0.05).round(9).eq(1).all() and len(shares) == 40
    lead = claims_of_correlations(rows, "ghn3")["orth-correlation"]
    means = rows.groupby(["initialisation", "training", "network"])["deviation"].mean()
    assert lead.value == pytest.approx((means["ghn3"] - means["ghn3-orth"]).mean()) and lead.trainings == 2 == lead.n


def test_costs_are_of_training_and_prediction(transferred):
    setup, source, learnt, found = transferred
    costs = start_costs(setup, source, learnt.architectures[0], [*found.starts, "random, 1 epoch", "ghn3, 1 epoch"])
    assert costs["random"] == costs["orthogonal"] == 0 < costs["ghn3"] == costs["ghn3-orth"] < costs["trained"]
    assert costs["ghn3"] == costs["ghn3-head"]
    assert costs["trained"] == costs["trained-orth"] == costs["random, 1 epoch"]
    assert costs["ghn3, 1 epoch"] == pytest.approx(costs["trained"] + costs["ghn3"])


def made(accuracies, name="ghn3", family=DEEPNETS):
    """As if networks had been trained for two steps: initialisation -> accuracies of networks 0, 1, ..."""
    rows = [
        {"initialisation": start, "network": i, "seed": 0, "training": 0, "budget": 2, "step": 2, "accuracy": value, "loss": 1.0,
         "error": "", "dataset": "d", "family": family}
        for start, values in accuracies.items() for i, value in enumerate(values)
    ]  # fmt: skip
    return Transferred(pd.DataFrame(rows), {("d", DEEPNETS): {}}, name, {})


def test_starts_are_compared_network_by_network_and_trained_ones_on_their_own_networks():
    found = made({"random": [50, 40, 0], "orthogonal": [70, 30, 0], "ghn3": [60, 60, nan], "ghn3-orth": [62, 58, 3],
                  "trained": [80, 90], "trained-orth": [82, 94]})  # fmt: skip
    claims = found.claims
    assert set(claims) == {"new-classes/d", "orth/d", "orth-control/d"}
    assert claims["new-classes/d"] == found.leads["d"]["ghn3 - random"]
    assert (
        claims["new-classes/d"].value == pytest.approx(10) and claims["new-classes/d"].n == 3
    )  # what diverged has 0 %
    assert claims["orth/d"].value == pytest.approx(1) and claims["orth/d"].low < 0 < claims["orth/d"].high
    assert found.control["d"].value == pytest.approx(3) == -claims["orth-control/d"].value
    assert claims["orth-control/d"].low == pytest.approx(-found.control["d"].high)  # of pairs
    ((pair, lead),) = found.oracle["d"].items()
    assert pair == "trained - ghn3, the best other start" and (lead.value, lead.n) == (25, 2)
    assert len(found.points) == 5 and found.points.loc["ghn3 - random", "d"].startswith(
        "not decided (one training): +10"
    )


def test_another_hypernetwork_says_nothing_about_ghn3():
    found = made({"random": [50], "orthogonal": [70], "ghn2": [60], "ghn2-orth": [62]}, name="ghn2")
    assert list(found.claims) == ["orth/d"] and found.control == found.oracle == {}
    assert found.family_claims == {} and found.metrics["families"] == {} and found.families_won("random") == 0


def test_a_control_that_changes_nothing_is_told_from_one_that_does():
    same = {"random": [50], "orthogonal": [70], "ghn3": [60], "trained": [80]}
    parts = [
        made({**same, "trained-orth": [value]}, family=family).rows for family, value in (("a", 80), ("b-swin", 85))
    ]
    found = Transferred(pd.concat(parts), {}, "ghn3", {})
    assert found.family_table("d")["trained-orth - trained"].to_dict() == {"a": "equal throughout", "b-swin": "+5"}
    assert {key: lead.value for key, lead in found.family_claims.items()} == {"new-classes-swin/d, b-swin": 10.0}
    assert (found.families_won("random"), found.families_won("orthogonal")) == (2, 0)


def test_small_networks_of_other_families_are_predicted_and_those_that_fail_are_named():
    ghn, small = tiny(num_classes=6), ["small-resnet", "small-convnext", "small-swin"]
    found, failed = family_networks([*small, "resnet49", "inception_v3"], 6, 16, ghn)
    assert list(found) == small
    assert "resnet49" in failed["resnet49"] and "cannot be traced" in failed["inception_v3"]  # too deep for 16 pixels
    for network in found.values():
        run = initial_runs([network.adapted(4, 16)], TrainingRecipe(1, 0.1), [0], {"ghn": [ghn]}, class_layers=False)[2]
        net, classes = initial_network(run), class_layers(run.architecture.graph)
        assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
        predicted = run.sources.parameters
        assert dict(net.named_parameters())[classes[0]].shape[0] == 4 and not set(classes) & set(predicted)
        assert sum(value.numel() for value in predicted.values()) > 0.8 * network.num_params


def test_a_network_without_classifier_is_refused():
    graph = Graph([Node("input"), Node("conv", "stem.weight", (8, 3, 3, 3))], [(0, 1)])
    with pytest.raises(DataError, match="without classification layer.*stem.weight"):
        class_layers(graph)


def test_correlations_of_tiled_and_of_orthogonal_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(1, 1, 3), nn.Linear(8, 2))
    first = net[0].weight.data[:1]
    net[0].weight.data = torch.cat([first, -first]).repeat(4, 1, 1, 1)
    found = channel_correlations(net)
    assert list(found) == [0, 1] and np.abs(found[0]) == pytest.approx(np.ones(8 * 7))
    assert sorted(found[0].round())[: 8 * 4] == [-1] * 32, "half of the others are opposite"
    a, b = net[1].weight.data.flatten(1)[:2].numpy()
    net[1].weight.data = net[1].weight.data[:2]
    assert channel_correlations(net)[1] == pytest.approx([np.corrcoef(a, b)[0, 1]] * 2, abs=1e-5)
    net[0].weight.data += 1e-3 * torch.randn_like(net[0].weight)
    orthogonalize(net)
    assert np.abs(channel_correlations(net)[0]).mean() < 0.5
