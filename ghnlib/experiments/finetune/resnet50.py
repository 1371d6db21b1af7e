"""ResNet-50 from He initialisation and from predictions (PPUDA Fig. 13), and until when a prediction is ahead."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.experiments.finetune.tuning import Budgets, recipe_of
from ghnlib.experiments.setup import Setup
from ghnlib.reporting.statistics import Measured, over_trainings
from ghnlib.training.networks import Accuracy, best_settings, grid_of, initial_runs, run_all


def compare_on_resnet50(setup: Setup) -> pd.DataFrame:
    """ResNet-50 from He initialisation ("random") and from predicted parameters, by each optimiser (PPUDA Fig. 13).

    Rows of ``run_all``, loss and accuracy on validation images ten times: of each initialisation and optimiser the runs
    of the rate (of ``finetune.resnet50_lrs``) and weight decay with which that of the first seed ends with the best
    accuracy; the i-th seed starts from what the i-th training predicts. Empty without ``finetune.resnet50_steps``.
    """
    settings, images, steps = setup.finetune, setup.images, setup.finetune.resnet50_steps
    if not steps:
        return pd.DataFrame()
    recipe = recipe_of(setup, steps)
    network = NamedNetwork(len(images.classes), images.side)
    hypernetworks = setup.trainings_of(settings.resnet50_variants)
    seeds = settings.seeds[: len(setup.train.seeds)]
    runs = [run for run in initial_runs([network], recipe, seeds, hypernetworks) if run.initialisation != "orthogonal"]
    grid, first, every = grid_of(settings.resnet50_lrs, settings.weight_decays), seeds[0], max(1, steps // 10)
    tried = [replace(run, recipe=replace(recipe, **setting)) for run in runs if run.seed == first for setting in grid]
    options = images.train, Accuracy(images.val), range(0, steps, every), setup.processes, setup.folder, every
    rows, sides = run_all(tried, *options), ["initialisation", "optimizer"]
    best = best_settings(rows[rows["step"] == steps], sides, ["lr", "weight_decay"])
    chosen = pd.DataFrame([dict(zip(sides, side)) | setting for side, setting in best.items()])
    others = [
        replace(run, recipe=replace(recipe, optimizer=optimizer, **setting))
        for run in runs if run.seed != first
        for (name, optimizer), setting in best.items() if name == run.labels["initialisation"]
    ]  # fmt: skip
    return pd.concat([rows.merge(chosen), run_all(others, *options)], ignore_index=True)


def crossovers(resnet50: pd.DataFrame, variants: Sequence[str], column: str) -> dict[str, list[int | None]]:
    """``crossover`` by "VARIANT, OPTIMIZER" of the rows of ``compare_on_resnet50``, one a seed."""
    found: dict[str, list[int | None]] = {}
    for (optimizer, _), rows in resnet50.groupby(["optimizer", "seed"], sort=False) if len(resnet50) else ():
        for name in variants:
            found.setdefault(f"{name}, {optimizer}", []).append(crossover(rows, name, column))
    return found


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


def crossover_in_words(step: int | None, budgets: Budgets) -> str:
    """What ``crossover`` returned, for readers."""
    if step is None:
        return "ahead to the end"
    return f"ahead until step {budgets.in_epochs(step)}" if step else "never ahead"


def claims_of_resnet50(crossed: Mapping[str, Sequence[int | None]]) -> dict[str, Measured]:
    """By optimiser, the step from which on GHN-2 is no more ahead in accuracy, over trainings: infinite where one is to
    the end."""
    of_ghn2 = {name.removeprefix("ghn2, "): steps for name, steps in crossed.items() if name.startswith("ghn2, ")}
    late = lambda step: Measured(math.inf if step is None else float(step))
    return {
        f"resnet50-crossover/{optimizer}": over_trainings([*map(late, steps)]) for optimizer, steps in of_ghn2.items()
    }
