"""The candidate operations of DeepNets-1M: as modules, and as the pieces of graph that they contribute.

An operation is registered once, as a function from a ``Spec`` to an ``Operation``: its ``Block`` (nodes and edges,
with shapes, from which graphs are composed and parameters counted) and a function that builds its module. Plain
chains of layers get both from one list. Shapes: B images, a input channels, b output channels, H x W pixels.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghnlib.architectures.layers import (
    RELU,
    Block,
    Layer,
    LayerNorm,
    Linear,
    bias,
    chain_block,
    clone_meta,
    conv,
    float32_on_cpu,
    layer_node,
    make_block,
    make_chain,
    make_layer,
    norm,
    norm_node,
    pool,
    weight,
)
from ghnlib.graphs.nodes import Node, Role

HEADS = 8


class Spec(NamedTuple):
    """What an operation must know: channels in and out, stride, whether to normalise."""

    c_in: int
    c_out: int
    stride: int = 1
    norm: bool = True


class Operation(NamedTuple):
    """An operation's piece of graph and ``build(track_running_stats, device)``, which makes its module."""

    block: Block
    build: Callable[[bool, object], nn.Module]


# Operations ----------------------------------------------------------------------------------------------------------

REGISTRY: dict[str, Callable[[Spec], Operation]] = {}


def register(name: str, **arguments) -> Callable:
    """Decorator: makes a function from Spec (and ``arguments``) to an Operation known under ``name``."""

    def add(function: Callable[..., Operation]) -> Callable[..., Operation]:
        REGISTRY[name] = partial(function, **arguments)
        return function

    return add


@lru_cache(maxsize=8192)
def operation(name: str, spec: Spec) -> Operation:
    """The operation ``name`` for the given channels and stride.

    Raises:
        KeyError: no operation of that name is registered.
    """
    if name not in REGISTRY:
        raise KeyError(f"unknown operation {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name](spec)


def build(name: str, spec: Spec, track_running_stats: bool = False, device=None) -> nn.Module:
    """The module of the operation ``name``."""
    if str(device) == "meta":
        return clone_meta(_template(name, spec, track_running_stats))
    return operation(name, spec).build(track_running_stats, device)


@lru_cache(maxsize=8192)
def _template(name: str, spec: Spec, track: bool) -> nn.Module:
    return operation(name, spec).build(track, "meta")


class Chain(nn.Module):
    """Layers in the container ``op``, as parameters are named in DeepNets-1M."""

    def __init__(self, layers: Sequence[Layer], track: bool, device):
        super().__init__()
        self.op = make_chain(layers, track, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Strided(nn.Module):
    """(B, a, H, W) -> (B, a, H / stride, W / stride) by leaving out pixels; graphs do not see it."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]


def _chain(layers: Sequence[Layer]) -> Operation:
    return Operation(chain_block(layers, "op."), partial(Chain, layers))


@register("none")
@register("subsample")
def _unparametrised(spec: Spec) -> Operation:
    return Operation(Block(), lambda track, device: Strided(spec.stride))


@register("max_pool_3x3", kind="max_pool")
@register("avg_pool_3x3", kind="avg_pool")
def _pool(spec: Spec, kind: str) -> Operation:
    layer = pool(kind, spec.stride)
    return Operation(make_block([layer_node(layer, "")]), lambda track, device: make_layer(layer))


@register("conv_1x1", kernel=1)
@register("conv_3x3", kernel=3)
@register("conv_5x5", kernel=5)
@register("conv_7x7", kernel=7)
def _conv(spec: Spec, kernel: int) -> Operation:
    return _chain([RELU, conv(spec.c_in, spec.c_out, kernel, spec.stride), norm(spec.c_out, spec.norm)])


@register("conv_7x1_1x7")
def _two_convs(spec: Spec) -> Operation:
    a, b, stride, normalise = spec
    return _chain([RELU, conv(a, a, (1, 7), (1, stride)), conv(a, b, (7, 1), (stride, 1)), norm(b, normalise)])


@register("sep_conv_3x3", kernel=3)
@register("sep_conv_5x5", kernel=5)
def _sep_conv(spec: Spec, kernel: int) -> Operation:
    a, b, stride, normalise = spec
    first = [RELU, conv(a, a, kernel, stride, groups=a), conv(a, a), norm(a, normalise)]
    return _chain(first + [RELU, conv(a, a, kernel, groups=a), conv(a, b), norm(b, normalise)])


@register("dil_conv_3x3", kernel=3)
@register("dil_conv_5x5", kernel=5)
def _dil_conv(spec: Spec, kernel: int) -> Operation:
    a, b, stride, normalise = spec
    spatial = conv(a, a, kernel, stride, padding=kernel - 1, dilation=2, groups=a)
    return _chain([RELU, spatial, conv(a, b), norm(b, normalise)])


class FactorizedReduce(nn.Module):
    """(B, a, H, W) -> (B, b, H/2, W/2) by two 1x1 convolutions on pixel grids one step apart. Odd sides round up."""

    def __init__(self, spec: Spec, track: bool, device):
        super().__init__()
        half = conv(spec.c_in, spec.c_out // 2, stride=2)
        self.conv_1 = make_layer(half, device=device)
        self.conv_2 = make_layer(half, device=device)
        self.bn = make_layer(norm(spec.c_out, spec.norm), track, device)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        odd_height, odd_width = x.shape[2] % 2, x.shape[3] % 2
        shifted = F.pad(x, (0, odd_width, 0, odd_height)) if odd_height or odd_width else x
        return self.bn(torch.cat((self.conv_1(x), self.conv_2(shifted[:, :, 1:, 1:])), 1))


@register("skip_connect")
def _skip(spec: Spec) -> Operation:
    if spec.stride == 1:
        return _unparametrised(spec)
    half = (spec.c_out // 2, spec.c_in, 1, 1)
    nodes = [weight("conv_1", *half), weight("conv_2", *half), Node("concat")]
    edges = [(-1, 0), (-1, 1), (0, 2), (1, 2)]
    if spec.norm:
        nodes, edges = nodes + [norm_node("bn", spec.c_out)], edges + [(2, 3)]
    return Operation(make_block(nodes, edges), partial(FactorizedReduce, spec))


class SqueezeExcitation(nn.Module):
    """x * hardswish(fc2(relu(fc1(mean of x over pixels)))): (B, a, H, W) -> (B, a, H / stride, W / stride)."""

    def __init__(self, spec: Spec, track: bool, device):
        super().__init__()
        self.fc1 = Linear(spec.c_in, spec.c_in // 2, device=device)
        self.fc2 = Linear(spec.c_in // 2, spec.c_in, device=device)
        self.stride = Strided(spec.stride)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.hardswish(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return self.stride(x) * gate[:, :, None, None]


@register("cse")
def _cse(spec: Spec) -> Operation:
    a, half = spec.c_in, spec.c_in // 2
    linear = partial(weight, role=Role.LINEAR)
    nodes = [linear("fc1", half, a), bias("fc1", half), linear("fc2", a, half), bias("fc2", a), Node("cse")]
    edges = [(-1, 0), (0, 1), (1, 2), (2, 3), (3, 4), (-1, 4)]
    return Operation(make_block(nodes, edges), partial(SqueezeExcitation, spec))


class SelfAttention(nn.Module):
    """Attention of 8 heads over tokens: (B, n, a) -> (B, n, a)."""

    def __init__(self, channels: int, device):
        super().__init__()
        self.to_qkv = Linear(channels, 3 * channels, bias=False, device=device)
        self.to_out = nn.Sequential(Linear(channels, channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, n, a / heads)
        values = float32_on_cpu(F.scaled_dot_product_attention, q, k, v)
        return self.to_out(values.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between: (B, n, a) -> (B, n, a)."""

    def __init__(self, channels: int, hidden: int, device):
        super().__init__()
        first, second = Linear(channels, hidden, device=device), Linear(hidden, channels, device=device)
        self.net = nn.Sequential(first, nn.GELU(), nn.Identity(), second)  # positions 0 and 3, as in DeepNets-1M

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Transformer(nn.Module):
    """A transformer layer over pixels: (B, a, H, W) -> (B, a, H / stride, W / stride)."""

    def __init__(self, spec: Spec, track: bool, device):
        super().__init__()
        self.ln1 = LayerNorm(spec.c_in, device=device)
        self.attn = SelfAttention(spec.c_in, device)
        self.ln2 = LayerNorm(spec.c_in, device=device)
        self.ff = FeedForward(spec.c_in, spec.c_out, device)
        self.stride = Strided(spec.stride)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.ln1(tokens))
        tokens = tokens + self.ff(self.ln2(tokens))
        return self.stride(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


@register("msa")
def _msa(spec: Spec) -> Operation:
    a, b = spec.c_in, spec.c_out
    linear = partial(weight, role=Role.LINEAR)
    nodes = [norm_node("ln1", a, "ln"), linear("attn.to_qkv", 3 * a, a), Node("msa")]
    nodes += [linear("attn.to_out.0", a, a), bias("attn.to_out.0", a), Node("sum")]
    nodes += [norm_node("ln2", a, "ln"), linear("ff.net.0", b, a), bias("ff.net.0", b)]
    nodes += [linear("ff.net.3", a, b), bias("ff.net.3", a), Node("sum")]
    edges = [(i - 1, i) for i in range(len(nodes))] + [(-1, 5), (5, 11)]
    return Operation(make_block(nodes, edges), partial(Transformer, spec))
