"""Accuracy of networks with predicted, random or trained parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ghnlib.architectures import Architecture, stop_tracking
from ghnlib.hypernetwork import GHN
from ghnlib.images import ImageSet


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
    arguments = (images, batch_size, statistics)
    rows = Parallel(processes)(delayed(_evaluate)(ghn, architecture, *arguments) for architecture in architectures)
    return pd.DataFrame(rows, columns=["accuracy", "top5"]).rename_axis("index").reset_index()


@torch.no_grad()
def _evaluate(ghn: GHN, architecture: Architecture, images: ImageSet, batch_size: int, statistics=None) -> dict:
    torch.set_num_threads(1)
    (parameters,) = ghn([architecture.graph], predict_class_layers=True)
    if statistics is None:
        return top_accuracies(architecture.build(device="meta"), images, batch_size, parameters)
    net = architecture.build(device="cpu", track_running_stats=True)
    net.load_state_dict(parameters, strict=False)
    source, batches, seed = statistics
    update_bn(islice(source.stream(batch_size, seed), batches), net)
    return top_accuracies(net, images, batch_size)


def sweep_predictions(
    ghn: GHN, architectures: Sequence[Architecture], images: ImageSet, folder: str, batch_size: int, processes: int
) -> pd.DataFrame:
    """``evaluate_predictions`` of many networks as a ``sweep``: resumable, with ``error`` for networks that failed."""
    file = Path(folder, f"{_fingerprint(ghn, images, batch_size, list(architectures))}.csv")
    tasks = {str(i): (ghn, architecture, images, batch_size) for i, architecture in enumerate(architectures)}
    return sweep(_evaluate, tasks, file, processes).rename(columns={"network": "index"}).astype({"index": int})


def sweep_torchvision(
    ghn: GHN, names: Sequence[str], images: ImageSet, folder: str, batch_size: int, processes: int
) -> pd.DataFrame:
    """A ``sweep`` over torchvision's classifiers with predicted parameters (the PyTorch split of GHN-3 section 5.1).
    What cannot be predicted keeps torchvision's initial values. ``names``: such as "torchvision.models.resnet50"."""
    file = Path(folder, f"{_fingerprint(ghn, images, batch_size, 'torchvision')}.csv")
    short = (name.rpartition(".")[2] for name in names)
    return sweep(_evaluate_torchvision, {name: (ghn, name, images, batch_size) for name in short}, file, processes)


def _evaluate_torchvision(ghn: GHN, name: str, images: ImageSet, batch_size: int) -> dict[str, float]:
    from torchvision import models  # takes a second, and only this needs it

    torch.set_num_threads(1)
    torch.manual_seed(0)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # minutes of truncated normals
    net = models.get_model(name, num_classes=len(images.classes), **slow).eval()
    stop_tracking(net)
    ghn.initialize(net, tuple(next(images.batches(1))[0].shape[1:]))
    return top_accuracies(net, images, batch_size)


def sweep(
    evaluate: Callable[..., Mapping[str, float]], networks: Mapping[str, tuple], file: Path, processes: int = 1
) -> pd.DataFrame:
    """Evaluate many networks; started again after an interruption, it goes on with those that ``file`` does not have.

    A network that raises an error, or whose scores are not finite, has a row that says so.

    Args:
        evaluate: called with the arguments of a network of ``networks``, returns ``accuracy`` and ``top5``.
        file: CSV to which finished rows are appended.

    Returns:
        One row a network, in their order: ``network``, ``accuracy``, ``top5``, ``error`` ("" if there was none).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    complete = file.read_text().rpartition("\n") if file.exists() else ("", "", "")
    file.write_text(complete[0] + complete[1])  # a killed process may have left half a line
    done = set(_read(file)["network"]) if complete[0] else set()
    todo = (delayed(_attempt)(evaluate, name, networks[name]) for name in networks if name not in done)
    with file.open("a") as log:
        for row in Parallel(processes, return_as="generator_unordered")(todo):
            pd.DataFrame([row]).to_csv(log, header=not log.tell(), index=False)
            log.flush()
    return _read(file).set_index("network").loc[list(networks)].reset_index()


def _attempt(evaluate: Callable, name: str, arguments: tuple) -> dict:
    row = {"network": name, "accuracy": math.nan, "top5": math.nan, "error": ""}
    try:
        row |= evaluate(*arguments)
    except Exception as error:  # whatever is wrong with one network, the others have their rows
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return row if math.isfinite(row["accuracy"]) else row | {"error": "scores are not finite"}


def _read(file: Path) -> pd.DataFrame:
    rows = pd.read_csv(file, dtype=str)  # numbers by way of text: exactly those that were written
    return rows.astype({"accuracy": float, "top5": float}).fillna({"error": ""})


def _fingerprint(ghn: GHN, images: ImageSet, *others) -> str:
    """Of the hypernetwork's configuration and values, the images' labels and normalisation, and the rest."""
    digest = hashlib.sha256(repr((ghn.config, images.classes, images.mean, images.std, *others)).encode())
    for tensor in (images.labels, *ghn.state_dict().values()):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """Number of values that are not NaN, their mean, population deviation, standard error (deviation / sqrt(n))."""
    values = np.asarray(list(values), dtype=float)
    values = values[~np.isnan(values)]
    mean, deviation = float(values.mean()), float(values.std())
    return {"n": len(values), "mean": mean, "deviation": deviation, "standard_error": deviation / len(values) ** 0.5}


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Mean of a - b over paired observations, with its Student-t confidence interval; NaN: not observed."""
    from scipy import stats  # takes a second, and only this needs it

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    difference = difference[~np.isnan(difference)]
    low, high = stats.t.interval(confidence, len(difference) - 1, difference.mean(), stats.sem(difference))
    return {"n": len(difference), "mean": float(difference.mean()), "low": float(low), "high": float(high)}
