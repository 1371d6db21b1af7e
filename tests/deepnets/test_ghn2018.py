"""The spaces of GHN 2018."""

from collections import Counter

import pytest
import torch
from shared import assert_composed_is_traced

from ghnlib import DeepNets
from ghnlib.architectures.plan import reduction_cells
from ghnlib.deepnets.splits import belongs_to, fingerprint
from ghnlib.graphs.nodes import Role


def nodes(arch):
    """Of a block, each a sum."""
    return len(arch.genotype.normal) // 2


def test_blocks_are_graphs_of_nodes_with_one_operation():
    arch, small = DeepNets("val", space="blocks")[0], DeepNets("train", space="blocks")[0]
    assert (arch.n_cells, nodes(arch), nodes(small)) == (18, 17, 7)
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
    if space == "blocks":
        assert {nodes(arch) for arch in archs} == {7}
    else:
        assert len({sum(map(len, arch.cells)) for arch in archs}) > 5
