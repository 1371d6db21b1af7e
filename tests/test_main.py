"""The command line, reports of what is predicted, and the public names."""

import csv

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from shared import tiny
from torch import nn

import ghnlib
from ghnlib.__main__ import main
from ghnlib.architectures.vision import network_by_name
from ghnlib.hypernetwork.coverage import coverage


@pytest.fixture
def folder(tmp_path):
    """A saved hypernetwork of 10 classes."""
    tiny().save_pretrained(tmp_path / "ghn")
    return str(tmp_path / "ghn")


class Probing(nn.Module):
    """Its constructor needs real weights."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        self.head = nn.Linear(144, num_classes)
        self.scale = self.head.weight.abs().max().item()

    def forward(self, x):
        return self.head(self.body(x))


# --- predict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "tensors"), [("resnet18", 62), ("regnet_y_400mf", 225)])
def test_predict_writes_all_parameters(folder, tmp_path, capsys, model, tensors):
    out = tmp_path / "parameters.safetensors"
    assert main(["predict", "--ghn", folder, "--model", f"torchvision.models.{model}", "--out", str(out)]) == 0
    net = torchvision.models.get_model(model, num_classes=10)
    assert {name: value.shape for name, value in load_file(out).items()} == {
        n: p.shape for n, p in net.named_parameters()
    }
    assert f"{tensors} tensors; 0 not predicted" in capsys.readouterr().out


@pytest.mark.parametrize(("ghn", "model", "message"), [
    ("missing.pt", "torchvision.models.resnet18", "no such file"), (None, "torchvision.models.nothing", "importable name"),
])  # fmt: skip
def test_mistakes_are_one_message(folder, tmp_path, capsys, ghn, model, message):
    assert main(["predict", "--ghn", ghn or folder, "--model", model, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- coverage --------------------------------------------------------------------------------------------------------


def test_networks_are_built_without_weights_where_that_works():
    assert all(parameter.is_meta for parameter in network_by_name("torchvision.models.regnet_y_400mf", 10).parameters())
    assert not any(parameter.is_meta for parameter in network_by_name(f"{__name__}.Probing", 10).parameters())


def test_a_report_says_what_is_predicted_and_why_the_rest_is_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(256, 7))
    ghn = tiny()
    report = coverage(ghn, net, (3, 8, 8))
    expected = {"0.weight": "convolution", "0.bias": "bias", "1.weight": "norm", "1.bias": "norm"}
    assert report.predicted == expected
    classes = "class layer; the hypernetwork predicts 10 classes"
    assert report.skipped == {"2.weight": "unsupported layer PReLU", "4.weight": classes, "4.bias": classes}
    assert (report.nodes, report.parameters, report.share) == (6, 12 + 4 + 8 + 4 + 256 * 7 + 7, 24 / 1827)
    predicted = torch.cat([value.flatten() for value in ghn.predict(net, (3, 8, 8)).values()])
    assert report.norm == pytest.approx(predicted.norm().item(), rel=1e-5)
    assert str(report).splitlines()[0] == "1.31% of 1,827 parameters predicted"
    assert any(line.split() == ["2", "tensors", "8", "values", "norm"] for line in str(report).splitlines())
    assert "not predicted: unsupported layer PReLU" in str(report)


def test_coverage_is_a_table_of_networks_and_survives_those_that_fail(folder, tmp_path, capsys):
    file = tmp_path / "table.csv"
    models = ["torchvision.models.nothing", "torchvision.models.googlenet", f"{__name__}.Probing"]
    assert main(["coverage", "--ghn", folder, "--csv", str(file), "--models", *models]) == 1
    printed = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(file.open()))
    assert [row["model"] for row in rows] == ["nothing", "googlenet", f"{__name__}.Probing"]
    assert [row["nodes"] for row in rows] == ["", "154", ""]
    assert [row["predicted %"] for row in rows] == ["", "100.0", ""]
    assert "importable name" in rows[0]["remarks"] and "input_shape" in rows[2]["remarks"]
    assert [line.split()[1] for line in printed[1:4]] == [row["model"] for row in rows]
    assert printed[-1] == "1 networks predicted, 2 failed"


@pytest.mark.slow
def test_all_torchvision_classifiers_are_covered(folder, tmp_path):
    assert main(["coverage", "--ghn", folder, "--csv", str(tmp_path / "table.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["model"] for row in rows] == torchvision.models.list_models(module=torchvision.models)
    assert len(rows) == 80
    assert all(float(row["predicted %"]) > 99.8 for row in rows)


def test_public_names():
    assert set(ghnlib.__all__) == {"GHN", "GHNConfig", "Graph", "DeepNets"}
    assert len(ghnlib.DeepNets(split="train", seed=0)) == 1_000_000
