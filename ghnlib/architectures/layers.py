"""Layers of DeepNets-1M networks: as modules that are cheap to build on the meta device, and as pieces of graph.

Shapes: B images, C channels, H x W pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghnlib.graphs.nodes import Node, Role


class Block(NamedTuple):
    """A piece of graph. Names are relative to the operation; in edges, -1 is the operation's input.

    ``nodes``: as Graph nodes. ``edges``: (source, target) pairs. ``output``: the node that leaves the block, -1 when
    the input passes unchanged. ``size``: number of scalars in its parameters, biases of norm layers included.
    """

    nodes: tuple[Node, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
    output: int = -1
    size: int = 0


class Layer(NamedTuple):
    """One layer of a chain. ``kind``: "conv", "norm", "relu", "max_pool", "avg_pool" or "identity"."""

    kind: str
    c_in: int = 0
    c_out: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1


# Layers --------------------------------------------------------------------------------------------------------------


class _NoMetaInit:
    """Initialisers compute nothing on the meta device but cost more than the rest of a constructor."""

    def reset_parameters(self) -> None:
        if self.weight is None or not self.weight.is_meta:
            super().reset_parameters()


def float32_on_cpu(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """For layers whose bfloat16 kernels are many times slower on processors, as is the backward pass of depthwise 5x5
    convolutions and of attention with few channels a head: there autocast leaves them in float32."""
    if not (inputs[0].is_cpu and torch.is_autocast_enabled("cpu")):
        return function(*inputs)
    with torch.autocast("cpu", enabled=False):
        return function(*(x.float() for x in inputs))


class Conv2d(_NoMetaInit, nn.Conv2d):
    """``nn.Conv2d``, cheap to build on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.groups == 1 else float32_on_cpu(super().forward, x)


class Linear(_NoMetaInit, nn.Linear):
    """``nn.Linear``, cheap to build on the meta device."""


class LayerNorm(_NoMetaInit, nn.LayerNorm):
    """``nn.LayerNorm``, cheap to build on the meta device."""


class BatchNorm2d(_NoMetaInit, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, cheap to build on the meta device."""


class PosEnc(nn.Module):
    """Adds a learned position to each pixel: (B, C, s, s) -> (B, C, s, s). Initialised from N(0, 1)."""

    def __init__(self, channels: int, side: int, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, side, side, device=device))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Flatten(nn.Module):
    """Global average (B, C, H, W) -> (B, C), or all pixels -> (B, C * H * W)."""

    def __init__(self, average: bool):
        super().__init__()
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True) if self.average else x  # the convention ppuda wants keepdim
        return pooled.flatten(1)


RELU, IDENTITY = Layer("relu"), Layer("identity")


def conv(c_in: int, c_out: int, kernel=1, stride=1, padding=None, dilation: int = 1, groups: int = 1) -> Layer:
    """A convolution without bias; sides may be one number or (height, width); padding keeps the size by default."""
    kernel, stride = _pair(kernel), _pair(stride)
    padding = (kernel[0] // 2, kernel[1] // 2) if padding is None else _pair(padding)
    return Layer("conv", c_in, c_out, kernel, stride, padding, dilation, groups)


def norm(channels: int, present: bool = True) -> Layer:
    """A batch norm, or an identity at the same position so that the names of later layers stay the same."""
    return Layer("norm", channels, channels) if present else IDENTITY


def pool(kind: str, stride: int) -> Layer:
    """3x3 pooling. ``kind``: "max_pool" or "avg_pool" (padding not counted)."""
    return Layer(kind, kernel=(3, 3), stride=_pair(stride), padding=(1, 1))


def _pair(side) -> tuple[int, int]:
    return side if isinstance(side, tuple) else (side, side)


def clone_meta(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device with its own parameters and buffers; much faster than building one."""
    copy = module.__class__.__new__(module.__class__)
    state = dict(module.__dict__)
    for key, value in state.items():
        if isinstance(value, (dict, set)):
            state[key] = value.copy() if value else type(value)()
    object.__setattr__(copy, "__dict__", state)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            state["_parameters"][name] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            state["_buffers"][name] = torch.empty_like(buffer)
    for name, child in module._modules.items():
        state["_modules"][name] = clone_meta(child)
    return copy


def make_layer(layer: Layer, track: bool = True, device=None) -> nn.Module:
    """The module of one layer; ``track``: whether batch norms keep running statistics. Raises ValueError for an unknown
    kind."""
    match layer.kind:
        case "conv":
            return Conv2d(*layer[1:6], layer.dilation, layer.groups, bias=False, device=device)
        case "norm":
            return BatchNorm2d(layer.c_out, track_running_stats=track, device=device)
        case "relu":
            return nn.ReLU()
        case "max_pool":
            return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding)
        case "avg_pool":
            return nn.AvgPool2d(layer.kernel, layer.stride, layer.padding, count_include_pad=False)
        case "identity":
            return nn.Identity()
    raise ValueError(f"unknown layer kind {layer.kind!r}")


def make_chain(layers: Sequence[Layer], track: bool = True, device=None) -> nn.Sequential:
    """The layers one after another."""
    return nn.Sequential(*(make_layer(layer, track, device) for layer in layers))


# Pieces of graph -----------------------------------------------------------------------------------------------------


def weight(name: str, *shape: int, op: str = "conv", role: Role = Role.CONV) -> Node:
    """The node of a weight matrix or of a convolution's weight."""
    return Node(op, f"{name}.weight", shape, role)


def bias(name: str, size: int) -> Node:
    """The node of a bias."""
    return Node("bias", f"{name}.bias", (size,), Role.BIAS)


def norm_node(name: str, size: int, op: str = "bn") -> Node:
    """The node of a norm layer, which stands for its weight and its bias."""
    return Node(op, f"{name}.weight", (size,), Role.NORM, f"{name}.bias")


def layer_node(layer: Layer, name: str) -> Node | None:
    """The node of one layer of a chain; None for layers that graphs leave out."""
    if layer.kind == "norm":
        return norm_node(name, layer.c_out)
    if layer.kind in ("max_pool", "avg_pool"):
        return Node(layer.kind, "", (1, 1, *layer.kernel))
    if layer.kind != "conv":
        return None
    op = "conv" if layer.groups == 1 else "sep_conv" if layer.dilation == 1 else "dil_conv"
    return weight(name, layer.c_out, layer.c_in // layer.groups, *layer.kernel, op=op)


def make_block(nodes: Sequence[Node], edges: Sequence[tuple[int, int]] | None = None) -> Block:
    """A block whose last node is its output; a chain when no edges are given."""
    chain = [(i - 1, i) for i in range(len(nodes))]
    size = sum(math.prod(node.shape) * (2 if node.norm_bias else 1) for node in nodes if node.name)
    return Block(tuple(nodes), tuple(chain if edges is None else edges), len(nodes) - 1, size)


def chain_block(layers: Sequence[Layer], prefix: str = "") -> Block:
    """The block of a chain whose layers are named by position after ``prefix``."""
    nodes = (layer_node(layer, f"{prefix}{i}") for i, layer in enumerate(layers))
    return make_block([node for node in nodes if node])
