"""Ordinary training of single networks, from random, orthogonal or predicted parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ghnlib.architectures import Architecture, ResNet50
from ghnlib.data import ImageSplits
from ghnlib.evaluation import accuracy, exits_of
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, DataError, ImageSet
from ghnlib.initialization import add_noise, orthogonalize

EVALUATION_BATCH = 256
"""With running statistics the batch size does not change accuracy, only speed."""
NOISE = 3e-5
"""Scale of the noise before orthogonal post-processing (GHN-orth section 4)."""
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class SGDRecipe:
    """Training with a cosine schedule (PPUDA section 5, GHN-3 section 5.2).

    Attributes:
        steps: updates; the learning rate falls to 0 at the last.
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
    bn_batches: int = 2
    augment: Augment | None = None
    optimizer: str = "sgd"


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
    log: Callable[[float], object] = lambda loss: None,
) -> dict[int, float]:
    """Train a network and evaluate it at ``checkpoints`` (numbers of steps, 0 = untrained) and at the end.

    Args:
        log: called with the training loss of each step.

    Returns:
        Step -> what ``evaluate`` returned. After a loss or gradient that is not finite, the remaining values are NaN.
    """
    own = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    make = OPTIMIZERS[recipe.optimizer]
    optimizer = make(net.train().parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True, **own)
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
            loss = sum(F.cross_entropy(logits, y) for logits in exits_of(net(x)))
            log(loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            if not (loss + norm).isfinite():
                break
            optimizer.step()
            schedule.step()
    return results


def reestimate_batch_norm(net: nn.Module, images: ImageSet, recipe: SGDRecipe, seed: int) -> None:
    """Running statistics of batch norm as plain averages over training batches, see ``SGDRecipe.bn_batches``."""
    batches = islice(
        images.stream(EVALUATION_BATCH, seed), min(recipe.bn_batches, math.ceil(len(images) / EVALUATION_BATCH))
    )
    with torch.no_grad():
        update_bn(batches, net)


def initial_runs(
    architectures: Sequence[Architecture],
    recipe: SGDRecipe,
    seeds: Sequence[int],
    hypernetworks: Mapping[str, GHN],
    lrs: Mapping[str, float] | None = None,
    class_layers: bool = True,
    given: Mapping[str, Sequence[dict[str, Tensor]]] | None = None,
    post_processed: Collection[str] = (),
) -> list[Run]:
    """Runs of each architecture and seed from random, orthogonal and predicted parameters.

    Args:
        hypernetworks: by name.
        lrs: learning rate of each initialisation, instead of the recipe's.
        class_layers: whether classification layers are predicted; if not, they are random.
        given: further initialisations by name: parameters of the first architectures, by name.
        post_processed: names of which "NAME-orth" is added, the same with GHN-orth post-processing.

    Returns:
        Runs labelled ``initialisation`` ("random", "orthogonal", a name, "NAME-orth") and ``network`` (index).

    Raises:
        DataError: classification layers are to be predicted for another number of classes than a hypernetwork's.
    """
    sides: dict[str, Sequence[dict[str, Tensor] | None]] = dict.fromkeys(
        ("random", "orthogonal"), [None] * len(architectures)
    )
    sides |= {name: _predict(name, ghn, architectures, class_layers) for name, ghn in hypernetworks.items()}
    sides |= given or {}
    sides |= {f"{name}-orth": sides[name] for name in post_processed}
    orthogonal = {"orthogonal", *(f"{name}-orth" for name in post_processed)}
    runs = []
    for name, starts in sides.items():
        own = recipe if lrs is None else replace(recipe, lr=lrs[name])
        for network, (architecture, start) in enumerate(zip(architectures, starts)):
            labels = (("initialisation", name), ("network", network))
            runs += [Run(architecture, own, seed, start, name in orthogonal, labels) for seed in seeds]
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
) -> pd.DataFrame:
    """Train many networks in parallel processes of one core each.

    Returns:
        One row a run and checkpoint, and with ``loss_every`` one each so many steps: the run's labels, ``seed``,
        ``lr``, ``budget`` (steps of the run), ``step``, ``accuracy`` (percent), ``loss`` (mean training loss of the
        steps since the row before). Accuracy is NaN in rows without evaluation, both are NaN once a run has diverged.
    """
    rows = Parallel(processes)(delayed(_run)(run, train, test, checkpoints, loss_every) for run in runs)
    return pd.DataFrame([row for part in rows for row in part])


def diverged(results: pd.DataFrame) -> list[str]:
    """What the runs of ``run_all`` are called that did not reach their end with a finite loss and gradient."""
    ends = results[(results["step"] == results["budget"]) & results["accuracy"].isna()]
    rows = ends.drop(columns=["step", "accuracy", "loss", "moment"], errors="ignore").to_dict("records")
    return [", ".join(f"{name} {value}" for name, value in row.items()) for row in rows]


def tune_learning_rate(
    runs: Sequence[Run], lrs: Sequence[float], train: ImageSet, val: ImageSet, group: str, processes: int = 1
) -> dict:
    """The learning rate with the best mean accuracy on validation images, for each value of label ``group``.

    Every group tries the same rates, so that each side has the same tuning budget. A run that diverges counts as 0.
    """
    tried = [replace(run, recipe=replace(run.recipe, lr=lr)) for run in runs for lr in lrs]
    results = run_all(tried, train, val, processes=processes)
    for name in diverged(results):
        print(f"diverged, counted as 0%: {name}", flush=True)
    means = results.fillna({"accuracy": 0.0}).groupby([group, "lr"])["accuracy"].mean().unstack()
    return means.idxmax(axis=1).to_dict()


def compare_on_resnet50(
    images: ImageSplits,
    hypernetworks: Mapping[str, GHN],
    finetune: Mapping,
    augment: Augment,
    seed: int,
    processes: int,
) -> pd.DataFrame:
    """ResNet-50 from He initialisation ("random") and from predicted parameters, by each optimiser (PPUDA Fig. 13).

    Returns:
        Rows of ``run_all`` with ``optimizer``, accuracy on validation images: of each initialisation and optimiser the
        run of the learning rate in ``finetune["resnet50_lrs"]`` that ends with the best accuracy.
    """
    steps = finetune["resnet50_steps"]
    side = next(images.val.batches(1))[0].shape[-1]
    recipe = SGDRecipe(steps, lr=1.0, batch_size=finetune["batch_size"], augment=augment)
    first = initial_runs([ResNet50(len(images.classes), side)], recipe, [seed], hypernetworks)
    runs = [
        replace(run, recipe=replace(recipe, lr=lr, optimizer=name), labels=(*run.labels, ("optimizer", name)))
        for run in first if not run.orthogonal for name, lrs in finetune["resnet50_lrs"].items() for lr in lrs
    ]  # fmt: skip
    results = run_all(runs, images.train, images.val, processes=processes, loss_every=max(1, steps // 20))
    ends = results[results["step"] == steps].fillna({"accuracy": 0.0})
    best = ends.groupby(["initialisation", "optimizer"], sort=False)["accuracy"].idxmax()
    return results.merge(ends.loc[best, ["initialisation", "optimizer", "lr"]])


def crossover(results: pd.DataFrame, name: str, baseline: str = "random") -> int | None:
    """Step of rows of ``run_all`` from which on the baseline's training loss is no more above that of ``name``; 0 if it
    never was, None if it still is at the end. A run that has diverged is not ahead."""
    losses = results.pivot_table("loss", "step", "initialisation")
    ahead = losses[name] < losses[baseline]
    if ahead.iloc[-1]:
        return None
    later = ahead.index[ahead.to_numpy().nonzero()[0].max() + 1 :] if ahead.any() else [0]
    return int(later[0])


def wins(results: pd.DataFrame, name: str, baseline: str = "random", against: str | None = None) -> pd.DataFrame:
    """Against how many networks an initialisation wins, and by how much (GHN-3 Table 4).

    Args:
        results: rows with ``initialisation``, ``moment``, ``network``, ``accuracy``; seeds are averaged.
        against: moment at which the baseline is taken; None: the same as that of ``name``.

    Returns:
        One row a moment: ``networks``, ``wins``, ``mean gain`` (of the networks that win), ``mean loss`` and ``largest
        loss`` (of those that lose), in points of accuracy; NaN where there is none.
    """
    means = results.groupby(["initialisation", "moment", "network"], sort=False)["accuracy"].mean().unstack()
    reference = means.loc[baseline]
    difference = means.loc[name] - (reference.loc[against] if against else reference)
    losses = difference.where(difference < 0)
    columns = {"networks": difference.count(axis=1), "wins": (difference > 0).sum(axis=1)}
    columns |= {"mean gain": difference.where(difference > 0).mean(axis=1)}
    return pd.DataFrame(columns | {"mean loss": losses.mean(axis=1), "largest loss": losses.min(axis=1)})


def _run(run: Run, train: ImageSet, test: ImageSet, checkpoints: Sequence[int], loss_every: int | None) -> list[dict]:
    torch.set_num_threads(1)
    net, losses = initial_network(run), []
    results = train_network(
        net, train, run.recipe, run.seed, lambda net: accuracy(net, test, EVALUATION_BATCH), checkpoints, losses.append
    )
    losses += [math.nan] * (run.recipe.steps - len(losses))
    common = {**dict(run.labels), "seed": run.seed, "lr": run.recipe.lr, "budget": run.recipe.steps}
    logged = range(loss_every, run.recipe.steps, loss_every) if loss_every else ()
    steps = sorted({*results, *logged})
    return [
        {**common, "step": step, "accuracy": results.get(step, math.nan), "loss": _mean(losses[last:step])}
        for last, step in pairwise((0, *steps))
    ]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan


def initial_network(run: Run) -> nn.Module:
    """The network of a run before its first step, batch norm with running statistics."""
    torch.manual_seed(run.seed)
    net = run.architecture.build(device="cpu", track_running_stats=True)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in (run.parameters or {}).items():
            if name not in own or own[name].shape != value.shape:
                there = tuple(own[name].shape) if name in own else "no such parameter"
                raise DataError(f"{name} {tuple(value.shape)} does not fit the network, which has {there}.")
            own[name].copy_(value)
    if run.orthogonal:
        if run.parameters:
            add_noise(net, NOISE, torch.Generator().manual_seed(run.seed))
        orthogonalize(net)
    return net
