"""DeepNets-1M (PPUDA section 3 and appendix A): architectures as a pure function of (split, seed, index)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ghnlib.architectures import GENOTYPES, PREDEFINED, Architecture, Genotype, TorchvisionNetwork
from ghnlib.deepnets_files import OfficialFile
from ghnlib.designspace import SPACES, SPLITS, DesignSpace, register_split, resolve_space, sample, sample_stored
from ghnlib.spaces2018 import AnytimeArchitecture  # adds its spaces to SPACES

__all__ = [
    "GENOTYPES", "SPACES", "SPLITS", "AnytimeArchitecture", "Architecture", "DeepNets", "DesignSpace", "Genotype",
    "TorchvisionNetwork", "register_split",
]  # fmt: skip


class DeepNets:
    """A split of DeepNets-1M: ``dataset[i]`` is a function of (split, seed, i), whatever was read before.

    That includes the widths of training networks, which PPUDA draws anew at each visit. In the evaluation splits of
    the paper's space, networks are as wide as it takes to have 2.5 million parameters.

    Args:
        split: a key of ``SPLITS``: "train", "val", "test", "wide", "deep", "dense", "bnfree", "search" or
            "predefined" (ResNet-50, ViT; with ``size=4`` DARTS and PDARTS too). "wide" holds the networks of "test"
            with more channels; otherwise no architecture is in two splits, whatever the seeds.
        seed: other seeds give other architectures; of official files, other widths in training.
        space: a name in ``SPACES`` or a ``DesignSpace``; the split's variation of it applies.
        num_classes, input_size: of the networks; None: the space's.
        size: number of architectures; None: the published one.
        path: an official HDF5 file to read instead of sampling, with its ``*_meta.json`` beside it.
        naming: "ghn3" or "ppuda": names of attention parameters.
        widths: a key of ``WIDTH_RULES`` for a split whose widths are drawn: "narrow" (PPUDA), "wide" (GHN-3, ImageNet).
        repair: mend the known defects of the graphs in official files, as GHN-3 does; GHN-2 was trained without.

    Raises:
        ValueError: unknown split or space; more architectures asked for than a file holds; a damaged file.
        FileNotFoundError: ``path`` or its meta JSON do not exist.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        space: str | DesignSpace = "paper",
        num_classes: int | None = 10,
        input_size: int | None = None,
        size: int | None = None,
        path: str | Path | None = None,
        naming: str = "ghn3",
        repair: bool = True,
        widths: str | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        base = resolve_space(space)
        self.split, self.seed, self.space = split, seed, base.for_split(split)
        if widths and getattr(self.space, "width_rule", None):
            self.space = replace(self.space, width_rule=widths)
        self._arguments = {
            "num_classes": num_classes or base.num_classes,
            "input_size": input_size or base.input_size,
            "naming": naming,
        }
        self._file = None if path is None else OfficialFile(path, split, repair)
        limit = None if self._file is None else len(self._file)
        self._size = (limit or SPLITS[split].size) if size is None else size
        if split == "predefined":
            limit = len(PREDEFINED)
        if limit is not None and self._size > limit:
            raise ValueError(f"there are {limit} architectures in {split!r}, not {size}")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Architecture | AnytimeArchitecture | TorchvisionNetwork:
        index = operator.index(index)
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for the {len(self)} architectures of {self.split!r}")
        if self._file is not None:
            stored = self._file.read(position)
            return sample_stored(stored, self.space, self.split, self.seed, position, self._arguments)
        if self.split == "predefined":
            return PREDEFINED[position](**self._arguments)
        return sample(self.space, self.split, self.seed, position, self._arguments)

    def __iter__(self) -> Iterator[Architecture | AnytimeArchitecture | TorchvisionNetwork]:
        return (self[i] for i in range(len(self)))
