"""Many calls in processes of one core each: results are kept in a folder, what fails is told and stops nothing else."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from joblib import Memory, Parallel, delayed
from joblib.hashing import NumpyHasher
from torch import Tensor
from tqdm import tqdm

from ghnlib.hypernetwork.ghn import GHN


def map_kept(
    function: Callable,
    tasks: Sequence[tuple],
    common: tuple,
    processes: int = 1,
    folder: str | Path | None = None,
    failures: bool = False,
) -> list:
    """``function(*task, *common)`` of each task, in processes of one core each.

    With a ``folder`` each result is kept there, under the name of the function and all that it is called with: the same
    call after an interruption computes only what is missing. ``failures``: in place of the result of a call that raised
    an error there is its type and message, which is not kept; otherwise the error ends all.
    """
    call = Memory(folder, verbose=0).cache(_call, ignore=["function", "arguments"])
    shared = _fingerprint(function, *common) if folder else ""
    keys = (_fingerprint(shared, *task) if folder else "" for task in tasks)
    run = delayed(partial(_attempt, call) if failures else call)
    results = Parallel(processes, return_as="generator")(
        run(key, function, (*task, *common)) for key, task in zip(keys, tasks)
    )
    name = getattr(function, "__name__", "calls").strip("_").replace("_", " ")
    # Only what takes long is kept; a bar that few seconds would end is none.
    return list(tqdm(results, name, len(tasks), leave=False, mininterval=5, delay=5, disable=not folder))


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
    results = map_kept(function, [task for _, task in tasks], common, processes, folder, failures=True)
    table = []
    for (labels, _), result in zip(tasks, results):
        rows = {"error": result} if isinstance(result, str) else result
        table += [{**labels, "error": "", **row} for row in (rows if isinstance(rows, list) else [rows])]
    return pd.DataFrame(table)


def _call(key: str, function: Callable, arguments: tuple):
    torch.set_num_threads(1)
    return function(*arguments)


def _attempt(call: Callable, key: str, function: Callable, arguments: tuple):
    try:
        return call(key, function, arguments)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Hasher(NumpyHasher):
    """joblib's, which does not know equal tensors from others and would hash what hypernetworks keep at hand."""

    def save(self, value) -> None:
        if isinstance(value, GHN):
            value = (value.config, dict(value.state_dict()))
        super().save(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def _fingerprint(*values) -> str:
    return _Hasher("sha1").hash(values)
