"""The command line and the public names."""

import csv

import pytest
import torchvision
from safetensors.torch import load_file
from shared import tiny

import ghnlib
from ghnlib.__main__ import main


@pytest.fixture
def folder(tmp_path):
    """A saved hypernetwork of 10 classes."""
    tiny().save_pretrained(tmp_path / "ghn")
    return str(tmp_path / "ghn")


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


def test_coverage_is_a_table_of_networks_and_survives_those_that_fail(folder, tmp_path, capsys):
    file = tmp_path / "table.csv"
    models = ["torchvision.models.nothing", "torchvision.models.googlenet", "shared.Reading"]
    assert main(["coverage", "--ghn", folder, "--csv", str(file), "--models", *models]) == 1
    printed = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(file.open()))
    assert [row["model"] for row in rows] == ["nothing", "googlenet", "shared.Reading"]
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
