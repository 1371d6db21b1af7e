"""Composed graphs and counted parameters against those of the networks themselves."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import assert_composed_is_traced

from ghnlib import DeepNets, Graph
from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import GENOTYPES, Genotype
from ghnlib.deepnets.spaces import OPERATIONS
from ghnlib.deepnets.splits import SPLITS

PAPERS = ("paper", "small")
SAMPLED = [split for split in SPLITS if split != "predefined"]


@pytest.mark.parametrize("space", PAPERS)
@pytest.mark.parametrize("split", SAMPLED)
def test_composed_graphs_equal_traced_ones(split, space):
    dataset = DeepNets(split, seed=1, space=space)
    for i in range(2):
        assert_composed_is_traced(dataset[i])


def test_composed_graphs_equal_traced_ones_on_imagenet():
    for i in range(3):
        assert_composed_is_traced(DeepNets("train", num_classes=1000, input_size=224)[i])


def test_networks_are_traced_for_ppuda_as_composed():
    for arch in DeepNets("val", seed=3, size=12):
        if "cse" not in arch.genotype.names:  # its rules lose some
            traced = Graph.from_module(arch.build(), convention="ppuda")
            assert sorted(node.op for node in traced.nodes) == sorted(node.op for node in arch.graph.nodes)
            assert len(traced.edges) == len(arch.graph.edges)


def test_composed_graphs_of_published_genotypes_equal_traced_ones():
    assert_composed_is_traced(DeepNets("predefined")[1])
    assert_composed_is_traced(Architecture(GENOTYPES["DARTS"], n_cells=3, stem_type=1))


@pytest.mark.parametrize(
    ("normal", "reduce", "concat"),
    [
        ("skip_connect:0 skip_connect:1", "msa:0 skip_connect:1", (2,)),  # x + x
        ("none:0 conv_3x3:1", "none:0 conv_1x1:1", (2,)),  # a chain: first inputs are never read
        ("conv_1x1:0 none:1", "conv_1x1:0 skip_connect:1", (2,)),  # cells that nothing reads
        ("skip_connect:0 none:1 skip_connect:0 none:1", "conv_1x1:0 msa:1 conv_1x1:0 msa:1", (2, 3)),
        ("none:0 none:1 cse:1 conv_1x1:2", "conv_1x1:0 none:1 conv_1x1:0 none:1", (2, 3)),
    ],
)
@pytest.mark.parametrize("stem_type", [0, 1])
def test_composed_graphs_of_odd_genotypes_equal_traced_ones(normal, reduce, concat, stem_type):
    genotype = Genotype.parse(normal, reduce, concat)
    arch = Architecture(genotype, n_cells=6, stem_type=stem_type, preproc=len(concat) > 1, C_mult=1)
    assert_composed_is_traced(arch)


@st.composite
def any_architecture(draw) -> Architecture:
    """Any arguments and operations, half of them 'none'."""
    steps = draw(st.integers(1, 3))
    ops = st.sampled_from(OPERATIONS) | st.just("none")
    cells = [tuple((draw(ops), draw(st.integers(0, j // 2 + 1))) for j in range(2 * steps)) for _ in range(2)]
    concat = tuple(draw(st.lists(st.integers(2, steps + 1), min_size=1, max_size=steps, unique=True)))
    C_mult = draw(st.sampled_from([1, 2]))
    return Architecture(
        Genotype(cells[0], concat, cells[1], concat),
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
