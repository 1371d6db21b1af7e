"""What falls to this process of what several do together, under torch.distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import distributed


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
    if distributed.is_initialized():
        distributed.all_reduce(number)
    return float(number)
