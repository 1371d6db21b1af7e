"""Predicted weights rounded to few bits, as networks on small devices store them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def quantised(parameters: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Parameters whose weights, tensors with two or more axes, are multiples of a step of their own for each output
    channel, symmetric about 0: the largest is 2^(bits - 1) - 1 steps (Krishnamoorthi 2018, section 3.1). Vectors keep
    their precision. Gradients pass as if nothing had been rounded (GHN-QAT, Yun and Wong 2023, trains so).

    Values are float32, as in training and evaluation; what is not finite stays so.
    """
    return {name: _rounded(value, bits) if value.ndim > 1 else value for name, value in parameters.items()}


def _rounded(weight: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    step = weight.detach().flatten(1).abs().amax(1) / most
    step = step.clamp_min(torch.finfo(step.dtype).tiny)  # of channels that are 0
    zeros = torch.zeros_like(step, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, step, zeros, 0, -most, most)
