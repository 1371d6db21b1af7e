"""Hundreds of damaged and hostile files of DeepNets-1M: each ends in a ValueError with its name, in seconds."""

import json
import random

import h5py
import numpy as np
import pytest
from released_files import TEXTS, WRONG, assert_refused, write_official

from ghnlib import DeepNets

pytestmark = pytest.mark.slow


@pytest.fixture
def deepnets(tmp_path):
    """The function ``deepnets(name, meta)``, which writes a file of two networks with other meta data."""
    write_official(tmp_path / "whole.hdf5", "val", DeepNets("val", seed=9, size=2))

    def write(name, meta=None):
        path = tmp_path / f"{name}.hdf5"
        path.write_bytes((tmp_path / "whole.hdf5").read_bytes())
        whole = (tmp_path / "whole_meta.json").read_text()
        text = meta if isinstance(meta, str) else json.dumps(json.loads(whole) if meta is None else meta)
        (tmp_path / f"{name}_meta.json").write_text(text)
        return path

    return write


def test_meta_data_of_deepnets(deepnets, tmp_path):
    whole = json.loads((tmp_path / "whole_meta.json").read_text())["val"]
    nets, tables = whole["nets"], whole["meta"]
    assert assert_refused([deepnets("same")], may_load=True) == 1
    texts = [*TEXTS, '{"val": []}', '{"val": {"nets": 3, "meta": 3}}']
    cells = [*WRONG, [["msa", 99], ["none", 0]], [["x", 0]] * 2, [["none", 0]] * 101, [101], [-1], [0] * 101]
    names = [{str(i): "_ops.x.weight" for i in range(99)}, {"9" * 5000: "x"}]
    others = [(nets[0] | {key: value}, nets[1]) for key in nets[0] for value in WRONG]
    others += [[nets[0] | {"genotype": nets[0]["genotype"] | {key: value}}]
               for key in nets[0]["genotype"] for value in cells]  # fmt: skip
    others += [[{}] * 10**6, [nets[0]] * 3, [3, None], {"0": nets[0]}, [[]]]
    metas = [{"nets": other, "meta": tables} for other in others]
    metas += [{"nets": nets, "meta": tables | {key: value}}
              for key in tables for value in [[], 3, {}, {"x": "y"}, {"0": 3}, {"0": None}, *names]]  # fmt: skip
    paths = [deepnets(str(i), meta) for i, meta in enumerate([*texts, *({"val": meta} for meta in metas)])]
    assert_refused(paths, may_load=True)  # an other kernel size or the other norm is found by the number of parameters


def test_arrays_of_deepnets(deepnets):
    paths, eye = [], np.triu(np.ones((9, 9), np.uint8), 1)
    shapes = [(10**9, 10**9), (10**6, 10**6), (6000, 6000), (9,), (0, 0), ()]
    arrays = [np.zeros((9, 9)), np.zeros((9, 9), "S5"), np.zeros((9, 9), [("a", "i4")]), eye.astype("c8"), eye[:3]]
    links = [h5py.SoftLink("/val/0"), h5py.SoftLink("/nothing"), h5py.ExternalLink("x", "/y")]
    for key in ("adj", "nodes"):
        for other in [*shapes, *arrays, None, *links]:
            paths.append(deepnets(f"{key}-{len(paths)}"))
            with h5py.File(paths[-1], "a") as file:
                group = file["val/0"]
                del group[key]
                if isinstance(other, tuple):
                    chunks = (min(other[0], 1000), 3) if len(other) == 2 and other[0] else None
                    group.create_dataset(key, other, np.uint16, chunks=chunks)
                elif other is not None:
                    group[key] = other
    dense = deepnets("dense")
    with h5py.File(dense, "a") as file:
        large = {"adj": np.triu(np.ones((5000, 5000), np.uint8), 1), "nodes": np.zeros((5000, 3), np.uint16)}
        for key, data in large.items():
            del file["val/0"][key]
            file["val/0"].create_dataset(key, data=data, compression="gzip")
    assert_refused([*paths, dense])


def test_damaged_files_of_deepnets(deepnets):
    whole, paths, draw = deepnets("same").read_bytes(), [], random.Random(3)
    for i in range(150):
        paths.append(deepnets(f"damaged-{i}"))
        if i < 30:
            paths[-1].write_bytes(whole[: draw.randrange(len(whole))])
        else:
            other = bytearray(whole)
            for _ in range(draw.choice((1, 4, 30))):
                other[draw.randrange(len(other))] = draw.randrange(256)
            paths[-1].write_bytes(other)
    assert_refused(paths, may_load=True)
