"""DeepNets-1M: composed graphs against traced ones, purity, disjoint splits, the design space, official files."""

import hashlib
import pickle
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ghnlib import designspace
from ghnlib.architectures import GENOTYPES, Architecture, Genotype, TorchvisionNetwork
from ghnlib.compose import parameter_nodes
from ghnlib.deepnets import SPACES, SPLITS, DeepNets, DesignSpace, register_split
from ghnlib.deepnets_files import OfficialFile, parameter_name, primitive_name, repair_edges, write_official
from ghnlib.designspace import (
    LARGE_CONVS,
    OPERATIONS,
    WIDTH_RULES,
    Draws,
    belongs_to,
    count_duplicates,
    draw_width,
    fingerprint,
    is_wanted,
    width_of_size,
)  # fmt: skip
from ghnlib.graph import Graph, Role
from ghnlib.networks import reduction_cells

PAPERS = ("paper", "small")
SAMPLED = [split for split in SPLITS if split != "predefined"]
DISJOINT = [split for split in SAMPLED if split != "wide"]


def structure(graph: Graph) -> tuple[Counter, Counter]:
    """Nodes and edges in a form that does not depend on the order of the nodes: each is told by its history."""
    labels: list[int] = []
    sources = [[] for _ in graph.nodes]
    for source, target in graph.edges.tolist():
        sources[target].append(source)
    for node, before in zip(graph.nodes, sources, strict=True):
        labels.append(hash((tuple(node), tuple(sorted(labels[s] for s in before)))))
    return Counter(labels), Counter((labels[s], labels[t]) for s, t in graph.edges.tolist())


def assert_composed_is_traced(arch: Architecture) -> None:
    composed, traced = arch.graph, Graph.from_module(arch.build())
    assert [n.op for n in composed.nodes[-2:]] == [n.op for n in traced.nodes[-2:]]
    assert Counter(composed.nodes) == Counter(traced.nodes)
    assert structure(composed) == structure(traced)
    assert set(composed.skipped) == set(traced.skipped)


# Composed graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", PAPERS)
@pytest.mark.parametrize("split", SAMPLED)
def test_composed_graphs_equal_traced_ones(split, space):
    dataset = DeepNets(split, seed=1, space=space)
    for i in range(2):
        assert_composed_is_traced(dataset[i])


def test_composed_graphs_equal_traced_ones_on_imagenet():
    for i in range(3):
        assert_composed_is_traced(DeepNets("train", num_classes=1000, input_size=224)[i])


@pytest.mark.parametrize("naming", ["ghn3", "ppuda"])
def test_composed_graphs_of_published_genotypes_equal_traced_ones(naming):
    assert_composed_is_traced(DeepNets("predefined", naming=naming)[1])
    assert_composed_is_traced(Architecture(GENOTYPES["DARTS"], n_cells=3, stem_type=1, naming=naming))


@pytest.mark.parametrize(
    ("normal", "reduce", "concat"),
    [
        ([("skip_connect", 0), ("skip_connect", 1)], [("msa", 0), ("skip_connect", 1)], [2]),  # x + x
        ([("none", 0), ("conv_3x3", 1)], [("none", 0), ("conv_1x1", 1)], [2]),  # a chain: first inputs are never read
        ([("conv_1x1", 0), ("none", 1)], [("conv_1x1", 0), ("skip_connect", 1)], [2]),  # cells that nothing reads
        ([("skip_connect", 0), ("none", 1)] * 2, [("conv_1x1", 0), ("msa", 1)] * 2, [2, 3]),
        ([("none", 0), ("none", 1), ("cse", 1), ("conv_1x1", 2)], [("conv_1x1", 0), ("none", 1)] * 2, [2, 3]),
    ],
)
@pytest.mark.parametrize("stem_type", [0, 1])
def test_composed_graphs_of_odd_genotypes_equal_traced_ones(normal, reduce, concat, stem_type):
    simple = len(concat) == 1
    genotype = Genotype.from_lists(normal, concat, reduce, concat)
    arch = Architecture(genotype, n_cells=6, stem_type=stem_type, preproc=not simple, C_mult=1)
    assert_composed_is_traced(arch)


@st.composite
def any_architecture(draw) -> Architecture:
    """Any arguments and operations, half of them 'none'."""
    steps = draw(st.integers(1, 3))
    ops = st.sampled_from(OPERATIONS) | st.just("none")
    cells = [[(draw(ops), draw(st.integers(0, j // 2 + 1))) for j in range(2 * steps)] for _ in range(2)]
    concat = draw(st.lists(st.integers(2, steps + 1), min_size=1, max_size=steps, unique=True))
    C_mult = draw(st.sampled_from([1, 2]))
    return Architecture(
        Genotype.from_lists(cells[0], concat, cells[1], concat),
        C=16,
        n_cells=draw(st.integers(1, 5)),
        stem_type=draw(st.integers(0, 1)),
        norm=draw(st.sampled_from(["bn", None])),
        preproc=len(concat) > 1 or C_mult > 1 or draw(st.booleans()),
        C_mult=C_mult,
        fc_layers=draw(st.integers(1, 2)),
        glob_avg=draw(st.booleans()),
        input_size=16,
    )


@settings(max_examples=60, deadline=None)
@given(any_architecture())
def test_composed_graphs_equal_traced_ones_for_any_arguments(arch):
    """Or neither exists, where 'none' cuts the network in two."""
    try:
        assert len(arch.plan.cells) == arch.n_cells
    except ValueError:
        return
    assert_composed_is_traced(arch)
    assert arch.num_params == sum(p.numel() for p in arch.build().parameters())


@settings(max_examples=60, deadline=None)
@given(any_architecture())
def test_averaged_maps_leave_no_more_parameters_on_larger_images(arch):
    """Which ``DesignSpace.accepts`` relies on."""
    arch = replace(arch, glob_avg=True)
    try:
        small, large = arch.num_params, arch.adapted(input_size=224).num_params
    except ValueError:
        return
    assert arch.is_vit or large <= small


@pytest.mark.slow
@pytest.mark.parametrize("space", PAPERS)
@pytest.mark.parametrize("split", SAMPLED)
def test_many_composed_graphs_equal_traced_ones(split, space):
    dataset = DeepNets(split, seed=2, space=space)
    for i in range(40):
        assert_composed_is_traced(dataset[i])


def test_num_params_for_other_sizes():
    for arch in (DeepNets("train", seed=3)[i] for i in range(8)):
        large = arch.adapted(1000, 224)
        assert large.num_params == sum(p.numel() for p in arch.build(1000, 224).parameters())


# Datasets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", PAPERS)
def test_architectures_do_not_depend_on_what_was_read_before(space):
    dataset = DeepNets("train", seed=5, space=space)
    forward = [dataset[i] for i in range(30)]
    assert [DeepNets("train", seed=5, space=space)[i] for i in reversed(range(30))] == forward[::-1]
    assert DeepNets("train", seed=6, space=space)[0] != forward[0]
    assert pickle.loads(pickle.dumps(dataset))[7] == forward[7]


def test_architectures_are_the_same_on_every_platform():
    """Change these only together with the sampling: they are what published experiments refer to."""
    drawn = [(DeepNets(split, space=space)[11]) for space in PAPERS for split in ("train", "wide", "dense")]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "c4178e05cff02a53"
    drawn = [DeepNets("test", seed=1, space=space)[i] for space in ("blocks", "anytime") for i in range(4)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "b1dbfc526538cc52"


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


def test_impossible_spaces_are_explained(monkeypatch):
    monkeypatch.setattr("ghnlib.designspace.MAX_ATTEMPTS", 50)
    with pytest.raises(ValueError, match="too restrictive"):
        DeepNets(space=replace(SPACES["paper"], max_params=10))[0]


def test_predefined():
    assert len(DeepNets("predefined")) == 2
    resnet, vit, darts, pdarts = DeepNets("predefined", size=4)
    assert (darts.num_params, pdarts.num_params) == (3_356_596, 3_441_052)
    assert DeepNets("predefined", size=4, num_classes=1000, input_size=224)[2].num_params == 4_718_752
    assert isinstance(resnet, TorchvisionNetwork) and vit.num_params == 1_012_234
    assert (len(resnet.graph), len(resnet.graph.edges)) == (126, 141)
    assert vit.is_vit and len(vit.graph) == 129


def assert_disjoint(count: int, seeds: dict[str, int], space: str) -> None:
    seen: dict[bytes, str] = {}
    for split in DISJOINT:
        for arch in DeepNets(split, seeds.get(split, 0), space=space, size=count):
            assert seen.setdefault(fingerprint(arch), split) == split


@pytest.mark.parametrize("space", PAPERS)
def test_splits_share_no_architecture_whatever_the_seeds(space):
    assert_disjoint(300, {"train": 1}, space)


@pytest.mark.slow
@pytest.mark.parametrize("space", PAPERS)
def test_large_splits_share_no_architecture(space):
    evaluated = {fingerprint(a): s for s in DISJOINT if s not in ("train", "search") for a in DeepNets(s, space=space)}
    drawn = [fingerprint(arch) for arch in DeepNets("train", seed=7, space=space, size=100_000)]
    train = set(drawn)
    assert len(train) > (0.98 if space == "paper" else 0.9) * len(drawn), "0.9 % and 4.6 % equal an earlier one"
    search = {fingerprint(arch) for arch in DeepNets("search", space=space, size=10_000)}
    assert not train & evaluated.keys() and not search & evaluated.keys() and not train & search


def test_duplicates_are_counted():
    archs = [DeepNets("test")[i] for i in range(5)]
    assert count_duplicates(archs) == 0
    assert count_duplicates([*archs, archs[0], DeepNets("wide")[1]]) == 2, "widths make no difference"


def test_fingerprint_sees_arguments_but_not_widths():
    arch = DeepNets("train")[0]
    assert fingerprint(arch) == fingerprint(replace(arch, C=48, fc_dim=64, num_classes=3, input_size=64))
    assert fingerprint(arch) != fingerprint(replace(arch, n_cells=arch.n_cells + 1))
    swapped = arch.genotype._replace(normal=arch.genotype.normal[1::-1] + arch.genotype.normal[2:])
    assert fingerprint(arch) == fingerprint(replace(arch, genotype=swapped))


def test_each_split_takes_its_share_of_candidates():
    assert sorted(b for name, split in SPLITS.items() if name != "wide" for b in split.buckets) == list(range(100))
    dataset = DeepNets("train")
    assert all(belongs_to(dataset[i], "train") and not belongs_to(dataset[i], "val") for i in range(20))
    assert belongs_to(DeepNets("wide")[0], "test")


# Design space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "factor"), [("paper", 4), ("small", 2)])
def test_wide_is_test_with_more_channels(space, factor):
    for i in range(5):
        narrow, wide = DeepNets("test", space=space)[i], DeepNets("wide", space=space)[i]
        assert replace(narrow, C=narrow.C * factor) == wide


def test_wide_on_imagenet_has_twice_the_channels():
    assert DeepNets("wide", input_size=224)[0].C == 2 * DeepNets("test", input_size=224)[0].C


def steps(arch) -> int:
    return len(arch.genotype.normal) // 2


@pytest.mark.parametrize(
    ("split", "cells", "sums"), [("train", (4, 18), (1, 4)), ("deep", (10, 36), (1, 4)), ("dense", (4, 18), (2, 10))]
)
def test_ranges_of_the_paper(split, cells, sums):
    archs = [DeepNets(split)[i] for i in range(250 if split == "train" else 100)]
    assert all(cells[0] <= arch.n_cells <= cells[1] and sums[0] <= steps(arch) <= sums[1] for arch in archs)
    assert {arch.n_cells for arch in archs} >= {cells[0], cells[1]}
    assert {steps(arch) for arch in archs} >= {sums[0], sums[1]}


def test_statistics_of_the_paper():
    """Against the published mean of 192 nodes, and shares measured with the released generator."""
    archs = [DeepNets("train", seed=3)[i] for i in range(1000)]
    nodes = np.array([len(arch.graph) for arch in archs])
    assert 180 < nodes.mean() < 204 and 80 < nodes.std() < 105
    assert 2.2 < 2 * np.mean([len(arch.graph.edges) for arch in archs]) / nodes.mean() < 2.4

    def share(condition) -> float:
        return float(np.mean([condition(arch) for arch in archs]))

    assert share(lambda arch: arch.is_vit) == pytest.approx(0.35, abs=0.07)
    assert share(lambda arch: arch.norm is None) == pytest.approx(0.035, abs=0.02)
    assert share(lambda arch: "none" in arch.genotype.names) == pytest.approx(0.40, abs=0.1)
    assert share(lambda arch: not arch.preproc) == pytest.approx(0.05, abs=0.04)


def test_evaluation_networks_have_the_published_sizes():
    archs = [DeepNets("val")[i] for i in range(100)]
    sizes = np.array([arch.num_params for arch in archs])
    assert sizes.min() >= 2_500_000 and 3.0e6 < sizes.mean() < 3.6e6
    assert all(replace(arch, C=arch.C - 16).num_params < 2_500_000 for arch in archs if arch.C > 32)
    assert width_of_size(replace(archs[0], C=32), 2_500_000) == archs[0].C


def test_bnfree_has_no_norms_and_search_always_does():
    for space in PAPERS:
        assert all(DeepNets("bnfree", space=space)[i].norm is None for i in range(30))
        assert all(DeepNets("search", space=space)[i].norm == "bn" for i in range(30))
    assert not any(node.op == "bn" for node in DeepNets("bnfree")[0].graph.nodes)


def test_small_space():
    archs = [DeepNets("train", space="small")[i] for i in range(200)]
    assert {arch.n_cells for arch in archs} == {4, 5, 6} and {steps(arch) for arch in archs} == {1, 2}
    assert all(arch.C == 16 and arch.fc_dim == 64 and arch.input_size == 16 for arch in archs)
    assert all(arch.stem_pool or arch.stem_type == 1 for arch in archs)
    assert not {"msa", "cse", "none"} & {name for arch in archs for name in arch.genotype.names}
    assert 0.005 < np.mean([arch.norm is None for arch in archs]) < 0.08
    assert {DeepNets("deep", space="small")[i].n_cells for i in range(60)} == set(range(8, 13))
    assert {steps(DeepNets("dense", space="small")[i]) for i in range(60)} == {2, 3, 4, 5}


def test_operations_of_a_space_are_free_to_choose():
    space = replace(SPACES["small"], operations=OPERATIONS)
    names = {name for i in range(100) for name in DeepNets(space=space)[i].genotype.names}
    assert names == set(OPERATIONS)
    only = DesignSpace(operations=("conv_3x3", "skip_connect"), cells=(3, 3))
    names = {name for i in range(20) for name in DeepNets("val", space=only)[i].genotype.names}
    assert names == {"conv_3x3", "skip_connect"}


@dataclass(frozen=True)
class Residual(DesignSpace):
    """Every sum adds an operation to what it reads."""

    def draw_genotype(self, steps, draws):
        cell = [(op, state + 1) for state in range(steps) for op in (draws.pick(self.operations), "skip_connect")]
        return Genotype(tuple(cell), (steps + 1,), tuple(cell), (steps + 1,))


def test_spaces_with_rules_of_their_own(monkeypatch):
    monkeypatch.setitem(SPACES, "residual", Residual(operations=("conv_3x3", "sep_conv_3x3"), max_params=10**8))
    archs = [DeepNets("val", space="residual")[i] for i in range(5)]
    assert all(arch.genotype.names[1::2] == ("skip_connect",) * (2 * steps(arch)) for arch in archs)
    assert_composed_is_traced(archs[0])


def test_one_call_adds_a_split(monkeypatch):
    monkeypatch.setattr("ghnlib.designspace.SPLITS", dict(SPLITS))
    monkeypatch.setattr("ghnlib.deepnets.SPLITS", designspace.SPLITS)
    register_split("attentive", size=20, like="dense", operations=("msa", "conv_1x1"), steps=(1, 1, 1))
    archs = list(DeepNets("attentive"))
    assert len(archs) == 20 and {name for arch in archs for name in arch.genotype.names} <= {"msa", "conv_1x1"}
    assert all(belongs_to(arch, "dense") for arch in archs) and archs[0] != DeepNets("dense")[0]
    with pytest.raises(ValueError, match="already"):
        register_split("attentive", size=2)


def test_genotypes_are_uniform():
    space, draws = SPACES["paper"], Draws(0)
    genotypes = [replace(space, only_pool=0.0).draw_genotype(3, draws) for _ in range(3000)]
    ops = Counter(name for genotype in genotypes for name in genotype.names)
    assert set(ops) == set(OPERATIONS) and max(ops.values()) / min(ops.values()) < 1.15
    pairs = Counter((genotype.normal[4][1], genotype.normal[5][1]) for genotype in genotypes)
    assert len(pairs) == 12 and max(pairs.values()) / min(pairs.values()) < 1.5
    assert all(g.normal_concat[-1] == 4 and g.normal_concat == g.reduce_concat for g in genotypes)
    single = [replace(space, only_pool=1.0).draw_genotype(1, draws) for _ in range(200)]
    assert {name for g in single for name, _ in g.reduce} == {"max_pool_3x3", "avg_pool_3x3", "skip_connect"}
    assert not any("none" in g.names for g in single)


def wanted(*normal: str) -> bool:
    cell = tuple((name, 0) for name in normal)
    return is_wanted(Genotype(cell, (2,), (("skip_connect", 0), ("skip_connect", 1)), (2,)))


def test_mixtures_that_are_rejected():
    assert wanted("conv_1x1", "skip_connect") and wanted("msa", "skip_connect") and wanted("cse", "conv_1x1")
    assert not wanted("skip_connect", "max_pool_3x3")
    assert not wanted("cse", "msa"), "squeeze and excitation without convolution"
    assert not wanted("cse", "cse", "conv_1x1") and not wanted("conv_5x5", "conv_7x7")
    assert wanted("conv_5x5", "conv_3x3")


def test_widths_in_training():
    archs = [DeepNets("train", seed=4)[i] for i in range(400)]
    base = [replace(arch, C=32, fc_dim=256) for arch in archs]
    assert {arch.C for arch in archs} == set(range(32, 129, 16))
    assert {arch.fc_dim for arch in archs} == set(range(64, 513, 64))
    for arch, small in zip(archs, base, strict=True):
        heavy = not arch.glob_avg or any(name in LARGE_CONVS for name in arch.genotype.names)
        if heavy or small.num_params > 800_000 or arch.n_cells > 12:
            assert arch.C == 32
        elif small.num_params > 400_000 or arch.n_cells > 10:
            assert arch.C <= 48
        elif small.num_params > 200_000 or arch.n_cells > 8:
            assert arch.C <= 64
        assert arch.fc_dim <= 256 or arch.C <= 64


def test_wider_networks_and_strides_on_imagenet():
    space = replace(SPACES["paper"], width_rule="wide")
    genotype = Genotype.from_lists([["conv_1x1", 0], ["skip_connect", 1]], [2], [["max_pool_3x3", 0]] * 2, [2])
    arch = Architecture(genotype, n_cells=5, stem_pool=True)
    drawn = [draw_width(arch, space, Draws(i), 224) for i in range(200)]
    assert {a["imagenet_stride"] for a in drawn} == {2, 4} and {a["C"] for a in drawn} == set(space.widths)
    assert {draw_width(replace(arch, n_cells=11), space, Draws(i), 224)["C"] for i in range(200)} == {32, 48, 64, 80}
    assert set(WIDTH_RULES) == {"narrow", "wide"}
    assert DeepNets("train", widths="wide").space == replace(SPACES["paper"].for_split("train"), width_rule="wide")
    for split, scale in ("val", "paper"), ("train", "small"):  # they draw no widths
        assert DeepNets(split, space=scale, widths="wide").space.width_rule is None


# The spaces of 2018 ---------------------------------------------------------------------------------------------------


def test_blocks_are_graphs_of_nodes_with_one_operation():
    arch, small = DeepNets("val", space="blocks")[0], DeepNets("train", space="blocks")[0]
    assert (arch.n_cells, steps(arch), steps(small)) == (18, 17, 7)
    assert arch.genotype.normal == arch.genotype.reduce and reduction_cells(18) == (6, 12)
    for (first, a), (second, b) in zip(arch.genotype.normal[::2], arch.genotype.normal[1::2], strict=True):
        assert second == "none" or (first == second and a < b)
    read = {source for name, source in arch.genotype.normal if name != "none"}
    assert set(arch.genotype.normal_concat) == set(range(2, 19)) - read, "leaves are concatenated"
    assert_composed_is_traced(small)


def test_anytime_networks_predict_at_every_exit():
    arch = DeepNets("val", space="anytime", num_classes=7)[0]
    assert [len(cell) for cell in arch.cells] == [24, 16, 8]
    for cell, shrinks in zip(arch.cells, ({1, 2, 4}, {2, 4}, {4}), strict=True):
        assert {node.shrink for node in cell} == shrinks
    outputs = arch.build(device="cpu")(torch.randn(2, 3, 32, 32))
    assert [tuple(logits.shape) for logits in outputs] == [(2, 7)] * 6
    roles = Counter(node.role for node in arch.graph.nodes)
    assert roles[Role.CLASS_WEIGHT] == roles[Role.CLASS_BIAS] == 6 and not arch.graph.skipped
    shapes = {name: tuple(p.shape) for name, p in arch.build().named_parameters()}
    assert all(shapes[node.name] == node.shape for node in arch.graph.nodes if node.name)
    assert arch.num_params == sum(p.numel() for p in arch.build(device="cpu").parameters())
    assert arch.build(100, 64)(torch.empty(2, 3, 64, 64, device="meta"))[0].shape == (2, 100)


@pytest.mark.parametrize("space", ["blocks", "anytime"])
def test_spaces_of_2018_are_functions_of_the_index(space):
    dataset = DeepNets("train", seed=2, space=space)
    archs = [dataset[i] for i in range(20)]
    assert archs == [DeepNets("train", seed=2, space=space)[i] for i in reversed(range(20))][::-1]
    assert len({fingerprint(arch) for arch in archs}) == 20
    assert all(belongs_to(arch, "train") for arch in archs)
    sizes = {sum(map(len, arch.cells)) if space == "anytime" else steps(arch) for arch in archs}
    assert len(sizes) == (1 if space == "blocks" else len(sizes)) and (space == "blocks" or len(sizes) > 5)


# Official files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    archs = [DeepNets("val", seed=9)[i] for i in range(6)]
    path = tmp_path / "deepnets1m_eval.hdf5"
    write_official(path, "val", archs)
    return archs, path, tmp_path / "deepnets1m_eval_meta.json"


def test_official_files_give_the_stored_architectures_and_graphs(official):
    archs, path, _ = official
    dataset = DeepNets("val", path=path)
    assert len(dataset) == 6
    for arch, read in zip(archs, dataset, strict=True):
        assert (read.genotype, read.C, read.norm) == (arch.genotype, arch.C, arch.norm)
        assert read.graph.nodes == arch.graph.nodes
        assert np.array_equal(read.graph.edges, arch.graph.edges[np.lexsort(arch.graph.edges.T[::-1])])
        assert read.graph.skipped.keys() == arch.graph.skipped.keys()
        assert read.adapted(100).graph.nodes[-1].shape == (100,)
        assert pickle.loads(pickle.dumps(read)).graph.nodes == read.graph.nodes
    assert {n.name for n in DeepNets("val", path=path, naming="ppuda")[0].graph.nodes} <= {
        *parameter_nodes(replace(archs[0], naming="ppuda")), "",
    }  # fmt: skip


def test_official_files_of_training_draw_widths(tmp_path):
    some = (DeepNets("train", seed=9)[i] for i in range(100))
    archs = [replace(arch, C=32, fc_dim=256) for arch in some if arch.C > 32]
    path = tmp_path / "deepnets1m_train.hdf5"
    write_official(path, "train", archs)
    assert OfficialFile(path, "train").read(0).C == 32
    first, again = ([a.C for a in DeepNets("train", seed=s, path=path)] for s in (0, 0))
    assert first == again and len(set(first)) > 1


def test_official_files_hold_several_splits(official):
    archs, path, _ = official
    deep = list(DeepNets("deep", size=2))
    write_official(path, "deep", deep)
    assert [a.genotype for a in DeepNets("deep", path=path)] == [a.genotype for a in deep]
    assert [a.genotype for a in DeepNets("val", path=path)] == [a.genotype for a in archs]
    with pytest.raises(ValueError, match="split 'deep' already"):
        write_official(path, "deep", deep)


def test_official_files_can_be_read_by_workers(official):
    _, path, _ = official
    dataset = DeepNets("val", path=path)
    dataset[0]
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, batch_size=2, collate_fn=list)
    assert [a.C for batch in loader for a in batch] == [a.C for a in dataset]


def test_damaged_official_files_are_explained(official):
    _, path, meta = official
    text = meta.read_text()
    with pytest.raises(ValueError, match="no split 'test'"):
        OfficialFile(path, "test")
    meta.write_text(text.replace('"num_nodes": ', '"num_nodes": 9'))
    with pytest.raises(ValueError, match="nodes"):
        OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"cifar10": ', '"cifar10": 9'))
    with pytest.raises(ValueError, match="parameters, but"):
        OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"genotype"', '"genes"'))
    with pytest.raises(ValueError, match="missing argument: 'genotype'"):
        OfficialFile(path, "val").read(0)
    meta.write_text(text.replace('"primitives_ext"', '"primitives"'))
    with pytest.raises(ValueError, match="incomplete: 'val' has no 'primitives_ext'"):
        OfficialFile(path, "val")
    meta.write_text(text[:-50])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        OfficialFile(path, "val")
    meta.write_text(text)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        OfficialFile(path, "val").read(5)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        OfficialFile(path, "val")


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("_ops.3.1.weight", "cells.2._ops.3.op.1.weight"),
        ("_ops.3.op.1.weight", "cells.2._ops.3.op.1.weight"),
        ("_ops.0.to_qkv.weight", "cells.2._ops.0.attn.to_qkv.weight"),
        ("_ops.0.to_out.0.", "cells.2._ops.0.attn.to_out.0.weight"),
        ("_ops.0.ff.net.3.bias", "cells.2._ops.0.ff.net.3.bias"),
        ("_ops.1.conv_2.weight", "cells.2._ops.1.conv_2.weight"),
        ("preprocess0.op.1.weight", "cells.2.preprocess0.op.1.weight"),
        ("cells.0.stem1.2.weight", "stem1.2.weight"),
        ("pos_enc.weight", "pos_enc.weight"),
        ("classifier.0.bias", "classifier.0.bias"),
        ("sum", ""),
        ("max_pool", ""),
        ("", ""),
    ],
)
def test_parameter_names_of_official_files(stored, name):
    assert parameter_name(stored, 2) == name


def test_primitive_names_of_official_files():
    names = ["conv_1x1", "sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3", "fc-b", "bn", "pos_enc"]
    assert [primitive_name(n) for n in names] == ["conv", "sep_conv", "dil_conv", "max_pool", "bias", "bn", "pos_enc"]


def test_repairs_of_official_edges():
    net = {"norm": "bn", "stem_type": 1}
    ops = ["input", "conv", "bn", "conv", "bn", "conv", "bn", "conv", "conv", "sum", "conv"]
    chain = [[i, i + 1] for i in range(6)]
    broken = chain + [[4, 7], [4, 10], [6, 8]]
    assert repair_edges(broken, ops, net, False) == sorted(chain + [[4, 7], [6, 10], [6, 8]])
    assert repair_edges(broken, ops, net, True) == sorted(broken)
    several = [[0, 1], [1, 2], [0, 2], [1, 9], [2, 9]]
    assert repair_edges(several, ops, {"norm": None, "stem_type": 0}, False) == [[0, 1], [0, 2], [1, 9], [2, 9]]


@pytest.mark.parametrize(
    ("name", "first", "poolings"),
    [("resnet18", "conv1", 0), ("densenet121", "features.conv0", 0), ("alexnet", "features.0", 2),
     ("mobilenet_v2", "features.0.0", 0), ("mobilenet_v3_small", "features.4.block.1.0", 0), ("mnasnet0_5", "layers.0", 0),
     ("shufflenet_v2_x0_5", "conv1.0", 0), ("convnext_tiny", "features.0.0", 0), ("vgg11", "features.0", 3)],
)  # fmt: skip
def test_torchvisions_networks_keep_resolution_on_small_images(name, first, poolings):
    large, small = (TorchvisionNetwork(10, side, name).build().eval() for side in (64, 32))
    assert small.get_submodule(first).stride == (1, 1)
    assert sum(isinstance(module, nn.MaxPool2d) for module in small.modules()) == poolings
    assert small(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    shapes = [{n: p.shape for n, p in net.named_parameters() if n != f"{first}.weight"} for net in (large, small)]
    assert shapes[0] == shapes[1]
    assert (small.get_parameter(f"{first}.weight").shape[-1] == 3) or name in ("alexnet", "mobilenet_v3_small", "convnext_tiny")


def test_first_filters_are_cut_to_their_centre():
    torch.manual_seed(0)
    whole = TorchvisionNetwork(10, 64, "resnet18").build(device="cpu").conv1.weight
    torch.manual_seed(0)
    assert torch.equal(TorchvisionNetwork(10, 32, "resnet18").build(device="cpu").conv1.weight, whole[:, :, 2:5, 2:5])
