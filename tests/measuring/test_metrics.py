"""Metrics on images whose classes are not equally frequent, against scikit-learn on logits made by hand."""

from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn import metrics as theirs
from torch import nn

from ghnlib.bounds import Metrics
from ghnlib.data.images import Images
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.measuring.metrics import METRICS, metrics_of
from ghnlib.training.networks import Accuracy

LABELS = torch.tensor([0] * 8 + [1] * 3 + [2])


@cache
def logits(classes=3):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(len(LABELS), classes, generator=generator) + 2 * nn.functional.one_hot(LABELS, classes)


class Read(nn.Module):
    """Takes the logits out of the first pixels of an image."""

    def forward(self, x):
        return x[:, 0, 0, : logits().shape[1]]


@pytest.fixture
def unbalanced():
    """Eight images of one class, three of another, one of a third."""
    pixels = torch.zeros(len(LABELS), 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, :3] = (20 * logits() + 128).round().to(torch.uint8)
    return Images(LABELS, ("a", "b", "c"), (0.5,) * 3, (0.5,) * 3, pixels)


def test_params_yaml_may_name_those_that_are_measured():
    (names, *_) = get_args(get_args(Metrics)[0])
    assert get_args(names) == ("accuracy", *METRICS)


def test_metrics_are_those_of_scikit_learn():
    found, probabilities = metrics_of(METRICS, LABELS, logits()), logits().double().softmax(1).numpy()
    predicted = logits().argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(100 * theirs.balanced_accuracy_score(LABELS, predicted))
    assert found["macro_f1"] == pytest.approx(100 * theirs.f1_score(LABELS, predicted, average="macro"))
    auc = theirs.roc_auc_score(LABELS, probabilities, multi_class="ovr", average="macro")
    assert found["auc"] == pytest.approx(100 * auc)
    assert len({100 * theirs.accuracy_score(LABELS, predicted), *found.values()}) == 4


def test_auc_is_of_the_classes_that_there_are_images_of():
    more = torch.cat([logits(), torch.full((len(LABELS), 1), -1e4)], 1)  # a class without images, never predicted
    assert metrics_of(["auc"], LABELS, more) == pytest.approx(metrics_of(["auc"], LABELS, logits()))
    two = LABELS.clamp(max=1), logits()[:, :2]
    auc = theirs.roc_auc_score(two[0], two[1].softmax(1)[:, 1])
    assert metrics_of(["auc"], *two)["auc"] == pytest.approx(100 * auc)


def test_batches_of_a_network_are_measured_together(unbalanced):
    read = torch.cat([Read()(x) for x, _ in unbalanced.batches(12)])
    expected = {"accuracy": 100 * theirs.accuracy_score(LABELS, read.argmax(1)), **metrics_of(METRICS, LABELS, read)}
    found = top_accuracies(Read(), unbalanced, 5, metrics=list(METRICS))
    assert found.pop("top5") == 100 and found == pytest.approx(expected)
    assert Accuracy(unbalanced, metrics=["auc"])(Read()) == pytest.approx({k: expected[k] for k in ("accuracy", "auc")})
    assert abs(found["accuracy"] - found["balanced_accuracy"]) > 4


def test_a_network_that_is_not_finite_has_no_metric(unbalanced):
    class Bad(nn.Module):
        def forward(self, x):
            return Read()(x) * torch.nan

    assert np.isnan(list(top_accuracies(Bad(), unbalanced, metrics=["auc"]).values())).all()
