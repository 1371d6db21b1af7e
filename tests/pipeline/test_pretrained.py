"""Hypernetworks of finished runs that are put among those of the package."""

import json
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML
from shared import tiny

from ghnlib import GHN
from ghnlib.params_file import read_yaml
from ghnlib.pipeline import pretrained

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with what the package needs of a run of the default profile: two trainings of ghn3."""
    values = read_yaml(ROOT / "params.yaml")
    values["train"]["seeds"] = [0, 1]
    values["train"]["variants"]["ghn3"]["start_from"] = "models/earlier-{seed}"
    YAML(typ="safe", pure=True).dump(values, tmp_path / "params.yaml")
    metrics = tmp_path / "reports/digits/metrics"
    metrics.mkdir(parents=True)
    for seed, validated in ((0, 80.0), (1, 90.0)):
        tiny(hid=8 * (seed + 1)).save_pretrained(tmp_path / f"models/ghn3-{seed}")
        (metrics / f"train-ghn3-{seed}.json").write_text(json.dumps({"validation_accuracy": validated}))
    epoch = {"n": 3, "mean": 58.24, "standard_error": 6.5}
    found = {"own_networks": {"ghn3": {"resnet": 97.0, "unseen": 1.0}}, "accuracy": {"SGD, 1 epoch": {"test": epoch}}}
    (metrics / "evaluate.json").write_text(json.dumps(found))
    (tmp_path / "results").mkdir()
    rows = [("ghn3", "test", seed, i, 70.0 + 10 * seed + i) for seed in (0, 1) for i in (0, 1)]
    table = pd.DataFrame([*rows, ("mlp", "test", 0, 0, 1.0)], columns=["method", "split", "seed", "index", "top1"])
    table.to_csv(tmp_path / "results/evaluate.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "PRETRAINED", tmp_path / "pretrained")
    return tmp_path


def test_the_best_on_validation_is_packed_with_its_card(run):
    folder = pretrained.pack("mine", "ghn3")
    assert folder == run / "pretrained/mine" and GHN.from_pretrained(folder).config.hid == 16, "that of seed 1"
    card = (folder / "README.md").read_text()
    assert "training seed 1: of the\n  seeds 0, 1 that with the best" in card
    assert "going on from `models/earlier-1`" in card
    assert [cell.strip() for cell in card.split("| test ")[1].split("\n")[0].split("|")[1:4]] == ["2", "80.5", "75.5"]
    assert "97.0" in card and "unseen |" not in card and "58.2 ± 6.5" in card


def test_one_training_is_told_once(run):
    text = (run / "params.yaml").read_text()
    (run / "params.yaml").write_text(text.replace("seeds: [0, 1]", "seeds: [0]", 1))
    table = pd.read_csv("results/evaluate.csv")
    table[table["seed"] == 0].to_csv("results/evaluate.csv", index=False)
    card = (pretrained.pack("mine", "ghn3") / "README.md").read_text()
    assert "training seed 0, the only one." in card and "mean of" not in card


def test_what_cannot_be_packed_is_named(run, monkeypatch):
    with pytest.raises(ValueError, match="no variant 'ghn4' in params.yaml: ghn1, ghn2"):
        pretrained.pack("mine", "ghn4")
    monkeypatch.setattr(pretrained, "LARGEST", 100)
    with pytest.raises(ValueError, match="at most 100 come with the package"):
        pretrained.pack("mine", "ghn3")
    assert not (run / "pretrained/mine").exists()
