"""The command line and the public names."""

import csv
import importlib
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from shared import ROOT, tiny

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


@pytest.mark.parametrize(("more", "tensors"), [([], 60), (["--class-layers", "resize"], 62)])
def test_classification_layers_of_other_classes_are_resized_on_request(folder, tmp_path, capsys, more, tensors):
    out = str(tmp_path / "parameters.safetensors")
    model = ["--model", "torchvision.models.resnet18", "--num-classes", "7"]
    assert main(["predict", "--ghn", folder, *model, "--out", out, *more]) == 0
    assert f"{tensors} tensors" in capsys.readouterr().out
    assert (load_file(out)["fc.weight"].shape == (7, 512)) if more else ("fc.weight" not in load_file(out))


MODELS = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

def own_classes(width=16):
    return net(10)

def without_return(num_classes):
    net(num_classes)

def refuses(num_classes):
    raise ValueError("no")

def größe(num_classes):
    return nn.ModuleDict({"größe": nn.Identity(), "net": net(num_classes)}).net

def parametrised(num_classes):
    made = net(num_classes)
    nn.utils.parametrizations.weight_norm(made[0])
    return made

class Wide(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.größe = nn.Parameter(nn.Linear(1, 1).weight)
        self.net = net(num_classes)

    def forward(self, x):
        assert x.shape[-1] == 40, "größe"
        return self.net(x)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of networks, ``mynets``."""
    (tmp_path / "mynets.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mynets", None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own_classes", "unexpected keyword argument 'num_classes'"),
        ("without_return", "made a NoneType"),
        ("refuses", "refuses(num_classes=10) failed: ValueError: no. Give a function"),
        ("none", "importable name"),
    ],
)
@pytest.mark.usefixtures("models")
def test_functions_that_make_no_network_are_named(folder, tmp_path, capsys, model, message):
    assert main(["predict", "--ghn", folder, "--model", f"mynets.{model}", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"mynets.{model}" in error and message in error


@pytest.mark.parametrize(
    "command", [["predict", "--model", "mynets.net", "--out"], ["coverage", "--csv"]], ids=lambda c: c[0]
)
def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, capsys, command):
    for place, message in ("missing/file", "no folder"), ("", "is a folder"):
        assert main([*command, str(tmp_path / place), "--ghn", "nothing.pt"]) == 1
        assert message in capsys.readouterr().err  # and not that there is no hypernetwork
    assert not (tmp_path / "missing").exists()


@pytest.mark.usefixtures("models")
def test_what_a_weight_is_computed_from_is_written_so_that_it_loads(folder, tmp_path, capsys):
    out = tmp_path / "parameters.safetensors"
    assert main(["predict", "--ghn", folder, "--model", "mynets.parametrised", "--out", str(out)]) == 0
    assert "5 tensors; 0 not predicted" in capsys.readouterr().out
    mynets = importlib.import_module("mynets")
    net, predicted = mynets.parametrised(10), tiny().predict(mynets.net(10))
    net.load_state_dict(load_file(out))
    torch.testing.assert_close(net[0].weight, predicted["0.weight"])


@pytest.mark.usefixtures("models")
def test_input_shape_is_a_side_or_a_whole_shape(folder, tmp_path, capsys):
    for shape in ["40"], ["3", "40", "40"]:
        out = tmp_path / f"{len(shape)}.safetensors"
        arguments = ["--ghn", folder, "--model", "mynets.Wide", "--out", str(out), "--input-shape", *shape]
        assert main(["predict", *arguments]) == 0
        assert "net.3.weight" in load_file(out)
    for shape in ["0"], ["-3"], ["x"]:
        with pytest.raises(SystemExit):
            main(["predict", "--ghn", folder, "--model", "mynets.net", "--out", str(out), "--input-shape", *shape])
        assert "--input-shape" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("arguments", [
    ["predict", "--model", "mynets.Wide", "--input-shape", "40", "--out", "größe.safetensors"],
    ["coverage", "--models", "mynets.größe", "mynets.Wide", "--csv", "größe.csv"],
], ids=lambda a: a[0])  # fmt: skip
def test_terminals_without_utf_8_show_escapes(folder, tmp_path, arguments):
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | plain
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-m", "ghnlib", *arguments, "--ghn", folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert "gr\\xf6\\xdfe" in done.stdout or "gr\\udcc3" in done.stdout
    if arguments[0] == "coverage":
        assert "größe" in (tmp_path / "größe.csv").read_text(encoding="utf-8")


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


SIGNALS = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("primitives", "said"), [
    (("conv1d",), "beyond the papers' primitives it knows conv1d"), ((), "unsupported layer Conv1d"),
])  # fmt: skip
def test_coverage_tells_which_layers_are_known(tmp_path, monkeypatch, capsys, primitives, said):
    tiny(primitives=primitives).save_pretrained(tmp_path / "ghn")
    (tmp_path / "signals.py").write_text(SIGNALS)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["coverage", "--ghn", str(tmp_path / "ghn"), "--models", "signals.net", "--input-shape", "2", "20"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert said in out and ("100.00" in out) == bool(primitives)
