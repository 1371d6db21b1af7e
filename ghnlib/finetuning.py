"""Ordinary training of single networks, from random, orthogonal or predicted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.architectures import Architecture, TorchvisionNetwork
from ghnlib.data import ImageSplits
from ghnlib.evaluation import accuracy, estimate_batch_norm, exits_of, map_kept, one_line
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, DataError, ImageSet
from ghnlib.initialization import Sources, initialize
from ghnlib.training import OPTIMIZERS

EVALUATION_BATCH = 256
"""With running statistics the batch size does not change accuracy, only speed."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Training of one network (PPUDA section 5, GHN-3 section 5.2).

    Attributes:
        steps: updates.
        schedule: a key of ``SCHEDULES``.
        optimizer: "sgd" (with momentum), "adam" (weight decay coupled) or "adamw" (decoupled).
        bn_batches: batches of EVALUATION_BATCH training images, of one pass at most, from which batch-norm statistics
            are estimated before each evaluation.
    """

    steps: int
    lr: float
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    bn_batches: int = 1
    augment: Augment | None = None
    optimizer: str = "sgd"
    schedule: str = "cosine"
    label_smoothing: float = 0.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** int(3 * done),  # of 90 epochs after 30 and 60 (GHN-3 Table 6)
    "constant": lambda done: 1.0,  # within the first 30 epochs of these (GHN-3 Table 2)
}
"""Share of the training that is done -> factor on the learning rate."""


@dataclass(frozen=True)
class Run:
    """One network trained once. ``seed``: of random initialisation and the order of images. ``initialisation``: a key
    of ``INITIALIZATIONS``, for which ``parameters`` (by name) stand in for a prediction. ``labels``: columns of the
    result. ``orth_from``: of GHN-orth, see ``orthogonalize``."""

    architecture: Architecture
    recipe: TrainingRecipe
    seed: int
    initialisation: str = "random"
    parameters: dict[str, Tensor] | None = None
    labels: tuple[tuple[str, object], ...] = ()
    orth_from: float = 0.0


def train_network(
    net: nn.Module,
    images: ImageSet,
    recipe: TrainingRecipe,
    seed: int,
    evaluate: Callable[[nn.Module], float],
    checkpoints: Sequence[int] = (),
    log: Callable[[float], object] = lambda loss: None,
) -> dict[int, float]:
    """Train a network and evaluate it at ``checkpoints`` (numbers of steps, 0 = untrained) and at the end.

    Args:
        log: called with the training loss of each step.

    Returns:
        Step -> what ``evaluate`` returned. After a loss or gradient that is not finite, the remaining values are NaN.
    """
    own = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    make = torch.optim.SGD if recipe.optimizer == "sgd" else OPTIMIZERS[recipe.optimizer]
    optimizer = make(net.train().parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True, **own)
    factor = SCHEDULES[recipe.schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / max(1, recipe.steps)))
    wanted = sorted({*(c for c in checkpoints if c <= recipe.steps), recipe.steps})
    results = dict.fromkeys(wanted, math.nan)
    batches = images.stream(recipe.batch_size, seed, augment=recipe.augment)
    for step in range(recipe.steps + 1):
        if step in results:
            estimate_batch_norm(net, images, recipe.bn_batches, EVALUATION_BATCH, seed)
            results[step] = evaluate(net)
            net.train()
        if step < recipe.steps:
            x, y = next(batches)
            loss = _loss(net(x), y, recipe.label_smoothing)
            log(loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            if not (loss + norm).isfinite():
                break
            optimizer.step()
            schedule.step()
    return results


def _loss(output: Tensor | list[Tensor] | tuple[Tensor, Tensor], labels: Tensor, smoothing: float) -> Tensor:
    """Sum of the exits' cross-entropies; 0.4 times that of an auxiliary head (PPUDA Table 9)."""
    loss = partial(F.cross_entropy, target=labels, label_smoothing=smoothing)
    return loss(output[0]) + 0.4 * loss(output[1]) if isinstance(output, tuple) else sum(map(loss, exits_of(output)))


def initial_runs(
    architectures: Sequence[Architecture],
    recipe: TrainingRecipe,
    seeds: Sequence[int],
    hypernetworks: Mapping[str, GHN],
    tuned: Mapping[str, Mapping[str, object]] | None = None,
    class_layers: bool = True,
    given: Mapping[str, Sequence[dict[str, Tensor]]] | None = None,
    post_processed: Collection[str] = (),
    orth_from: float = 0.0,
) -> list[Run]:
    """Runs of each architecture and seed from random, orthogonal and predicted parameters, these with GHN-3's noise.

    Args:
        hypernetworks: by name.
        tuned: fields of the recipe that differ, by initialisation, as ``tune`` finds them.
        class_layers: whether classification layers are predicted; if not, they are random.
        given: further initialisations by name: parameters of the first architectures, by name.
        post_processed: names of which "NAME-orth" is added, the same with GHN-orth post-processing.
        orth_from: share of the layers that post-processing leaves, see ``orthogonalize``.

    Returns:
        Runs labelled ``initialisation`` ("random", "orthogonal", a name, "NAME-orth") and ``network`` (index).

    Raises:
        DataError: classification layers are to be predicted for another number of classes than a hypernetwork's.
    """
    predicted = {name: _predict(name, ghn, architectures, class_layers) for name, ghn in hypernetworks.items()}
    given = given or {}
    sides = [(name, name, [None] * len(architectures)) for name in ("random", "orthogonal")]
    sides += [(name, "ghn-noise", starts) for name, starts in predicted.items()]
    sides += [(name, "ghn", starts) for name, starts in given.items()]
    sides += [(f"{name}-orth", "ghn-orth", (predicted | given)[name]) for name in post_processed]
    runs = []
    for name, initialisation, starts in sides:
        own = replace(recipe, **tuned[name]) if tuned else recipe
        for network, (architecture, start) in enumerate(zip(architectures, starts)):
            labels = (("initialisation", name), ("network", network))
            runs += [Run(architecture, own, seed, initialisation, start, labels, orth_from) for seed in seeds]
    return runs


@torch.no_grad()
def _predict(name: str, ghn: GHN, architectures: Sequence[Architecture], class_layers: bool) -> list[dict[str, Tensor]]:
    known, wanted = ghn.config.num_classes, {architecture.num_classes for architecture in architectures}
    if class_layers and wanted != {known}:
        raise DataError(f"hypernetwork {name} is for {known} classes, not for {wanted}: train one on these images.")
    return [ghn.predict(architecture.graph, predict_class_layers=class_layers) for architecture in architectures]


def run_all(
    runs: Sequence[Run],
    train: ImageSet,
    test: ImageSet,
    checkpoints: Sequence[int] = (),
    processes: int = 1,
    loss_every: int | None = None,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Train many networks in parallel processes of one core each.

    Args:
        folder: where finished runs are kept, see ``map_kept``.

    Returns:
        One row a run and checkpoint, and with ``loss_every`` one each so many steps: the run's labels, ``seed``,
        ``optimizer``, ``lr``, ``weight_decay``, ``budget`` (steps of the run), ``step``, ``accuracy`` (percent),
        ``loss`` (mean training loss of the steps since the row before), ``error`` ("" if none). Accuracy is NaN in rows
        without evaluation, both are NaN once a run has diverged. A run that raised an error has its last row alone.

    Raises:
        DataError: every run raised an error; the message is the first one's.
    """
    common = (train, test, tuple(checkpoints), loss_every)
    rows = map_kept(_run, [(run,) for run in runs], common, processes, folder)
    if rows and all(part[-1]["error"] for part in rows):
        raise DataError(f"none of {len(rows)} trainings could be run: {rows[0][-1]['error']}")
    return pd.DataFrame([row for part in rows for row in part])


def diverged(results: pd.DataFrame) -> list[str]:
    """What the runs of ``run_all`` are called that did not reach their end with a finite loss and gradient, or ended
    with an error."""
    ends = results[(results["step"] == results["budget"]) & results["accuracy"].isna()]
    rows = ends.drop(columns=["step", "accuracy", "loss", "moment"], errors="ignore").to_dict("records")
    return [", ".join(f"{name} {value}" for name, value in row.items() if value != "") for row in rows]


def grid_of(lrs: Mapping[str, Sequence[float]], weight_decays: Sequence[float]) -> list[dict[str, object]]:
    """Every combination of an optimiser with one of its rates and a weight decay, as fields of the recipe."""
    rates = [(optimizer, lr) for optimizer in lrs for lr in lrs[optimizer]]
    return [{"optimizer": o, "lr": lr, "weight_decay": decay} for (o, lr), decay in product(rates, weight_decays)]


def tune(
    runs: Sequence[Run], grid: Sequence[Mapping[str, object]], train: ImageSet, val: ImageSet, group: str,
    processes: int = 1, folder: str | Path | None = None,
) -> dict[str, dict[str, object]]:  # fmt: skip
    """For each value of label ``group`` the setting with the best mean accuracy on validation images.

    Every group tries the same settings, so that each side has the same tuning budget. A run that diverges counts as 0.

    Args:
        grid: fields of the recipe that differ, see ``grid_of``.
    """
    tried = [replace(run, recipe=replace(run.recipe, **setting)) for run in runs for setting in grid]
    results = run_all(tried, train, val, processes=processes, folder=folder)
    for name in diverged(results):
        print(f"diverged, counted as 0%: {name}", flush=True)
    keys = list(grid[0])
    means = results.fillna({"accuracy": 0.0}).groupby([group, *keys])["accuracy"].mean()
    return {name: dict(zip(keys, best[1:])) for name, best in means.groupby(level=0).idxmax().items()}


def compare_on_resnet50(
    images: ImageSplits,
    hypernetworks: Mapping[str, GHN],
    finetune: Mapping,
    augment: Augment,
    seed: int,
    processes: int,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """ResNet-50 from He initialisation ("random") and from predicted parameters, by each optimiser (PPUDA Fig. 13).

    Returns:
        Rows of ``run_all``, loss and accuracy on validation images ten times: of each initialisation and optimiser the
        run of the learning rate in ``finetune["resnet50_lrs"]`` that ends with the best accuracy.
    """
    steps = finetune["resnet50_steps"]
    recipe = TrainingRecipe(steps, lr=1.0, batch_size=finetune["batch_size"], augment=augment)
    first = initial_runs([TorchvisionNetwork(len(images.classes), images.side)], recipe, [seed], hypernetworks)
    sides = [run for run in first if run.initialisation != "orthogonal"]
    grid = grid_of(finetune["resnet50_lrs"], [recipe.weight_decay])
    runs = [replace(run, recipe=replace(recipe, **setting)) for run in sides for setting in grid]
    every = max(1, steps // 10)
    results = run_all(runs, images.train, images.val, range(0, steps, every), processes, every, folder)
    ends = results[results["step"] == steps].fillna({"accuracy": 0.0})
    best = ends.groupby(["initialisation", "optimizer"], sort=False)["accuracy"].idxmax()
    return results.merge(ends.loc[best, ["initialisation", "optimizer", "lr"]])


def crossover(results: pd.DataFrame, name: str, column: str = "loss") -> int | None:
    """Step of rows of ``run_all`` from which on ``name`` is no more ahead of "random" in training loss (or in
    ``column`` "accuracy"); 0 if it never was, None if it still is at the end. Of the means of the runs that go on; a
    side without any is behind."""
    means = results.groupby(["step", "initialisation"])[column].mean().unstack().dropna(how="all")
    means = (-means if column == "accuracy" else means).fillna(math.inf)
    ahead = means[name] < means["random"]
    if ahead.iloc[-1]:
        return None
    later = ahead.index[ahead.to_numpy().nonzero()[0].max() + 1 :] if ahead.any() else [0]
    return int(later[0])


def wins(results: pd.DataFrame, name: str, against: str | None = None) -> pd.DataFrame:
    """For how many networks an initialisation wins against "random", and by how much (GHN-3 Table 4).

    Args:
        results: rows with ``initialisation``, ``moment``, ``network``, ``accuracy``; seeds are averaged.
        against: moment at which "random" is taken; None: the same as that of ``name``.

    Returns:
        One row a moment: ``networks``, ``wins``, ``mean gain`` (of the networks that win), ``mean loss`` and ``largest
        loss`` (of those that lose), in points of accuracy; NaN where there is none.
    """
    means = results.groupby(["initialisation", "moment", "network"], sort=False)["accuracy"].mean().unstack()
    reference = means.loc["random"]
    difference = means.loc[name] - (reference.loc[against] if against else reference)
    losses = difference.where(difference < 0)
    columns = {"networks": difference.count(axis=1), "wins": (difference > 0).sum(axis=1)}
    columns |= {"mean gain": difference.where(difference > 0).mean(axis=1)}
    return pd.DataFrame(columns | {"mean loss": losses.mean(axis=1), "largest loss": losses.min(axis=1)})


def _run(run: Run, train: ImageSet, test: ImageSet, checkpoints: Sequence[int], loss_every: int | None) -> list[dict]:
    settings = {key: getattr(run.recipe, key) for key in ("optimizer", "lr", "weight_decay")}
    common = {**dict(run.labels), "seed": run.seed, **settings, "budget": run.recipe.steps}
    losses, score = [], lambda net: accuracy(net, test, EVALUATION_BATCH)
    try:
        results = train_network(initial_network(run), train, run.recipe, run.seed, score, checkpoints, losses.append)
    except Exception as error:  # whatever is wrong with one network, the others are trained
        empty = {"step": run.recipe.steps, "accuracy": math.nan, "loss": math.nan}
        return [{**common, **empty, "error": one_line(error)}]
    losses += [math.nan] * (run.recipe.steps - len(losses))
    logged = range(loss_every, run.recipe.steps, loss_every) if loss_every else ()
    steps = sorted({*results, *logged})
    return [
        {**common, "step": step, "accuracy": results.get(step, math.nan), "loss": _mean(losses[last:step]), "error": ""}
        for last, step in pairwise((0, *steps))
    ]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan


def initial_network(run: Run) -> nn.Module:
    """The network of a run before its first step, batch norm with running statistics."""
    torch.manual_seed(run.seed)
    net = run.architecture.build(device="cpu", track_running_stats=True)
    initialize(run.initialisation, net, Sources(run.seed, parameters=run.parameters, orth_from=run.orth_from))
    return net
