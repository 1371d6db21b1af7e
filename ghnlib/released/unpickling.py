"""Pickles of tensors, as torch and joblib write them, read within limits.

``torch.load(weights_only=True)`` runs no code, but a hundred bytes make it allocate gigabytes, and it trusts the sizes
that are stated. Here only what builds tensors and plain values is known, an instruction costs of ``MAX_OPCODES``, data
cost of the file's own size, and what a checkpoint may hold besides (arguments, data types) is read as nothing.
"""

import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from torch import Tensor

MAX_OPCODES = 300_000
"""GHN-3-XL with its optimiser has 37,000."""
MAX_DIRECTORY = 4 * 2**20
"""Bytes of a zip file's directory; of GHN-3-XL with its optimiser 66,000."""
COMPRESSED = (b"x\x01", b"x^", b"x\x9c", b"x\xda", b"\x1f\x8b", b"BZ", b"\xfd7", b"]\x00", b"\x04\x22")
"""What files of zlib, gzip, bz2, xz, lzma and lz4 begin with."""
LEGACY = 0x1950A86A20F9469CFC6C
"""What torch's files before version 1.6 begin with."""
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


def read_pickle(path: Path) -> Any:
    """Dictionaries, lists, plain values and tensors of a file of torch.save (old or new) or joblib.dump.

    Raises:
        pickle.UnpicklingError: it wants to load something else, or more than the limits.
        Exception: the file is damaged; of any class.
    """
    size = path.stat().st_size
    reader = _Reader(size)
    with path.open("rb") as file:
        start = file.read(2)
        if start == b"PK":
            return reader.zipped(file)
        if start in COMPRESSED:
            raise pickle.UnpicklingError("it is compressed: dump it without compress")
        # Unlike a file, a map does not set aside the memory for a length before it has the data.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return reader.legacy(mapped) if LEGACY.to_bytes(10, "little") in mapped[:16] else reader.load(mapped)


class _Reader:
    """The limits of one file and the pickles in it."""

    def __init__(self, size: int):
        self.size, self.bytes_left = size, size
        self.opcodes = _Opcodes()

    def spend(self, count: int) -> None:
        """Count bytes of data that are about to be read."""
        self.bytes_left -= count
        if count < 0 or self.bytes_left < 0:
            raise pickle.UnpicklingError(f"tensors are larger than the whole file of {self.size:,} bytes")

    def load(self, file, storage: Callable[..., Tensor] | None = None) -> Any:
        """One pickle; ``storage``: from the arguments of a persistent id to its values."""
        return _Unpickler(file, self, storage).load()

    def zipped(self, file) -> Any:
        """The zip file of torch.save."""
        end = zipfile._EndRecData(file)
        if end is None or end[zipfile._ECD_SIZE] > MAX_DIRECTORY:
            raise pickle.UnpicklingError("its directory is missing (truncated?) or too long")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > self.size:
                raise pickle.UnpicklingError("its entries are compressed or overlap, which torch.save never does")
            (name,) = (entry.filename for entry in entries if entry.filename.endswith("/data.pkl"))
            root = name.removesuffix("data.pkl")
            if archive.NameToInfo.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
                raise pickle.UnpicklingError("it was written on a machine of another byte order")
            data: dict[str, Tensor] = {}

            def storage(dtype: torch.dtype, key: str, location: str, numel: int) -> Tensor:
                if key not in data:
                    content = bytearray(archive.read(f"{root}data/{key}"))
                    self.spend(len(content))
                    data[key] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
                return _typed(data[key], dtype, numel)

            return self.load(io.BytesIO(archive.read(name)), storage)

    def legacy(self, file) -> Any:
        """Pickles one after the other, then the data."""
        data: dict[str, tuple[Tensor, int]] = {}

        def storage(dtype: torch.dtype, key: str, location: str, numel: int, view: tuple | None) -> Tensor:
            if view is not None:
                raise pickle.UnpicklingError("it holds views of storages, which torch wrote before version 0.4")
            if key not in data:
                self.spend(numel * dtype.itemsize)
                data[key] = torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype.itemsize
            return _typed(data[key][0], dtype, numel)

        magic, _, machine = (self.load(file) for _ in range(3))
        if magic != LEGACY or not machine["little_endian"]:
            raise pickle.UnpicklingError("it was written on a machine of another byte order")
        content = self.load(file, storage)
        for key in self.load(file):
            values, itemsize = data.pop(key)
            if int.from_bytes(file.read(8), "little") * itemsize != len(values):
                raise pickle.UnpicklingError("a tensor has another size than is stated")
            if len(values):
                values.copy_(torch.frombuffer(bytearray(file.read(len(values))), dtype=torch.uint8))
        if data:
            raise pickle.UnpicklingError(f"data of {len(data)} tensors are missing")
        return content


def _typed(data: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    values = data.view(dtype)
    if len(values) != numel:
        raise pickle.UnpicklingError(f"a tensor has {len(values)} values where {numel} are stated")
    return values


class _Unpickler(NumpyUnpickler):
    def __init__(self, file, reader: _Reader, storage: Callable[..., Tensor] | None):
        super().__init__("", file, ensure_native_byte_order=True)
        self.reader, self.storage, self.dispatch = reader, storage, reader.opcodes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # joblib nests a torch file for each storage
            return lambda data: self.reader.legacy(io.BytesIO(data))
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Ignored
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not tensor data")
        return _SAFE[module, name]

    def persistent_load(self, saved: tuple) -> Tensor:
        kind, dtype, *rest = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self.storage is None:
            raise pickle.UnpicklingError(f"it refers to a {kind!r}, which is not tensor data")
        return self.storage(dtype, *rest)


class _Opcodes(dict):
    """Functions by opcode, for a limited number of calls: what they build grows with it."""

    def __init__(self):
        table = {code: function for code, function in NumpyUnpickler.dispatch.items() if code not in _UNUSED}
        super().__init__(
            table | {pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}
        )
        self.left = MAX_OPCODES

    def __getitem__(self, opcode: int) -> Callable:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} instructions")
        return super().__getitem__(opcode)


# Sizes set aside before there are data; containers that compare what they hold.
_UNUSED = {code[0] for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.FROZENSET, pickle.DICT)}


def _build(unpickler: _Unpickler) -> None:
    """Attributes are set on arrays alone; other objects keep none."""
    if isinstance(unpickler.stack[-2], _Array | _DType):
        NumpyUnpickler.load_build(unpickler)
    else:
        unpickler.stack.pop()


def _set_item(unpickler: _Unpickler) -> None:
    _check_keys(unpickler.stack[-2:-1])
    pickle._Unpickler.load_setitem(unpickler)


def _set_items(unpickler: _Unpickler) -> None:
    _check_keys(unpickler.stack[::2])
    pickle._Unpickler.load_setitems(unpickler)


def _check_keys(keys: list) -> None:
    """Tuples of tuples take for ever to hash, large numbers can be chosen to collide."""
    for key in keys:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**31):
            raise pickle.UnpicklingError(f"a dictionary has a key of type {type(key).__name__}")


class _Array(NumpyArrayWrapper):
    """joblib's place-holder of an array, whose values follow in the file."""

    def read(self, unpickler: _Unpickler, ensure_native_byte_order: bool) -> Tensor:
        self.dtype = self.dtype.resolved()
        if min(self.shape, default=0) < 0:
            raise pickle.UnpicklingError(f"an array has the shape {self.shape}")
        unpickler.reader.spend(math.prod(self.shape) * self.dtype.itemsize)
        return torch.from_numpy(self.read_array(unpickler, ensure_native_byte_order))


class _DType:
    """A number type of numpy, whose own objects a pickle can change for the whole process."""

    order = "="

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def resolved(self) -> np.dtype:
        if not re.fullmatch("[<>=|][fiu][1248]|[|=]b1", self.order + self.code):
            raise pickle.UnpicklingError(f"an array holds {self.code!r}, not numbers")
        return np.dtype(self.order + self.code)


class _Ignored:
    def __init__(self, *arguments):
        pass


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, grad=False, hooks=None, metadata=None) -> Tensor:
    if metadata:
        raise pickle.UnpicklingError("a tensor is a negated or conjugated view")
    return torch.as_strided(storage, size, stride, offset)


def _size(sizes: tuple) -> tuple:
    """A ``torch.Size``. Of a list it would be a copy, for which nothing in the file pays."""
    if type(sizes) is not tuple:
        raise pickle.UnpicklingError(f"it makes a size of a {type(sizes).__name__}")
    return sizes


_SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: {},
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _DType,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, grad, hooks: tensor,
    **dict.fromkeys([("argparse", "Namespace"), ("torch", "device"), ("_codecs", "encode")], _Ignored),
    **dict.fromkeys([(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")], _Ignored),
    **dict.fromkeys(product(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")), _Ignored),
    **dict.fromkeys([("builtins", "set"), ("__builtin__", "set"), ("collections", "Counter")], _Ignored),
}
