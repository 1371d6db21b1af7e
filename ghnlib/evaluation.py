"""Accuracy of networks with predicted, random or trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from ghnlib.architectures import Architecture
from ghnlib.hypernetwork import GHN
from ghnlib.images import ImageSet


@torch.no_grad()
def accuracy(
    net: nn.Module, images: ImageSet, batch_size: int = 64, parameters: dict[str, Tensor] | None = None
) -> float:
    """Top-1 accuracy in percent, images in their order.

    Args:
        net: in evaluation mode afterwards. Batch norm without running statistics uses those of each batch
            (PPUDA and GHN-3 evaluate predicted parameters so, in batches of 64).
        parameters: used instead of the network's own.
    """
    net.eval()
    correct = 0
    for x, y in images.batches(batch_size):
        logits = net(x) if parameters is None else torch.func.functional_call(net, parameters, (x,))
        correct += int((logits.argmax(1) == y).sum())
    return 100 * correct / len(images)


def evaluate_predictions(
    ghn: GHN, architectures: Sequence[Architecture], images: ImageSet, batch_size: int = 64, processes: int = 1
) -> pd.DataFrame:
    """Accuracy with predicted parameters, without fine-tuning, in processes of one core each.

    Returns:
        One row an architecture: ``index``, ``accuracy`` (percent).
    """
    tasks = (delayed(_evaluate)(ghn, architecture, images, batch_size) for architecture in architectures)
    values = Parallel(processes)(tasks)
    return pd.DataFrame({"index": range(len(values)), "accuracy": values})


@torch.no_grad()
def _evaluate(ghn: GHN, architecture: Architecture, images: ImageSet, batch_size: int) -> float:
    torch.set_num_threads(1)
    (parameters,) = ghn([architecture.graph], predict_class_layers=True)
    return accuracy(architecture.build(device="meta"), images, batch_size, parameters)


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """Number, mean and standard error (population deviation / sqrt(n), as PPUDA reports it)."""
    values = np.asarray(list(values), dtype=float)
    return {"n": len(values), "mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Mean of a - b over paired observations, with its Student-t confidence interval."""
    from scipy import stats  # takes a second, and only this needs it

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low, high = stats.t.interval(confidence, len(difference) - 1, difference.mean(), stats.sem(difference))
    return {"n": len(difference), "mean": float(difference.mean()), "low": float(low), "high": float(high)}
