"""Decoders: from a node's state to the values of its tensor.

Shapes: n nodes decoded together, d hidden size, (M_o, M_i, S, S) the largest tensor decoded, C classes.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.graphs.nodes import Role, as_planes

POSITION_SEED = 0


class Slice(NamedTuple):
    """The part of the largest tensor that decoding computes: a kernel (kh, kw), out <= M_o and in <= M_i channels.
    ``classes``: the rows are to be class scores instead.
    """

    kernel: tuple[int, int]
    out: int
    in_: int
    classes: bool = False


class ConvDecoder(nn.Module):
    """Tensors with two or more axes (PPUDA appendix B.2): a linear layer makes a (4d, S, S) map, 1x1 convolutions widen
    every position to M_o * M_i values. Only the channels and positions asked for are computed. ``window``: where a
    kernel smaller than S is read, "centre" (GHN-3) or "corner" (GHN-1, GHN-2)."""

    def __init__(self, hid: int, max_shape: tuple[int, int, int, int], num_classes: int, window: str):
        super().__init__()
        self.max_shape, self.window = max_shape, window
        out, in_, side, _ = max_shape
        self.fc = nn.Linear(hid, 4 * hid * side * side)
        self.conv1 = nn.Linear(4 * hid, 8 * hid)
        self.conv2 = nn.Linear(8 * hid, out * in_)
        self.class_layer = nn.Linear(out, num_classes)

    @torch.no_grad()
    def add_identity(self, weight: float) -> None:
        """Add to every decoded (M_o, M_i) matrix, at each position, so many times the identity."""
        bias = self.conv2.bias.view(self.max_shape[:2])
        bias += weight * torch.eye(*bias.shape)

    def forward(self, slices: Sequence[Slice], states: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Indices of ``slices``, and for each from states (n, d) the values (n, h * w, out, in); h, w = min(kernel, S).

        Slices with one kernel share a product for the features, those with the same channels one for the values.
        """
        features = dict(_by_label(self._features, [s.kernel for s in slices], states))
        flat = [features[i].flatten(0, 1) for i in range(len(slices))]
        for i, values in _by_label(self._values, [(s.out, s.in_) for s in slices], flat):
            values = values.unflatten(0, features[i].shape[:2])
            yield i, self._class_weights(values) if slices[i].classes else values

    def _features(self, kernels: Sequence[tuple[int, int]], states: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each kernel, states (n, d) -> features (n, h * w, 8d)."""
        side = self.max_shape[2]
        at = [(slice(None), *(positions(size, side, self.window) for size in kernel)) for kernel in kernels]
        weights = Crops.apply(self.fc.weight.view(-1, side, side, self.fc.in_features), *at)
        biases = Crops.apply(self.fc.bias.view(-1, side, side), *at)
        return map(self._widened, states, weights, biases)

    def _widened(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Row by row: a row of positions is a batch of matrices in place, several rows would be copied.
        x = torch.stack([x @ row.permute(1, 2, 0) for row in weight.unbind(1)])  # (h, w, n, 4d)
        x = x.permute(2, 0, 1, 3) + bias.permute(1, 2, 0)
        return F.relu(self.conv1(F.relu(x.flatten(1, 2))))

    def _values(self, channels: Sequence[tuple[int, int]], features: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each (out, in), features of any positions (n, 8d) -> (n, out, in)."""
        at = [(slice(out), slice(in_)) for out, in_ in channels]
        weights = Crops.apply(self.conv2.weight.unflatten(0, self.max_shape[:2]), *at)
        biases = Crops.apply(self.conv2.bias.unflatten(0, self.max_shape[:2]), *at)
        # A batch of products over out reads the slice in place; without gradients no copy of it is made.
        return ((f @ w.mT + b.unsqueeze(1)).transpose(0, 1) for f, w, b in zip(features, weights, biases))

    def _class_weights(self, values: Tensor) -> Tensor:
        """(n, 1, M_o, in) -> (n, 1, C, in): class scores from the rectified output channels of each input column."""
        return self.class_layer.weight @ F.relu(values) + self.class_layer.bias.unsqueeze(1)


class MLPDecoder(nn.Module):
    """The decoder without convolutions: two linear layers make all M_o * M_i * S * S values (PPUDA Table 8).

    Class scores come from a layer of their own instead of the second; arguments and result as in ``ConvDecoder``.
    """

    def __init__(self, hid: int, max_shape: tuple[int, int, int, int], num_classes: int, window: str):
        super().__init__()
        self.max_shape, self.window = max_shape, window
        self.fc1 = nn.Linear(hid, 2 * hid)
        self.fc2 = nn.Linear(2 * hid, prod(max_shape))
        self.class_layer = nn.Linear(2 * hid, num_classes * max_shape[1])

    def forward(self, slices: Sequence[Slice], states: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Indices of ``slices``, and for each from states (n, d) the values (n, h * w, out, in)."""
        for i, (s, x) in enumerate(zip(slices, states)):
            yield i, (self._class_weights if s.classes else self._values)(s, F.relu(self.fc1(x)))

    @torch.no_grad()
    def add_identity(self, weight: float) -> None:
        """As of ``ConvDecoder``."""
        bias = self.fc2.bias.view(self.max_shape)
        bias += weight * torch.eye(*bias.shape[:2])[..., None, None]

    def _values(self, s: Slice, features: Tensor) -> Tensor:
        at = slice(s.out), slice(s.in_), *(positions(size, self.max_shape[2], self.window) for size in s.kernel)
        weight, bias = self.fc2.weight.unflatten(0, self.max_shape)[at], self.fc2.bias.view(self.max_shape)[at]
        return (weight.flatten(2, 3) @ features.T + bias.flatten(2).unsqueeze(3)).permute(3, 2, 0, 1)

    def _class_weights(self, s: Slice, features: Tensor) -> Tensor:
        return self.class_layer(features).view(len(features), 1, -1, self.max_shape[1])[..., : s.in_]


class VectorDecoder(nn.Module):
    """Tensors with one axis: a norm layer's weight and bias, or the bias of any other layer (PPUDA appendix B.2)."""

    def __init__(self, hid: int, length: int, num_classes: int):
        super().__init__()
        self.fc1 = nn.Linear(hid, 2 * hid)
        self.fc2 = nn.Linear(2 * hid, 2 * length)
        self.class_layer = nn.Linear(length, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, d) -> weights (n, M), biases (n, M)."""
        weight, bias = self.fc2(F.relu(self.fc1(x))).unflatten(1, (2, -1)).unbind(1)
        return weight, bias

    def class_bias(self, bias: Tensor) -> Tensor:
        """Biases (n, M) -> biases of a classifier (n, C)."""
        return self.class_layer(F.relu(bias))


class Crops(torch.autograd.Function):
    """``tuple(whole[index] for index in indices)``, whose gradients are collected in one tensor like ``whole``."""

    @staticmethod
    def forward(ctx, whole: Tensor, *indices) -> tuple[Tensor, ...]:
        ctx.shape, ctx.indices = whole.shape, indices
        return tuple(whole[index] for index in indices)

    @staticmethod
    def backward(ctx, *gradients):
        total = gradients[0].new_zeros(ctx.shape)
        for index, gradient in zip(ctx.indices, gradients):
            total[index] += gradient
        return total, *(None for _ in gradients)


def _by_label(function: Callable, labels: Sequence[Hashable], inputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Indices of ``inputs`` with their results of ``function``, which takes the labels and, of each, all its inputs."""
    members: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    joined = [torch.cat([inputs[i] for i in group]) for group in members.values()]
    for group, result in zip(members.values(), function(list(members), joined)):
        yield from zip(group, result.split([len(inputs[i]) for i in group]))


def slice_of(role: Role, shape: tuple[int, ...], max_shape: tuple[int, int, int, int]) -> Slice:
    """What to decode for a tensor with two or more axes. Of convolutions see ``as_planes``; the rows of an embedding
    over M_o are read in blocks of so many, each from a position of its own, so that M_o * S * S rows differ: columns of
    the map first, because the low-rank decoder has fewer rows for higher kernels.
    """
    shape = as_planes(role, shape)
    largest_out, largest_in, side, _ = max_shape
    if role == Role.EMBEDDING:
        blocks = ceil(shape[0] / largest_out)
        positions = ceil(blocks / side), min(blocks, side)
        return Slice(positions, min(shape[0], largest_out), min(shape[1], largest_in))
    if role == Role.CLASS_WEIGHT:
        return Slice((1, 1), largest_out, min(shape[1], largest_in), classes=True)
    out, in_ = (1, shape[2]) if len(shape) == 3 else shape[:2]
    return Slice(_kernel(role, shape), min(out, largest_out), min(in_, largest_in))


def _kernel(role: Role, shape: tuple[int, ...]) -> tuple[int, int]:
    """Kernel size that a tensor is decoded with."""
    if role == Role.CLASS_WEIGHT or len(shape) == 2:
        return 1, 1
    if len(shape) == 3:
        side = int(shape[1] ** 0.5)
        return side, side
    return shape[2], shape[3]


def shaped(values: Tensor, role: Role, shape: tuple[int, ...], side: int) -> Tensor:
    """Decoded positions (n, h * w, out, in) -> (n, *shape) of tensors with two or more axes; ``side``: S."""
    if role == Role.EMBEDDING:
        return tile(values.flatten(1, 2), shape)
    values = resize(values, _kernel(role, as_planes(role, shape)), side)
    if role == Role.POSITION and len(shape) == 3:
        return _token_positions(shape, values)
    values = values.reshape(*values.shape[:3], *shape[2:])
    return tile(values.transpose(1, 2) if role == Role.TRANSPOSED else values, shape)


def _token_positions(shape: tuple[int, ...], grid: Tensor) -> Tensor:
    """(n, 1, in, h, w) -> (n, 1, tokens, c). Rows before the grid of positions (class tokens) are drawn from
    N(0, 0.02^2) with a generator of its own, because no hypernetwork predicts them."""
    _, tokens, width = shape
    grid = grid.flatten(3).transpose(2, 3)  # (n, 1, h * w, in)
    generator = torch.Generator().manual_seed(POSITION_SEED)
    extra = torch.randn(len(grid), 1, tokens - grid.shape[2], grid.shape[3], generator=generator) * 0.02
    positions = torch.cat([extra.to(grid, non_blocking=True), grid], 2)
    return tile(positions.transpose(1, 3), (width, tokens, 1)).transpose(1, 3)  # tile repeats axes 1, 2


def positions(size: int, side: int, window: str) -> slice:
    """Where a kernel of a size is read on an axis of the decoded map."""
    if window == "corner":
        return slice(0, min(size, side))
    middle = side // 2
    return slice(max(0, middle - size // 2), min(side, middle + (size + 1) // 2))


def resize(x: Tensor, kernel: tuple[int, int], side: int) -> Tensor:
    """Decoded positions (n, h * w, out, in) -> (n, out, in, kh, kw). Kernels over ``side`` = S are resized."""
    n, _, out, in_ = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, out * in_, min(kernel[0], side), min(kernel[1], side))
    if x.shape[2:] != kernel:
        x = F.interpolate(x, kernel, mode="bilinear", align_corners=False)
    return x.unflatten(1, (out, in_))


def tile(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat whole blocks of (n, out, in, ...) or (n, out) along the channel axes 1 and 2 up to ``shape``, (out, in,
    ...) or (out,), then truncate: ``out[:, r] = x[:, r mod x.shape[1]]``. Other axes must agree."""
    tiled = [axis for axis in range(len(x.shape[1:3])) if shape[axis] > x.shape[axis + 1]]
    for axis in reversed(tiled):
        copies = -(-shape[axis] // x.shape[axis + 1])
        x = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], copies, *x.shape[axis + 1 :])
    for axis in tiled:  # one copy at most, in the layout of the result
        x = x.flatten(axis + 1, axis + 2)
    return x[(slice(None), *map(slice, shape[:2]))]


def weight_scale(shape: tuple[int, ...], role: Role = Role.CONV, fan: str = "in") -> float:
    """sqrt(beta / fan) of a predicted weight (PPUDA section 4, parameter normalisation).

    beta is 1 where no ReLU is expected to follow (depthwise convolutions, 1x7 kernels), else 2. Positional
    encodings keep their scale, as do embeddings, whose rows are read alone; the released hypernetworks tell positional
    encodings by the shape (1, c, >= 11, w). A transposed convolution counts as one of stride 1 and a single group,
    neither of which its shape (in, out, ...) tells.
    ``fan``: "in" counts the values of one output channel, "out" those of one input channel (PPUDA Table 8).
    """
    if role == Role.TRANSPOSED:
        shape = (shape[1], shape[0], prod(shape[2:]))
    is_image = len(shape) == 4
    if role in (Role.POSITION, Role.EMBEDDING) or (is_image and shape[0] == 1 and shape[2] >= 11):
        return 1.0
    no_relu = len(shape) > 2 and shape[1] == 1 or is_image and shape[2] < shape[3]
    return ((1 if no_relu else 2) / max(1, shape[0 if fan == "out" else 1] * prod(shape[2:]))) ** 0.5
