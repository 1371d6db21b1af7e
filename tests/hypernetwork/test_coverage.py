"""Reports of what is predicted of a network."""

import pytest
import torch
from shared import tiny
from torch import nn

from ghnlib.hypernetwork.coverage import coverage


def test_weights_that_are_computed_count_as_what_they_are_computed_from():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.Flatten(), nn.Linear(256, 10))
    report = coverage(tiny(), net, (3, 8, 8))
    parts = {f"0.parametrizations.weight.original{i}": "convolution" for i in (0, 1)}
    assert not report.skipped and parts.items() <= report.predicted.items()


def test_a_report_says_what_is_predicted_and_why_the_rest_is_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(256, 7))
    ghn = tiny()
    report = coverage(ghn, net, (3, 8, 8))
    expected = {"0.weight": "convolution", "0.bias": "bias", "1.weight": "norm", "1.bias": "norm"}
    assert report.predicted == expected
    classes = "class layer; the hypernetwork predicts 10 classes, the network has 7"
    assert report.skipped == {"2.weight": "unsupported layer PReLU", "4.weight": classes, "4.bias": classes}
    assert (report.nodes, report.parameters, report.share) == (6, 12 + 4 + 8 + 4 + 256 * 7 + 7, 24 / 1827)
    predicted = torch.cat([value.flatten() for value in ghn.predict(net, (3, 8, 8)).values()])
    assert report.norm == pytest.approx(predicted.norm().item(), rel=1e-5)
    assert str(report).splitlines()[0] == "1.31% of 1,827 parameters predicted"
    assert any(line.split() == ["2", "tensors", "8", "values", "norm"] for line in str(report).splitlines())
    assert "not predicted: unsupported layer PReLU" in str(report)
