"""What initialisations cost and give (GHN-3 Table 6), a part of the report on accuracy without training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import pandas as pd
from torch import Tensor

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import mix
from ghnlib.experiments.setup import Setup
from ghnlib.measuring.costs import flops, step_flops
from ghnlib.measuring.kept import map_kept, rows_kept
from ghnlib.reporting.statistics import (
    Measured,
    counted,
    mean_and_error,
    over_trainings,
    paired_interval,
    rate_in_words,
    with_standard_error,
)
from ghnlib.training.initialization import INITIALIZATIONS, Sources
from ghnlib.training.networks import Accuracy, Run, TrainingRecipe, best_settings, initial_network, on_cpu, run_all

PEERS = 16
"""Validation architectures whose predictions "ghn-mean" averages."""
BEFORE = ("random", "he", "orthogonal", "gradinit", "nio")
"""Initialisations that a prediction is compared with after training."""
BASELINES = ("ghn-perturbed", "ghn-mean", "ghn-shuffled")
"""Those that show what a prediction owes to its graph, compared before training."""


@dataclass(frozen=True)
class ComparedInitialisations:
    """Networks trained from each initialisation, at the rate that is best for it. ``rows``: of ``run_all``, with
    ``initialisation``, ``training`` (seed of the hypernetwork that predicts; of others the first), ``network``, ``lr``,
    ``step`` (0 and the last), ``accuracy`` (percent, test images), ``error``; ``costs``: by initialisation, in training
    steps; ``lrs``: the rates that were tried."""

    rows: pd.DataFrame
    costs: pd.Series
    lrs: Sequence[float]

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Accuracies, see ``counted``: rows are initialisations, trainings and networks, columns steps."""
        keys = ["initialisation", "training", "network"]
        return counted(self.rows).pivot(index=keys, columns="step", values="accuracy")

    @property
    def per_network(self) -> pd.DataFrame:
        """The same, means over trainings: rows are initialisations and networks."""
        return self.scores.groupby(level=["initialisation", "network"], sort=False).mean()

    @property
    def failed(self) -> pd.DataFrame:
        """Initialisation, network and error of those that failed."""
        return self.rows.loc[self.rows["error"] != "", ["initialisation", "network", "error"]]

    def lead(self, step: int, others: Iterable[str]) -> dict[str, Measured]:
        """Points by which networks with predicted parameters are ahead of another initialisation at a step, paired by
        network and, where both are predicted, by training."""
        scores, found = self.scores[step].unstack(), {}
        for name in others:
            if {"ghn", name} <= set(scores.index.get_level_values(0)):
                other = scores.loc[name].reindex(scores.loc["ghn"].index).ffill()
                pairs = zip(scores.loc["ghn"].to_numpy(), other.to_numpy())
                found[name] = over_trainings([paired_interval(*pair) for pair in pairs])
        return found

    @property
    def after(self) -> dict[str, Measured]:
        """The lead over initialisations that predict nothing, after the last step."""
        return self.lead(self.scores.columns.max(), BEFORE)

    @property
    def owed(self) -> dict[str, Measured]:
        """The lead over baselines that lack the graph or the exact values, without training."""
        return self.lead(0, BASELINES)

    @property
    def claims(self) -> dict[str, Measured]:
        """Of GHN-3 Table 6."""
        return {"few-steps-gradinit": self.after["gradinit"]} if "gradinit" in self.after else {}

    @property
    def table(self) -> pd.DataFrame:
        """One row an initialisation: cost, rate, accuracy at each step, mean over trainings ± standard error
        over networks."""
        rates = (
            self.rows.groupby("initialisation", sort=False)["lr"].first().map(lambda lr: rate_in_words(lr, self.lrs))
        )
        table = pd.DataFrame({"cost in training steps": self.costs.round(2), "lr": rates}).reindex(rates.index)
        for step, values in self.per_network.items():
            table[f"{step} steps"] = values.groupby(level=0).agg(with_standard_error)
        return table.rename_axis(None)

    @property
    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """Initialisation -> "N steps" -> ``mean_and_error`` over networks of the means over trainings."""
        by_name = self.per_network.groupby(level=0, sort=False)
        return {
            name: {f"{step} steps": mean_and_error(values) for step, values in rows.items()} for name, rows in by_name
        }


def compare_initialisations(
    setup: Setup, variant: str, architectures: Sequence[Architecture], names: Iterable[str] = INITIALIZATIONS
) -> ComparedInitialisations:
    """Train architectures for few steps from each initialisation, keys of ``INITIALIZATIONS`` (GHN-3 Table 6), with
    each training of the hypernetwork ``variant``. Each takes the learning rate with the best accuracy on validation
    images for the first validation architecture. Raises DataError if no training could be run."""
    names, section, images = list(names), setup.evaluate, setup.images
    tuning, *others = islice(setup.split("val"), PEERS)
    learning = {"held_out": images.val, "steps": section.learned_steps, "batch_size": section.sgd.batch_size}
    common = Sources(setup.seed, peers=[a.graph for a in (tuning, *others)], images=images.train, **learning)
    trainings = {seed: replace(common, ghn=ghn) for seed, ghn in setup.hypernetworks[variant].items()}
    cases = [(name, seed) for name in names for seed in list(trainings)[: None if _predicts(name) else 1]]
    recipe = setup.recipe(section.sgd, section.initialised_steps)
    runs = [_run(name, seed, -1, tuning, recipe, trainings[seed]) for name, seed in cases]
    starts = map_kept(_start, [(run,) for run in runs], (), **setup.kept, failures=True)
    started = [run if isinstance(start, str) else replace(run, initialisation="ghn", sources=Sources(parameters=start))
               for run, start in zip(runs, starts)]  # fmt: skip
    runs = [replace(run, recipe=replace(recipe, lr=lr)) for run in started for lr in section.initialised_lrs]
    tuned = best_settings(run_all(runs, images.train, Accuracy(images.val), **setup.kept), "initialisation", ["lr"])
    runs = [_run(name, seed, i, architecture, replace(recipe, **tuned[name]), trainings[seed])
            for name, seed in cases for i, architecture in enumerate(architectures)]  # fmt: skip
    rows = run_all(runs, images.train, Accuracy(images.test), (0,), **setup.kept)
    smallest = min(architectures, key=lambda a: len(a.graph))
    run = _run("random", 0, 0, smallest, recipe, next(iter(trainings.values())))
    tasks = [({"initialisation": name}, (name,)) for name in names]
    costs = rows_kept(initialisation_cost, tasks, (run,), **setup.kept).set_index("initialisation")
    return ComparedInitialisations(rows, costs["cost"], section.initialised_lrs)


def _predicts(name: str) -> bool:
    """Whether an initialisation depends on the hypernetwork."""
    return name in INITIALIZATIONS and bool({"prediction", "ghn"} & set(INITIALIZATIONS[name][1]))


def _run(
    name: str, training: int, network: int, architecture: Architecture, recipe: TrainingRecipe, sources: Sources
) -> Run:
    own = replace(sources, graph=architecture.graph)
    labels = {"initialisation": name, "training": training, "network": network}
    return Run(architecture, recipe, mix(sources.seed, network + 1), name, own, labels)


def _start(run: Run) -> dict[str, Tensor]:
    """Initial parameters: to learn scales takes longer than a run, and is the same for each rate."""
    return on_cpu(initial_network(run, run.sources.images.device).named_parameters())


def initialisation_cost(name: str, run: Run) -> Mapping[str, float]:
    """``cost``: FLOPs of convolutions and matrix products (QR is not counted) of an initialisation, in those of a
    training step of the run."""
    spent = flops(lambda: initial_network(replace(run, initialisation=name), run.sources.images.device))
    return {"cost": spent / (run.recipe.batch_size * step_flops([run.architecture]))}
