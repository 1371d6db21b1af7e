"""The report on fine-tuning: training from random, orthogonal and predicted parameters (GHN-3 Tables 2 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import TorchvisionNetwork
from ghnlib.experiments.families import family_networks
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.splits import graph_statistics
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import evaluate_predictions
from ghnlib.reporting.publish import published
from ghnlib.reporting.statistics import (
    Measured,
    mean_and_error,
    paired_interval,
    share_above_half,
    with_standard_error,
)
from ghnlib.training.networks import (
    Accuracy,
    TrainingRecipe,
    diverged,
    grid_of,
    initial_runs,
    run_all,
    tune,
)

DEEPNETS = "DeepNets"
"""The family of the architectures that are drawn, beside torchvision's."""
EARLY = (0, 4)
"""Steps of the shortest training at which networks are compared, beside the end of each."""
TENTH = (0.05, 0.2)
"""Epochs that count as the papers' tenth of one."""

Settings = dict[str, dict[str, object]]
"""Initialisation -> optimizer, lr and weight_decay."""


@dataclass(frozen=True)
class Budgets:
    """Lengths of training: ``steps`` of each, rising; ``epoch``: steps of one epoch."""

    steps: tuple[int, ...]
    epoch: int

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """Those of ``finetune.budgets``, in epochs."""
        epoch = len(setup.images.train) // setup.finetune.batch_size
        return cls(tuple(sorted({max(1, round(epochs * epoch)) for epochs in setup.finetune.budgets})), epoch)

    @property
    def tenth(self) -> str | None:
        """Name of the budget that is about a tenth of an epoch, the papers' shortest."""
        return next((self.name(n) for n in self.steps if TENTH[0] <= n / self.epoch <= TENTH[1]), None)

    @property
    def one(self) -> str:
        """Name of the budget of one epoch, or of the longest where none is."""
        return self.name(self.epoch if self.epoch in self.steps else self.steps[-1])

    @property
    def moments(self) -> dict[tuple[int, int], str]:
        """Where networks are compared, in the order of training: budget and step of it -> name."""
        shortest = self.steps[0]
        early = {(shortest, step): f"{step} steps" for step in EARLY if step < shortest}
        return early | {(steps, steps): self.name(steps) for steps in self.steps}

    def name(self, steps: int) -> str:
        """Such as "3 steps", or "2 epochs" where these are whole."""
        epochs, rest = divmod(steps, self.epoch)
        return f"{steps} steps" if rest else f"{epochs} {'epoch' if epochs == 1 else 'epochs'}"

    def checkpoints(self, budget: int) -> list[int]:
        """Steps at which a training is measured: where networks are compared, in the longest after each epoch too."""
        epochs = range(self.epoch, budget, self.epoch) if budget == self.steps[-1] else ()
        return sorted({*(step for of, step in self.moments if of == budget), *epochs})

    def in_epochs(self, steps: int) -> str:
        """A number of steps, and in epochs."""
        return f"{steps} ({steps / self.epoch:.2g} epochs)"


class Networks(NamedTuple):
    """What is fine-tuned, by family. ``tuning``: what settings are tuned on, of torchvision the same network;
    ``refused``: why one of torchvision's is left out, by name."""

    tuning: dict[str, Sequence[Architecture | TorchvisionNetwork]]
    chosen: dict[str, Sequence[Architecture | TorchvisionNetwork]]
    refused: dict[str, str]


def choose_networks(setup: Setup) -> Networks:
    """The test architectures that the last of the hypernetworks serves best on validation images, architectures of the
    split "val" for tuning, torchvision's networks."""
    settings, images, candidates = setup.finetune, setup.images, list(setup.split("test"))
    chooser = setup.hypernetworks[settings.variants[-1]]
    scores = evaluate_predictions(chooser, candidates, images.val, processes=setup.processes, folder=setup.folder)
    best = scores.nlargest(settings.networks, "accuracy")["index"]
    found, refused = family_networks(settings.families, len(images.classes), images.side, chooser)
    of_torchvision = {family: [network] for family, network in found.items()}
    tuning = list(setup.split("val"))[: settings.tuning_networks]
    return Networks(
        {DEEPNETS: tuning} | of_torchvision, {DEEPNETS: [candidates[i] for i in best]} | of_torchvision, refused
    )


def tune_settings(setup: Setup, networks: Networks) -> dict[tuple[str, int], Settings]:
    """For each family and budget in steps the best settings of each initialisation on validation images, all of the
    same grid."""
    grid, budgets, tuned = grid_of(setup.finetune.lrs, setup.finetune.weight_decays), Budgets.of(setup), {}
    for family, members in networks.tuning.items():
        for steps in budgets.steps:
            runs = initial_runs(members, _recipe(setup, steps), [setup.seed], _hypernetworks(setup))
            tuned[family, steps] = tune(
                runs, grid, setup.images.train, setup.images.val, "initialisation", setup.processes, setup.folder
            )
            print(f"{family}, {steps} steps: {len(runs)} runs tuned", flush=True)
    return tuned


def _recipe(setup: Setup, steps: int) -> TrainingRecipe:
    """Its learning rate is to be tuned."""
    settings = setup.finetune
    return TrainingRecipe(
        steps, lr=1.0, batch_size=settings.batch_size, schedule=settings.schedule, augment=setup.augment,
        label_smoothing=settings.label_smoothing,
    )  # fmt: skip


def _hypernetworks(setup: Setup) -> dict[str, GHN]:
    return {name: setup.hypernetworks[name] for name in setup.finetune.variants}


@dataclass(frozen=True)
class Trainings:
    """Networks trained from each initialisation, by family and budget.

    Attributes:
        rows: those of ``run_all``, on test images, with ``moment`` (a name, see ``Budgets``) and ``family``.
        variants: hypernetworks whose predictions are compared; the last one's are looked at most closely.
    """

    rows: pd.DataFrame
    budgets: Budgets
    variants: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        """What the runs are called that diverged, which count as 0 %, or failed, which are left out."""
        return diverged(self.rows)

    @cached_property
    def counted(self) -> pd.DataFrame:
        """The rows that are compared."""
        return self.rows[self.rows["error"] == ""].dropna(subset="moment").fillna({"accuracy": 0.0})

    @property
    def deepnets(self) -> pd.DataFrame:
        """Those of DeepNets."""
        return self.counted[self.counted["family"] == DEEPNETS]

    @property
    def moments(self) -> list[str]:
        """At which DeepNets are compared, in the order of training."""
        reached = set(self.deepnets["moment"])
        return [moment for moment in self.budgets.moments.values() if moment in reached]

    @cached_property
    def per_network(self) -> pd.Series:
        """Accuracy (%) of DeepNets by ``initialisation``, ``moment`` and ``network``, the mean of its seeds."""
        return self.deepnets.groupby(["initialisation", "moment", "network"])["accuracy"].mean()

    @property
    def longest(self) -> pd.DataFrame:
        """Rows of the longest training of DeepNets, of which the loss is known."""
        rows = self.rows[(self.rows["family"] == DEEPNETS) & (self.rows["error"] == "")]
        return rows[(rows["budget"] == self.budgets.steps[-1]) & (rows["step"] > 0)]

    @property
    def evaluated(self) -> pd.DataFrame:
        """Rows of the longest training with an accuracy, and before the first step."""
        start = self.deepnets[self.deepnets["step"] == 0]
        return pd.concat([start, self.longest]).dropna(subset="accuracy")

    def leads(self, name: str) -> dict[str, Measured]:
        """By moment, the points of accuracy by which an initialisation is ahead of "random", over networks."""
        wide = self.per_network.unstack("initialisation")
        by_moment = {moment: wide.xs(moment, level="moment") for moment in self.moments}
        return {moment: paired_interval(rows[name], rows["random"]) for moment, rows in by_moment.items()}

    def wins(self, name: str, against: str | None = None) -> pd.DataFrame:
        """Those of DeepNets, see ``wins``."""
        return wins(self.deepnets, name, against).reindex(self.moments)

    def early_loss(self, name: str) -> tuple[int, Measured]:
        """The first steps of the longest training, and by how much the mean training loss over them is lower than that
        from "random", over networks."""
        first = self.longest["step"].min()
        rows = self.longest[self.longest["step"] == first]
        losses = rows.groupby(["network", "initialisation"])["loss"].mean().unstack()
        return int(first), paired_interval(losses["random"], losses[name])

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """``mean_and_error`` over DeepNets, by initialisation and moment."""
        return {
            name: {moment: mean_and_error(part) for moment, part in rows.groupby(level="moment", sort=False)}
            for name, rows in self.per_network.groupby(level="initialisation", sort=False)
        }

    def by_family(self) -> pd.DataFrame:
        """Accuracy (%) of torchvision's networks: rows are ``family`` and ``initialisation``, columns moments."""
        rows = self.counted[self.counted["family"] != DEEPNETS]
        return rows.groupby(["family", "initialisation", "moment"], sort=False)["accuracy"].mean().unstack("moment")


def train_networks(setup: Setup, networks: Networks, tuned: Mapping[tuple[str, int], Settings]) -> Trainings:
    """Train the chosen networks from each initialisation with its settings, measured on test images."""
    budgets, images, parts = Budgets.of(setup), setup.images, []
    for family, members in networks.chosen.items():
        for budget in budgets.steps:
            runs = initial_runs(
                members, _recipe(setup, budget), setup.finetune.seeds, _hypernetworks(setup), tuned[family, budget]
            )
            part = run_all(
                runs, images.train, Accuracy(images.test), budgets.checkpoints(budget), setup.processes, setup.folder,
                loss_every=max(1, budget // 10),
            )  # fmt: skip
            print(f"{family}, {budget} steps: {len(runs)} runs", flush=True)
            moments = [budgets.moments.get((budget, step)) for step in part["step"]]
            parts.append(part.assign(moment=moments, family=family))
    return Trainings(pd.concat(parts), budgets, setup.finetune.variants)


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


def settings_table(tuned: Mapping[tuple[str, int], Settings], budgets: Budgets) -> pd.DataFrame:
    """What was tuned, in words: rows are families and budgets, columns initialisations."""
    words = "{optimizer}, lr {lr:g}, weight decay {weight_decay:g}".format
    rows = {
        f"{family}, {budgets.name(steps)}": {name: words(**setting) for name, setting in settings.items()}
        for (family, steps), settings in tuned.items()
    }
    return pd.DataFrame(rows).T


def accuracy_table(trained: Trainings) -> pd.DataFrame:
    """Accuracy (%) of DeepNets, mean ± standard error over networks: rows are initialisations, columns moments."""
    cells = trained.per_network.groupby(level=["initialisation", "moment"]).agg(with_standard_error).unstack()
    return cells.reindex(trained.deepnets["initialisation"].unique())[trained.moments]


def papers_of(budgets: Budgets) -> list[str]:
    """Columns of published.yaml that stand beside ``accuracy_table``: those of budgets like the papers'."""
    columns = {budgets.tenth: "finetune/tenth-epoch", "1 epoch": "finetune/epoch"}
    return [column for name, column in columns.items() if name in budgets.moments.values()]


def wins_table(trained: Trainings, name: str) -> pd.DataFrame:
    """``wins`` at the same budget and against "random" after an epoch (as GHN-3 Table 4 counts), the published ones
    beside them where a budget is one epoch."""
    budgets = trained.budgets
    parts = {"same budget": trained.wins(name), f"random after {budgets.one}": trained.wins(name, against=budgets.one)}
    table = pd.concat(parts, axis=1).round(1)
    if budgets.one == "1 epoch":
        column = published("finetune/wins").rename({"1/10 epoch": budgets.tenth})
        table[column.name, "wins, mean gain, mean loss"] = column
    return table


def wins_by_kind(trained: Trainings, networks: Sequence[Architecture], name: str) -> pd.DataFrame:
    """At the same budget, "wins of networks": rows are what networks are made of, columns moments."""
    traits = pd.DataFrame([graph_statistics(network.graph) for network in networks])
    kinds = {
        "attention": traits["attention"], "squeeze-and-excitation": traits["squeeze_excitation"],
        "no batch norm": traits["bn_free"],
    }  # fmt: skip
    kinds["none of these"] = ~pd.DataFrame(kinds).any(axis=1)
    rows, found = trained.deepnets, {}
    for kind, members in kinds.items():
        if members.any():
            counts = wins(rows[rows["network"].isin(traits.index[members])], name).reindex(trained.moments)
            found[kind] = counts["wins"].map("{:.0f}".format) + " of " + counts["networks"].map("{:.0f}".format)
    return pd.DataFrame(found).T


def claims_of_leads(trained: Trainings) -> dict[str, Measured]:
    """GHN-3 over random initialisation after the shortest budget, an epoch and the longest budget."""
    if "ghn3" not in trained.variants:
        return {}
    leads, budgets = trained.leads("ghn3"), trained.budgets
    moments = {"few-steps": budgets.name(budgets.steps[0]), "one-epoch": "1 epoch",
               "full-training": budgets.name(budgets.steps[-1])}  # fmt: skip
    return {claim: leads[moment] for claim, moment in moments.items() if moment in leads}


def claims_of_wins(trained: Trainings) -> dict[str, Measured]:
    """For which share of the networks GHN-3 is ahead after an epoch."""
    if "ghn3" not in trained.variants or "1 epoch" not in trained.moments:
        return {}
    counts = trained.wins("ghn3").loc["1 epoch"]
    return {"wins-after-epoch": share_above_half(int(counts["wins"]), int(counts["networks"]))}
