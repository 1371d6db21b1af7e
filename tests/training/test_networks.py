"""Training of single networks: schedules, optimisers, divergence, tuning, what runs start from."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from shared import digits, pool, tiny
from torch import nn

from ghnlib.data.images import DataError
from ghnlib.measuring.accuracy import estimate_batch_norm
from ghnlib.training import networks
from ghnlib.training.initialization import Sources
from ghnlib.training.networks import (
    EVALUATION_BATCH,
    SCHEDULES,
    Accuracy,
    Run,
    TrainingRecipe,
    best_settings,
    diverged,
    grid_of,
    initial_network,
    initial_runs,
    run_all,
    train_network,
    tune,
)


@cache
def few():
    return digits().train.few_shot(4, seed=0)


def on_validation():
    return Accuracy(digits().val)


def test_random_networks_are_at_chance_and_training_leaves_it():
    recipe = TrainingRecipe(steps=40, lr=0.03)
    net = initial_network(Run(pool()[0], recipe, 0))
    results = train_network(net, digits().train, recipe, 0, on_validation(), (0, 20))
    assert sorted(results) == [0, 20, 40]
    assert results[0]["accuracy"] < 30 and results[40]["accuracy"] > 50


def test_a_run_depends_on_its_seed_alone():
    run = Run(pool()[1], TrainingRecipe(steps=3, lr=0.03), 0, labels={"network": 1})
    one, two = (run_all([run], digits().train, on_validation(), (1,), processes) for processes in (1, 2))
    assert one.equals(two)
    columns = "network, seed, optimizer, lr, weight_decay, budget, step, accuracy, loss, error"
    assert ", ".join(one.columns) == columns


def test_an_interrupted_call_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    ghn, recipe, trained = tiny(hid=16), TrainingRecipe(steps=1, lr=0.03), []

    def train(net, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(net)
        return train_network(net, *rest)

    monkeypatch.setattr(networks, "train_network", train)
    predict = lambda: initial_runs(pool()[:2], recipe, [0], {"ghn": [ghn]})
    with pytest.raises(KeyboardInterrupt):
        run_all(predict(), few(), Accuracy(few()), folder=tmp_path)
    trained[:] = [None] * 4
    whole = run_all(predict(), few(), Accuracy(few()), folder=tmp_path)
    assert len(trained) == 4 + 3 and len(whole) == 6
    pd.testing.assert_frame_equal(run_all(predict(), few(), Accuracy(few()), folder=tmp_path), whole)
    assert len(trained) == 7
    run_all(predict()[:1], few(), on_validation(), folder=tmp_path)  # other images
    with torch.no_grad():
        next(ghn.parameters()).add_(1)
    run_all(predict(), few(), Accuracy(few()), folder=tmp_path)  # other predictions
    assert len(trained) == 7 + 1 + 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_each_optimizer_trains(optimizer):
    recipe = TrainingRecipe(steps=30, lr=0.03 if optimizer == "sgd" else 0.003, optimizer=optimizer)
    net, losses = initial_network(Run(pool()[0], recipe, 0)), []
    train_network(net, digits().train, recipe, 0, lambda net: 0.0, log=losses.append)
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize(("options", "weight"), [({}, 0.4), ({"auxiliary_weight": 0.5}, 0.5)])
def test_the_loss_of_an_auxiliary_head_is_weighted(options, weight):
    logits, labels = torch.randn(2, 6, 10), torch.arange(6)
    own, other = (F.cross_entropy(each, labels) for each in logits)
    loss = networks._loss((logits[0], logits[1]), labels, TrainingRecipe(1, 0.1, **options))
    torch.testing.assert_close(loss, own + weight * other)


def test_losses_are_means_between_the_rows():
    plain = next(a for a in pool(size=9) if not a.is_vit and a.fc_layers == 1)  # the others have dropout, and so chance
    run = Run(plain, TrainingRecipe(steps=5, lr=0.01), 0)
    losses = []
    train_network(initial_network(run), digits().train, run.recipe, 0, lambda net: 0.0, log=losses.append)
    rows = run_all([run], digits().train, on_validation(), (0,), loss_every=2)
    assert list(rows["step"]) == [0, 2, 4, 5]
    assert list(rows["accuracy"].isna()) == [False, True, True, False]
    expected = [math.nan, np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose(rows["loss"], expected, rtol=1e-5)


def test_a_diverging_run_is_reported_and_the_sweep_goes_on():
    recipe = TrainingRecipe(steps=5, lr=1e20, clip=1e30)
    runs = [Run(pool()[0], recipe, 0, labels={"initialisation": "a"})]
    results = run_all(runs, digits().train, on_validation())
    assert math.isnan(results["accuracy"].iloc[-1])
    assert diverged(results) == ["initialisation a, seed 0, optimizer sgd, lr 1e+20, weight_decay 0.0003, budget 5"]
    grid = grid_of({"sgd": (1e20, 0.01), "adamw": ()}, (0.0, 1e30))
    best = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.0}
    assert tune(runs, grid, digits().train, digits().val) == {"a": best}


def test_the_optimizer_is_tuned_with_its_rates():
    grid = grid_of({"sgd": (1e20,), "adamw": (1e-3, 4e-3)}, (0.0, 0.1))
    assert len(grid) == 6 and grid[0] == {"optimizer": "sgd", "lr": 1e20, "weight_decay": 0.0}
    runs = [Run(pool()[0], TrainingRecipe(steps=5, lr=1.0, clip=1e30), 0, labels={"initialisation": "a"})]
    assert tune(runs, grid, digits().train, digits().val)["a"]["optimizer"] == "adamw"


def test_a_network_that_fails_is_named_and_the_others_are_trained():
    recipe, broken = TrainingRecipe(steps=2, lr=0.01), {"classifier.9": torch.zeros(2)}
    good = Run(pool()[0], recipe, 0, labels={"side": "a"})
    bad = replace(good, initialisation="ghn", sources=Sources(parameters=broken), labels={"side": "b"})
    results = run_all([good, bad], digits().train, on_validation(), (0,))
    assert list(results["step"]) == [0, 2, 2] and list(results["accuracy"].isna()) == [False, False, True]
    (said,) = diverged(results)
    assert said.startswith("side b, seed 0") and "DataError: classifier.9" in said
    with pytest.raises(DataError, match="none of 1 trainings could be run: DataError: classifier.9"):
        run_all([bad], digits().train, on_validation())


@pytest.mark.parametrize(
    ("schedule", "factors"), [("cosine", [1, 0.75, 0.25]), ("step", [1, 0.1, 0.01]), ("constant", [1, 1, 1])]
)
def test_schedules_of_the_learning_rate(schedule, factors):
    assert [SCHEDULES[schedule](done / 3) for done in range(3)] == pytest.approx(factors)


def test_smoothed_labels_mix_the_label_with_all_classes():
    def first_loss(smoothing):
        run = Run(pool()[0], TrainingRecipe(1, 0.01, label_smoothing=smoothing), 0)
        return run_all([run], digits().train, on_validation())["loss"].iloc[-1]

    x, y = next(digits().train.stream(32, 0))
    logs = initial_network(Run(pool()[0], TrainingRecipe(1, 0.01), 0)).train()(x).detach().log_softmax(1)
    own = float(-logs[range(len(y)), y].mean())
    assert first_loss(0.0) == pytest.approx(own, rel=1e-5)
    assert first_loss(0.3) == pytest.approx(0.7 * own - 0.3 * float(logs.mean()), rel=1e-5)


def test_batch_norm_statistics_are_averages_over_training_batches():
    net = nn.Sequential(nn.BatchNorm2d(3))
    estimate_batch_norm(net, digits().train, 2, EVALUATION_BATCH, seed=0)
    batches = digits().train.stream(EVALUATION_BATCH, 0)
    expected = torch.stack([next(batches)[0].mean((0, 2, 3)) for _ in range(2)]).mean(0)
    torch.testing.assert_close(net[0].running_mean, expected)


def test_sides_start_from_what_they_say():
    ghn = tiny(hid=16)
    runs = initial_runs(pool()[:1], TrainingRecipe(1, 0.1), [0], {"ghn": [ghn]})
    assert [run.labels["initialisation"] for run in runs] == ["random", "orthogonal", "ghn"]
    nets = [initial_network(run) for run in runs]
    predicted = ghn.predict(pool()[0].graph)
    values = {name: value.detach() for name, value in nets[2].named_parameters() if name in predicted}
    for name, value in values.items():
        torch.testing.assert_close(value, predicted[name], atol=1e-4, rtol=0)
    assert any(not torch.equal(value, predicted[name]) for name, value in values.items())  # GHN-3's noise
    matrix = next(m.weight for m in nets[1].modules() if isinstance(m, nn.Conv2d)).flatten(1)
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_hypernetworks_of_other_classes_and_parameters_of_other_networks_are_named():
    recipe, few_classes = TrainingRecipe(1, 0.1), [architecture.adapted(7) for architecture in pool()[:1]]
    with pytest.raises(DataError, match=r"ghn9 is for 10 classes, not for \{7\}"):
        initial_runs(few_classes, recipe, [0], {"ghn9": [tiny()]})
    with pytest.raises(DataError, match=r"classifier.9 \(2,\) .*no such parameter"):
        initial_network(Run(few_classes[0], recipe, 0, "ghn", Sources(parameters={"classifier.9": torch.zeros(2)})))


def test_settings_are_chosen_for_each_pair_and_what_diverged_counts_as_0():
    tried = pd.DataFrame({
        "side": ["a"] * 4 + ["b"] * 2, "optimizer": ["sgd", "sgd", "adam", "adam", "sgd", "sgd"],
        "lr": [0.1, 0.2, 0.1, 0.2, 0.1, 0.2], "accuracy": [50.0, 60.0, 70.0, math.nan, math.nan, 1.0],
    })  # fmt: skip
    assert best_settings(tried, ["side", "optimizer"], ["lr"]) == {
        ("a", "adam"): {"lr": 0.1}, ("a", "sgd"): {"lr": 0.2}, ("b", "sgd"): {"lr": 0.2},
    }  # fmt: skip
    assert best_settings(tried, "side", ["optimizer", "lr"])["a"] == {"optimizer": "adam", "lr": 0.1}


def test_a_measure_gives_the_columns_of_a_row_and_none_after_divergence():
    measure = lambda net: {"accuracy": 50.0, "layers": len(list(net.modules()))}
    recipe = TrainingRecipe(steps=2, lr=0.01)
    rows = run_all([Run(pool()[0], replace(recipe, lr=lr, clip=1e30), 0) for lr in (0.01, 1e30)], few(), measure, (0,))
    assert rows["layers"].isna().tolist() == rows["accuracy"].isna().tolist() == [False, False, False, True]
    net = pool()[0].build(device="cpu", track_running_stats=True)
    assert train_network(net, few(), replace(recipe, lr=math.inf), 0, lambda net: [1, 2], (0,)) == {0: [1, 2], 2: None}
