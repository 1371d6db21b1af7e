"""Initialisations by their definitions, training of single networks, evaluation and diagnostics."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ghnlib import DeepNets, finetuning
from ghnlib.data import load_images
from ghnlib.diagnostics import activation_variances, diversity, sparsity
from ghnlib.evaluation import accuracy, estimate_batch_norm, evaluate_predictions, mean_and_error, paired_interval
from ghnlib.finetuning import (
    EVALUATION_BATCH,
    SCHEDULES,
    Run,
    TrainingRecipe,
    compare_on_resnet50,
    crossover,
    diverged,
    grid_of,
    initial_network,
    initial_runs,
    run_all,
    train_network,
    tune,
    wins,
)  # fmt: skip
from ghnlib.images import DataError
from ghnlib.initialization import add_noise, correlation_deviation, orthogonalize
from tests.test_hypernetwork import tiny

IMAGES = load_images("digits")
FEW = IMAGES.train.few_shot(4, seed=0)
ARCHITECTURES = list(DeepNets("val", space="small", size=3))


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(4, 10))


def test_orthogonalize_makes_columns_orthonormal_except_in_the_classifier():
    net = layers()
    classifier = net[3].weight.clone()
    orthogonalize(net)
    wide, tall = net[0].weight.flatten(1), net[2].weight.flatten(1)
    torch.testing.assert_close(wide @ wide.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(tall @ tall.T, torch.eye(4), atol=1e-5, rtol=0)
    assert torch.equal(net[3].weight, classifier)


def test_orthogonalize_is_the_orthogonal_initialisation_of_the_same_matrix():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    torch.manual_seed(3)
    net[0].weight.data.normal_()
    torch.manual_seed(3)
    expected = nn.init.orthogonal_(torch.empty(6, 4))
    orthogonalize(net)
    torch.testing.assert_close(net[0].weight, expected)


def test_orthogonalize_leaves_a_share_of_the_layers():
    net = layers()
    first = net[0].weight.clone()
    orthogonalize(net, orth_from=1 / 3)
    assert torch.equal(net[0].weight, first)
    assert not torch.equal(layers()[2].weight, net[2].weight)


@pytest.mark.parametrize(("share", "count", "first"), [(0.667, 54, 37), (0.823, 113, 94)])
def test_the_share_gives_the_papers_first_layer(share, count, first):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    before = [layer.weight.clone() for layer in net]
    orthogonalize(net, share)
    changed = [i for i, layer in enumerate(net, start=1) if not torch.equal(layer.weight, before[i - 1])]
    assert changed == list(range(first, count))


def test_noise_breaks_the_symmetry_of_tiled_channels_in_proportion_to_their_correlation():
    net = layers()
    net[0].weight.data = net[0].weight.data[:4].repeat(2, 1, 1, 1)
    before = net[0].weight.clone()
    sigma = correlation_deviation(before)
    rows = before.detach().flatten(1).T  # the taller orientation
    assert float(sigma) == pytest.approx(float(torch.corrcoef(rows).std()), rel=1e-4)
    add_noise(net, 0.1, torch.Generator().manual_seed(0))
    noise = net[0].weight - before
    assert not torch.equal(net[0].weight[0], net[0].weight[4])
    assert float(noise.detach().std()) == pytest.approx(0.1 * float(sigma), rel=0.2)


def test_noise_leaves_weights_of_one_column_alone():
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Linear(4, 10))
    before = net[0].weight.clone()
    add_noise(net, 0.1, torch.Generator())
    assert torch.equal(net[0].weight, before)


def test_random_networks_are_at_chance_and_training_leaves_it():
    recipe = TrainingRecipe(steps=40, lr=0.03)
    net = initial_network(Run(ARCHITECTURES[0], recipe, 0))
    results = train_network(net, IMAGES.train, recipe, 0, lambda net: accuracy(net, IMAGES.val), (0, 20))
    assert sorted(results) == [0, 20, 40]
    assert results[0] < 30 and results[40] > 50


def test_a_run_depends_on_its_seed_alone():
    run = Run(ARCHITECTURES[1], TrainingRecipe(steps=3, lr=0.03), 0, labels=(("network", 1),))
    one, two = (run_all([run], IMAGES.train, IMAGES.val, (1,), processes) for processes in (1, 2))
    assert one.equals(two)
    assert list(one.columns) == ["network", "seed", "optimizer", "lr", "weight_decay", "budget", "step", "accuracy", "loss", "error"]


def test_an_interrupted_call_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    ghn, recipe, trained = tiny(hid=16), TrainingRecipe(steps=1, lr=0.03), []

    def train(net, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(net)
        return train_network(net, *rest)

    monkeypatch.setattr(finetuning, "train_network", train)
    predict = lambda: initial_runs(ARCHITECTURES[:2], recipe, [0], {"ghn": ghn})
    with pytest.raises(KeyboardInterrupt):
        run_all(predict(), FEW, FEW, folder=tmp_path)
    trained[:] = [None] * 4
    whole = run_all(predict(), FEW, FEW, folder=tmp_path)
    assert len(trained) == 4 + 3 and len(whole) == 6
    pd.testing.assert_frame_equal(run_all(predict(), FEW, FEW, folder=tmp_path), whole)
    assert len(trained) == 7
    run_all(predict()[:1], FEW, IMAGES.val, folder=tmp_path)  # other images
    with torch.no_grad():
        next(ghn.parameters()).add_(1)
    run_all(predict(), FEW, FEW, folder=tmp_path)  # other predictions
    assert len(trained) == 7 + 1 + 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_each_optimizer_trains(optimizer):
    recipe = TrainingRecipe(steps=30, lr=0.03 if optimizer == "sgd" else 0.003, optimizer=optimizer)
    net, losses = initial_network(Run(ARCHITECTURES[0], recipe, 0)), []
    train_network(net, IMAGES.train, recipe, 0, lambda net: 0.0, log=losses.append)
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_losses_are_means_between_the_rows():
    run = Run(ARCHITECTURES[0], TrainingRecipe(steps=5, lr=0.01), 0)
    losses = []
    train_network(initial_network(run), IMAGES.train, run.recipe, 0, lambda net: 0.0, log=losses.append)
    rows = run_all([run], IMAGES.train, IMAGES.val, (0,), loss_every=2)
    assert list(rows["step"]) == [0, 2, 4, 5]
    assert list(rows["accuracy"].isna()) == [False, True, True, False]
    expected = [math.nan, np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose(rows["loss"], expected, rtol=1e-5)


def test_a_diverging_run_is_reported_and_the_sweep_goes_on():
    recipe = TrainingRecipe(steps=5, lr=1e20, clip=1e30)
    runs = [Run(ARCHITECTURES[0], recipe, 0, labels=(("side", "a"),))]
    results = run_all(runs, IMAGES.train, IMAGES.val)
    assert math.isnan(results["accuracy"].iloc[-1])
    assert diverged(results) == ["side a, seed 0, optimizer sgd, lr 1e+20, weight_decay 0.0003, budget 5"]
    grid = grid_of({"sgd": (1e20, 0.01), "adamw": ()}, (0.0, 1e30))
    best = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.0}
    assert tune(runs, grid, IMAGES.train, IMAGES.val, "side") == {"a": best}


def test_the_optimizer_is_tuned_with_its_rates():
    grid = grid_of({"sgd": (1e20,), "adamw": (1e-3, 4e-3)}, (0.0, 0.1))
    assert len(grid) == 6 and grid[0] == {"optimizer": "sgd", "lr": 1e20, "weight_decay": 0.0}
    runs = [Run(ARCHITECTURES[0], TrainingRecipe(steps=5, lr=1.0, clip=1e30), 0, labels=(("side", "a"),))]
    assert tune(runs, grid, IMAGES.train, IMAGES.val, "side")["a"]["optimizer"] == "adamw"


def test_a_network_that_fails_is_named_and_the_others_are_trained():
    recipe, broken = TrainingRecipe(steps=2, lr=0.01), {"classifier.9": torch.zeros(2)}
    good = Run(ARCHITECTURES[0], recipe, 0, labels=(("side", "a"),))
    bad = replace(good, initialisation="ghn", parameters=broken, labels=(("side", "b"),))
    results = run_all([good, bad], IMAGES.train, IMAGES.val, (0,))
    assert list(results["step"]) == [0, 2, 2] and list(results["accuracy"].isna()) == [False, False, True]
    (said,) = diverged(results)
    assert said.startswith("side b, seed 0") and "DataError: classifier.9" in said
    with pytest.raises(DataError, match="none of 1 trainings could be run: DataError: classifier.9"):
        run_all([bad], IMAGES.train, IMAGES.val)


@pytest.mark.parametrize(
    ("schedule", "factors"), [("cosine", [1, 0.75, 0.25]), ("step", [1, 0.1, 0.01]), ("constant", [1, 1, 1])]
)
def test_schedules_of_the_learning_rate(schedule, factors):
    assert [SCHEDULES[schedule](done / 3) for done in range(3)] == pytest.approx(factors)


def test_smoothed_labels_change_the_loss():
    run = lambda smoothing: Run(ARCHITECTURES[0], TrainingRecipe(2, 0.01, label_smoothing=smoothing), 0)
    plain, smooth = (run_all([run(s)], IMAGES.train, IMAGES.val)["loss"].iloc[-1] for s in (0.0, 0.5))
    assert plain != smooth


def test_batch_norm_statistics_are_averages_over_training_batches():
    net = nn.Sequential(nn.BatchNorm2d(3))
    estimate_batch_norm(net, IMAGES.train, 2, EVALUATION_BATCH, seed=0)
    batches = IMAGES.train.stream(EVALUATION_BATCH, 0)
    expected = torch.stack([next(batches)[0].mean((0, 2, 3)) for _ in range(2)]).mean(0)
    torch.testing.assert_close(net[0].running_mean, expected)


def test_sides_start_from_what_they_say():
    ghn = tiny(hid=16)
    runs = initial_runs(ARCHITECTURES[:1], TrainingRecipe(1, 0.1), [0], {"ghn": ghn}, post_processed=["ghn"])
    assert [dict(run.labels)["initialisation"] for run in runs] == ["random", "orthogonal", "ghn", "ghn-orth"]
    nets = [initial_network(run) for run in runs]
    predicted = ghn.predict(ARCHITECTURES[0].graph)
    values = {name: value.detach() for name, value in nets[2].named_parameters() if name in predicted}
    for name, value in values.items():
        torch.testing.assert_close(value, predicted[name], atol=1e-4, rtol=0)
    assert any(not torch.equal(value, predicted[name]) for name, value in values.items())  # GHN-3's noise
    first = [next(m.weight for m in net.modules() if isinstance(m, nn.Conv2d)).flatten(1) for net in nets]
    for matrix in (first[1], first[3]):
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)


def test_hypernetworks_of_other_classes_and_parameters_of_other_networks_are_named():
    recipe, networks = TrainingRecipe(1, 0.1), [architecture.adapted(7) for architecture in ARCHITECTURES[:1]]
    with pytest.raises(DataError, match=r"ghn9 is for 10 classes, not for \{7\}"):
        initial_runs(networks, recipe, [0], {"ghn9": tiny()})
    with pytest.raises(DataError, match=r"classifier.9 \(2,\) .*no such parameter"):
        initial_network(Run(networks[0], recipe, 0, "ghn", {"classifier.9": torch.zeros(2)}))


def rows_of(**accuracies):
    rows = [
        {"initialisation": name, "moment": moment, "network": network, "seed": seed, "accuracy": value + seed}
        for name, moments in accuracies.items() for moment, values in moments.items()
        for network, value in enumerate(values) for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_wins_gains_and_losses():
    results = rows_of(random={"early": [10, 20, 30], "late": [50, 60, 70]}, ghn={"early": [40, 22, 29], "late": [40, 60, 66]})
    early, late = wins(results, "ghn").loc["early"], wins(results, "ghn").loc["late"]
    assert early.to_dict() == {"networks": 3, "wins": 2, "mean gain": 16, "mean loss": -1, "largest loss": -1}
    assert (late["wins"], late["mean loss"], late["largest loss"]) == (0, -7, -10) and math.isnan(late["mean gain"])
    assert wins(results, "ghn", against="late").loc["early", "mean loss"] == pytest.approx((-10 - 38 - 41) / 3)


@pytest.mark.parametrize(
    ("ghn", "step"), [([3, 2, 1], None), ([5, 5, 5], 0), ([3, 3, 3], 20), ([3, 2.9, math.nan], 30), ([5, 2, 9], 30)]
)
def test_crossover_is_where_random_initialisation_stays_ahead(ghn, step):
    losses = {"random": [4, 3, 2], "ghn": ghn}
    rows = [{"initialisation": n, "step": s, "loss": v} for n, all_ in losses.items() for s, v in zip((10, 20, 30), all_)]
    assert crossover(pd.DataFrame(rows), "ghn") == step
    scores = [{**row, "accuracy": 100 - row["loss"], "loss": 1.0} for row in rows]
    unseen = [{"initialisation": n, "step": 15, "accuracy": math.nan, "loss": 1.0} for n in losses]
    assert crossover(pd.DataFrame(scores + unseen), "ghn", "accuracy") == step


@pytest.mark.parametrize(("name", "step"), [("ghn", 0), ("random", None)])
def test_a_side_that_diverged_in_all_runs_is_not_ahead(name, step):
    losses = {"random": 4.0, "ghn": 5.0} | {name: math.nan}
    rows = [{"initialisation": n, "step": s, "loss": v} for n, v in losses.items() for s in (10, 20)]
    assert crossover(pd.DataFrame(rows), "ghn") == step


def test_resnet50_is_compared_by_optimizer_at_its_best_rate(monkeypatch):
    monkeypatch.setattr("ghnlib.finetuning.TorchvisionNetwork", lambda classes, side: ARCHITECTURES[0])
    settings = {"resnet50_steps": 20, "batch_size": 8, "resnet50_lrs": {"sgd": (1e20, 0.01), "adam": (1e-3,)}}
    found = compare_on_resnet50(IMAGES, {"ghn2": tiny()}, settings, None, 0, 1)
    ends = found[found["step"] == 20].set_index(["initialisation", "optimizer"])["lr"]
    assert ends.to_dict() == {
        ("random", "sgd"): 0.01, ("random", "adam"): 1e-3, ("ghn2", "sgd"): 0.01, ("ghn2", "adam"): 1e-3,
    }  # fmt: skip
    assert found["accuracy"].notna().all() and len(found) == 4 * 11
    assert found.loc[found["step"] > 0, "loss"].notna().all()


def test_evaluation_equals_the_initialized_network():
    ghn = tiny()
    frame = evaluate_predictions(ghn, ARCHITECTURES[:2], IMAGES.val, processes=2)
    net = ARCHITECTURES[0].build(device="cpu")
    ghn.initialize(net)
    assert frame["accuracy"][0] == pytest.approx(accuracy(net, IMAGES.val), abs=0.5)


def test_statistics():
    values = mean_and_error([1.0, 2.0, 3.0])
    deviation = (2 / 3) ** 0.5
    assert values == {"n": 3, "mean": 2.0, "deviation": pytest.approx(deviation), "standard_error": pytest.approx(deviation / 3**0.5)}
    interval = paired_interval([2.0, 3.0, 4.1], [1.0, 2.0, 3.0])
    assert interval["low"] < interval["mean"] < interval["high"]
    assert interval["mean"] == pytest.approx(3.1 / 3)


def test_diversity_of_parallel_and_of_random_tensors():
    tensor = torch.randn(64, 3, 3)
    assert diversity([tensor, -2 * tensor]) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    random = [torch.randn(1152) for _ in range(200)]
    assert diversity(random) == pytest.approx(1 - math.sqrt(2 / (math.pi * 1152)), abs=0.002)


def test_sparsity():
    assert sparsity(torch.tensor([0.0, 0.04, 0.06, -1.0])) == 0.5


def test_activation_variances_are_those_of_each_layer_in_order():
    net = layers()[:1]
    images = torch.randn(4, 3, 8, 8)
    assert activation_variances(net, images) == [pytest.approx(float(net(images).var()))]
    assert not net[0]._forward_hooks
    assert np.isfinite(activation_variances(ARCHITECTURES[0].build(device="cpu"), images)).all()
