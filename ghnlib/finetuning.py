"""Ordinary training of single networks, from random, orthogonal or predicted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ghnlib.architectures import Architecture
from ghnlib.evaluation import accuracy
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, ImageSet
from ghnlib.initialization import add_noise, orthogonalize

EVALUATION_BATCH = 256
"""With running statistics the batch size does not change accuracy, only speed."""
NOISE = 3e-5
"""Scale of the noise before orthogonal post-processing (GHN-orth section 4)."""


@dataclass(frozen=True)
class SGDRecipe:
    """SGD with momentum and a cosine schedule (PPUDA section 5, GHN-3 section 5.2).

    Attributes:
        steps: updates; the learning rate falls to 0 at the last.
        bn_batches: batches of EVALUATION_BATCH training images from which batch-norm statistics are estimated before
            each evaluation.
    """

    steps: int
    lr: float
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    bn_batches: int = 2
    augment: Augment | None = None


@dataclass(frozen=True)
class Run:
    """One network trained once. ``parameters``: initial values by name over random initialisation, which ``seed``
    decides together with the order of images. ``orthogonal``: whether weights are then post-processed as in GHN-orth
    (noise that breaks the symmetry of predicted weights, orthogonal factor). ``labels``: columns of the result."""

    architecture: Architecture
    recipe: SGDRecipe
    seed: int
    parameters: dict[str, Tensor] | None = None
    orthogonal: bool = False
    labels: tuple[tuple[str, object], ...] = ()


def train_network(
    net: nn.Module,
    images: ImageSet,
    recipe: SGDRecipe,
    seed: int,
    evaluate: Callable[[nn.Module], float],
    checkpoints: Sequence[int] = (),
) -> dict[int, float]:
    """Train a network and evaluate it at ``checkpoints`` (numbers of steps, 0 = untrained) and at the end.

    Returns:
        Step -> what ``evaluate`` returned. After a loss that is not finite, the remaining values are NaN.
    """
    optimizer = torch.optim.SGD(
        net.train().parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, recipe.steps)))
    )
    wanted = sorted({*(c for c in checkpoints if c <= recipe.steps), recipe.steps})
    results = dict.fromkeys(wanted, math.nan)
    batches = images.stream(recipe.batch_size, seed, augment=recipe.augment)
    for step in range(recipe.steps + 1):
        if step in results:
            reestimate_batch_norm(net, images, recipe, seed)
            results[step] = evaluate(net)
            net.train()
        if step < recipe.steps:
            x, y = next(batches)
            loss = F.cross_entropy(net(x), y)
            if not loss.isfinite():
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
    return results


def reestimate_batch_norm(net: nn.Module, images: ImageSet, recipe: SGDRecipe, seed: int) -> None:
    """Running statistics of batch norm as plain averages over ``recipe.bn_batches`` training batches."""
    batches = islice(images.stream(EVALUATION_BATCH, seed), recipe.bn_batches)
    with torch.no_grad():
        update_bn(batches, net)


def initial_runs(
    architectures: Sequence[Architecture],
    recipe: SGDRecipe,
    seeds: Sequence[int],
    hypernetworks: Mapping[str, GHN],
    lrs: Mapping[str, float] | None = None,
    class_layers: bool | None = None,
    orthogonal_ghn: bool = False,
) -> list[Run]:
    """Runs of each architecture and seed from random, orthogonal and predicted parameters.

    Args:
        hypernetworks: by name.
        lrs: learning rate of each initialisation, instead of the recipe's.
        class_layers: whether classification layers are predicted; None: if the class counts agree.
        orthogonal_ghn: adds "NAME-orth", predicted parameters with GHN-orth post-processing.

    Returns:
        Runs labelled ``initialisation`` ("random", "orthogonal", a name, "NAME-orth") and ``network`` (index).
    """
    sides: list[tuple[str, GHN | None, bool]] = [("random", None, False), ("orthogonal", None, True)]
    for name, ghn in hypernetworks.items():
        sides += [(name, ghn, False)] + [(f"{name}-orth", ghn, True)] * orthogonal_ghn
    runs = []
    for name, ghn, orthogonal in sides:
        own = recipe if lrs is None else replace(recipe, lr=lrs[name])
        for network, architecture in enumerate(architectures):
            labels = (("initialisation", name), ("network", network))
            with torch.no_grad():
                parameters = ghn.predict(architecture.graph, predict_class_layers=class_layers) if ghn else None
            runs += [Run(architecture, own, seed, parameters, orthogonal, labels) for seed in seeds]
    return runs


def run_all(
    runs: Sequence[Run], train: ImageSet, test: ImageSet, checkpoints: Sequence[int] = (), processes: int = 1
) -> pd.DataFrame:
    """Train many networks in parallel processes of one core each.

    Returns:
        One row a run and checkpoint: the run's labels, ``seed``, ``lr``, ``budget`` (steps of the run), ``step``,
        ``accuracy`` (percent, NaN if the loss was not finite).
    """
    rows = Parallel(processes)(delayed(_run)(run, train, test, checkpoints) for run in runs)
    return pd.DataFrame([row for part in rows for row in part])


def tune_learning_rate(
    runs: Sequence[Run], lrs: Sequence[float], train: ImageSet, val: ImageSet, group: str, processes: int = 1
) -> dict:
    """The learning rate with the best mean accuracy on validation images, for each value of label ``group``.

    Every group tries the same rates, so that each side has the same tuning budget. A run that diverges counts as 0.
    """
    tried = [replace(run, recipe=replace(run.recipe, lr=lr)) for run in runs for lr in lrs]
    results = run_all(tried, train, val, processes=processes)
    means = results.fillna({"accuracy": 0.0}).groupby([group, "lr"])["accuracy"].mean().unstack()
    return means.idxmax(axis=1).to_dict()


def _run(run: Run, train: ImageSet, test: ImageSet, checkpoints: Sequence[int]) -> list[dict]:
    torch.set_num_threads(1)
    net = initial_network(run)
    results = train_network(
        net, train, run.recipe, run.seed, lambda net: accuracy(net, test, EVALUATION_BATCH), checkpoints
    )
    common = {**dict(run.labels), "seed": run.seed, "lr": run.recipe.lr, "budget": run.recipe.steps}
    return [{**common, "step": step, "accuracy": value} for step, value in results.items()]


def initial_network(run: Run) -> nn.Module:
    """The network of a run before its first step, batch norm with running statistics."""
    torch.manual_seed(run.seed)
    net = run.architecture.build(device="cpu", track_running_stats=True)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in (run.parameters or {}).items():
            own[name].copy_(value)
    if run.orthogonal:
        if run.parameters:
            add_noise(net, NOISE, torch.Generator().manual_seed(run.seed))
        orthogonalize(net)
    return net
