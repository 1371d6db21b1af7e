"""DeepNets-1M (PPUDA section 3 and appendix A): architectures as a pure function of (split, seed, index)."""

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import GENOTYPES
from ghnlib.architectures.plan import IMAGENET_FORM
from ghnlib.architectures.vision import NamedNetwork
from ghnlib.deepnets.ghn2018 import AnytimeArchitecture, AnytimeSpace, BlockSpace
from ghnlib.deepnets.spaces import PAPER, SMALL, WIDTH_RULES, DesignSpace, Draws
from ghnlib.deepnets.splits import SPLITS, belongs_to
from ghnlib.params import DeepNets as Section
from ghnlib.released.deepnets1m import OfficialFile

SPACES = {"paper": PAPER, "small": SMALL, "blocks": BlockSpace(), "anytime": AnytimeSpace()}
"""Design spaces by name: DeepNets-1M, a small one for 16x16 images and training on a processor, those of GHN 2018."""
MAX_ATTEMPTS = 100_000
FILES = {"train": "deepnets1m_train.hdf5", "search": "deepnets1m_search.hdf5"}
"""The released files by split; the other splits are in deepnets1m_eval.hdf5."""


def _searched(name: str, input_size: int, **arguments) -> Architecture:
    """A published genotype as its paper trains it: 20 cells on CIFAR, 14 on ImageNet."""
    C, n_cells = (48, 14) if input_size >= IMAGENET_FORM else (36, 20)
    return Architecture(GENOTYPES[name], C, n_cells, stem_type=1, input_size=input_size, **arguments)


PREDEFINED = {
    0: NamedNetwork,
    1: lambda **sizes: Architecture(GENOTYPES["ViT"], C=128, n_cells=12, preproc=False, C_mult=1, **sizes),
    2: partial(_searched, "DARTS"),
    3: partial(_searched, "PDARTS"),
}
"""The split "predefined" by index."""


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
        path: an official HDF5 file to read instead of sampling, with its ``*_meta.json`` beside it; see
            ``OfficialFile``.
        widths: a key of ``WIDTH_RULES`` for a split whose widths are drawn: "narrow" (PPUDA), "wide" (GHN-3, ImageNet).

    Raises:
        ValueError: an unknown or impossible argument; more architectures asked for than a file holds; a damaged file.
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
        widths: str | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if isinstance(space, str) and space not in SPACES:
            raise ValueError(f"unknown space {space!r}; known: {', '.join(SPACES)}")
        if widths is not None and widths not in WIDTH_RULES:
            raise ValueError(f"unknown widths {widths!r}; known: {', '.join(WIDTH_RULES)}")
        base = SPACES[space] if isinstance(space, str) else space
        self.split, self.seed, self.space = split, seed, base.for_split(split)
        if widths is not None and getattr(self.space, "width_rule", None):
            self.space = replace(self.space, width_rule=widths)
        self._arguments = {
            "num_classes": base.num_classes if num_classes is None else num_classes,
            "input_size": base.input_size if input_size is None else input_size,
        }
        self._file = None if path is None or split == "predefined" else OfficialFile(path, split)
        limit = None if self._file is None else len(self._file)
        self._size = size if size is not None else SPLITS[split].size if limit is None else limit
        limits = {"seed": (seed, 0), "size": (self._size, 0)} | {k: (v, 1) for k, v in self._arguments.items()}
        for name, (value, least) in limits.items():
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed")
        if split == "predefined":
            limit = len(PREDEFINED)
        if limit is not None and self._size > limit:
            raise ValueError(f"there are {limit} architectures in {split!r}, not {self._size}")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Architecture | AnytimeArchitecture | NamedNetwork:
        index = operator.index(index)
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for the {len(self)} architectures of {self.split!r}")
        if self.split == "predefined":
            return PREDEFINED[position](**self._arguments)
        draws = Draws(self.seed, SPLITS[self.split].stream, position)
        if self._file is None:
            return sample(self.space, self.split, draws, self._arguments)
        # the stored width where there is one, which the rule of evaluation splits gave, else one drawn for training
        space = replace(self.space, min_params=0)
        return space.finish(self._file.read(position), draws, self._arguments)


def architectures_of(
    deepnets: Section, split: str, input_size: int, num_classes: int, seed: int, size: int | None = None,
    widths: str | None = None,
) -> DeepNets:  # fmt: skip
    """A split of the section ``deepnets`` of params.yaml, for images of a size and number of classes.

    Args:
        size: other than the section's. widths: see ``DeepNets``.
    """
    sizes = {"train": deepnets.train_pool, "val": deepnets.val, "test": deepnets.test, "predefined": None}
    path = deepnets.path and Path(deepnets.path, FILES.get(split, "deepnets1m_eval.hdf5"))
    return DeepNets(
        split, seed, deepnets.scale, num_classes, input_size, size or sizes.get(split, deepnets.ood), path, widths
    )


def sample(space: DesignSpace, split: str, draws: Draws, arguments: Mapping[str, Any]) -> Architecture:
    """An architecture of a split whose space is ``space``: the first candidate of its stream that is accepted.

    ``arguments``: num_classes and input_size of the networks.

    Raises:
        ValueError: the space has no architecture that is accepted.
    """
    for _ in range(MAX_ATTEMPTS):
        arch = space.draw(draws)
        if arch is not None and belongs_to(arch, split) and space.accepts(arch):
            return space.finish(arch, draws, arguments)
    raise ValueError(f"no architecture of {split!r} in {MAX_ATTEMPTS} candidates: the space is too restrictive")
