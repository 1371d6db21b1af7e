"""What falls to this process of what several do together, under torch.distributed."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, distributed

SMALL = 2**20
"""Values of gradients that are summed together with others, as each sum waits for the network: of GHN-3-XL a tenth."""


def is_first_rank() -> bool:
    """Whether this process reports and writes: the only one, or rank 0."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def share_of_rank(items: Sequence, cost: Callable) -> list:
    """This process's part of the items, in their order: all without torch.distributed. As in PPUDA, parts are of equal
    size but for one item and of about equal cost: the costliest first, each to the part with room that costs least."""
    if not distributed.is_initialized():
        return list(items)
    parts: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    room, total = math.ceil(len(items) / len(parts)), lambda part: sum(cost(items[i]) for i in part)
    for i in sorted(range(len(items)), key=lambda i: cost(items[i]), reverse=True):
        min((part for part in parts if len(part) < room), key=total).append(i)
    return [items[i] for i in sorted(parts[distributed.get_rank()])]


def sum_over_ranks(value: float, device: torch.device) -> float:
    """A number summed over all ranks, the same on each: it waits for the others."""
    number = torch.tensor(value, dtype=torch.float64, device=device)
    sum_tensor(number)
    return float(number)


def sum_tensor(values: Tensor) -> None:
    """Sum a tensor over all ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of parameters over all ranks, in place; where there is none it counts as zeros. Large ones are
    summed where they are: a copy of all would double their memory."""
    if not distributed.is_initialized():
        return
    small = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.numel() > SMALL:
            distributed.all_reduce(parameter.grad)
        else:
            small.append(parameter.grad)
    if small:
        together = torch.cat([gradient.flatten() for gradient in small])
        distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(gradient) for part, gradient in zip(parts, small)])
