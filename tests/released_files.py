"""Files in the released formats."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import torch
from shared import ROOT

from ghnlib.architectures.architecture import Architecture
from ghnlib.graphs.nodes import Node
from ghnlib.released.checkpoints import our_name
from ghnlib.released.deepnets1m import ARGUMENTS, numbers_of_parameters

NAMES = json.loads(Path(__file__).with_name("released").joinpath("hypernetworks.json").read_text())
"""Tensors of released files with their shapes (PPUDA's for CIFAR-10, GHN-3-T's for ImageNet)."""
CONFIG = {"max_shape": (16, 16, 11, 11), "num_classes": 10, "hypernet": "gatedgnn", "decoder": "conv", "weight_norm": True, "ve": True,
          "layernorm": True, "hid": 16, "layers": 2, "heads": 2, "is_ghn2": False}  # fmt: skip


def save_legacy(content, path):
    """As torch did before version 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def official_names(ghn, legacy=False):
    """The state dict of a small GHN-3 under the names of the training code, or of the files on the hub."""
    own, state = ghn.state_dict(), {}
    for name in NAMES["ghn3-t"]:
        if our_name(name) in own:  # the small one has fewer layers
            tables = name.startswith(("centrality", "input_dist"))
            state[f"gnn.0.{name}" if tables and not legacy else name] = own[our_name(name)]
    assert len(state) == len(own)
    return state


def write_official(path: str | Path, split: str, architectures: Iterable[Architecture]) -> None:
    """Write architectures as a split of a file of the generator of DeepNets-1M, beside splits that it has already.

    Widths are stored for evaluation splits only: those of "train" and "search" are drawn when they are read.
    """
    meta_path, drawn = Path(path).with_name(f"{Path(path).stem}_meta.json"), split in ("train", "search")
    meta = json.loads(meta_path.read_text()) if meta_path.exists() else {}
    ops: dict[str, int] = {}
    names: dict[str, int] = {}
    nets = []
    with h5py.File(path, "a") as file:
        file.attrs.update({"title": "DeepNets-1M", "repaired": True})
        for i, arch in enumerate(architectures):
            rows, cell = [], 0
            for node in arch.graph.nodes:
                extended, cell, name = _stored_node(node, cell)
                rows.append((ops.setdefault(extended, len(ops)), cell, names.setdefault(name, len(names))))
            group = file.create_group(f"{split}/{i}")
            group.create_dataset("adj", data=arch.graph.distances, compression="gzip")
            group.create_dataset("nodes", data=np.array(rows, dtype=np.uint16), compression="gzip")
            arguments = {key: getattr(arch, key) for key in ARGUMENTS[drawn:]} | ({"fc_dim": 256} if drawn else {})
            described = {"genotype": arch.genotype._asdict(), "num_nodes": len(rows), "norm": arch.norm}
            nets.append({**arguments, **described, "num_params": numbers_of_parameters(arch)})
    tables = {"primitives_ext": ops, "unique_op_names": names}
    meta[split] = {"nets": nets, "meta": {key: {str(i): k for k, i in ids.items()} for key, ids in tables.items()}}
    meta_path.write_text(json.dumps(meta))


def _stored_node(node: Node, cell: int) -> tuple[str, int, str]:
    """(primitive with kernel size, cell, name) as files hold a node; ``cell``: of the node before."""
    extended = "conv_1x1" if node.op == "conv" and node.shape[2:] in ((), (1, 1)) else node.op
    if not node.name.startswith("cells."):
        return extended, cell, node.name or node.op
    _, number, name = node.name.split(".", 2)
    return extended, int(number), name.replace(".attn.", ".")


# --- hostile files ---------------------------------------------------------------------------------------------------

MEMORY, SECONDS = 2**30, 20
"""Limits for one file. The seconds leave room for a busy machine; alone, none takes over three."""

LOAD = """
import json, resource, sys, time
import h5py
from ghnlib import GHN
from ghnlib.released.checkpoints import CheckpointError
from ghnlib.released.deepnets1m import OfficialFile
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + int(sys.argv[1]), -1))
for path in sys.stdin.read().splitlines():
    start, deepnets = time.perf_counter(), path.endswith(".hdf5")
    try:
        file = OfficialFile(path, "val") if deepnets else GHN.from_pretrained(path)
        for i in range(len(file) if deepnets else 0):
            file.read(i)
        outcome, message = "loaded", ""
    except (ValueError if deepnets else CheckpointError) as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = type(error).__name__, str(error)[:300]
    print(json.dumps([path, outcome, message, time.perf_counter() - start]), flush=True)
"""


def _load_all(paths):
    """Path -> (outcome, message, seconds) of loading in a process that has ``MEMORY`` to spare."""
    command = [sys.executable, "-c", LOAD, str(MEMORY)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    text = "\n".join(map(str, paths))
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=1800)
    found = {path: rest for path, *rest in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"the process died at {paths[len(found)]}: {done.stderr[-500:]}"
    return found


def assert_refused(paths, may_load=False):
    """Each file is refused by name, or where that is right too, loaded. Returns how many were loaded."""
    found = _load_all(paths)
    wrong = [
        f"{path}: {outcome} {message[:200]} after {seconds:.1f} s"
        for path, (outcome, message, seconds) in found.items()
        if seconds > SECONDS
        or not (path.removesuffix(".hdf5") in message if outcome == "refused" else may_load and outcome == "loaded")
    ]  # fmt: skip
    print(f"{len(found)} files, {sum(found[path][0] == 'loaded' for path in found)} loaded, "
          f"slowest {max(rest[2] for rest in found.values()):.1f} s")  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)
    assert len(found) == len(paths)
    return sum(outcome == "loaded" for outcome, *_ in found.values())


WRONG = ["no", "", -1, 0, 1.5, 10**9, 10**30, 2**63 - 1, [], {}, [1], [[1]], [16, 16, 11], [16, 16, 11, 11, 11], float("nan"),
         "x" * 10**6, ["a", "b", "c", "d"], [10**9] * 4, [16, 16, 10**9, 10**9], [16, 16, -1, -1], [16, 16, True, True]]  # fmt: skip
"""Values that no key of a configuration can have, with few exceptions."""
TEXTS = ["", "[]", "3", "null", "{", '"x"', "[" * 10**5, '{"a":' * 10**5, "{}" + " " * 10**7, '{"hid": ' + "9" * 10**5 + "}", "\xff",
         '{"x": 3}', '{"hid": Infinity}', '{"max_shape": [' + "1," * 10**5 + "1]}", '{"layers": ' + "[" * 900 + "]" * 900 + "}"]  # fmt: skip
"""JSON files that hold no configuration."""
