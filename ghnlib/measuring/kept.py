"""Many calls in processes of one core each: results are kept in a folder, what fails is told and stops nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from joblib import Memory, Parallel, delayed
from joblib.hashing import NumpyHasher
from torch import Tensor
from tqdm import tqdm

from ghnlib.hypernetwork.ghn import GHN


def map_kept(
    function: Callable, tasks: Sequence[tuple], common: tuple, processes: int = 1, folder: str | Path | None = None
) -> list:
    """``function(*task, *common)`` of each task, in processes of one core each.

    With a ``folder`` each result is kept there, under the name of the function and all that it is called with: the same
    call after an interruption computes only what is missing.
    """
    call = Memory(folder, verbose=0).cache(_call, ignore=["function", "arguments"])
    return _each(call, function, tasks, common, processes, folder)


def rows_kept(
    function: Callable,
    tasks: Sequence[tuple[Mapping[str, object], tuple]],
    common: tuple,
    processes: int = 1,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """A table of many calls, as ``map_kept``. Whatever is wrong with one of them, the others have their rows.

    Args:
        function: returns a row (column -> value) or a list of rows.
        tasks: of each call the labels of its rows (column -> value), and the arguments before ``common``.

    Returns:
        Rows of labels, what the function returned, and ``error`` ("" if none). A call that raised an error has one row:
        its labels and the error; it is not kept.
    """
    call = Memory(folder, verbose=0).cache(_call, ignore=["function", "arguments"])
    arguments = [task for _, task in tasks]
    results = _each(partial(_attempt, call), function, arguments, common, processes, folder)
    table = []
    for (labels, _), result in zip(tasks, results):
        rows = [{"error": result.reason}] if isinstance(result, _Failure) else result
        table += [{**labels, "error": "", **row} for row in (rows if isinstance(rows, list) else [rows])]
    return pd.DataFrame(table)


def one_line(error: Exception) -> str:
    """Its type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _each(
    call: Callable, function: Callable, tasks: Sequence[tuple], common: tuple, processes: int, folder: str | Path | None
) -> list:
    shared = _fingerprint(function, *common) if folder else ""
    keys = (_fingerprint(shared, *task) if folder else "" for task in tasks)
    calls = (delayed(call)(key, function, (*task, *common)) for key, task in zip(keys, tasks))
    results = Parallel(processes, return_as="generator")(calls)
    name = getattr(function, "__name__", "calls").strip("_").replace("_", " ")
    # Only what takes long is kept; a bar that few seconds would end is none.
    return list(tqdm(results, name, len(tasks), leave=False, mininterval=5, delay=5, disable=not folder))


def _call(key: str, function: Callable, arguments: tuple):
    torch.set_num_threads(1)
    return function(*arguments)


class _Failure(NamedTuple):
    reason: str


def _attempt(call: Callable, key: str, function: Callable, arguments: tuple):
    try:
        return call(key, function, arguments)
    except Exception as error:
        return _Failure(one_line(error))


class _Hasher(NumpyHasher):
    """joblib's, which does not know equal tensors from others and would hash what hypernetworks keep at hand."""

    def save(self, value) -> None:
        if isinstance(value, GHN):
            value = (value.config, dict(value.state_dict()))
        super().save(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def _fingerprint(*values) -> str:
    return _Hasher("sha1").hash(values)
