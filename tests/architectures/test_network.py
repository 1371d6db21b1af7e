"""Networks of DeepNets-1M as modules: sizes, forward passes, unused branches, cheap construction."""

import pytest
import torch
from torch.func import functional_call

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import GENOTYPES, Genotype
from ghnlib.architectures.layers import Conv2d, Layer, make_layer
from ghnlib.architectures.network import Cell
from ghnlib.architectures.operations import REGISTRY, FactorizedReduce, SelfAttention, Spec, build, operation, register
from ghnlib.architectures.plan import cell_liveness, reduction_cells
from ghnlib.deepnets.dataset import PREDEFINED

genotype = Genotype.parse
CONVS = genotype("conv_3x3:1 skip_connect:0", "conv_3x3:1 skip_connect:0", (2,))
MIXED = genotype(
    "cse:1 conv_7x1_1x7:0 sep_conv_5x5:2 none:1", "max_pool_3x3:0 avg_pool_3x3:1 dil_conv_5x5:2 skip_connect:0", (3,)
)
ATTENTION = genotype(
    "msa:0 conv_1x1:1 msa:2 skip_connect:1", "conv_5x5:0 avg_pool_3x3:1 dil_conv_3x3:2 sep_conv_3x3:0", (2, 3)
)
DARTS, PDARTS, VIT = (GENOTYPES[name] for name in ("DARTS", "PDARTS", "ViT"))
IMAGENET = {"num_classes": 1000, "input_size": 224}
TRANSFORMER = {"C": 128, "n_cells": 12, "preproc": False, "C_mult": 1}

# architecture, parameter tensors, parameters, nodes, edges: measured with the released code
VECTORS = {
    "V1": (Architecture(CONVS, stem_pool=True, preproc=False, C_mult=1), 37, 77_674, 39, 48),
    "V2": (Architecture(CONVS, stem_type=1, fc_layers=2), 96, 742_362, 82, 94),
    "V3": (
        Architecture(CONVS, ks=7, norm=None, fc_layers=2, fc_dim=128, glob_avg=False, **IMAGENET),
        35, 4_033_224, 48, 59,
    ),
    "V4": (Architecture(MIXED, C=48, n_cells=6, ks=5, stem_type=1), 130, 1_146_466, 122, 138),
    "V5": (Architecture(ATTENTION, C=64, n_cells=5, fc_layers=2, fc_dim=192), 141, 3_955_402, 146, 172),
    "V6": (Architecture(ATTENTION, C=64, n_cells=5, C_mult=1, **IMAGENET), 139, 658_280, 144, 170),
    "V7": (Architecture(VIT, **TRANSFORMER), 114, 1_012_234, 129, 148),
    "V8": (Architecture(VIT, **TRANSFORMER, **IMAGENET), 114, 1_244_392, 129, 148),
    "V9": (Architecture(DARTS, C=36, n_cells=20, stem_type=1), 926, 3_356_596, 800, 942),
    "V10": (Architecture(DARTS, C=48, n_cells=14, stem_type=1, **IMAGENET), 626, 4_718_752, 548, 648),
    "V11": (Architecture(DARTS, C=48, n_cells=14, **IMAGENET), 619, 4_688_152, 542, 641),
    "V12": (Architecture(PDARTS, C=36, n_cells=20, stem_type=1), 918, 3_441_052, 788, 930),
}  # fmt: skip


def images(arch, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, arch.input_size, arch.input_size, generator=torch.Generator().manual_seed(0))


def random_parameters(net, names=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.1
        for name, p in net.named_parameters()
        if names is None or name in names
    }


@pytest.mark.parametrize("name", VECTORS)
def test_sizes_agree_with_the_released_code(name):
    arch, tensors, scalars, nodes, edges = VECTORS[name]
    parameters = list(arch.build().parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (tensors, scalars)
    assert (len(arch.graph), len(arch.graph.edges)) == (nodes, edges)
    assert arch.num_params == scalars


def test_auxiliary_head_has_the_size_of_the_released_one():
    parameters = list(VECTORS["V9"][0].build(auxiliary=True).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (934, 3_833_022)


@pytest.mark.parametrize("arch", [VECTORS[name][0] for name in ("V1", "V2", "V4", "V5", "V7")])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_forward_gives_logits_for_every_image_size(arch, size):
    arch = arch.adapted(7, size)
    net = arch.build(device="cpu")
    assert net.expected_input_sz == size
    logits = net(images(arch))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("name", ["V3", "V8", "V11"])
def test_forward_in_imagenet_form(name):
    arch = VECTORS[name][0]
    with torch.no_grad():
        assert arch.build(device="cpu")(images(arch)).shape == (2, 1000)


@pytest.mark.parametrize("size", [16, 32, 28, 64, 224])
@pytest.mark.parametrize("stem", [{"stem_type": 1}, {"stem_pool": True}, {}])
def test_flattening_heads_fit_the_last_map(size, stem):
    arch = Architecture(CONVS, n_cells=5, C=16, glob_avg=False, input_size=size, **stem)
    net = arch.build()
    assert net(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    side = {32: 8, 224: 14}.get(size)
    if side:
        assert net.classifier[0].in_features == 64 * (side // 2 if stem else side) ** 2


@pytest.mark.parametrize(("size", "side"), [(32, 11), (16, 6), (224, 14)])
def test_transformers_have_one_position_per_patch(size, side):
    assert Architecture(VIT, **TRANSFORMER, input_size=size).build().pos_enc.weight.shape == (1, 128, side, side)


@pytest.mark.parametrize("name", ["V4", "V7", "V12"])
def test_parameters_without_a_node_may_be_missing(name):
    """Unused branches own parameters, but nothing reads them: functional_call leaves them on meta."""
    arch = VECTORS[name][0]
    net = arch.build()
    nodes = [node for node in arch.graph.nodes if node.name]
    predicted = {n.name for n in nodes} | {n.norm_bias for n in nodes if n.norm_bias}
    assert predicted | set(arch.graph.skipped) == set(dict(net.named_parameters()))
    assert not predicted & set(arch.graph.skipped)
    parameters = {k: p.requires_grad_() for k, p in random_parameters(net, predicted).items()}
    functional_call(net, parameters, (images(arch),)).square().sum().backward()
    without = [k for k, p in parameters.items() if p.grad is None]
    assert without == [], "a parameter with a node does not reach the output"


def test_absent_states_are_replaced_by_zeros():
    """'none' twice makes a state absent; its channels of the concatenation are zero."""
    normal = "conv_1x1:0 conv_1x1:1 none:0 none:1 skip_connect:2 none:3"
    g = genotype(normal, "conv_1x1:0 skip_connect:1 " * 3, (2, 3, 4))
    arch = Architecture(g, C=16, n_cells=1, C_mult=1)
    net = arch.build(device="cpu")
    out = net.cells[0](*net._stem(images(arch)))
    assert out.shape[1] == 48 and (out[:, 16:32] == 0).all() and torch.equal(out[:, :16], out[:, 32:])


def test_network_cut_in_two_is_refused():
    with pytest.raises(ValueError, match="none"):
        Architecture(genotype("none:0 none:1", "none:0 none:1", (2,))).plan  # noqa: B018


def test_liveness_ignores_what_nothing_reads():
    ops = (("conv_1x1", 0), ("none", 1), ("conv_3x3", 1), ("skip_connect", 0))
    assert cell_liveness(ops, (2,), (True, True)) == ((True,) * 4, (True, False, False, False), (True, False))
    assert cell_liveness(ops, (2,), (False, True)).present == (False, True, False, True)


@pytest.mark.parametrize(("n", "cells"), [(1, ()), (2, (1,)), (3, (1, 2)), (8, (2, 5)), (14, (4, 9))])
def test_reduction_cells(n, cells):
    assert reduction_cells(n) == cells


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"none"}))
def test_every_operation_keeps_its_promises(name, stride):
    """Output shape, parameter names and sizes of the block against the module, on an odd size too."""
    spec = Spec(16, 16, stride)
    net = build(name, spec, device="meta")
    block = operation(name, spec).block
    shapes = {node.name: node.shape for node in block.nodes if node.name}
    shapes |= {node.norm_bias: node.shape for node in block.nodes if node.norm_bias}
    assert {k: tuple(p.shape) for k, p in net.named_parameters()} == shapes
    assert block.size == sum(p.numel() for p in net.parameters())
    for side in (8, 7):
        out = net(torch.empty(2, 16, side, side, device="meta"))
        assert out.shape == (2, 16, -(-side // stride), -(-side // stride))


def test_one_registered_function_adds_an_operation(monkeypatch):
    monkeypatch.setitem(REGISTRY, "conv_9x9", None)
    register("conv_9x9", kernel=9)(REGISTRY["conv_1x1"].func)
    arch = Architecture(genotype("conv_9x9:0 conv_1x1:1", "conv_9x9:0 conv_1x1:1", (2,)), C=16, n_cells=3)
    weight = "cells.0._ops.0.op.1.weight"
    assert dict(arch.build().named_parameters())[weight].shape == (16, 16, 9, 9)
    assert weight in [node.name for node in arch.graph.nodes]


def test_squeeze_and_excitation_gates_channels():
    net = build("cse", Spec(4, 4), device="cpu")
    x = torch.randn(3, 4, 5, 5)
    gate = torch.nn.functional.hardswish(net.fc2(net.fc1(x.mean((2, 3))).relu()))
    assert torch.allclose(net(x), x * gate.view(3, 4, 1, 1))


def test_attention_is_the_textbook_formula():
    net = build("msa", Spec(16, 16), device="cpu")
    tokens = torch.randn(2, 5, 16)
    q, k, v = (t.reshape(2, 5, 8, 2).transpose(1, 2) for t in net.attn.to_qkv(tokens).chunk(3, -1))
    mixed = (q @ k.transpose(2, 3) / 2**0.5).softmax(-1) @ v
    assert torch.allclose(net.attn(tokens), net.attn.to_out(mixed.transpose(1, 2).reshape(2, 5, 16)), atol=1e-6)


def test_factorized_reduce_reads_two_grids():
    net = FactorizedReduce(Spec(2, 4, 2, norm=False), True, "cpu")
    x = torch.rand(1, 2, 4, 4)
    first, second = net(x).chunk(2, 1)
    assert torch.allclose(first, torch.nn.functional.conv2d(x[:, :, ::2, ::2], net.conv_1.weight))
    assert torch.allclose(second, torch.nn.functional.conv2d(x[:, :, 1::2, 1::2], net.conv_2.weight))


def test_batch_statistics_unless_tracked():
    arch = VECTORS["V1"][0]
    assert not list(arch.build().buffers())
    tracked = arch.build(device="cpu", track_running_stats=True)
    tracked(images(arch))
    assert not torch.equal(tracked.stem[1].running_mean, torch.zeros(32))
    untracked = arch.build(device="cpu")
    untracked.load_state_dict(tracked.state_dict(), strict=False)
    x = images(arch)
    assert torch.allclose(untracked.eval()(x), untracked.train()(x), atol=1e-6)
    assert not torch.allclose(tracked.eval()(x), tracked.train()(x), atol=1e-3)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", ["V2", "V5"])
def test_auxiliary_logits_in_training_only(name, size):
    arch = VECTORS[name][0].adapted(input_size=size)
    net = arch.build(device="cpu", auxiliary=True)
    logits, auxiliary = net(images(arch))
    assert logits.shape == auxiliary.shape == (2, 10)
    assert net.eval()(images(arch)).shape == (2, 10)


def test_drop_path_drops_whole_images_in_training():
    arch = VECTORS["V1"][0]
    net = arch.build(device="cpu", drop_path=0.5)
    x = images(arch, 4)
    torch.manual_seed(0)
    first, second = net(x), net(x)
    assert not torch.allclose(first, second)
    assert torch.equal(net.eval()(x), net(x))
    cell: Cell = net.cells[0].train()
    states = [cell.preprocess0(net._stem(x)[0])] * 2
    outs = cell._term(0, states, 0.5)
    full = cell._term(0, states, 0.0)
    assert all(torch.allclose(o, 2 * f, atol=1e-5) or not o.any() for o, f in zip(outs, full, strict=True))


def test_networks_on_meta_share_nothing():
    arch = VECTORS["V2"][0]
    a, b = arch.build(track_running_stats=True), arch.build(track_running_stats=True)
    shared = {id(t) for t in [*a.parameters(), *a.buffers(), *a.modules()]}
    assert not shared & {id(t) for t in [*b.parameters(), *b.buffers(), *b.modules()]}
    assert len(list(a.parameters())) == len(list(a.named_parameters(remove_duplicate=False)))
    a.cells[0].register_forward_hook(lambda *args: None)
    assert not b.cells[0]._forward_hooks and not arch.build().cells[0]._forward_hooks
    assert [n for n, _ in a.named_modules()] == [n for n, _ in arch.build(device="cpu").named_modules()]


def test_meta_and_real_networks_compute_the_same():
    arch = VECTORS["V4"][0]
    real = arch.build(device="cpu")
    x = images(arch)
    assert torch.equal(functional_call(arch.build(), dict(real.named_parameters()), (x,)), real(x))


def test_building_on_meta_calls_no_initialiser(monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("an initialiser was called")

    for name in "kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_":
        monkeypatch.setattr(torch.nn.init, name, called)
    g = genotype("conv_3x3:0 sep_conv_3x3:1 msa:2 cse:0", "max_pool_3x3:0 " * 4, (2, 3))
    arch = Architecture(g, C=24, n_cells=6, fc_layers=2, input_size=20)
    assert all(p.is_meta for p in arch.build(track_running_stats=True).parameters())
    with pytest.raises(AssertionError, match="initialiser"):
        arch.build(device="cpu")


def test_resnet50_for_small_and_large_images():
    small, large = PREDEFINED[0](num_classes=10, input_size=32), PREDEFINED[0](1000, 224)
    assert small.num_params == 23_520_842 and large.num_params == 25_557_032
    net = small.build()
    assert net.conv1.kernel_size == (3, 3) and net.expected_input_sz == 32
    assert not list(net.buffers())
    assert net(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    with pytest.raises(ValueError, match="auxiliary"):
        small.build(auxiliary=True)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="preproc"):
        Architecture(CONVS, preproc=False)
    with pytest.raises(ValueError, match="norm"):
        Architecture(CONVS, norm="bn-track")
    with pytest.raises(KeyError, match="unknown operation"):
        Architecture(genotype("conv_0x0:0 conv_1x1:1", "conv_1x1:0 conv_1x1:1", (2,))).build()
    with pytest.raises(ValueError, match="unknown layer"):
        make_layer(Layer("dense"))


def test_layers_without_fast_bfloat16_kernels_stay_in_float32():
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        depthwise, dense = (Conv2d(8, 8, 5, padding=2, groups=groups)(x) for groups in (8, 1))
        attention = SelfAttention(8, "cpu")
        attention.to_out = torch.nn.Identity()
        tokens = attention(x.flatten(2).mT)
    assert [depthwise.dtype, dense.dtype, tokens.dtype] == [torch.float32, torch.bfloat16, torch.float32]


def test_networks_move_between_devices_and_types():
    net = Architecture(CONVS).build(device="meta").to_empty(device="cpu").double()
    assert {p.dtype for p in net.parameters()} == {torch.float64} and not any(p.is_meta for p in net.parameters())
