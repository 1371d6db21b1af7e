"""Files of DeepNets-1M in the released format."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from released_files import write_official

from ghnlib import DeepNets
from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import Genotype
from ghnlib.graphs.nodes import PRIMITIVES
from ghnlib.released.deepnets1m import (
    ARGUMENTS,
    LARGEST_META,
    Cells,
    OfficialFile,
    numbers_of_parameters,
    parameter_name,
    primitive_name,
    repair_edges,
)


@pytest.fixture
def official(tmp_path):
    archs = [DeepNets("val", seed=9)[i] for i in range(6)]
    path = tmp_path / "deepnets1m_eval.hdf5"
    write_official(path, "val", archs)
    return archs, path, tmp_path / "deepnets1m_eval_meta.json"


def test_official_files_give_the_stored_architectures_and_graphs(official):
    archs, path, _ = official
    dataset = DeepNets("val", path=path)
    assert len(dataset) == 6
    for arch, read in zip(archs, dataset, strict=True):
        assert (read.genotype, read.C, read.norm) == (arch.genotype, arch.C, arch.norm)
        assert read.graph.nodes == arch.graph.nodes
        assert np.array_equal(read.graph.edges, arch.graph.edges[np.lexsort(arch.graph.edges.T[::-1])])
        assert read.graph.skipped.keys() == arch.graph.skipped.keys()
        assert read.adapted(100).graph.nodes[-1].shape == (100,)
        assert pickle.loads(pickle.dumps(read)).graph.nodes == read.graph.nodes


def test_official_files_of_training_draw_widths(tmp_path):
    some = (DeepNets("train", seed=9)[i] for i in range(100))
    archs = [replace(arch, C=32, fc_dim=256) for arch in some if arch.C > 32]
    path = tmp_path / "deepnets1m_train.hdf5"
    write_official(path, "train", archs)
    assert OfficialFile(path, "train").read(0).C == 32
    first, again = ([a.C for a in DeepNets("train", seed=s, path=path)] for s in (0, 0))
    assert first == again and len(set(first)) > 1


def test_official_files_hold_several_splits(official):
    archs, path, _ = official
    deep = list(DeepNets("deep", size=2))
    write_official(path, "deep", deep)
    assert [a.genotype for a in DeepNets("deep", path=path)] == [a.genotype for a in deep]
    assert [a.genotype for a in DeepNets("val", path=path)] == [a.genotype for a in archs]


def test_official_files_can_be_read_by_workers(official):
    _, path, _ = official
    dataset = DeepNets("val", path=path)
    dataset[0]
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, batch_size=2, collate_fn=list)
    assert [a.C for batch in loader for a in batch] == [a.C for a in dataset]


def test_damaged_official_files_are_explained(official):
    _, path, meta = official
    text = meta.read_text()
    with pytest.raises(ValueError, match="no split 'test'"):
        OfficialFile(path, "test")
    meta.write_text(text.replace('"num_nodes": ', '"num_nodes": 9'))
    with pytest.raises(ValueError, match="nodes"):
        OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"cifar10": ', '"cifar10": 9'))
    with pytest.raises(ValueError, match="parameters, but"):
        OfficialFile(path, "val").read(0)
    meta.write_text(re.sub(r'"imagenet": \d+', '"other": 1', text))
    with pytest.raises(ValueError, match="parameters, but"):
        OfficialFile(path, "val").read(0)
    meta.write_text(re.sub(r', "imagenet": \d+', "", text))
    assert OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"genotype"', '"genes"'))
    with pytest.raises(ValueError, match="network 0 of .*genotype: Field required"):
        OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"primitives_ext"', '"primitives"'))
    with pytest.raises(ValueError, match="incomplete: 'val' has no 'primitives_ext'"):
        OfficialFile(path, "val")
    meta.write_text(text[:-50])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        OfficialFile(path, "val")
    meta.write_text(text)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        OfficialFile(path, "val").read(5)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        OfficialFile(path, "val")


UNKNOWN = [["conv_9x9", 0], ["conv_1x1", 1]]


@pytest.mark.parametrize(("key", "value", "message"), [
    ("n_cells", 10**9, "n_cells = 1000000000.*less than or equal to 200"), ("C", "64", "C = '64'"), ("num_nodes", 0, "num_nodes"), ("ks", True, "ks"),
    ("stem_pool", "x", "stem_pool"), ("norm", "ln", "norm = 'ln'.*pattern '.bn'"), ("norm", "", "norm = ''"), ("genotype", {"normal": [["msa", 0]] * 101}, "genotype.normal"), ("genotype", [], "genotype"),
    ("genotype", {"normal": UNKNOWN, "normal_concat": [2], "reduce": UNKNOWN, "reduce_concat": [2]}, "'conv_9x9'; known: .*conv_7x7"),
])  # fmt: skip
def test_descriptions_of_official_files_are_checked(official, key, value, message):
    _, path, meta = official
    described = json.loads(meta.read_text())
    described["val"]["nets"][1][key] = value
    meta.write_text(json.dumps(described))
    file = OfficialFile(path, "val")
    assert file.read(0).C > 0
    with pytest.raises(ValueError, match=f"network 1 of {path} .*{message}"):
        file.read(1)


def test_arguments_at_the_defaults_of_the_released_networks_may_be_missing(official):
    archs, path, meta = official
    described = json.loads(meta.read_text())
    nets = described["val"]["nets"]
    for net in nets:
        if net["fc_layers"] == 1:
            net |= {"fc_layers": 0, "fc_dim": 0}
        if net["norm"]:
            del net["norm"]
    assert any(net["fc_layers"] == 0 for net in nets) and any("norm" not in net for net in nets)
    meta.write_text(json.dumps(described))
    for arch, read in zip(archs, DeepNets("val", path=path), strict=True):
        assert (read.identity, read.graph.nodes) == (arch.identity, arch.graph.nodes)


def test_more_networks_than_are_stored_are_refused(official):
    _, path, meta = official
    described = json.loads(meta.read_text())
    described["val"]["nets"] = [{}] * 10**5
    meta.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"{meta} describes 100000 networks, {path} has 6"):
        OfficialFile(path, "val")


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**9, 3), (7,)])
def test_large_arrays_of_official_files_are_refused(official, shape):
    _, path, _ = official
    with h5py.File(path, "a") as file:
        del file["val/0/adj"]
        file["val/0"].create_dataset("adj", shape, "u1", chunks=(1,) * len(shape))
    with pytest.raises(ValueError, match=f"network 0 of {path} .*adj has the shape"):
        OfficialFile(path, "val").read(0)


RECORDS = json.loads(Path(__file__).with_name("deepnets1m.json").read_text())
"""Three networks as the released generator writes them: arguments; of each node primitive, cell, name."""


@pytest.mark.parametrize("record", RECORDS)
def test_parameters_of_released_files_are_those_of_the_network(record):
    net = record["net"]
    cells = Cells.model_validate_json(json.dumps(net["genotype"]))
    genotype, norm = Genotype(**dict(cells)), "bn" if net["norm"] else None
    arch = Architecture(genotype, norm=norm, **{key: net[key] for key in ARGUMENTS if key in net})
    read = [(primitive_name(op), parameter_name(name, cell)) for op, cell, name in record["rows"]]
    own = [(node.op, node.name) for node in arch.graph.nodes if node.name]  # of operations, files lack some
    assert sorted((op, name) for op, name in read if name) == sorted(own)
    assert numbers_of_parameters(arch) == net["num_params"]


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("_ops.3.1.weight", "cells.2._ops.3.op.1.weight"),
        ("_ops.3.op.1.weight", "cells.2._ops.3.op.1.weight"),
        ("_ops.0.to_qkv.weight", "cells.2._ops.0.attn.to_qkv.weight"),
        ("_ops.0.to_out.0.", "cells.2._ops.0.attn.to_out.0.weight"),
        ("_ops.0.ff.net.3.bias", "cells.2._ops.0.ff.net.3.bias"),
        ("_ops.1.conv_2.weight", "cells.2._ops.1.conv_2.weight"),
        ("preprocess0.op.1.weight", "cells.2.preprocess0.op.1.weight"),
        ("cells.0.stem1.2.weight", "stem1.2.weight"),
        ("pos_enc.weight", "pos_enc.weight"),
        ("classifier.0.bias", "classifier.0.bias"),
        ("sum", ""),
        ("max_pool", ""),
        ("", ""),
    ],
)
def test_parameter_names_of_official_files(stored, name):
    assert parameter_name(stored, 2) == name


def test_names_of_weights_may_lack_their_ending():
    assert parameter_name("_ops.3.op.1", 2, "sep_conv") == "cells.2._ops.3.op.1.weight"
    assert parameter_name("pos_enc", 0, "pos_enc") == "pos_enc.weight"
    assert parameter_name("max_pool", 2, "max_pool") == parameter_name("", 2, "conv") == ""


def test_primitive_names_of_official_files():
    names = ["conv_1x1", "sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3", "fc-b", "bn", "pos_enc"]
    assert [primitive_name(n) for n in names] == ["conv", "sep_conv", "dil_conv", "max_pool", "bias", "bn", "pos_enc"]
    assert all(primitive_name(name) == name for name in PRIMITIVES)


@pytest.mark.parametrize("name", ["convolve", "conv_bogus", "concrete", "glob", "norm", ""])
def test_unknown_operations_of_official_files_are_refused(official, name):
    _, path, meta = official
    meta.write_text(meta.read_text().replace('"conv_1x1"', json.dumps(name)))
    with pytest.raises(ValueError, match=f"{meta} is damaged.* {name!r}; known.*conv_1x1.*glob_avg"):
        OfficialFile(path, "val")


def test_meta_data_of_gigabytes_are_not_read(official):
    _, path, meta = official
    os.truncate(meta, LARGEST_META + 1)  # sparse: it takes no room on the disk
    with pytest.raises(ValueError, match=f"{meta} has {LARGEST_META + 1} bytes, at most {LARGEST_META}"):
        OfficialFile(path, "val")


def test_repairs_of_official_edges():
    net = {"norm": "bn", "stem_type": 1}
    ops = ["input", "conv", "bn", "conv", "bn", "conv", "bn", "conv", "conv", "sum", "conv"]
    chain = [[i, i + 1] for i in range(6)]
    broken = chain + [[4, 7], [4, 10], [6, 8]]
    assert repair_edges(broken, ops, net, False) == sorted(chain + [[4, 7], [6, 10], [6, 8]])
    assert repair_edges(broken, ops, net, True) == sorted(broken)
    several = [[0, 1], [1, 2], [0, 2], [1, 9], [2, 9]]
    assert repair_edges(several, ops, {"norm": None, "stem_type": 0}, False) == [[0, 1], [0, 2], [1, 9], [2, 9]]
