"""Accuracy of networks with predicted, random or trained parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Memory, Parallel, delayed
from joblib.hashing import NumpyHasher
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from ghnlib.architectures import Architecture, TorchvisionNetwork
from ghnlib.hypernetwork import GHN
from ghnlib.images import DataError, ImageFiles, ImageSet


def accuracy(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: dict[str, Tensor] | None = None
) -> float:
    """Top-1 accuracy in percent, see ``top_accuracies``."""
    return top_accuracies(net, images, batch_size, parameters)["accuracy"]


def exits_of(output: Tensor | list[Tensor]) -> list[Tensor]:
    """Logits (B, classes) of each of a network's exits; most networks have one."""
    return output if isinstance(output, list) else [output]


@torch.no_grad()
def top_accuracies(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """``accuracy`` (top-1) and ``top5`` in percent, images in their order; NaN if a score is not finite.

    Args:
        net: in evaluation mode afterwards. Batch norm without running statistics uses those of each batch
            (PPUDA and GHN-3 evaluate predicted parameters so, in batches of 64). Of several exits the last counts.
        parameters: used instead of the network's own.
    """
    net.eval()
    first, five, finite = 0, 0, True
    for x, y in images.batches(batch_size):
        logits = exits_of(net(x) if parameters is None else torch.func.functional_call(net, parameters, (x,)))[-1]
        first += int((logits.argmax(1) == y).sum())
        five += int((logits.topk(min(5, logits.shape[1])).indices == y[:, None]).sum())
        finite &= bool(logits.isfinite().all())
    hits = {"accuracy": first, "top5": five}
    return {name: 100 * count / len(images) if finite else math.nan for name, count in hits.items()}


def evaluate_predictions(
    ghn: GHN,
    architectures: Sequence[Architecture],
    images: ImageSet,
    batch_size: int = 64,
    processes: int = 1,
    statistics: tuple[ImageSet, int, int] | None = None,
) -> pd.DataFrame:
    """Accuracy with predicted parameters, without fine-tuning, in processes of one core each.

    Args:
        statistics: images, number of batches and seed of their order, to average batch-norm statistics over instead
            of taking those of each test batch (PPUDA appendix C.1: 200 batches of 64 training images).

    Returns:
        One row an architecture: ``index``, ``accuracy`` and ``top5`` (percent).
    """
    tasks, common = [(architecture,) for architecture in architectures], (ghn, images, batch_size, statistics)
    rows = map_kept(_evaluate, tasks, common, processes)
    return pd.DataFrame(rows, columns=["accuracy", "top5"]).rename_axis("index").reset_index()


@torch.no_grad()
def _evaluate(architecture: Architecture, ghn: GHN, images: ImageSet, batch_size: int, statistics=None) -> dict:
    _check_classes(ghn, images)
    (parameters,) = ghn([architecture.graph], predict_class_layers=True)
    if statistics is None:
        return top_accuracies(architecture.build(device="meta"), images, batch_size, parameters)
    net = architecture.build(device="cpu", track_running_stats=True)
    net.load_state_dict(parameters, strict=False)
    source, batches, seed = statistics
    estimate_batch_norm(net, source, batches, batch_size, seed)
    return top_accuracies(net, images, batch_size)


@torch.no_grad()
def estimate_batch_norm(net: nn.Module, images: ImageSet, batches: int, batch_size: int, seed: int) -> None:
    """Running statistics of batch norm as plain averages over training batches, of one pass at most."""
    one_pass = math.ceil(len(images) / batch_size)
    update_bn(islice(images.stream(batch_size, seed), min(batches, one_pass)), net)


def sweep_predictions(
    ghn: GHN, architectures: Sequence[Architecture], images: ImageSet, folder: str, batch_size: int, processes: int
) -> pd.DataFrame:
    """``evaluate_predictions`` of many networks as a ``sweep``: resumable, with ``error`` for networks that failed."""
    rows = sweep(_evaluate, dict(enumerate(architectures)), (ghn, images, batch_size), folder, processes)
    return rows.rename(columns={"network": "index"})


def sweep_torchvision(
    ghn: GHN, names: Sequence[str], images: ImageSet, folder: str, batch_size: int, processes: int
) -> pd.DataFrame:
    """A ``sweep`` over torchvision's classifiers with predicted parameters (the PyTorch split of GHN-3 section 5.1).
    What cannot be predicted keeps torchvision's initial values. ``names``: such as "torchvision.models.resnet50"."""
    short = [name.rpartition(".")[2] for name in names]
    return sweep(_evaluate_torchvision, dict(zip(short, short)), (ghn, images, batch_size), folder, processes)


def _evaluate_torchvision(name: str, ghn: GHN, images: ImageSet, batch_size: int) -> dict[str, float]:
    _check_classes(ghn, images)
    if name == "inception_v3" and isinstance(images, ImageFiles):
        images = replace(images, image_size=299)  # GHN-3's evaluation
    torch.manual_seed(0)
    side = next(images.batches(1))[0].shape[-1]
    net = TorchvisionNetwork(len(images.classes), side, name).build(device="cpu").eval()
    ghn.initialize(net, (3, side, side))
    return top_accuracies(net, images, batch_size)


def _check_classes(ghn: GHN, images: ImageSet) -> None:
    if (known := ghn.config.num_classes) != len(images.classes):
        raise DataError(f"the hypernetwork predicts {known} classes, the images have {len(images.classes)}.")


def sweep(
    evaluate: Callable[..., Mapping[str, float]],
    networks: Mapping[object, object],
    common: tuple,
    folder: str | Path,
    processes: int = 1,
) -> pd.DataFrame:
    """Evaluate many networks; finished ones are kept in ``folder``, see ``map_kept``.

    A network that raises an error, or whose scores are not finite, has a row that says so.

    Args:
        evaluate: called with a value of ``networks`` and ``common``, returns ``accuracy`` and ``top5``.

    Returns:
        One row a network, in their order: ``network`` (the key), ``accuracy``, ``top5``, ``error`` ("" if none).
    """
    tasks = [(evaluate, name, network) for name, network in networks.items()]
    return pd.DataFrame(map_kept(_attempt, tasks, common, processes, folder))


def _attempt(evaluate: Callable, name: object, network: object, *common) -> dict:
    row = {"network": name, "accuracy": math.nan, "top5": math.nan, "error": ""}
    try:
        row |= evaluate(network, *common)
    except Exception as error:  # whatever is wrong with one network, the others have their rows
        return row | {"error": one_line(error)}
    return row if math.isfinite(row["accuracy"]) else row | {"error": "scores are not finite"}


def one_line(error: Exception) -> str:
    """Its type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def map_kept(
    function: Callable, tasks: Sequence[tuple], common: tuple, processes: int = 1, folder: str | Path | None = None
) -> list:
    """``function(*task, *common)`` of each task, in processes of one core each.

    With a ``folder`` each result is kept there, under the name of the function and all that it is called with: the same
    call after an interruption computes only what is missing.
    """
    call = Memory(folder, verbose=0).cache(_call, ignore=["function", "arguments"])
    shared = _fingerprint(function, *common) if folder else ""
    keys = (_fingerprint(shared, *task) if folder else "" for task in tasks)
    return Parallel(processes)(delayed(call)(key, function, (*task, *common)) for key, task in zip(keys, tasks))


def _call(key: str, function: Callable, arguments: tuple):
    torch.set_num_threads(1)
    return function(*arguments)


class _Hasher(NumpyHasher):
    """joblib's, which does not know equal tensors from others and would hash what hypernetworks keep at hand."""

    def save(self, value) -> None:
        if isinstance(value, GHN):
            value = (value.config, dict(value.state_dict()))
        super().save(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def _fingerprint(*values) -> str:
    return _Hasher("sha1").hash(values)


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


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """Number of values that are not NaN, their mean, population deviation, standard error (deviation / sqrt(n))."""
    values = np.asarray(list(values), dtype=float)
    values = values[~np.isnan(values)]
    mean, deviation = float(values.mean()), float(values.std())
    return {"n": len(values), "mean": mean, "deviation": deviation, "standard_error": deviation / len(values) ** 0.5}


def paired_interval(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Mean of a - b over paired observations, with its 95 % interval (Student's t; NaN for one); NaN: not observed."""
    from scipy import stats  # takes a second, and only this needs it

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    difference = difference[~np.isnan(difference)]
    n, mean = len(difference), float(difference.mean())
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(difference)) if n > 1 else math.nan
    return {"n": n, "mean": mean, "low": mean - half, "high": mean + half}
