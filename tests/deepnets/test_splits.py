"""Splits that share no architecture."""

from dataclasses import replace

import pytest

from ghnlib import DeepNets
from ghnlib.deepnets import dataset
from ghnlib.deepnets.spaces import DesignSpace
from ghnlib.deepnets.splits import SPLITS, belongs_to, fingerprint, register_split

PAPERS = ("paper", "small")
DISJOINT = [split for split in SPLITS if split not in ("predefined", "wide")]


def owners(space, size, seeds=()):
    """Fingerprint -> the splits that have an architecture of it, of the splits that must share none."""
    found = {}
    for split in DISJOINT:
        for arch in DeepNets(split, dict(seeds).get(split, 0), space=space, size=size):
            found.setdefault(fingerprint(arch), set()).add(split)
    return found


@pytest.mark.parametrize("space", PAPERS)
def test_splits_share_no_architecture_whatever_the_seeds(space):
    assert all(len(splits) == 1 for splits in owners(space, 100, {"train": 1}).values())


def test_splits_of_a_space_with_few_architectures_would_overlap_without_the_hash(monkeypatch):
    few = DesignSpace(
        cells=(3, 5), steps=(1, 1, 1), operations=("conv_3x3", "skip_connect"), variations=dict.fromkeys(SPLITS, {})
    )
    assert all(len(splits) == 1 for splits in owners(few, 20).values())
    monkeypatch.setattr(dataset, "belongs_to", lambda arch, split: True)
    assert sum(len(splits) > 1 for splits in owners(few, 20).values()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("space", PAPERS)
def test_large_splits_share_no_architecture(space):
    evaluated = {fingerprint(a): s for s in DISJOINT if s not in ("train", "search") for a in DeepNets(s, space=space)}
    drawn = [fingerprint(arch) for arch in DeepNets("train", seed=7, space=space, size=100_000)]
    train = set(drawn)
    assert len(train) > (0.98 if space == "paper" else 0.9) * len(drawn), "0.9 % and 4.6 % equal an earlier one"
    search = {fingerprint(arch) for arch in DeepNets("search", space=space, size=10_000)}
    assert not train & evaluated.keys() and not search & evaluated.keys() and not train & search


def test_fingerprint_sees_arguments_but_not_widths():
    arch = DeepNets("train")[0]
    assert fingerprint(arch) == fingerprint(replace(arch, C=48, fc_dim=64, num_classes=3, input_size=64))
    assert fingerprint(arch) != fingerprint(replace(arch, n_cells=arch.n_cells + 1))
    swapped = arch.genotype._replace(normal=arch.genotype.normal[1::-1] + arch.genotype.normal[2:])
    assert fingerprint(arch) == fingerprint(replace(arch, genotype=swapped))


def test_each_split_takes_its_share_of_candidates():
    assert sorted(b for name, split in SPLITS.items() if name != "wide" for b in split.buckets) == list(range(100))
    some = DeepNets("train", size=20)
    assert all(belongs_to(arch, "train") and not belongs_to(arch, "val") for arch in some)
    assert belongs_to(DeepNets("wide")[0], "test")


def test_one_call_adds_a_split(monkeypatch):
    monkeypatch.setitem(SPLITS, "attentive", None)  # which is undone afterwards
    del SPLITS["attentive"]
    register_split("attentive", size=20, like="dense", operations=("msa", "conv_1x1"), steps=(1, 1, 1))
    archs = list(DeepNets("attentive"))
    assert len(archs) == 20 and {name for arch in archs for name in arch.genotype.names} <= {"msa", "conv_1x1"}
    assert all(belongs_to(arch, "dense") for arch in archs) and archs[0] != DeepNets("dense")[0]
    with pytest.raises(ValueError, match="already"):
        register_split("attentive", size=2)
