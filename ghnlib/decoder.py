"""Decoders: from a node's state to the values of its tensor.

Shapes: n nodes decoded together, d hidden size, (M_o, M_i, S, S) the largest tensor decoded, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvDecoder(nn.Module):
    """Tensors with two or more axes (PPUDA appendix B.2): a linear layer makes a (4d, S, S) map, 1x1 convolutions
    widen every position to M_o * M_i values. Only the channels and positions asked for are computed.

    Args:
        window: where a kernel smaller than S is read: "centre" (GHN-3) or "corner" (GHN-1, GHN-2).
    """

    def __init__(self, hid: int, max_shape: tuple[int, int, int, int], num_classes: int, window: str):
        super().__init__()
        self.max_shape, self.window = max_shape, window
        out, in_, side, _ = max_shape
        self.fc = nn.Linear(hid, 4 * hid * side * side)
        self.conv1 = nn.Linear(4 * hid, 8 * hid)
        self.conv2 = nn.Linear(8 * hid, out * in_)
        self.class_layer = nn.Linear(out, num_classes)

    def features(self, x: Tensor, kernel: tuple[int, int]) -> Tensor:
        """States (n, d) -> (n, h * w, 8d) at the positions of a kernel (kh, kw); h, w = min(kh, S), min(kw, S)."""
        side = self.max_shape[2]
        rows, cols = (self._positions(size) for size in kernel)
        weight = self.fc.weight.view(-1, side, side, x.shape[1])[:, rows, cols]
        bias = self.fc.bias.view(-1, side, side)[:, rows, cols]
        # Row by row: a row of positions is a batch of matrices in place, several rows would be copied.
        x = torch.stack([x @ row.permute(1, 2, 0) for row in weight.unbind(1)])  # (h, w, n, 4d)
        x = x.permute(2, 0, 1, 3) + bias.permute(1, 2, 0)
        return F.relu(self.conv1(F.relu(x.flatten(1, 2))))

    def weights(self, features: Tensor, out: int, in_: int) -> Tensor:
        """Features of any positions (n, 8d) -> (n, out, in), out <= M_o, in <= M_i."""
        weight = self.conv2.weight.unflatten(0, self.max_shape[:2])[:out, :in_]
        bias = self.conv2.bias.unflatten(0, self.max_shape[:2])[:out, :in_]
        # A batch of products over out reads the slice in place; without gradients no copy of it is made.
        return (features @ weight.mT + bias.unsqueeze(1)).transpose(0, 1)

    def class_weights(self, weights: Tensor) -> Tensor:
        """(n, M_o, in) -> (n, C, in): class scores from the rectified output channels of each input column."""
        return self.class_layer.weight @ F.relu(weights) + self.class_layer.bias.unsqueeze(1)

    def _positions(self, size: int) -> slice:
        side = self.max_shape[2]
        if self.window == "corner":
            return slice(0, min(size, side))
        middle = side // 2
        return slice(max(0, middle - size // 2), min(side, middle + (size + 1) // 2))


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

    def class_bias(self, x: Tensor) -> Tensor:
        """States (n, d) -> (n, C)."""
        return self.class_layer(F.relu(self(x)[1]))


def resize(x: Tensor, kernel: tuple[int, int], side: int) -> Tensor:
    """Decoded positions (n, h * w, out, in) -> (n, out, in, kh, kw). Kernels over ``side`` = S are resized."""
    n, _, out, in_ = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, out * in_, min(kernel[0], side), min(kernel[1], side))
    if x.shape[2:] != kernel:
        x = F.interpolate(x, kernel, mode="bilinear", align_corners=False)
    return x.unflatten(1, (out, in_))


def tile(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat whole blocks along the channel axes 1 and 2, then truncate: ``out[:, r] = x[:, r mod x.shape[1]]``.

    Args:
        x: (n, out, in, ...) or (n, out).
        shape: the target (out, in, ...) or (out,); other axes must agree.
    """
    channels = x.shape[1:3]
    for axis in reversed(range(len(channels))):
        copies = -(-shape[axis] // channels[axis])
        x = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], copies, *x.shape[axis + 1 :])
    for axis in range(len(channels)):  # one copy at most, in the layout of the result
        x = x.flatten(axis + 1, axis + 2).narrow(axis + 1, 0, shape[axis])
    return x


def weight_scale(shape: tuple[int, ...], is_position: bool = False) -> float:
    """sqrt(beta / fan-in) of a predicted weight (PPUDA section 4, parameter normalisation).

    beta is 1 where no ReLU is expected to follow (depthwise convolutions, 1x7 kernels), else 2. Positional
    encodings keep their scale; the released hypernetworks tell them by the shape (1, c, >= 11, w).
    """
    if is_position or (len(shape) > 2 and shape[0] == 1 and shape[2] >= 11):
        return 1.0
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    no_relu = len(shape) > 2 and (shape[1] == 1 or shape[2] < shape[3])
    return ((1 if no_relu else 2) / fan_in) ** 0.5
