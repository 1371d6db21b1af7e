"""The report on fine-tuning: training from random, orthogonal and predicted parameters (GHN-3 Tables 2 and 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import NamedTuple, Self

import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NamedNetwork
from ghnlib.experiments.families import DEEPNETS, TrainedFamilies, family_networks
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.splits import graph_statistics
from ghnlib.reporting.publish import published
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    mean_and_error,
    mean_interval,
    over_trainings,
    paired_interval,
    rate_in_words,
    share_above_half,
    tables_over_trainings,
)
from ghnlib.training.networks import Accuracy, TrainingRecipe, grid_of, initial_runs, run_all, tune

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
        epoch = setup.images.train.steps_per_epoch(setup.finetune.batch_size)
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

    tuning: dict[str, Sequence[Architecture | NamedNetwork]]
    chosen: dict[str, Sequence[Architecture | NamedNetwork]]
    refused: dict[str, str]


def choose_networks(setup: Setup) -> Networks:
    """The first test architectures, the first of the split "val" for tuning, torchvision's networks. None is chosen by
    what a hypernetwork makes of it: that would be in its favour."""
    settings, images = setup.finetune, setup.images
    ghn = setup.trainings_of(settings.variants)[settings.variants[-1]][0]
    found, refused = family_networks(settings.families, len(images.classes), images.side, ghn)
    of_torchvision = {family: [network] for family, network in found.items()}
    counts = {"val": settings.tuning_networks, "test": settings.networks}
    tuning, test = ({DEEPNETS: list(islice(setup.split(name), count))} for name, count in counts.items())
    return Networks(tuning | of_torchvision, test | of_torchvision, refused)


def tune_settings(setup: Setup, networks: Networks) -> dict[tuple[str, int], Settings]:
    """For each family and budget in steps the best settings of each initialisation on validation images, all of the
    same grid; of the first training of each hypernetwork, which stands for the others."""
    grid, budgets, tuned = grid_of(setup.finetune.lrs, setup.finetune.weight_decays), Budgets.of(setup), {}
    first = {name: trainings[:1] for name, trainings in setup.trainings_of(setup.finetune.variants).items()}
    for family, members in networks.tuning.items():
        for steps in budgets.steps:
            runs = initial_runs(members, recipe_of(setup, steps), [setup.seed], first)
            tuned[family, steps] = tune(runs, grid, setup.images.train, setup.images.val, **setup.kept)
            print(f"{family}, {steps} steps: {len(runs)} runs tuned", flush=True)
    return tuned


def recipe_of(setup: Setup, steps: int) -> TrainingRecipe:
    """Fine-tuning for so many steps; its learning rate is to be tuned."""
    settings = setup.finetune
    return TrainingRecipe(
        steps, lr=1.0, batch_size=settings.batch_size, schedule=settings.schedule, augment=setup.augment,
        label_smoothing=settings.label_smoothing,
    )  # fmt: skip


@dataclass(frozen=True)
class FineTuned(TrainedFamilies):
    """Networks trained from each initialisation, by family and budget. ``rows``: also ``moment``, a name, see
    ``Budgets``; on test images. ``variants``: hypernetworks whose predictions are compared, the last one's most
    closely; ``top``: how many of its own best networks each side has in some tables (GHN-3 Table 2: ten)."""

    budgets: Budgets
    variants: tuple[str, ...]
    top: int

    @cached_property
    def counted(self) -> pd.DataFrame:
        """Those at a moment at which networks are compared."""
        return super().counted.dropna(subset="moment")

    @property
    def moments(self) -> list[str]:
        """At which DeepNets are compared, in the order of training."""
        reached = set(self.deepnets["moment"])
        return [moment for moment in self.budgets.moments.values() if moment in reached]

    @cached_property
    def per_network(self) -> pd.Series:
        """Accuracy (%) of DeepNets by ``initialisation``, ``moment`` and ``network``, the mean of its seeds."""
        return self.deepnets.groupby(["initialisation", "moment", "network"], sort=False)["accuracy"].mean()

    def scores(self, top: bool) -> pd.Series:
        """These of all networks, or of the ``top`` own ones of each initialisation and moment (GHN-3 Table 2)."""
        best = self.per_network.groupby(level=["initialisation", "moment"], sort=False).rank("first", ascending=False)
        return self.per_network[best <= self.top] if top else self.per_network

    @property
    def longest(self) -> pd.DataFrame:
        """Rows of the longest training of DeepNets, of which the loss is known."""
        rows = self.rows[(self.rows["family"] == DEEPNETS) & (self.rows["error"] == "")]
        return rows[(rows["budget"] == self.budgets.steps[-1]) & (rows["step"] > 0)]

    @property
    def losses(self) -> pd.DataFrame:
        """Its loss by initialisation, step and network, mean over seeds."""
        means = self.longest.groupby(["initialisation", "step", "network"], sort=False)["loss"].mean()
        return means.reset_index()

    def leads(self, name: str, top: bool = False) -> dict[str, Measured]:
        """By moment, the points of accuracy by which predictions are ahead of "random", over networks and trainings: on
        the same networks, or each with its ``top`` own ones."""
        return claims_over_trainings([one._leads(name, top) for one in self.by_training])

    def _leads(self, name: str, top: bool) -> dict[str, Measured]:
        found, wide = {}, self.scores(top).unstack("initialisation")
        for moment in self.moments:
            own, others = (wide.xs(moment, level="moment")[side] for side in (name, "random"))
            found[moment] = mean_interval(own).minus(mean_interval(others)) if top else paired_interval(own, others)
        return found

    def wins(self, name: str, against: str | None = None) -> pd.DataFrame:
        """Those of DeepNets, see ``wins``."""
        return wins(self.deepnets, name, against).reindex(self.moments)

    def early_loss(self, name: str) -> tuple[int, Measured]:
        """The first steps of the longest training, and by how much the mean training loss over them is lower than that
        from "random", over networks and trainings."""
        first = self.longest["step"].min()
        rows = self.longest[self.longest["step"] == first]
        means = rows.groupby(["training", "network", "initialisation"])["loss"].mean().unstack()
        return int(first), over_trainings([
            paired_interval(losses["random"], losses[name]) for _, losses in means.groupby(level="training")
        ])  # fmt: skip

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """``mean_and_error`` over DeepNets, by initialisation and moment."""
        return {
            name: {moment: mean_and_error(part) for moment, part in rows.groupby(level="moment", sort=False)}
            for name, rows in self.per_network.groupby(level="initialisation", sort=False)
        }

    def by_family(self) -> pd.DataFrame:
        """Accuracy (%) of torchvision's networks: rows are ``family`` and ``initialisation``, columns moments."""
        rows = self.counted[self.counted["family"] != DEEPNETS]
        means = rows.groupby(["family", "initialisation", "moment"], sort=False)["accuracy"].mean()
        return means.unstack("moment").rename_axis(columns=None)


def train_networks(setup: Setup, networks: Networks, tuned: Mapping[tuple[str, int], Settings]) -> FineTuned:
    """Train the chosen networks from each initialisation with its settings, measured on test images: the runs of each
    seed from the predictions of one training of the hypernetworks."""
    settings, budgets, images, parts = setup.finetune, Budgets.of(setup), setup.images, []
    trainings = dict(zip(settings.seeds, cycle(range(len(setup.train.seeds)))))
    hypernetworks = setup.trainings_of(settings.variants)
    for family, members in networks.chosen.items():
        for budget in budgets.steps:
            runs = initial_runs(members, recipe_of(setup, budget), settings.seeds, hypernetworks, tuned[family, budget])
            part = run_all(
                runs, images.train, Accuracy(images.test, metrics=setup.metrics[1:]), budgets.checkpoints(budget),
                loss_every=max(1, budget // 10), **setup.kept,
            )  # fmt: skip
            print(f"{family}, {budget} steps: {len(runs)} runs", flush=True)
            moments = [budgets.moments.get((budget, step)) for step in part["step"]]
            parts.append(part.assign(moment=moments, family=family, training=part["seed"].map(trainings)))
    return FineTuned(pd.concat(parts), budgets, settings.variants, settings.top)


def wins(results: pd.DataFrame, name: str, against: str | None = None) -> pd.DataFrame:
    """For how many networks an initialisation wins against "random", and by how much (GHN-3 Table 4), from rows with
    ``initialisation``, ``moment``, ``network``, ``accuracy``; seeds are averaged. ``against``: moment at which "random"
    is taken; None: the same.

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


def settings_table(
    tuned: Mapping[tuple[str, int], Settings], budgets: Budgets, lrs: Mapping[str, Sequence[float]]
) -> pd.DataFrame:
    """What was tuned, in words: rows are families and budgets, columns initialisations. ``lrs``: the grid's."""
    words = "{optimizer}, lr {rate}, weight decay {weight_decay:g}".format
    rates = lambda setting: {"rate": rate_in_words(setting["lr"], lrs[setting["optimizer"]])}
    rows = {
        f"{family}, {budgets.name(steps)}": {
            name: words(**setting, **rates(setting)) for name, setting in settings.items()
        }
        for (family, steps), settings in tuned.items()
    }
    return pd.DataFrame(rows).T


def accuracy_table(trained: FineTuned, top: bool = False) -> pd.DataFrame:
    """Accuracy (%) of DeepNets, see ``scores``: mean ± deviation over trainings, of random and orthogonal parameters
    over the seeds that stand for them. Rows are initialisations, columns moments."""
    means = [one.scores(top).groupby(level=[0, 1], sort=False).mean().unstack() for one in trained.by_training]
    return tables_over_trainings(means)[trained.moments].rename_axis(index=None, columns=None)


def family_table(trained: FineTuned) -> pd.DataFrame:
    """``by_family``, mean ± deviation over trainings; empty without families."""
    tables = [one.by_family() for one in trained.by_training]
    return tables_over_trainings(tables) if len(tables[0]) else tables[0]


def papers_of(budgets: Budgets) -> list[str]:
    """Columns of published.yaml that stand beside ``accuracy_table``: those of budgets like the papers'."""
    columns = {budgets.tenth: "finetune/tenth-epoch", "1 epoch": "finetune/epoch"}
    return [column for name, column in columns.items() if name in budgets.moments.values()]


def wins_table(trained: FineTuned, name: str) -> pd.DataFrame:
    """``wins`` at the same budget and against "random" after an epoch (as GHN-3 Table 4 counts), mean ± deviation over
    trainings, the published ones beside them where a budget is one epoch."""
    budgets, tables = trained.budgets, []
    for one in trained.by_training:
        parts = {"same budget": one.wins(name), f"random after {budgets.one}": one.wins(name, against=budgets.one)}
        tables.append(pd.concat(parts, axis=1).drop(columns="networks", level=1))
    table = tables_over_trainings(tables).loc[trained.moments].rename_axis(index=None)
    if budgets.one == "1 epoch":
        column = published("finetune/wins").rename({"1/10 epoch": budgets.tenth})
        table[column.name, "wins, mean gain, mean loss"] = column
    return table


def wins_by_kind(trained: FineTuned, networks: Sequence[Architecture], name: str) -> pd.DataFrame:
    """How many networks are ahead at the same budget, mean ± deviation over trainings: rows are what networks are made
    of and how many are, columns moments."""
    traits = pd.DataFrame([graph_statistics(network.graph) for network in networks])
    names = {"attention": "attention", "squeeze_excitation": "squeeze-and-excitation", "bn_free": "no batch norm"}
    kinds = traits[list(names)].rename(columns=names)
    kinds = kinds.assign(**{"none of these": ~kinds.any(axis=1)})
    kinds = {f"{kind} (of {members.sum()})": traits.index[members] for kind, members in kinds.items() if members.any()}
    tables = [
        pd.DataFrame({kind: wins(rows[rows["network"].isin(members)], name)["wins"] for kind, members in kinds.items()})
        for rows in (one.deepnets for one in trained.by_training)
    ]
    return tables_over_trainings(tables).loc[trained.moments].T.rename_axis(columns=None)


def claims_of_leads(trained: FineTuned) -> dict[str, Measured]:
    """GHN-3 over random initialisation after the shortest budget and an epoch, each side with its own best networks
    (GHN-3 Table 2), and after the longest budget on the same networks (Table 6)."""
    if "ghn3" not in trained.variants:
        return {}
    budgets, top, same = trained.budgets, trained.leads("ghn3", top=True), trained.leads("ghn3")
    moments = {"few-steps": (top, budgets.name(budgets.steps[0])), "one-epoch": (top, "1 epoch"),
               "full-training": (same, budgets.name(budgets.steps[-1]))}  # fmt: skip
    return {claim: leads[moment] for claim, (leads, moment) in moments.items() if moment in leads}


def claims_of_wins(trained: FineTuned) -> dict[str, Measured]:
    """For which share of the networks GHN-3 is ahead after an epoch."""
    if "ghn3" not in trained.variants or "1 epoch" not in trained.moments:
        return {}
    counts = [one.wins("ghn3").loc["1 epoch"] for one in trained.by_training]
    shares = [share_above_half(int(count["wins"]), int(count["networks"])) for count in counts]
    found = over_trainings(shares)  # the deviation over trainings knows no bounds, a share does
    return {"wins-after-epoch": found._replace(low=max(found.low, -0.5), high=min(found.high, 0.5))}
