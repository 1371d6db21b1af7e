"""Ordinary training of single networks, from random, orthogonal or predicted parameters."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import Augment, DataError, ImageSet
from ghnlib.hypernetwork.ghn import GHN, ClassLayers
from ghnlib.measuring.accuracy import SCORES, estimate_batch_norm, exits_of, top_accuracies
from ghnlib.measuring.kept import rows_kept
from ghnlib.training.initialization import Sources, initialize
from ghnlib.training.step import OPTIMIZERS

EVALUATION_BATCH = 256
"""With running statistics the batch size does not change accuracy, only speed."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Training of one network (PPUDA section 5, GHN-3 section 5.2).

    Attributes:
        steps: updates. lr: the peak rate. batch_size: images of a step.
        momentum: of "sgd" alone. clip: the largest norm of a gradient.
        schedule: a key of ``SCHEDULES``.
        optimizer: "sgd" (with momentum), "adam" (weight decay coupled) or "adamw" (decoupled).
        bn_batches: batches of EVALUATION_BATCH training images, of one pass at most, from which batch-norm statistics
            are estimated before each evaluation.
        auxiliary_weight: of the loss of an auxiliary head, 0.4 in PPUDA (Table 9) as in DARTS, 0.5 in GHN 2018.
        drop_path: probability of dropping an operation's output at the end of the training; it rises from 0.
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
    drop_path: float = 0.0
    auxiliary_weight: float = 0.4


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** int(3 * done),  # of 90 epochs after 30 and 60 (GHN-3 Table 6)
    "step-half": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # anytime networks (GHN 2018, section 5.4)
    "constant": lambda done: 1.0,  # within the first 30 epochs of these (GHN-3 Table 2)
}
"""Share of the training that is done -> factor on the learning rate."""


@dataclass(frozen=True)
class Run:
    """One network trained once.

    Attributes:
        seed: of random initialisation and the order of images.
        initialisation: a key of ``INITIALIZATIONS``; sources: what it draws on, with the seed of the run.
        labels: columns of the result.
        auxiliary: whether a second classifier helps in training, see ``Architecture.build``.
    """

    architecture: Architecture
    recipe: TrainingRecipe
    seed: int
    initialisation: str = "random"
    sources: Sources = Sources()
    labels: Mapping[str, object] = field(default_factory=dict)
    auxiliary: bool = False


def initial_network(run: Run, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a run before its first step, on a device, batch norm with running statistics. Random values are
    those of the CPU."""
    torch.manual_seed(run.seed)
    options = {"auxiliary": True} if run.auxiliary else {}
    net = run.architecture.build(device="cpu", track_running_stats=True, **options).to(device)
    initialize(run.initialisation, net, replace(run.sources, seed=run.seed))
    return net


def on_cpu(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of parameters with their names, as a network lists them: what is kept, compared or waits for its turn."""
    return {name: value.detach().to("cpu", copy=True) for name, value in parameters}


def train_network(
    net: nn.Module,
    images: ImageSet,
    recipe: TrainingRecipe,
    seed: int,
    measure: Callable[[nn.Module], object],
    checkpoints: Sequence[int] = (),
    log: Callable[[float], object] = lambda loss: None,
) -> dict[int, object]:
    """Train a network and measure it at ``checkpoints`` (numbers of steps, 0 = untrained) and at the end. ``log`` is
    called with the training loss of each step. Returns step -> what ``measure`` returned: None after a loss or gradient
    that is not finite."""
    make = {"sgd": partial(torch.optim.SGD, momentum=recipe.momentum), **OPTIMIZERS}[recipe.optimizer]
    optimizer = make(net.train().parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    factor = SCHEDULES[recipe.schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / max(1, recipe.steps)))
    wanted = sorted({*(c for c in checkpoints if c <= recipe.steps), recipe.steps})
    results = dict.fromkeys(wanted)
    batches = images.stream(recipe.batch_size, seed, augment=recipe.augment)
    for step in range(recipe.steps + 1):
        if recipe.drop_path:
            net.drop_path = recipe.drop_path / recipe.steps * step
        if step in results:
            estimate_batch_norm(net, images, recipe.bn_batches, EVALUATION_BATCH, seed)
            results[step] = measure(net)
            net.train()
        if step < recipe.steps:
            x, y = next(batches)
            loss = _loss(net(x), y, recipe)
            log(loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            if not (loss + norm).isfinite():
                break
            optimizer.step()
            schedule.step()
    return results


def _loss(output: Tensor | list[Tensor] | tuple[Tensor, Tensor], labels: Tensor, recipe: TrainingRecipe) -> Tensor:
    """Sum of the exits' cross-entropies, that of an auxiliary head weighted."""
    loss = partial(F.cross_entropy, target=labels, label_smoothing=recipe.label_smoothing)
    if isinstance(output, tuple):
        return loss(output[0]) + recipe.auxiliary_weight * loss(output[1])
    return sum(map(loss, exits_of(output)))


@dataclass(frozen=True)
class Accuracy:
    """Measures ``accuracy`` (percent) of a network on images; ``score``: of ``top_accuracies``; ``metrics``: others."""

    images: ImageSet
    score: str = "accuracy"
    metrics: Sequence[str] = ()

    def __call__(self, net: nn.Module) -> dict[str, float]:
        found = top_accuracies(net, self.images, EVALUATION_BATCH, metrics=self.metrics)
        return {"accuracy": found[self.score], **{name: found[name] for name in self.metrics}}


def run_all(
    runs: Sequence[Run],
    train: ImageSet,
    measure: Callable[[nn.Module], Mapping[str, object]],
    checkpoints: Sequence[int] = (),
    processes: int = 1,
    folder: str | Path | None = None,
    loss_every: int | None = None,
) -> pd.DataFrame:
    """Train many networks in parallel processes of one core each.

    Args:
        measure: a network -> columns of its row, such as ``Accuracy``.
        checkpoints: steps at which networks are measured beside the end.
        folder: where finished runs are kept, see ``map_kept``.

    Returns:
        One row a run and checkpoint, and with ``loss_every`` one each so many steps: the run's labels, ``seed``,
        ``optimizer``, ``lr``, ``weight_decay``, ``budget`` (steps of the run), ``step``, what ``measure`` returned,
        ``loss`` (mean training loss of the steps since the row before), ``error`` ("" if none). Measures are missing
        (NaN) in rows without, also the loss once a run has diverged. A run that raised an error has its last row alone.

    Raises:
        DataError: every run raised an error; the message is the first one's.
    """
    common = (train, measure, tuple(checkpoints), loss_every)
    rows = rows_kept(_run, [(_labels(run), (run,)) for run in runs], common, processes, folder)
    if not len(rows):
        return rows
    if (rows["error"] != "").all():
        raise DataError(f"none of {len(rows)} trainings could be run: {rows['error'].iloc[0]}")
    rows["step"] = rows["step"].fillna(rows["budget"]).astype(int)
    last = [name for name in ("accuracy", "loss", "error") if name in rows]
    return rows[[*rows.columns.drop(last), *last]]


def _labels(run: Run) -> dict[str, object]:
    settings = {key: getattr(run.recipe, key) for key in ("optimizer", "lr", "weight_decay")}
    return {**run.labels, "seed": run.seed, **settings, "budget": run.recipe.steps}


def _run(
    run: Run, train: ImageSet, measure: Callable, checkpoints: Sequence[int], loss_every: int | None
) -> list[dict[str, object]]:
    losses: list[float] = []
    net = initial_network(run, train.device)
    results = train_network(net, train, run.recipe, run.seed, measure, checkpoints, losses.append)
    losses += [math.nan] * (run.recipe.steps - len(losses))
    logged = range(loss_every, run.recipe.steps, loss_every) if loss_every else ()
    steps = sorted({*results, *logged})
    return [
        {"step": step, "accuracy": math.nan, **(results.get(step) or {}), "loss": _mean(losses[last:step])}
        for last, step in pairwise((0, *steps))
    ]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan


def diverged(results: pd.DataFrame) -> list[str]:
    """What the runs of ``run_all`` are called that did not reach their end with a finite loss and gradient, or ended
    with an error."""
    ends = results[(results["step"] == results["budget"]) & results["accuracy"].isna()]
    rows = ends.drop(columns=["step", *SCORES, "loss", "moment"], errors="ignore").to_dict("records")
    return [", ".join(f"{name} {value}" for name, value in row.items() if value != "") for row in rows]


def grid_of(lrs: Mapping[str, Sequence[float]], weight_decays: Sequence[float]) -> list[dict[str, object]]:
    """Every combination of an optimiser with one of its rates and a weight decay, as fields of the recipe."""
    rates = [(optimizer, lr) for optimizer in lrs for lr in lrs[optimizer]]
    return [{"optimizer": o, "lr": lr, "weight_decay": decay} for (o, lr), decay in product(rates, weight_decays)]


def tune(
    runs: Sequence[Run], grid: Sequence[Mapping[str, object]], train: ImageSet, val: ImageSet, **kept: Any
) -> dict[object, dict[str, object]]:
    """For each label ``initialisation`` the setting of the ``grid`` (see ``grid_of``) with the best mean accuracy on
    validation images. All try the same settings, so that each side has the same tuning budget; a run that diverges
    counts as 0. ``kept``: ``processes`` and ``folder`` of ``run_all``."""
    tried = [replace(run, recipe=replace(run.recipe, **setting)) for run in runs for setting in grid]
    results = run_all(tried, train, Accuracy(val), **kept)
    for name in diverged(results):
        print(f"diverged, counted as 0%: {name}", flush=True)
    return best_settings(results, "initialisation", list(grid[0]))


def best_settings(
    tried: pd.DataFrame, group: str | list[str], settings: list[str], score: str = "accuracy"
) -> dict[object, dict[str, object]]:
    """For each value (a tuple of several) of the columns ``group`` the values of ``settings`` with the best mean
    score; what has none counts as 0."""
    groups = [group] if isinstance(group, str) else group
    means = tried.fillna({score: 0.0}).groupby([*groups, *settings])[score].mean()
    best = means.groupby(level=list(range(len(groups))) if len(groups) > 1 else 0).idxmax()
    return {name: dict(zip(settings, where[len(groups) :])) for name, where in best.items()}


def initial_runs(
    architectures: Sequence[Architecture],
    recipe: TrainingRecipe,
    seeds: Sequence[int],
    hypernetworks: Mapping[str, Sequence[GHN]],
    tuned: Mapping[str, Mapping[str, object]] | None = None,
    class_layers: ClassLayers = True,
    given: Mapping[str, Sequence[dict[str, Tensor]]] | None = None,
) -> list[Run]:
    """Runs of each architecture and seed from random, orthogonal and predicted parameters, these with GHN-3's noise,
    labelled ``initialisation`` ("random", "orthogonal", a name) and ``network`` (index).

    Of each hypernetwork the i-th seed's runs start from what its i-th training predicts, or in turn if there are more
    seeds. ``tuned``: fields of the recipe that differ, by initialisation, as ``tune`` finds them; ``class_layers``:
    whether classification layers are predicted, "resize": of other classes too, or random; ``given``: further
    initialisations by name, parameters of the first architectures. Raises DataError if classification layers are to be
    predicted for another number of classes than a hypernetwork's.
    """
    predicted = {name: [_predict(name, ghn, architectures, class_layers) for ghn in trainings]
                 for name, trainings in hypernetworks.items()}  # fmt: skip
    sides = [(name, name, [[None] * len(architectures)]) for name in ("random", "orthogonal")]
    sides += [(name, "ghn-noise", starts) for name, starts in predicted.items()]
    sides += [(name, "ghn", [starts]) for name, starts in (given or {}).items()]
    runs = []
    for name, initialisation, trainings in sides:
        own = replace(recipe, **tuned[name]) if tuned else recipe
        for network, (architecture, *starts) in enumerate(zip(architectures, *trainings)):
            sources = [Sources(parameters=start) for start in starts]
            labels = {"initialisation": name, "network": network}
            runs += [Run(architecture, own, seed, initialisation, source, labels)
                     for seed, source in zip(seeds, cycle(sources))]  # fmt: skip
    return runs


@torch.no_grad()
def _predict(
    name: str, ghn: GHN, architectures: Sequence[Architecture], class_layers: ClassLayers
) -> list[dict[str, Tensor]]:
    known, wanted = ghn.config.num_classes, {architecture.num_classes for architecture in architectures}
    if class_layers is True and wanted != {known}:
        raise DataError(f"hypernetwork {name} is for {known} classes, not for {wanted}: train one on these images.")
    predictions = (ghn.predict(architecture.graph, predict_class_layers=class_layers) for architecture in architectures)
    return [on_cpu(prediction.items()) for prediction in predictions]  # many wait there for their turn
