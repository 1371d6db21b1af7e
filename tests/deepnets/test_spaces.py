"""The design space of DeepNets-1M: ranges, shares and widths of the paper, spaces of one's own."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from shared import assert_composed_is_traced

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import Genotype
from ghnlib.deepnets.dataset import SPACES, DeepNets
from ghnlib.deepnets.spaces import (
    LARGE_CONVS,
    OPERATIONS,
    WIDTH_RULES,
    DesignSpace,
    Draws,
    draw_width,
    is_wanted,
    width_of_size,
)

PAPERS = ("paper", "small")


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
    assert {arch.n_cells for arch in archs} == {2, 3, 4} and {steps(arch) for arch in archs} == {1, 2}
    assert {arch.C for arch in archs} == {16, 24, 32} and {arch.fc_dim for arch in archs} == {32, 64, 96, 128}
    assert all(arch.input_size == 16 and (arch.stem_pool or arch.stem_type == 1) for arch in archs)
    share = lambda *names: np.mean([bool({*names} & set(arch.genotype.names)) for arch in archs])
    assert 0.03 < share("msa") < 0.2 and 0.05 < share("cse") < 0.25 and 0.1 < share("none") < 0.3
    assert 0.1 < np.mean([arch.norm is None for arch in archs]) < 0.25
    assert 0.05 < np.mean([not arch.glob_avg for arch in archs]) < 0.2
    val = [DeepNets("val", space="small")[i] for i in range(60)]
    averaged = [arch.adapted(input_size=32) for arch in val if arch.glob_avg]  # the size that widths are chosen at
    assert min(arch.num_params for arch in averaged) >= 30_000
    assert all(replace(arch, C=arch.C - 8).num_params < 30_000 for arch in averaged if arch.C > 16)
    assert {DeepNets("deep", space="small")[i].n_cells for i in range(60)} == set(range(5, 9))
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
    genotype = Genotype.parse("conv_1x1:0 skip_connect:1", "max_pool_3x3:0 max_pool_3x3:0", (2,))
    arch = Architecture(genotype, n_cells=5, stem_pool=True)
    drawn = [draw_width(arch, space, Draws(i), 224) for i in range(200)]
    assert {a["imagenet_stride"] for a in drawn} == {2, 4} and {a["C"] for a in drawn} == set(space.widths)
    assert {draw_width(replace(arch, n_cells=11), space, Draws(i), 224)["C"] for i in range(200)} == {32, 48, 64, 80}
    assert set(WIDTH_RULES) == {"narrow", "wide"}
    assert DeepNets("train", widths="wide").space == replace(SPACES["paper"].for_split("train"), width_rule="wide")
    for split, scale in ("val", "paper"), ("val", "small"):  # they draw no widths
        assert DeepNets(split, space=scale, widths="wide").space.width_rule is None
