"""The official file format of DeepNets-1M: HDF5 graphs with their meta JSON (PPUDA appendix A.3)."""

import json
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.composing import parameter_nodes
from ghnlib.architectures.genotypes import Genotype
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import PRIMITIVES, Node
from ghnlib.graphs.recording import UNUSED
from ghnlib.released.errors import one_line

ARGUMENTS = ("C", "n_cells", "ks", "stem_type", "stem_pool", "preproc", "C_mult", "fc_layers", "fc_dim", "glob_avg")
JOINS = ("concat", "sum", "cse")
MAX_NODES, MAX_EDGES = 5_000, 50_000
"""Largest graphs read, several times those of DeepNets-1M."""
LARGEST_META = 2**30
"""Bytes of a meta JSON: one of the million networks for training takes 400 to 800."""
KERNEL_SIZES = re.compile(r"(_\d+x\d+)+$")
ALIASES = {"fc-b": "bias", "bnorm": "bn"}
WITH_WEIGHTS = ("conv", "sep_conv", "dil_conv", "bn", "ln", "pos_enc")
Flag = bool | Literal[0, 1]
Cell = Annotated[tuple[tuple[str, Annotated[int, Field(ge=0, le=100)]], ...], Field(max_length=100)]
Concat = Annotated[tuple[Annotated[int, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=100)]


class Cells(BaseModel):
    """A genotype in the meta JSON."""

    model_config = ConfigDict(strict=True)
    normal: Cell
    normal_concat: Concat
    reduce: Cell
    reduce_concat: Concat


class StoredArguments(BaseModel):
    """A network in the meta JSON: of what is not there, and of layers and units that are 0, ``Architecture`` has the
    value."""

    model_config = ConfigDict(strict=True)
    genotype: Cells
    norm: Annotated[str, Field(pattern="^bn")] | None = "bn"
    stem_type: Literal[0, 1] = 0
    C: Annotated[int, Field(gt=0, le=4_096)] = 32
    n_cells: Annotated[int, Field(gt=0, le=200)] = 8
    ks: Annotated[int, Field(gt=0, le=31)] = 3
    stem_pool: Flag = False
    preproc: Flag = True
    C_mult: Annotated[int, Field(gt=0, le=8)] = 2
    fc_layers: Literal[0, 1, 2] = 1
    fc_dim: Annotated[int, Field(ge=0, le=65_536)] = 256
    glob_avg: Flag = True
    num_nodes: Annotated[int, Field(gt=0)] | None = None
    num_params: Annotated[dict[str, int], Field(min_length=1)] | None = None


@dataclass(frozen=True)
class StoredArchitecture(Architecture):
    """An architecture of an official file. ``graph`` is the stored one, with the shapes of this width.

    ``records``: (op, parameter name or "") of each node. ``edges``: pairs (source, target).
    """

    records: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    edges: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @cached_property
    def graph(self) -> Graph:
        """The stored graph.

        Raises:
            ValueError: it has a parameter that the network does not have.
        """
        table = parameter_nodes(self.plan)
        nodes = []
        for op, name in self.records:
            if name and name not in table:
                raise ValueError(f"the stored graph has parameter {name!r}, which the network does not have")
            shape = (1, 1, 3, 3) if op in ("max_pool", "avg_pool") else None
            nodes.append(table[name]._replace(op=op) if name else Node(op, shape=shape))
        stored = {node.name for node in nodes}
        unused = [node for name, node in table.items() if name not in stored]
        names = [name for node in unused for name in (node.name, node.norm_bias) if name]
        return Graph(nodes, self.edges, dict.fromkeys(names, UNUSED))


class OfficialFile:
    """One split of an official HDF5 file, opened when first read (and anew in every process). The two known defects of
    the edges in released files are mended, as GHN-3 does; files with an attribute ``repaired`` have none.

    Args:
        path: the HDF5 file; ``<stem>_meta.json`` must lie beside it.
        split: name of the group.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ValueError: the meta JSON cannot be read, is incomplete or has no such split.
    """

    def __init__(self, path: str | Path, split: str):
        self.path, self.split = Path(path), split
        meta_path = self.path.with_name(f"{self.path.stem}_meta.json")
        for needed in (self.path, meta_path):
            if not needed.is_file():
                raise FileNotFoundError(f"{needed} does not exist")
        if (size := meta_path.stat().st_size) > LARGEST_META:
            raise ValueError(
                f"{meta_path} has {size} bytes, at most {LARGEST_META} are read: split it into several files"
            )
        try:
            meta = json.loads(meta_path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{meta_path} is damaged or incomplete: {error}") from error
        if not isinstance(meta, dict) or split not in meta:
            known = ", ".join(meta) if isinstance(meta, dict) else f"a {type(meta).__name__}"
            raise ValueError(f"{meta_path} has no split {split!r}, only {known}")
        try:
            self._nets, tables = list(meta[split]["nets"]), meta[split]["meta"]
            self._ops = {int(i): primitive_name(name) for i, name in tables["primitives_ext"].items()}
            self._names = {int(i): name for i, name in tables["unique_op_names"].items()}
        except KeyError as error:
            raise ValueError(f"{meta_path} is incomplete: {split!r} has no {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{meta_path} is damaged, in {split!r}: {one_line(error)}") from error
        self._open: tuple[int, Any] | None = None
        try:
            stored = len(self._handle()[split])
        except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged or incomplete: {error}") from error
        if len(self._nets) > stored:
            raise ValueError(f"{meta_path} describes {len(self._nets)} networks, {self.path} has {stored} ({split})")

    def __len__(self) -> int:
        return len(self._nets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # an open file belongs to its process

    def read(self, index: int) -> StoredArchitecture:
        """Network ``index`` with the width stored in the file, 32 where there is none.

        Raises:
            ValueError: the record is missing, damaged or contradicts its description, which is also checked against
                the number of parameters that it states.
        """
        where = f"network {index} of {self.path} ({self.split})"
        try:
            # By way of JSON: there a list stands for a tuple, and nothing else is converted.
            net = StoredArguments.model_validate_json(json.dumps(self._nets[index]))
            arch = self._architecture(net, *self._arrays(index))
            described = net.num_params or {}
            counted = {form: number for form, number in numbers_of_parameters(arch).items() if form in described}
        except Exception as error:  # damaged and hostile files can raise any
            raise ValueError(f"{where} is damaged or incomplete: {one_line(error)}") from error
        if described != counted:
            raise ValueError(f"{where}: {counted} parameters, but {described} are described")
        return arch

    def _architecture(self, net: StoredArguments, adjacency: np.ndarray, nodes: np.ndarray) -> StoredArchitecture:
        n = len(nodes)
        if adjacency.shape != (n, n) or nodes.shape[1:] != (3,) or (net.num_nodes or n) != n:
            raise ValueError(f"{n} nodes and an adjacency {adjacency.shape}, but {net.num_nodes} nodes are described")
        if np.tril(adjacency).any():
            raise ValueError("edges that point backwards")
        if np.count_nonzero(adjacency == 1) > MAX_EDGES:
            raise ValueError(f"more than {MAX_EDGES:,} edges")
        rows = ((self._ops[op], cell, self._names[name]) for op, cell, name in nodes.tolist())
        records = tuple((op, parameter_name(name, cell, op)) for op, cell, name in rows)
        genotype = Genotype(**dict(net.genotype))
        edges = np.argwhere(adjacency == 1).tolist()
        if not self._handle().attrs.get("repaired", False):
            edges = repair_edges(edges, [op for op, _ in records], dict(net), "msa" in genotype.names)
        given = net.model_fields_set - {key for key in ("fc_layers", "fc_dim") if not getattr(net, key)}
        arguments = {key: getattr(net, key) for key in ARGUMENTS if key in given}
        edges = tuple(map(tuple, edges))
        return StoredArchitecture(genotype, norm="bn" if net.norm else None, **arguments, records=records, edges=edges)

    def _arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Adjacency (N, N) and node rows (N, 3)."""
        group = self._handle()[self.split][str(index)]
        for key in ("adj", "nodes"):
            shape, dtype = group[key].shape, group[key].dtype
            if len(shape) != 2 or max(shape) > MAX_NODES or dtype.kind not in "biu":
                raise ValueError(f"{key} has the shape {shape} of {dtype}, at most {MAX_NODES} nodes are read")
        return group["adj"][:], group["nodes"][:].astype(np.int64)

    def _handle(self):
        if self._open is None or self._open[0] != os.getpid():
            import h5py  # only those who read the official files need it

            self._open = os.getpid(), h5py.File(self.path, "r")
        return self._open[1]


def numbers_of_parameters(arch: Architecture) -> dict[str, int]:
    """What meta JSON states: parameters with 32 channels, 256 hidden units and 10 classes in either form."""
    base = replace(arch, C=32, fc_dim=256)
    return {form: base.adapted(10, size).num_params for form, size in (("cifar10", 32), ("imagenet", 224))}


def primitive_name(extended: str) -> str:
    """The primitive that a name with kernel size stands for, such as "conv_1x1" or "sep_conv_3x3".

    Raises:
        ValueError: it stands for none.
    """
    name = KERNEL_SIZES.sub("", extended)
    name = ALIASES.get(name, name)
    if name not in PRIMITIVES:
        known = ", ".join((*PRIMITIVES, *ALIASES))
        raise ValueError(f"unknown operation {extended!r:.60}; known, also with a kernel size as in conv_1x1: {known}")
    return name


def parameter_name(stored: str, cell: int, op: str = "") -> str:
    """A parameter's qualified name from the one in the file, which older code wrote; "" for operations. ``op``: the
    node's primitive: of those of ``WITH_WEIGHTS`` the name may lack ".weight"."""
    name = f"{stored}weight" if stored.endswith("to_out.0.") else stored
    if not name.endswith((".weight", ".bias")):
        if not name or op not in WITH_WEIGHTS:
            return ""
        name += ".weight"
    for part in ("stem", "pos_enc"):
        if part in name:
            return name[name.index(part) :]
    if name.startswith("classifier"):
        return name
    parts = name.split(".")
    if parts[0] == "_ops" and parts[2].isdigit():
        parts.insert(2, "op")  # modules had no inner container then
    if parts[0] == "_ops" and parts[2] in ("to_qkv", "to_out"):
        parts.insert(2, "attn")
    return ".".join(("cells", str(cell), *parts))


def repair_edges(edges: list[list[int]], ops: list[str], net: dict[str, Any], attention: bool) -> list[list[int]]:
    """Mend the two known defects of released graphs: cell 1 must read stem 1, only joins have several inputs."""
    s0, s1 = (4, 6) if net["norm"] else (2, 3)
    if net["stem_type"] == 1 and not attention:
        after_s0 = [target for source, target in edges if source == s0]
        after_s1 = [target for source, target in edges if source == s1]
        if len(after_s1) == 1 and len(after_s0) > 1 and after_s0[-1] - after_s0[-2] != 1:
            edges = [[s1, t] if (s, t) == (s0, after_s0[-1]) else [s, t] for s, t in edges]
    kept, seen = [], set()
    for source, target in sorted(edges):
        if ops[target] in JOINS or target not in seen:
            kept.append([source, target])
        seen.add(target)
    return kept
