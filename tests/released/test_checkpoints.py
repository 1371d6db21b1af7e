"""Reading and writing hypernetworks, ours and the official formats, and refusing what is broken or unsafe."""

import argparse
import json
import os
import pickle
from pathlib import Path

import joblib
import pytest
import torch
from shared import tiny

from ghnlib import GHN, GHNConfig
from ghnlib.config import PRESETS
from ghnlib.released.checkpoints import CheckpointError, our_name

NAMES = json.loads(Path(__file__).with_name("hypernetworks.json").read_text())
"""Tensors of released files with their shapes (PPUDA's for CIFAR-10, GHN-3-T's for ImageNet)."""


@pytest.mark.parametrize("preset", NAMES)
def test_tensors_of_released_files_are_those_of_the_hypernetwork(preset):
    with torch.device("meta"):
        own = GHN(PRESETS[preset]).state_dict()
    # PPUDA keeps the decoder's 1x1 convolutions as such
    read = {our_name(name): tuple(shape[:2] if len(shape) == 4 else shape) for name, shape in NAMES[preset].items()}
    assert read == {name: tuple(value.shape) for name, value in own.items()}


CONFIG = {"max_shape": (16, 16, 11, 11), "num_classes": 10, "hypernet": "gatedgnn", "decoder": "conv", "weight_norm": True, "ve": True,
          "layernorm": True, "hid": 16, "layers": 2, "heads": 2, "is_ghn2": False}  # fmt: skip


def assert_equal(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("encoder", ["mlp", "gated_gnn", "graphormer"])
def test_save_and_load_keep_everything(tmp_path, encoder):
    ghn = tiny(encoder, convention="ghn3")
    ghn.save_pretrained(tmp_path / "saved")
    loaded = GHN.from_pretrained(tmp_path / "saved")
    assert loaded.config == ghn.config
    assert_equal(loaded, ghn)


def test_overrides_replace_the_stored_configuration(tmp_path):
    tiny().save_pretrained(tmp_path / "saved")
    assert GHN.from_pretrained(tmp_path / "saved", convention="ppuda").config.convention == "ppuda"
    with pytest.raises(ValueError, match="unknown configuration key 'hidden'"):
        GHN.from_pretrained(tmp_path / "saved", hidden=3)


def test_ghn3_training_files(tmp_path, official_names):
    ghn = tiny()
    content = {
        "state_dict": official_names(ghn),
        "config": CONFIG,
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, name="run"),
    }
    torch.save(content, tmp_path / "ghn.pt")
    loaded = GHN.from_pretrained(tmp_path / "ghn.pt")
    assert loaded.config == GHNConfig(hid=16, layers=2, heads=2, max_shape=(16, 16, 11, 11), convention="ghn3")
    assert_equal(loaded, ghn)


def test_hub_files_are_read_with_inferred_configuration(tmp_path, official_names):
    ghn = tiny()
    joblib.dump(official_names(ghn, legacy=True), tmp_path / "ghn3.pt")
    loaded = GHN.from_pretrained(tmp_path / "ghn3.pt")
    assert loaded.config.heads == 2  # as the last layer of the edge bias has rows
    assert_equal(loaded, ghn)
    with pytest.raises(CheckpointError, match="size mismatch for encoder.edge_bias.2.weight"):
        GHN.from_pretrained(tmp_path / "ghn3.pt", heads=4)


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("dump", [
    lambda value, path: torch.save(value, path), lambda value, path: joblib.dump(value, path),
    lambda value, path: path.write_bytes(pickle.dumps(value)),
])  # fmt: skip
def test_files_that_run_code_are_refused_by_name(tmp_path, monkeypatch, dump):
    monkeypatch.chdir(tmp_path)
    dump({"state_dict": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(CheckpointError, match="system"):
        GHN.from_pretrained(tmp_path / "attack.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("dump", [torch.save, joblib.dump])
def test_truncated_files_are_refused(tmp_path, dump, official_names):
    dump(official_names(tiny()), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        GHN.from_pretrained(tmp_path / "part.pt")


def test_missing_tensors_are_named(tmp_path, official_names):
    state = official_names(tiny())
    del state["gnn.1.ln2.weight"]
    torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match="Missing key.*encoder.layers.1.norm2.weight"):
        GHN.from_pretrained(tmp_path / "ghn.pt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError):
        GHN.from_pretrained(tmp_path / "text.pt")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a hypernetwork"):
        GHN.from_pretrained(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        GHN.from_pretrained(tmp_path / "nothing.pt")


def test_released_names_offline_say_where_to_put_the_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="put it in"):
        GHN.from_pretrained("ghn3tm8.pt")
