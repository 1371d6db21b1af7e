"""The command line and the public names."""

import pytest
import torchvision
from safetensors.torch import load_file

import ghnlib
from ghnlib.__main__ import main
from tests.test_hypernetwork import tiny


def test_predict_writes_all_parameters(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "ghn")
    out = tmp_path / "resnet18.safetensors"
    arguments = ["predict", "--ghn", str(tmp_path / "ghn"), "--model", "torchvision.models.resnet18", "--out", str(out)]
    assert main(arguments) == 0
    net = torchvision.models.resnet18(num_classes=10)
    assert {name: value.shape for name, value in load_file(out).items()} == {n: p.shape for n, p in net.named_parameters()}
    assert "62 tensors; 0 not predicted" in capsys.readouterr().out


@pytest.mark.parametrize(("ghn", "model", "message"), [
    ("missing.pt", "torchvision.models.resnet18", "no such file"), (None, "torchvision.models.nothing", "importable name"),
])  # fmt: skip
def test_mistakes_are_one_message(tmp_path, capsys, ghn, model, message):
    tiny().save_pretrained(tmp_path / "ghn")
    assert main(["predict", "--ghn", ghn or str(tmp_path / "ghn"), "--model", model, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_public_names():
    assert set(ghnlib.__all__) == {"GHN", "GHNConfig", "Graph", "DeepNets"}
    assert len(ghnlib.DeepNets(split="train", seed=0)) == 1_000_000
