"""Files in the released formats."""

import json
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import pytest

from ghnlib.architectures.architecture import Architecture
from ghnlib.graphs.nodes import Node
from ghnlib.released.checkpoints import our_name
from ghnlib.released.deepnets1m import ARGUMENTS, numbers_of_parameters

NAMES = json.loads(Path(__file__).with_name("hypernetworks.json").read_text())


@pytest.fixture(scope="session")
def official_names():
    """The function ``official_names(ghn, legacy=False)``."""
    return _official_names


def _official_names(ghn, legacy=False):
    """The state dict of a small GHN-3 under the names of the training code, or of the files on the hub."""
    own, state = ghn.state_dict(), {}
    for name in NAMES["ghn3-t"]:
        if our_name(name) in own:  # the small one has fewer layers
            tables = name.startswith(("centrality", "input_dist"))
            state[f"gnn.0.{name}" if tables and not legacy else name] = own[our_name(name)]
    assert len(state) == len(own)
    return state


@pytest.fixture
def write_official():
    """The function ``write(path, split, architectures)``, which writes files as the generator of DeepNets-1M does."""
    return _write


def _write(path: str | Path, split: str, architectures: Iterable[Architecture]) -> None:
    """Write architectures as a split of a file in the official format, beside splits that it has already.

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
