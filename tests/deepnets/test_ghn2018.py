"""The spaces of GHN 2018."""

from collections import Counter
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from shared import assert_composed_is_traced

from ghnlib import DeepNets
from ghnlib.architectures.plan import reduction_cells
from ghnlib.deepnets.ghn2018 import BlockSpace
from ghnlib.deepnets.splits import belongs_to, fingerprint
from ghnlib.graphs.nodes import Role
from ghnlib.graphs.recording import UNUSED


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
    with pytest.warns(UserWarning, match="ties"):
        assert_composed_is_traced(small)


@cache
def small():
    space = BlockSpace(nodes=4, cells=(3, 3), width=4, stem_pool=1.0)
    return list(DeepNets("val", space=space, input_size=16, size=30))


def test_a_node_has_one_set_of_weights_for_both_inputs():
    halved = ("skip_connect", 0), ("skip_connect", 1)
    assert any(pair == halved for a in small() for pair in zip(a.genotype.normal[::2], a.genotype.normal[1::2]))
    for architecture in small():
        with pytest.warns(UserWarning, match="ties") if "tied" in str(architecture.graph.skipped) else nullcontext():
            assert_composed_is_traced(architecture)
        net = architecture.build(device="cpu")
        assert architecture.num_params == sum(p.numel() for p in net.parameters())
        named = dict(net.named_parameters())
        assert {node.name for node in architecture.graph.nodes if node.name} <= set(named) and not (
            set(architecture.graph.skipped)
            & set(named) - {n for n, r in architecture.graph.skipped.items() if r == UNUSED}
        )


def test_shared_weights_get_the_gradients_of_both_inputs_and_survive_a_move():
    architecture = next(a for a in small() if a.genotype.normal[0][0] == a.genotype.normal[1][0] == "conv_1x1")
    net = architecture.build(device="cpu", track_running_stats=True).eval()
    first, second = (net.cells[0]._ops[i].op for i in (0, 1))
    assert first[1].weight is second[1].weight and first[2].bias is second[2].bias
    x = torch.randn(1, *first[1].weight.shape[1:2], 4, 4)
    first[2].running_mean += 1
    assert not torch.equal(first(x), second(x)), "statistics of the batch norms are those of each input"
    moved = net.to("meta").cells[0]._ops
    assert moved[0].op[1].weight is moved[1].op[1].weight
    values = {name: torch.full(p.shape, 0.1) for name, p in net.named_parameters()}
    assert torch.func.functional_call(architecture.build(), values, torch.randn(2, 3, 16, 16)).shape == (2, 10)


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
