"""DeepNets-1M: architectures as a function of split, seed and index, the published genotypes."""

import hashlib
import pickle
from dataclasses import replace

import pytest
import torch
from shared import structure

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.deepnets.dataset import SPACES, DeepNets
from ghnlib.deepnets.splits import SPLITS

PAPERS = ("paper", "small")


@pytest.mark.parametrize("space", PAPERS)
def test_architectures_do_not_depend_on_what_was_read_before(space):
    dataset = DeepNets("train", seed=5, space=space)
    forward = [dataset[i] for i in range(30)]
    assert [DeepNets("train", seed=5, space=space)[i] for i in reversed(range(30))] == forward[::-1]
    assert DeepNets("train", seed=6, space=space)[0] != forward[0]
    assert pickle.loads(pickle.dumps(dataset))[7] == forward[7]


def test_architectures_are_the_same_on_every_platform():
    """Change these only together with the sampling: they are what published experiments refer to."""
    for space, digest in ("paper", "4ff7b123f9945400"), ("small", "220a39420ae18c58"):
        drawn = [(DeepNets(split, space=space)[11]) for split in ("train", "wide", "dense")]
        assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == digest
    drawn = [DeepNets("test", seed=1, space=space)[i] for space in ("blocks", "anytime") for i in range(4)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "31b2a44ebf118a73"


def test_pickled_architectures_are_equal_and_small():
    arch = DeepNets("dense")[0]
    assert len(arch.graph) and arch.num_params, "both are cached now"
    copy = pickle.loads(pickle.dumps(arch))
    assert copy == arch and structure(copy.graph) == structure(arch.graph)
    assert len(pickle.dumps(arch)) < 2000


def test_loading_in_workers():
    loader = torch.utils.data.DataLoader(DeepNets("val", size=6), num_workers=2, batch_size=3, collate_fn=list)
    assert [arch for batch in loader for arch in batch] == list(DeepNets("val", size=6))


def test_lengths_and_indices():
    lengths = {split: len(DeepNets(split)) for split in SPLITS}
    assert lengths == {"train": 1_000_000, "val": 500, "test": 500, "wide": 100, "deep": 100, "dense": 100,
                       "bnfree": 100, "search": 100_000, "predefined": 2}  # fmt: skip
    few = DeepNets("val", size=4)
    assert len(few) == 4 and len(list(few)) == 4 and few[-1] == few[3] == DeepNets("val")[3]
    for wrong in (4, -5):
        with pytest.raises(IndexError, match="out of range"):
            few[wrong]


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        DeepNets("validation")
    with pytest.raises(ValueError, match="unknown space 'large'"):
        DeepNets(space="large")
    with pytest.raises(ValueError, match="there are 4"):
        DeepNets("predefined", size=5)
    with pytest.raises(ValueError, match="unknown widths 'huge'; known: narrow, wide"):
        DeepNets(widths="huge")


@pytest.mark.parametrize(("key", "value", "least"), [
    ("num_classes", -5, 1), ("num_classes", 0, 1), ("input_size", -5, 1), ("size", -3, 0), ("seed", -1, 0), ("seed", 0.5, 0),
])  # fmt: skip
def test_impossible_numbers_are_named(key, value, least):
    with pytest.raises(ValueError, match=f"{key}={value}: a whole number of at least {least}"):
        DeepNets(**{key: value})


def test_impossible_spaces_are_explained(monkeypatch):
    monkeypatch.setattr("ghnlib.deepnets.dataset.MAX_ATTEMPTS", 50)
    with pytest.raises(ValueError, match="too restrictive"):
        DeepNets(space=replace(SPACES["paper"], max_params=10))[0]


def test_predefined():
    assert len(DeepNets("predefined")) == 2
    resnet, vit, darts, pdarts = DeepNets("predefined", size=4)
    assert (darts.num_params, pdarts.num_params) == (3_356_596, 3_441_052)
    assert DeepNets("predefined", size=4, num_classes=1000, input_size=224)[2].num_params == 4_718_752
    assert isinstance(resnet, NamedNetwork) and vit.num_params == 1_012_234
    assert (len(resnet.graph), len(resnet.graph.edges)) == (126, 141)
    assert vit.is_vit and len(vit.graph) == 129
    assert [type(a) for a in DeepNets("predefined", path="no file has it")] == [type(resnet), type(vit)]
