"""Accuracies by their definitions, sweeps that are interrupted, networks that fail."""

import math
from itertools import islice

import pandas as pd
import pytest
import torch
from torch import nn

from ghnlib import DeepNets, evaluation
from ghnlib.data import load_images
from ghnlib.evaluation import (
    evaluate_predictions,
    flops,
    inference_flops,
    mean_and_error,
    sweep,
    sweep_predictions,
    sweep_torchvision,
    top_accuracies,
)
from ghnlib.experiments import describe
from tests.test_hypernetwork import tiny

IMAGES = load_images("digits", image_size=32)
FEW = IMAGES.val.few_shot(4, 0)
ARCHITECTURES = list(DeepNets("val", space="small", input_size=32, size=3))


def test_top_1_and_top_5_count_labels_among_the_largest_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found = top_accuracies(net, FEW, 7)
    order = net(next(FEW.batches(len(FEW)))[0]).argsort(1, descending=True)
    hits = order == FEW.labels[:, None]
    assert found["accuracy"] == pytest.approx(100 * float(hits[:, 0].float().mean()))
    assert found["top5"] == pytest.approx(100 * float(hits[:, :5].any(1).float().mean()))
    assert 0 < found["accuracy"] < found["top5"] < 100
    net[1].bias.data[3] = math.nan
    assert math.isnan(top_accuracies(net, FEW)["accuracy"])


def test_statistics_of_training_batches_replace_those_of_test_batches():
    ghn, architecture = tiny(), next(a for a in ARCHITECTURES if a.norm)
    found = evaluate_predictions(ghn, [architecture], FEW, 64, statistics=(IMAGES.train, 2, 3))
    net = architecture.build(device="cpu", track_running_stats=True)
    ghn.initialize(net)
    means = []
    first = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_hook(lambda module, inputs, output: means.append(inputs[0].mean((0, 2, 3))))
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for x, _ in islice(IMAGES.train.stream(64, 3), 2):
            net(x)
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(0))
    assert found["accuracy"][0] == pytest.approx(top_accuracies(net, FEW)["accuracy"], abs=0.1)


def scores(name, log):
    with log.open("a") as file:
        file.write(name)
    if name == "c":
        raise NotImplementedError("no such layer:\n  Fold")
    if name == "d" and log.with_name("interrupt").exists():
        raise KeyboardInterrupt
    return {"accuracy": math.nan if name == "b" else 100 / 3, "top5": 0.1 + 0.2}


def test_a_sweep_names_failures_and_goes_on_where_it_stopped(tmp_path):
    log, interrupt = tmp_path / "log", tmp_path / "interrupt"
    again = lambda: sweep(scores, {name: name for name in "abcde"}, (log,), tmp_path / "deep" / "kept")
    interrupt.touch()
    with pytest.raises(KeyboardInterrupt):
        again()
    interrupt.unlink()
    whole = again()
    assert log.read_text() == "abcd" + "de"
    assert list(whole["network"]) == [*"abcde"]
    assert list(whole["error"]) == ["", "scores are not finite", "NotImplementedError: no such layer: Fold", "", ""]
    assert whole["accuracy"][0] == 100 / 3 and whole["top5"][3] == 0.1 + 0.2
    pd.testing.assert_frame_equal(again(), whole)
    assert log.read_text() == "abcdde"


def test_sweeps_of_predictions_are_evaluations_kept_by_hypernetwork(tmp_path, monkeypatch):
    ghn, seen = tiny(), []
    monkeypatch.setattr(evaluation, "top_accuracies", lambda *rest: seen.append(rest) or top_accuracies(*rest))
    expected = evaluate_predictions(ghn, ARCHITECTURES[:2], FEW)
    for count in (4, 4):  # the second time nothing is evaluated
        rows = sweep_predictions(ghn, ARCHITECTURES[:2], FEW, tmp_path, 64, 1)
        pd.testing.assert_frame_equal(rows.drop(columns="error"), expected)
        assert len(seen) == count
    with torch.no_grad():
        next(ghn.parameters()).add_(1)
    sweep_predictions(ghn, ARCHITECTURES[:2], FEW, tmp_path, 64, 1)
    assert len(seen) == 6


def test_torchvision_networks_are_evaluated_and_those_that_fail_are_named(tmp_path):
    names = ["torchvision.models.squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
    rows = sweep_torchvision(tiny(), names, FEW, tmp_path, 16, 1).set_index("network")
    assert list(rows.index) == ["squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
    assert rows["accuracy"][:2].between(0, 100).all() and (rows["error"][:2] == "").all()
    assert "32" in rows["error"]["vit_b_32"] and math.isnan(rows["accuracy"]["vit_b_32"])


def test_networks_are_described_by_what_accuracy_is_drawn_against():
    row = describe("val", ARCHITECTURES[:1]).iloc[0]
    net = ARCHITECTURES[0].build()
    assert row["parameters"] == sum(p.numel() for p in net.parameters())
    assert row["batch_norm"] == any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert (row["depth"], row["width"]) == (ARCHITECTURES[0].n_cells, ARCHITECTURES[0].C)
    assert list(describe("predefined", list(DeepNets("predefined", input_size=32)))["depth"].isna()) == [True, False]


def test_a_hypernetwork_for_other_classes_is_named_and_not_evaluated(tmp_path):
    ghn = tiny(num_classes=5)
    rows = sweep_predictions(ghn, ARCHITECTURES[:1], FEW, tmp_path, 64, 1)
    assert rows["error"].tolist() == ["DataError: the hypernetwork predicts 5 classes, the images have 10."]
    assert rows["accuracy"].isna().all()


def test_means_leave_out_networks_that_failed():
    expected = {"n": 2, "mean": 2.0, "deviation": 1.0, "standard_error": pytest.approx(0.5**0.5)}
    assert mean_and_error([1.0, math.nan, 3.0]) == expected


def test_flops_are_two_for_each_multiplication_of_the_layers():
    class Two:
        input_size = 8

        def build(self, track_running_stats):
            layers = nn.Conv2d(3, 5, 3, bias=False), nn.Flatten(), nn.Linear(180, 4, bias=False)
            return nn.Sequential(*layers).to("meta")

    assert flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
    assert inference_flops(Two()) == 2 * (5 * 27 * 36 + 180 * 4)
