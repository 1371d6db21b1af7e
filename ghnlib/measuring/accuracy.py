"""Accuracy of networks with predicted, random or trained parameters.

Shapes: B images of s pixels a side.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NamedNetwork, build_to_run
from ghnlib.data.images import DataError, ImageFiles, ImageSet
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.hypernetwork.quantising import quantised
from ghnlib.measuring.kept import rows_kept
from ghnlib.measuring.metrics import METRICS, metrics_of

SCORES = ("accuracy", "top5", *METRICS)


def exits_of(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Logits (B, classes) of each of a network's exits, which are a list; most networks have one. Of a tuple the first:
    the others are auxiliary."""
    return output if isinstance(output, list) else [output[0] if isinstance(output, tuple) else output]


@torch.no_grad()
def classified(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits (B, classes) of each exit and labels (B,), batch by batch, images in their order.

    Args:
        net: in evaluation mode from then on. Batch norm without running statistics uses those of each batch
            (PPUDA and GHN-3 evaluate predicted parameters so, in batches of 64).
        parameters: used instead of the network's own.
    """
    net.eval()
    for x, y in images.batches(batch_size):
        yield exits_of(torch.func.functional_call(net, dict(parameters or {}), (x,))), y


def top_accuracies(
    net: nn.Module,
    images: ImageSet,
    batch_size: int = 64,
    parameters: Mapping[str, Tensor] | None = None,
    metrics: Sequence[str] = (),
) -> dict[str, float]:
    """``accuracy`` (top-1), ``top5`` and further ``METRICS`` in percent, of several exits those of the last; NaN if a
    score is not finite. Other arguments: see ``classified``."""
    first, five, finite, outputs = 0, 0, True, []
    for (*_, logits), y in classified(net, images, batch_size, parameters):
        if metrics:
            outputs.append((y, logits))
        first += int((logits.argmax(1) == y).sum())
        five += int((logits.topk(min(5, logits.shape[1])).indices == y[:, None]).sum())
        finite &= bool(logits.isfinite().all())
    if not finite:
        return dict.fromkeys(("accuracy", "top5", *metrics), math.nan)
    found = {"accuracy": 100 * first / len(images), "top5": 100 * five / len(images)}
    return found | (metrics_of(metrics, *map(torch.cat, zip(*outputs))) if metrics else {})


def exit_accuracies(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: Mapping[str, Tensor] | None = None
) -> list[float]:
    """Top-1 accuracy in percent of each exit. Arguments: see ``classified``."""
    correct = 0
    for exits, y in classified(net, images, batch_size, parameters):
        correct = correct + torch.stack([(logits.argmax(1) == y).sum() for logits in exits])
    return (100 * correct / len(images)).tolist()


@torch.no_grad()
def predicted_accuracies(
    architecture: Architecture,
    ghn: GHN,
    images: ImageSet,
    batch_size: int = 64,
    statistics: tuple[ImageSet, int, int] | None = None,
    metrics: Sequence[str] = (),
    bits: int | None = None,
) -> dict[str, float]:
    """``top_accuracies`` of a network with predicted parameters. ``statistics``, ``bits``: of ``evaluate_predictions``.

    Raises:
        DataError: the hypernetwork is for another number of classes.
    """
    _check_classes(ghn, images)
    (parameters,) = ghn([architecture.graph], predict_class_layers=True)
    if bits:
        parameters = quantised(parameters, bits)
    if statistics is None:
        net = build_to_run(architecture, next(ghn.parameters()).device)
        return top_accuracies(net, images, batch_size, parameters, metrics)
    net = architecture.build(device="cpu", track_running_stats=True).to(images.device)
    net.load_state_dict(parameters, strict=False)
    source, batches, seed = statistics
    estimate_batch_norm(net, source, batches, batch_size, seed)
    return top_accuracies(net, images, batch_size, metrics=metrics)


def evaluate_predictions(
    ghn: GHN,
    architectures: Sequence[Architecture],
    images: ImageSet,
    batch_size: int = 64,
    processes: int = 1,
    folder: str | Path | None = None,
    statistics: tuple[ImageSet, int, int] | None = None,
    metrics: Sequence[str] = (),
    bits: int | None = None,
) -> pd.DataFrame:
    """Accuracy with predicted parameters, without fine-tuning, in processes of one core each.

    Args:
        folder: where results are kept, see ``map_kept``.
        statistics: images, number of batches and seed of their order, to average batch-norm statistics over instead
            of taking those of each test batch (PPUDA appendix C.1: 200 batches of 64 training images).
        metrics: some of ``METRICS``.
        bits: that predicted weights are rounded to, see ``quantised``; None: float32.

    Returns:
        One row an architecture: ``index``, ``accuracy``, ``top5``, metrics (percent; NaN if there is an error),
        ``error``.
    """
    tasks = [({"index": i}, (architecture,)) for i, architecture in enumerate(architectures)]
    common = (ghn, images, batch_size, statistics, metrics, bits)
    return _scored(rows_kept(predicted_accuracies, tasks, common, processes, folder))


def evaluate_torchvision(
    ghn: GHN,
    names: Sequence[str],
    images: ImageSet,
    batch_size: int,
    processes: int,
    folder: str | Path,
    metrics: Sequence[str] = (),
) -> pd.DataFrame:
    """The same of torchvision's classifiers (the PyTorch split of GHN-3 section 5.1), by ``network``, their name. What
    cannot be predicted keeps torchvision's initial values. ``names``: such as "torchvision.models.resnet50"."""
    tasks = [({"network": name.rpartition(".")[2]}, (name.rpartition(".")[2],)) for name in names]
    return _scored(rows_kept(_torchvision_accuracies, tasks, (ghn, images, batch_size, metrics), processes, folder))


def _torchvision_accuracies(
    name: str, ghn: GHN, images: ImageSet, batch_size: int, metrics: Sequence[str]
) -> dict[str, float]:
    _check_classes(ghn, images)
    if name == "inception_v3" and isinstance(images, ImageFiles):
        images = replace(images, image_size=299)  # GHN-3's evaluation
    torch.manual_seed(0)
    side = images.side
    net = NamedNetwork(len(images.classes), side, name).build(device="cpu").to(images.device).eval()
    ghn.initialize(net, (3, side, side))
    return top_accuracies(net, images, batch_size, metrics=metrics)


def _scored(rows: pd.DataFrame) -> pd.DataFrame:
    """With the scores last and an error where they are not finite. DataError: nothing could be evaluated."""
    if (rows["error"] != "").all():
        raise DataError(f"none of {len(rows)} networks could be evaluated: {rows['error'].iloc[0]}")
    without = (rows["error"] == "") & rows["accuracy"].isna()
    rows = rows.assign(error=rows["error"].mask(without, NOT_FINITE))
    scores = [name for name in SCORES if name in rows]
    return rows[[*rows.columns.drop([*scores, "error"]), *scores, "error"]]


NOT_FINITE = "scores are not finite"
"""The ``error`` of a network that diverged."""


def _check_classes(ghn: GHN, images: ImageSet) -> None:
    if (known := ghn.config.num_classes) != len(images.classes):
        raise DataError(f"the hypernetwork predicts {known} classes, the images have {len(images.classes)}.")


@torch.no_grad()
def estimate_batch_norm(net: nn.Module, images: ImageSet, batches: int, batch_size: int, seed: int) -> None:
    """Running statistics of batch norm as plain averages over training batches, of one pass at most."""
    one_pass = math.ceil(len(images) / batch_size)
    update_bn(islice(images.stream(batch_size, seed), min(batches, one_pass)), net)
