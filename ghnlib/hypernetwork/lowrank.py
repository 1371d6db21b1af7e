"""The low-rank decoder of LoGAH (Zhou et al. 2024, arXiv 2405.16287, section 3): wide tensors without repetition.

Shapes: n nodes decoded together, d hidden size, r rank, (M_o, M_i, S, S) the largest tensor, K = max(M_o, M_i) * S.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.hypernetwork.decoders import Crops, Slice


class LowRankDecoder(nn.Module):
    """Every tensor as the product of two factors: an MLP d -> 4d -> 8d -> 2 r^2 makes 2r vectors of r numbers from a
    state, one linear map r -> K makes of these A and B (K, r).

    A weight (out, in, h, w) is A[: out * h] B[: in * w]^T, a class layer (C, in) likewise; vectors are (n, 2): a norm
    layer's weight and its bias, or the bias of any other layer. What is larger than K is tiled as by ``ConvDecoder``.

    Decoded values start with a deviation of about 1, which weight normalisation makes He's scale. Rows of the linear
    map start without a mean: what a ReLU leaves has one, and with torch's own initialisation nearly all of a matrix is
    the one pattern that it makes (measured: 99.97% of the squares, at a deviation of 0.3).
    """

    def __init__(self, hid: int, max_shape: tuple[int, int, int, int], num_classes: int, rank: int):
        super().__init__()
        longest = max(max_shape[:2]) * max_shape[2]
        self.max_shape, self.num_classes, self.rank = (longest, longest, *max_shape[2:]), num_classes, rank
        sizes = pairwise((hid, 4 * hid, 8 * hid, 2 * rank**2))
        self.mlp = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())))
        self.expand = nn.Linear(rank, longest)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        for layer in self.mlp[::2]:  # rectified, their outputs have a mean square of 1 and a variance of 1 - 1 / pi
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        weight = nn.init.normal_(self.expand.weight, std=self.rank**-0.75 * (1 - 1 / pi) ** -0.5)
        weight -= weight.mean(1, keepdim=True)
        nn.init.zeros_(self.expand.bias)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Divide all decoded values by a factor."""
        self.expand.weight /= factor**0.5

    def forward(self, slices: Sequence[Slice], states: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Indices of ``slices``, and for each from states (n, d) the values (n, h * w, out, in); h, w = min(kernel, S).
        Of classes there are C, of other channels no more than K allows."""
        longest, _, side, _ = self.max_shape
        kernels = [(min(s.kernel[0], side), min(s.kernel[1], side)) for s in slices]
        out = [self.num_classes if s.classes else min(s.out, longest // h) for s, (h, _) in zip(slices, kernels)]
        in_ = [min(s.in_, longest // w) for s, (_, w) in zip(slices, kernels)]
        rows = [slice(o * h) for o, (h, _) in zip(out, kernels)] + [slice(i * w) for i, (_, w) in zip(in_, kernels)]
        weights, biases = Crops.apply(self.expand.weight, *rows), Crops.apply(self.expand.bias, *rows)
        vectors = self.mlp(torch.cat(list(states))).unflatten(1, (2, self.rank, self.rank))
        for i, x in enumerate(vectors.split([len(state) for state in states])):
            a, b = (F.linear(x[:, k], weights[i + k * len(slices)], biases[i + k * len(slices)]) for k in (0, 1))
            a = a.unflatten(2, (out[i], -1)).permute(0, 3, 2, 1).unsqueeze(2)  # (n, h, 1, out, r)
            b = b.unflatten(2, (in_[i], -1)).permute(0, 3, 1, 2).unsqueeze(1)  # (n, 1, w, r, in)
            yield i, (a @ b).flatten(1, 2)

    def vectors(self, states: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """States (n, d) -> weights, biases (n, length), or (n, K) if that is less."""
        ((_, values),) = self([Slice((1, 1), length, 2)], [states])
        return values[:, 0].unbind(2)
