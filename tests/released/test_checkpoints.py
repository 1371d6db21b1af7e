"""Reading and writing hypernetworks, ours and the official formats, and refusing what is broken or unsafe."""

import argparse
import itertools
import json
import os
import pickle
import zipfile
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from released_files import CONFIG, NAMES, official_names, save_legacy
from safetensors.torch import save_file
from shared import tiny

from ghnlib import GHN, GHNConfig
from ghnlib.config import PRESETS
from ghnlib.graphs.vocabulary import EXTENDED
from ghnlib.hypernetwork.pretrained import least_values
from ghnlib.released.checkpoints import CheckpointError, our_name, read_checkpoint
from ghnlib.released.unpickling import read_pickle


@pytest.mark.parametrize("preset", NAMES)
def test_tensors_of_released_files_are_those_of_the_hypernetwork(preset):
    with torch.device("meta"):
        own = GHN(PRESETS[preset]).state_dict()
    # PPUDA keeps the decoder's 1x1 convolutions as such
    read = {our_name(name): tuple(shape[:2] if len(shape) == 4 else shape) for name, shape in NAMES[preset].items()}
    assert read == {name: tuple(value.shape) for name, value in own.items()}


def assert_equal(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("encoder", "option"),
    [
        ("mlp", {"convention": "ghn3"}),
        ("gated_gnn", {"directions": "forward"}),
        ("graphormer", {"primitives": EXTENDED}),
    ],
)
def test_save_and_load_keep_everything(tmp_path, encoder, option):
    ghn = tiny(encoder, **option)
    ghn.save_pretrained(tmp_path / "saved")
    loaded = GHN.from_pretrained(tmp_path / "saved")
    assert loaded.config == ghn.config
    assert_equal(loaded, ghn)


def test_overrides_replace_the_stored_configuration(tmp_path):
    tiny().save_pretrained(tmp_path / "saved")
    assert GHN.from_pretrained(tmp_path / "saved", convention="ppuda").config.convention == "ppuda"
    with pytest.raises(ValueError, match="unknown configuration key 'hidden'"):
        GHN.from_pretrained(tmp_path / "saved", hidden=3)


def test_ghn3_training_files(tmp_path):
    ghn = tiny()
    content = {"state_dict": official_names(ghn), "config": CONFIG, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "ghn.pt")
    loaded = GHN.from_pretrained(tmp_path / "ghn.pt")
    assert loaded.config == GHNConfig(hid=16, layers=2, heads=2, max_shape=(16, 16, 11, 11), convention="ghn3")
    assert_equal(loaded, ghn)


@pytest.mark.parametrize("stated", [True, False])
def test_files_with_the_mlp_decoder(tmp_path, stated):
    ghn = tiny("mlp", decoder="mlp", num_classes=7, window="corner", convention="ppuda" if stated else "ghn3")
    own, names = ghn.state_dict(), {"fc1": "fc.0", "fc2": "fc.2", "class_layer": "class_layer_predictor.1"}
    state = {name: own[our_name(name)] for name in NAMES["mlp"] if our_name(name) in own and "decoder.fc" not in name}
    state |= {f"decoder.{theirs}.{part}": own[f"weight_decoder.{ours}.{part}"]
              for ours, theirs in names.items() for part in ("weight", "bias")}  # fmt: skip
    config = {**CONFIG, "num_classes": 7, "decoder": "mlp", "hypernet": "mlp"}
    rest = (
        {"config": {key: config[key] for key in config if key not in ("layers", "heads", "is_ghn2")}} if stated else {}
    )
    torch.save({"state_dict": state, **rest}, tmp_path / "mlp.pt")
    loaded = GHN.from_pretrained(tmp_path / "mlp.pt")
    assert replace(loaded.config, layers=ghn.config.layers, heads=ghn.config.heads) == ghn.config
    assert_equal(loaded, ghn)


def test_graphormers_have_the_graphs_of_ghn3_whatever_their_file_states(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key not in ("heads", "layers", "is_ghn2")}
    torch.save({"state_dict": official_names(tiny()), "config": config}, tmp_path / "ghn.pt")
    assert GHN.from_pretrained(tmp_path / "ghn.pt").config.convention == "ghn3"


@pytest.mark.parametrize("write", [torch.save, save_legacy, joblib.dump])
def test_results_and_paths_beside_the_tensors_are_ignored(tmp_path, write):
    rest = {
        "epoch": np.int64(3),
        "accuracy": np.float64(0.5),
        "args": argparse.Namespace(folder=tmp_path, name=np.str_("x")),
    }
    write({"state_dict": official_names(tiny()), "config": CONFIG, **rest}, tmp_path / "ghn.pt")
    assert_equal(GHN.from_pretrained(tmp_path / "ghn.pt"), tiny())


def test_hub_files_are_read_with_inferred_configuration(tmp_path):
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
def test_truncated_files_are_refused(tmp_path, dump):
    dump(official_names(tiny()), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        GHN.from_pretrained(tmp_path / "part.pt")


def test_missing_tensors_are_named(tmp_path):
    state = official_names(tiny())
    del state["gnn.1.ln2.weight"]
    torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match="Missing key.*encoder.layers.1.norm2.weight"):
        GHN.from_pretrained(tmp_path / "ghn.pt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError):
        GHN.from_pretrained(tmp_path / "text.pt")
    lfs, page = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", b"\n<!DOCTYPE html>\n<html>404</html>"
    for name, (content, message) in itertools.product(
        ("file.pt", "file.safetensors"), ((b"", "it is empty"), (lfs, "run git lfs pull"), (page, "it is a web page"))
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            read_checkpoint(tmp_path / name)
    for method in "zlib", "gzip", "bz2", "xz", "lzma":
        joblib.dump(official_names(tiny()), tmp_path / "small.pt", compress=(method, 3))
        with pytest.raises(CheckpointError, match="small.pt.*compressed: dump it without compress"):
            GHN.from_pretrained(tmp_path / "small.pt")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a hypernetwork"):
        GHN.from_pretrained(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        GHN.from_pretrained(tmp_path / "nothing.pt")


# --- where the configuration and the names come from ------------------------------------------------------------------


def test_a_file_of_a_saved_folder_has_its_configuration(tmp_path):
    ghn = tiny(convention="ppuda", virtual_edges=False)
    ghn.save_pretrained(tmp_path / "saved")
    loaded = GHN.from_pretrained(tmp_path / "saved" / "model.safetensors")
    assert loaded.config == ghn.config
    assert_equal(loaded, ghn)
    (tmp_path / "saved" / "config.json").unlink()
    for source in tmp_path / "saved", tmp_path / "saved" / "model.safetensors":
        with pytest.raises(CheckpointError, match=f"{source}.* config.json"):
            GHN.from_pretrained(source)


def test_folders_without_a_hypernetwork_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no config.json and no model.safetensors"):
        GHN.from_pretrained(tmp_path)
    for source in "models/nothing", "models/nothing/", str(tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=f"{source}: no such file or folder"):
            GHN.from_pretrained(source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_left_out(tmp_path, prefix):
    ghn = tiny()
    state = {prefix + name: value for name, value in official_names(ghn).items()}
    torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "official.pt")
    assert_equal(GHN.from_pretrained(tmp_path / "official.pt"), ghn)
    ghn.save_pretrained(tmp_path)
    save_file({prefix + name: value for name, value in ghn.state_dict().items()}, tmp_path / "model.safetensors")
    assert_equal(GHN.from_pretrained(tmp_path), ghn)
    torch.save({"state_dict": official_names(ghn) | state}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match="twice"):
        GHN.from_pretrained(tmp_path / "twice.pt")


def test_names_of_compiled_parts_are_read(tmp_path):
    ghn = tiny()
    ghn.save_pretrained(tmp_path)
    ghn.encoder = torch.compile(ghn.encoder)
    assert "encoder._orig_mod.edge.weight" in ghn.state_dict()
    save_file(ghn.state_dict(), tmp_path / "model.safetensors")
    assert_equal(GHN.from_pretrained(tmp_path), tiny())


HUB = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True, "force_download": True}


def test_arguments_of_the_hub_reach_it(tmp_path, monkeypatch):
    ghn, calls = tiny(), []
    ghn.save_pretrained(tmp_path)
    joblib.dump(official_names(ghn, legacy=True), tmp_path / "ghn2.pt")

    def download(repository, name, **arguments):
        calls.append((repository, name, arguments))
        return str(tmp_path / name)

    monkeypatch.setattr("ghnlib.released.checkpoints.hf_hub_download", download)
    assert_equal(GHN.from_pretrained("some/ghn", **HUB, map_location=torch.device("cpu")), ghn)
    assert_equal(GHN.from_pretrained("ghn2.pt", **HUB), ghn)
    expected = [("some/ghn", "config.json"), ("some/ghn", "model.safetensors"), ("SamsungSAILMontreal/ghn3", "ghn2.pt")]
    assert calls == [(repository, name, HUB) for repository, name in expected]
    calls.clear()
    assert_equal(GHN.from_pretrained(tmp_path, **HUB), ghn)
    assert not calls
    assert {p.device.type for p in GHN.from_pretrained(tmp_path, map_location="meta").parameters()} == {"meta"}


# --- what files can set ----------------------------------------------------------------------------------------------


def test_pickles_hold_what_torch_and_joblib_read(tmp_path):
    """All formats, kinds of numbers, views and empty tensors."""
    whole, path = torch.randn(3, 4).T, tmp_path / "file"
    tensors = {"t": whole, "row": whole[1], "half": torch.randn(3).half(), "bf": torch.randn(3).bfloat16(),
               "none": torch.zeros(0, 3), "i": torch.arange(3), "b": torch.tensor(True)}  # fmt: skip
    rest = {3: [1, 2.5, None, (True, "x")]}
    for write in torch.save, save_legacy, joblib.dump:
        write(tensors | {"rest": rest}, path)
        read = read_pickle(path)
        assert read.pop("rest") == rest
        torch.testing.assert_close(read, tensors, rtol=0, atol=0)
    arrays = {"a": np.random.randn(3, 4), "fortran": np.asfortranarray(np.random.randn(3, 4)),
              "big": np.arange(4).astype(">f4"), "0": np.array(3.0)}  # fmt: skip
    for protocol in 2, 3, 4, 5:
        joblib.dump(arrays, path, protocol=protocol)
        assert all(np.array_equal(value.numpy(), arrays[name]) for name, value in read_pickle(path).items())


@pytest.mark.parametrize("write", [torch.save, save_legacy, joblib.dump])
@pytest.mark.parametrize(("values", "message"), [
    (torch.full((15, 16), torch.nan), "not finite"), (torch.zeros(15, 16, dtype=torch.int8), "torch.int8"),
    (torch.zeros(15, 16, dtype=torch.complex64), "not tensor data"), (torch.zeros(1).expand(10**6, 16), "larger than the file"), ([1.0], "a list, not a tensor"),
])  # fmt: skip
def test_tensors_are_checked(tmp_path, write, values, message):
    state = official_names(tiny())
    assert state["embed.weight"].shape == (15, 16)
    write({"state_dict": state | {"embed.weight": values}, "config": CONFIG}, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match=f"ghn.pt.*{message}"):
        GHN.from_pretrained(tmp_path / "ghn.pt")


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": 10**9}, "layers = 1000000000: .*less than or equal to 200"), ({"modules": 10**9}, "modules"), ({"weight_norm": "no"}, "weight_norm = 'no'"),
    ({"stacked": "x"}, "stacked"), ({"max_shape": [16384, 16384, 256, 256]}, "holds .* values, but its configuration describes at least"),
    ({"heads": 3}, "heads=3"), ({"hidden": 16}, "hidden"), ({"hid": [[16]]}, "hid is neither"),
])  # fmt: skip
def test_configurations_are_checked(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{message}"):
        GHN.from_pretrained(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    ({**CONFIG, "weight_norm": "no"}, "weight_norm = 'no'"), ({**CONFIG, "hid": 10**9}, "hid"), ([], "a list, not a dictionary"), ({**CONFIG, "hid": ((),)}, "hid is neither"),
])  # fmt: skip
def test_stated_configurations_are_checked(tmp_path, config, message):
    torch.save({"state_dict": official_names(tiny()), "config": config}, tmp_path / "ghn.pt")
    with pytest.raises(CheckpointError, match=f"ghn.pt.*{message}"):
        GHN.from_pretrained(tmp_path / "ghn.pt")


def test_archives_with_compressed_entries_are_refused(tmp_path):
    torch.save(official_names(tiny()), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in whole.namelist():
            other.writestr(name, whole.read(name))
    with pytest.raises(CheckpointError, match="small.pt.*compressed"):
        GHN.from_pretrained(tmp_path / "small.pt")


@pytest.mark.parametrize(("data", "message"), [
    (b"]" * 10**6, "more than 300,000 instructions"), (b"\x8e" + b"\xff" * 7 + b"\x1f", "truncated"), (b"})\x85)\x86Ns.", "key of type tuple"),
    (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "__builtin__.bytearray"),
])  # fmt: skip
def test_pickles_that_grow_are_refused(tmp_path, data, message):
    (tmp_path / "ghn.pt").write_bytes(b"\x80\x04" + data)
    with pytest.raises(CheckpointError, match=f"ghn.pt.*{message}"):
        GHN.from_pretrained(tmp_path / "ghn.pt")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ghn3-xl"])
def test_least_values_are_most_of_a_hypernetwork(preset):
    with torch.device("meta"):
        count = sum(p.numel() for p in GHN(PRESETS[preset]).parameters())
    assert 0.9 * count < least_values(GHNConfig(**PRESETS[preset])) <= count


def test_released_names_offline_say_where_to_put_the_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="put it in"):
        GHN.from_pretrained("ghn3tm8.pt")
