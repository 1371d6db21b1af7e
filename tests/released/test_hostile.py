"""Hundreds of damaged and hostile files: each ends in a CheckpointError with its name, in seconds and little memory."""

import argparse
import itertools
import json
import pickle
import random
import re
import struct
import zipfile

import joblib
import numpy as np
import pytest
import torch
from released_files import CONFIG, TEXTS, WRONG, assert_refused, official_names, save_legacy
from safetensors.torch import save_file
from shared import tiny

from ghnlib.config import PRESETS

pytestmark = pytest.mark.slow

WRITERS = {
    "zip.pt": torch.save,
    "legacy.pt": save_legacy,
    "tensors.joblib": lambda content, path: joblib.dump(content["state_dict"], path),
    "arrays.joblib": lambda content, path: joblib.dump({k: v.numpy() for k, v in content["state_dict"].items()}, path),
    "official.safetensors": lambda content, path: save_file(content["state_dict"], path),
}


@pytest.fixture
def content():
    """What the official training of GHN-3 saves."""
    config = CONFIG | {"hid": 8}
    return {"state_dict": official_names(tiny(hid=8)), "config": config, "args": argparse.Namespace(lr=0.1), "epoch": 3}


@pytest.fixture
def wholes(tmp_path, content):
    """A file that loads in each of the formats."""
    for name, write in WRITERS.items():
        write(content, tmp_path / name)
    return [tmp_path / name for name in WRITERS]


def variants(whole, changed):
    """Files with other bytes."""
    paths = [whole.with_stem(f"{whole.stem}-{i}") for i in range(len(changed))]
    for path, data in zip(paths, changed):
        path.write_bytes(data)
    return paths


def test_whole_files_load(wholes):
    assert assert_refused(wholes, may_load=True) == len(wholes)


def test_truncated_files(wholes):
    paths, draw = [], random.Random(0)
    for whole in wholes:
        data = whole.read_bytes()
        ends = [0, 1, 2, 8, 16, 64, len(data) - 1, *(draw.randrange(len(data)) for _ in range(23))]
        paths += variants(whole, [data[:end] for end in ends])
    assert_refused(paths)


def described(data):
    """Where a file's bytes are not values of tensors: its start, and beside its words."""
    near = (range(max(0, found.start() - 8), found.end() + 8) for found in re.finditer(rb"[\w./]{6,}", data))
    return [i for i in {*range(200), *itertools.chain(*near)} if i < len(data)]


def test_changed_bytes(wholes):
    paths, draw = [], random.Random(1)
    for whole in wholes:
        data = whole.read_bytes()
        places, changed = described(data), []
        for i in range(60):
            other = bytearray(data)
            for _ in range(draw.choice((1, 1, 2, 8))):
                other[draw.choice(places) if i % 4 else draw.randrange(len(data))] = draw.randrange(256)
            changed.append(bytes(other))
        paths += variants(whole, changed)
    assert_refused(paths, may_load=True)  # a changed value is as good as another


def test_bytes_left_out_or_put_in(wholes):
    paths, draw = [], random.Random(2)
    for whole in wholes:
        data = whole.read_bytes()
        places, changed = described(data), []
        for i in range(20):
            at, some = draw.choice(places), draw.randbytes(draw.choice((1, 4, 100)))
            changed.append(data[:at] + some + data[at:] if i % 2 else data[:at] + data[at + len(some) :])
        paths += variants(whole, changed)
    assert_refused(paths, may_load=True)


def test_other_tensors(tmp_path, content):
    state, paths = content["state_dict"], []
    for i, (name, value) in enumerate(state.items()):
        other = list(state)[(i + 1) % len(state)]
        changes = [{name: value[None, None]}, {name: value.flatten()[:-1]}, {name: value.flatten()[None]},
                   {name: value.to(torch.complex64)}, {name: value.to(torch.int32)}, {name: value * torch.nan},
                   {name: value + torch.inf}, {name: value.to(torch.float8_e4m3fn)}, {name: None}, {name: [1.0]},
                   {name: value.expand(10**6, *value.shape)}, {name: 3}, {f"{name}.x": value}, {3: value},
                   {f"module.{name}": value}]  # fmt: skip
        if value.shape != state[other].shape:
            changes.append({name: state[other], other: value})
        for k, change in enumerate(changes[i % 3 :: 3]):
            paths.append(tmp_path / f"{i}-{k}.pt")
            torch.save(content | {"state_dict": state | change}, paths[-1], _use_new_zipfile_serialization=i % 2 == 0)
    assert_refused(paths)


def test_other_types(tmp_path, content):
    paths, others = [], ([], [1, 2], "x", 3, 0.5, True, (1,), b"x", torch.zeros(3), {"x": {}}, {1: 2}, {})
    for key, value in itertools.product(("state_dict", "config", None), others):
        for write in (torch.save, joblib.dump):
            if not (key == "config" and isinstance(value, dict)):
                paths.append(tmp_path / f"{len(paths)}.pt")
                write(value if key is None else content | {"args": None, key: value}, paths[-1])
    assert_refused(paths)


def test_other_configurations(tmp_path):
    paths, ghn = [], tiny(hid=8)
    for key in ghn._hub_mixin_config:
        for value in [*WRONG, None, *[1] * isinstance(getattr(ghn.config, key), bool)]:
            if (key, value) not in (("modules", 1), ("primitives", [])):
                paths.append(tmp_path / f"{key}-{len(paths)}")
                ghn.save_pretrained(paths[-1])
                (paths[-1] / "config.json").write_text(json.dumps(ghn._hub_mixin_config | {key: value}))
    assert_refused(paths)


def test_other_texts_for_a_configuration(tmp_path):
    paths = [tmp_path / str(i) for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS):
        tiny(hid=8).save_pretrained(path)
        (path / "config.json").write_text(text, encoding="latin-1")
    assert_refused(paths)


# --- bombs -----------------------------------------------------------------------------------------------------------


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


TUPLES = b")" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60))
"""A pair of pairs of pairs, 60 deep: small, but too long to hash or to print."""
PICKLES = {
    "unicode8": opcodes(b"\x8d", struct.pack("<Q", 2**40), b"x"),
    "unicode": opcodes(b"X", struct.pack("<I", 2**32 - 1), b"x"),
    "bytes8": opcodes(b"\x8e", struct.pack("<Q", 2**62), b"x"),
    "bytearray8": opcodes(b"\x96", struct.pack("<Q", 2**35), b"x"),
    "frame": opcodes(b"\x95", struct.pack("<Q", 2**50), b"x"),
    "long4": opcodes(b"\x8b", struct.pack("<i", 2**31 - 1), b"x"),
    "negative long4": opcodes(b"\x8b", struct.pack("<i", -5), b"x"),
    "memo": opcodes(b"}r", struct.pack("<I", 2**32 - 1)),
    "deep lists": opcodes(b"]" * 10**6 + b"a" * (10**6 - 1)),
    "deep tuples": opcodes(b")" + b"\x85" * 10**6),
    "many sets": opcodes(b"\x8f" * 4 * 10**6),
    "many dictionaries": opcodes(b"}" * 4 * 10**6),
    "tuple as key": opcodes(b"}", TUPLES, b"Ns"),
    "tuples as keys": opcodes(b"}(", TUPLES, b"Nu"),
    "tuple in a set": opcodes(b"\x8f(", TUPLES, b"\x90"),
    "tuple as ordered key": opcodes(b"ccollections\nOrderedDict\n]", TUPLES, b"N\x86a\x85R"),
    "tuple as configuration": opcodes(b"}(X\x0a\0\0\0state_dict}X\x06\0\0\0config}X\x03\0\0\0hid", TUPLES, b"su"),
    "colliding keys": opcodes(b"}(", b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(10**5)), b"u"),
    "copies of a list": opcodes(b"ctorch\nSize\nq\x00](" + b"N" * 10**5 + b"eq\x010" + b"h\x00h\x01\x85R" * 1500),
    "text": opcodes(b"I" + b"9" * 10**6 + b"\n"),
    "attribute of a class": opcodes(b"cjoblib.numpy_pickle\nNumpyArrayWrapper\nN}X\x04\0\0\0readNs\x86b"),
    "numpy's own type": opcodes(b"cnumpy\ndtype\nX\x02\0\0\0f4\x85R(K\x03X\x01\0\0\0>NNNK\x00K\x00K\x00tb"),
    "large array": opcodes(b"cnumpy\nndarray\nJ", struct.pack("<i", 2**31 - 1), b"\x85R"),
}  # fmt: skip
CALLS = {
    "bytearray": Call(bytearray, 10**10),
    "tensor": Call(torch.Tensor, 10**10),
    "storage": Call(torch.FloatStorage, 10**10),
    "legacy storage": Call(torch.storage._load_from_bytes, b"x" * 100),
    "meta": Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**9, 10**9), (1, 1), False),
    "expanded": torch.zeros(1).expand(10**9, 10**9),
    "strided": torch.zeros(4).as_strided((4, 4), (0, 1)),
    "sparse": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.zeros(1), (10**6, 10**6)),
    "quantised": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    "objects": np.array([1, "x"], dtype=object),
    "void": np.zeros(3, "V1000000"),
    "strings": np.zeros(3, "U1000000"),
    "complex": np.zeros(3, "c8"),
    "structured": np.zeros(3, [("a", "f4"), ("b", "f8")]),
    "dates": np.zeros(3, "M8[s]"),
}


def test_pickles_that_grow(tmp_path):
    paths = []
    for name, data in PICKLES.items():
        paths += [tmp_path / f"{name}.joblib", tmp_path / f"{name}.pt", tmp_path / f"{name}.zip.pt"]
        paths[-3].write_bytes(data)
        paths[-2].write_bytes(
            b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + data
        )
        with zipfile.ZipFile(paths[-1], "w") as archive:
            archive.writestr("x/data.pkl", data)
    assert_refused(paths)


def test_calls_that_grow(tmp_path, content):
    paths = []
    for (name, value), write in itertools.product(CALLS.items(), (torch.save, joblib.dump, WRITERS["legacy.pt"])):
        paths.append(tmp_path / f"{name}-{len(paths)}.pt")
        write({"state_dict": content["state_dict"] | {"embed.weight": value}}, paths[-1])
    assert_refused(paths)


def test_many_names(tmp_path):
    names, value = [f"layer{i}.weight" for i in range(2 * 10**5)], torch.zeros(1)
    paths = [tmp_path / "zip.pt", tmp_path / "tensors.joblib", tmp_path / "names.safetensors", tmp_path / "some.pt"]
    torch.save(dict.fromkeys(names, value), paths[0])
    joblib.dump(dict.fromkeys(names, value), paths[1])
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    paths[2].write_bytes(len(header).to_bytes(8, "little") + header)
    torch.save(dict.fromkeys(names[:20000], value), paths[3])
    assert_refused(paths)


def repacked(source, target, replace=None, method=zipfile.ZIP_STORED, more=()):
    """A zip file of torch.save with other entries."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", method) as other:
        for name in whole.namelist():
            end = name.partition("/")[2]
            other.writestr(name, (replace or {}).get(end, whole.read(name)))
        for name, data in more:
            other.writestr(name, data)
    return target


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_grow(tmp_path, content):
    whole, large = tmp_path / "whole.pt", bytes(2**30)
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as archive:
        data = archive.read("whole/data.pkl")
    paths = [
        repacked(whole, tmp_path / "pickle.pt", {"data.pkl": large}, zipfile.ZIP_DEFLATED),
        repacked(whole, tmp_path / "data.pt", {"data/0": large}, zipfile.ZIP_DEFLATED),
        repacked(whole, tmp_path / "lzma.pt", {"data/0": large[: 2**28]}, zipfile.ZIP_LZMA),
        repacked(whole, tmp_path / "order.pt", {"byteorder": b"big"}),
        repacked(whole, tmp_path / "short.pt", {"data/0": b"1234"}),
        repacked(whole, tmp_path / "numel.pt", {"data.pkl": data.replace(b"K\x08", b"K\x7f")}),
        repacked(whole, tmp_path / "names.pt", more=[(f"whole/data/x{i}", b"") for i in range(10**5)]),
        repacked(whole, tmp_path / "twice.pt", more=[("other/data.pkl", data)]),
        repacked(whole, tmp_path / "key.pt", {"data.pkl": data.replace(b"X\x01\0\0\x000", b"X\x01\0\0\0\xff")}),
    ]
    stated = tmp_path / "stated.pt"  # the directory states 4 GB for an entry
    stated.write_bytes(
        whole.read_bytes().replace(struct.pack("<II", len(data), len(data)), struct.pack("<II", 2**32 - 2, 2**32 - 2))
    )
    assert_refused([*paths, stated])


def test_tensors_that_are_one_number(tmp_path):
    """The shapes of a hypernetwork of gigabytes in a file of kilobytes."""
    with torch.device("meta"):
        large = tiny(**PRESETS["ghn3-xl"] | {"hid": 4096, "layers": 24})
    state = {name: torch.zeros(1).expand(value.shape) for name, value in large.state_dict().items()}
    folder = tmp_path / "folder"
    tiny().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(large._hub_mixin_config))
    torch.save(state, folder / "tensors.pt")

    assert_refused([folder, folder / "tensors.pt"])


def test_headers_of_safetensors(tmp_path, content):
    whole = tmp_path / "whole.safetensors"
    save_file(content["state_dict"], whole)
    data = whole.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, changed = (
        json.loads(data[8 : 8 + size]),
        [n.to_bytes(8, "little") + data[8:] for n in (0, 2, 2**20, 2**40, 2**64 - 1)],
    )
    for name, key, value in (
        ("embed.weight", "shape", [10**9, 10**9]), ("embed.weight", "shape", [2**63, 2]), ("embed.weight", "dtype", "C64"),
        ("embed.weight", "dtype", "I32"), ("embed.weight", "dtype", "F8_E4M3"), ("embed.weight", "dtype", 3),
        ("embed.weight", "data_offsets", [0, 10**12]), ("embed.weight", "data_offsets", [10, 0]), ("ln.bias", "shape", []),
        ("ln.bias", "shape", [-1]), ("ln.bias", "data_offsets", header["ln.weight"]["data_offsets"]),
    ):  # fmt: skip
        text = json.dumps(header | {name: header[name] | {key: value}}).encode()
        changed.append(len(text).to_bytes(8, "little") + text + data[8 + size :])
    text = b'{"a":' * 10**5
    changed.append(len(text).to_bytes(8, "little") + text)
    assert_refused(variants(whole, changed))
