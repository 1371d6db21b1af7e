"""Accuracies by their definitions, networks that fail."""

import math
from functools import cache
from itertools import islice

import pytest
import torch
from shared import digits, pool, tiny
from torch import nn

from ghnlib.data.images import DataError
from ghnlib.measuring.accuracy import (
    NOT_FINITE,
    evaluate_predictions,
    evaluate_torchvision,
    exit_accuracies,
    top_accuracies,
)
from ghnlib.measuring.costs import flops, inference_flops


def images():
    return digits(image_size=32)


@cache
def few():
    return images().val.few_shot(4, 0)


def architectures():
    return pool(input_size=32)


def test_top_1_and_top_5_count_labels_among_the_largest_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found = top_accuracies(net, few(), 7)
    order = net(next(few().batches(len(few())))[0]).argsort(1, descending=True)
    hits = order == few().labels[:, None]
    assert found["accuracy"] == pytest.approx(100 * float(hits[:, 0].float().mean()))
    assert found["top5"] == pytest.approx(100 * float(hits[:, :5].any(1).float().mean()))
    assert 0 < found["accuracy"] < found["top5"] < 100
    net[1].bias.data[3] = math.nan
    assert math.isnan(top_accuracies(net, few())["accuracy"])


def test_of_several_outputs_in_a_tuple_the_first_counts():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    expected = top_accuracies(net, few())
    net.register_forward_hook(lambda module, inputs, output: (output, -output))
    assert top_accuracies(net, few()) == expected


def test_predictions_score_as_the_network_that_is_initialised_with_them():
    ghn, architecture = tiny(), architectures()[0]
    net = architecture.build(device="cpu")
    ghn.initialize(net)
    found = evaluate_predictions(ghn, [architecture], few(), 16)
    assert found["accuracy"][0] == pytest.approx(top_accuracies(net, few(), 16)["accuracy"], abs=0.5)


def test_statistics_of_training_batches_replace_those_of_test_batches():
    ghn, architecture = tiny(), next(a for a in architectures() if a.norm)
    found = evaluate_predictions(ghn, [architecture], few(), 64, statistics=(images().train, 2, 3))
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
        for x, _ in islice(images().train.stream(64, 3), 2):
            net(x)
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(0))
    assert found["accuracy"][0] == pytest.approx(top_accuracies(net, few())["accuracy"], abs=0.1)


def test_torchvision_networks_are_evaluated_and_those_that_fail_are_named(tmp_path):
    names = ["torchvision.models.squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
    rows = evaluate_torchvision(tiny(), names, few(), 16, 1, tmp_path).set_index("network")
    assert list(rows.index) == ["squeezenet1_1", "mobilenet_v3_small", "vit_b_32"]
    assert rows["accuracy"][:2].between(0, 100).all() and (rows["error"][:2] == "").all()
    assert "32" in rows["error"]["vit_b_32"] and math.isnan(rows["accuracy"]["vit_b_32"])


def test_a_hypernetwork_for_other_classes_is_named():
    with pytest.raises(DataError, match="none of 1 .*the hypernetwork predicts 5 classes, the images have 10"):
        evaluate_predictions(tiny(num_classes=5), architectures()[:1], few())


def test_what_diverges_is_told(monkeypatch):
    scores = iter([math.nan, 50.0])
    scored = lambda *_: {"accuracy": next(scores), "top5": 1.0}
    monkeypatch.setattr("ghnlib.measuring.accuracy.predicted_accuracies", scored)
    found = evaluate_predictions(tiny(), architectures()[:2], few())
    assert found["error"].tolist() == [NOT_FINITE, ""] and found["accuracy"][1] == 50.0


def test_exits_are_counted_one_by_one():
    class Exits(nn.Module):
        def forward(self, x):
            return [torch.eye(10).repeat(len(x) // 10 + 1, 1)[: len(x)], torch.eye(10)[torch.full((len(x),), 3)]]

    first, last = exit_accuracies(Exits(), few(), 10)
    order = torch.arange(len(few())) % 10
    assert first == pytest.approx(100 * float((few().labels == order).float().mean()))
    assert last == pytest.approx(10.0)


def test_flops_are_two_for_each_multiplication_of_the_layers():
    class Two:
        input_size = 8

        def build(self, track_running_stats):
            layers = nn.Conv2d(3, 5, 3, bias=False), nn.Flatten(), nn.Linear(180, 4, bias=False)
            return nn.Sequential(*layers).to("meta")

    assert flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
    assert inference_flops(Two()) == 2 * (5 * 27 * 36 + 180 * 4)
