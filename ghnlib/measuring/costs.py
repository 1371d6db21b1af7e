"""What calls and networks cost, in floating-point operations."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from ghnlib.architectures.architecture import Architecture


@torch.no_grad()
def flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions of a call, two for each multiplication and addition, on any
    device."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def inference_flops(architecture: Architecture) -> int:
    """``flops`` of a forward pass with one image."""
    side = architecture.input_size
    net = architecture.build(track_running_stats=True).eval()
    return flops(lambda: net(torch.empty(1, 3, side, side, device="meta")))


def step_flops(architectures: Sequence[Architecture]) -> float:
    """FLOPs of a training step of the average network, for each image: three forward passes (backward takes two)."""
    return 3 * sum(map(inference_flops, architectures)) / len(architectures)
