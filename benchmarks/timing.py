"""Seconds that functions take."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch


def seconds(function: Callable[[], object], clock: Callable[[], float] = perf_counter) -> float:
    """Of one call and of what it has started on a GPU; ``clock`` process_time: of this process alone."""
    wait()
    start = clock()
    result = function()
    wait()
    end = clock()
    del result  # freeing is not timed
    return end - start


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Of calls that take turns, after one of each to warm up."""
    rounds = [[seconds(function) for function in functions] for _ in range(repeats + 1)]
    return [median(times) for times in zip(*rounds[1:])]


def wait() -> None:
    """For a GPU, where one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
