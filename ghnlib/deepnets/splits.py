"""The splits of DeepNets-1M, and the hashes that keep them apart."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ghnlib.architectures.architecture import Architecture


class Split(NamedTuple):
    """``size``: published number of architectures. ``stream``: of random numbers; splits with the same one hold the
    same architectures. ``buckets``: of 100 for the hashes of all candidates, those that belong to the split.
    ``variation``: fields of a space that differ in the split, where the space's ``variations`` do not say.
    """

    size: int
    stream: int
    buckets: range
    variation: Mapping[str, Any] = MappingProxyType({})


SPLITS = {
    "train": Split(1_000_000, 0, range(0, 70)),
    "val": Split(500, 1, range(70, 74)),
    "test": Split(500, 2, range(74, 78)),
    "wide": Split(100, 2, range(74, 78)),
    "deep": Split(100, 3, range(78, 82)),
    "dense": Split(100, 4, range(82, 86)),
    "bnfree": Split(100, 5, range(86, 90)),
    "search": Split(100_000, 6, range(90, 100)),
    "predefined": Split(2, 7, range(0)),
}


def register_split(name: str, size: int, like: str = "test", **variation) -> None:
    """Add a split: ``DeepNets(name)`` then has ``size`` architectures of the space with the fields in ``variation``.

    They come from the candidates of the split ``like``, so that no other split has any of them, in an order of its own.

    Raises:
        ValueError: there is a split of that name.
    """
    if name in SPLITS:
        raise ValueError(f"there is a split {name!r} already")
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    SPLITS[name] = Split(size, stream, SPLITS[like].buckets, variation)


def fingerprint(arch: Architecture) -> bytes:
    """A hash of the architecture's ``identity``: of everything but widths, classes and image size."""
    return hashlib.blake2b(repr(arch.identity).encode(), digest_size=8).digest()


def belongs_to(arch: Architecture, split: str) -> bool:
    """Whether the hash assigns the architecture to the split, which makes splits disjoint whatever their seeds."""
    return int.from_bytes(fingerprint(arch), "big") % 100 in SPLITS[split].buckets
