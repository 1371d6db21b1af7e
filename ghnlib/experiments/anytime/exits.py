"""The report on GHN 2018, its part on networks that answer at any budget of FLOPs (section 3.2, Fig. 3).

Networks with exits map images to a list of logits, one an exit in order of cost: ``AnytimeNetwork`` and ``MSDNet``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from ghnlib.config import GHNConfig
from ghnlib.data.images import ImageSet, mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.ghn2018 import AnytimeArchitecture, AnytimeSpace
from ghnlib.experiments.anytime.blocks import RANDOM, networks_of, train_in_space
from ghnlib.experiments.anytime.msdnet import MSDNetArchitecture, exit_flops
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import exit_accuracies
from ghnlib.measuring.kept import rows_kept
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    correlation,
    finite,
    mean_interval,
    with_deviation,
    with_standard_error,
)
from ghnlib.training.networks import EVALUATION_BATCH, Run, initial_network, train_network

CHOSEN, GEOMETRY, MSDNET = "chosen by GHN", "chosen by costs alone", "MSDNet"
PREDICTED = "predicted parameters of the chosen, validation images"


def _curve(architecture: AnytimeArchitecture | MSDNetArchitecture, accuracies: Sequence[float]) -> list[dict]:
    costs = exit_flops(architecture)
    return [{"exit": k, "FLOPs": cost, "accuracy": a} for k, (cost, a) in enumerate(zip(costs, accuracies))]


def area_under(curve: pd.DataFrame, low: float, high: float, before: float) -> float:
    """Area under an accuracy-FLOPs curve from ``low`` to ``high`` FLOPs over their difference: a mean accuracy (%).

    Accuracy is ``before`` below the first exit's FLOPs, from exit to exit a straight line, then that of the last.
    """
    cost, accuracy = curve["FLOPs"].to_numpy(float), curve["accuracy"].to_numpy(float)
    budgets = np.linspace(low, high, 1001)
    return float(np.interp(budgets, cost, accuracy, left=before).mean())


class Candidates(NamedTuple):
    """Anytime networks with predicted parameters. ``curves``: ``FLOPs`` and ``accuracy`` (%) on validation images of
    each ``training``, ``network`` and ``exit``; ``chance``: accuracy (%) below the first exit's FLOPs."""

    networks: Sequence[AnytimeArchitecture]
    curves: pd.DataFrame
    chance: float

    @property
    def budgets(self) -> tuple[int, int]:
        """FLOPs of the cheapest exit of all and of the dearest, between which areas are taken."""
        return self.curves["FLOPs"].min(), self.curves["FLOPs"].max()

    def area(self, curve: pd.DataFrame) -> float:
        """``area_under`` a curve between these budgets."""
        return area_under(curve, *self.budgets, before=self.chance)

    @property
    def areas(self) -> pd.DataFrame:
        """That of each network (rows), a column each training."""
        curves = self.curves.groupby(["network", "training"])
        return pd.Series({key: self.area(curve) for key, curve in curves}).unstack()

    @property
    def geometry(self) -> pd.Series:
        """That of each network if all exits had the mean accuracy of all: what the exits' costs alone say."""
        equal = self.curves.assign(accuracy=self.curves["accuracy"].mean())
        first = equal[equal["training"] == equal["training"].min()]
        return pd.Series({network: self.area(curve) for network, curve in first.groupby("network")})


def predict_candidates(setup: Setup) -> Candidates:
    """Train a hypernetwork on anytime networks of random size, as the first of the variants, and predict others."""
    exits, settings = setup.anytime.exits, setup.anytime
    space = AnytimeSpace(nodes=tuple((n, n) for n in exits.nodes), exits=exits.exits, width=exits.width)
    config = GHNConfig(**settings.ghn.model_dump() | {"anytime": True})
    ghns = train_in_space(setup, space, "exits", config, settings.recipe_of(next(iter(settings.variants))))
    networks = list(networks_of(setup, space, "test", exits.candidates))
    tasks = [({"network": i}, (network,)) for i, network in enumerate(networks)]
    rows = [rows_kept(_predicted_curve, tasks, (ghn, setup.images.val), **setup.kept)
            .assign(training=k) for k, ghn in enumerate(ghns)]  # fmt: skip
    return Candidates(networks, _without_errors(pd.concat(rows, ignore_index=True)), setup.chance)


@torch.no_grad()
def _predicted_curve(architecture: AnytimeArchitecture, ghn: GHN, images: ImageSet) -> list[dict]:
    predicted = ghn.predict(architecture.graph)
    return _curve(architecture, exit_accuracies(architecture.build(), images, parameters=predicted))


def _without_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``rows_kept`` without those of calls that failed, which are told."""
    for failure in rows.loc[rows["error"] != "", rows.columns.drop(["exit", "FLOPs", "accuracy"])].to_dict("records"):
        print(f"failed, left out: {failure}", flush=True)
    kept = rows[rows["error"] == ""]
    return kept.drop(columns="error").astype({"exit": int, "FLOPs": int})


@dataclass(frozen=True)
class ComparedAnytime:
    """Anytime networks trained from random initialisation, each once.

    Attributes:
        curves: ``FLOPs`` and ``accuracy`` (%) on test images of each ``network`` and ``exit``: an index of the
            candidates, or below 0 a multi-scale DenseNet; without accuracy where the training diverged.
        best: of each training the candidates with the largest predicted areas.
        groups: networks that no hypernetwork chooses: by costs alone, at random, multi-scale DenseNets.
    """

    candidates: Candidates
    curves: pd.DataFrame
    best: Sequence[list[int]]
    groups: Mapping[str, list[int]]

    @property
    def failed(self) -> list[str]:
        """The networks whose training diverged, which are left out."""
        return [f"network {n}" for n, area in self.areas.items() if math.isnan(area)]

    @cached_property
    def areas(self) -> pd.Series:
        """Area under the curve (%) by network, NaN of a diverged one."""
        return pd.Series({n: self.candidates.area(curve) for n, curve in self.curves.groupby("network")})

    @property
    def members(self) -> dict[str, list[int]]:
        """Networks of all groups, of the chosen those of all trainings."""
        return {CHOSEN: sum(self.best, []), **self.groups}

    @property
    def with_predicted(self) -> pd.DataFrame:
        """Curves of all groups, and those of the chosen networks with predicted parameters."""
        curves = self.curves.set_index("network")
        parts = [curves.loc[[n]].assign(group=group, member=k).reset_index()
                 for group, members in self.members.items() for k, n in enumerate(members)]  # fmt: skip
        predicted = self.candidates.curves.set_index(["training", "network"]).sort_index()
        parts += [predicted.loc[[(k, n)]].assign(group=PREDICTED, member=f"{k}, {n}").reset_index()
                  for k, best in enumerate(self.best) for n in best]  # fmt: skip
        return pd.concat(parts)[["group", "member", "network", "exit", "FLOPs", "accuracy"]]

    def mean_curves(self, points: int = 100) -> pd.DataFrame:
        """Mean accuracy (%) of each group's networks at budgets of FLOPs: rows are budgets, columns groups."""
        budgets, means = np.linspace(*self.candidates.budgets, points), {}
        for group, rows in self.with_predicted.dropna(subset="accuracy").groupby("group", sort=False):
            curves = [
                np.interp(budgets, curve["FLOPs"], curve["accuracy"], left=self.candidates.chance)
                for _, curve in rows.groupby("member")
            ]
            means[group] = np.mean(curves, axis=0)
        return pd.DataFrame(means, index=pd.Index(budgets, name="FLOPs"))

    @property
    def msdnet_cost(self) -> float:
        """FLOPs up to the last exit: those of the multi-scale DenseNet over those of the chosen networks."""
        costs = self.curves.groupby("network")["FLOPs"].max()
        return float(costs[self.groups[MSDNET]].mean() / costs[self.members[CHOSEN]].mean())

    def agreement(self) -> dict[str, list[Measured]]:
        """``correlation`` of areas before and after training, over all candidates that were trained: predicted, one a
        training, and by costs alone."""
        trained = self.areas[self.areas.index >= 0]
        predicted = [correlation(areas[trained.index], trained) for _, areas in self.candidates.areas.items()]
        return {CHOSEN: predicted, GEOMETRY: [correlation(self.candidates.geometry[trained.index], trained)]}


def compare_anytime(setup: Setup, candidates: Candidates) -> ComparedAnytime:
    """Train the candidates with the largest area as each training predicts it, those with the largest by their exits'
    costs alone, as many drawn from them all, and as often an ``MSDNet`` with the FLOPs of the chosen."""
    exits, images = setup.anytime.exits, setup.images
    best = [areas.nlargest(exits.chosen).index.tolist() for _, areas in candidates.areas.items()]
    earliest = candidates.geometry.nlargest(exits.chosen).index.tolist()
    drawn = np.random.default_rng(setup.seed).choice(len(candidates.networks), exits.chosen, replace=False).tolist()
    cost = candidates.curves.groupby("network")["FLOPs"].max()[sum(best, [])].mean()
    msdnet = MSDNetArchitecture.of_flops(
        cost, scales=3, layers=exits.exits + 2, exits=exits.exits + 1, num_classes=len(images.classes),
        input_size=images.side,
    )  # fmt: skip
    groups = {GEOMETRY: earliest, RANDOM: drawn, MSDNET: [-1 - i for i in range(exits.chosen)]}
    todo = sorted({n for group in (*best, *groups.values()) for n in group})
    recipe = setup.recipe(exits.sgd, exits.steps)
    tasks = [({"network": n}, (Run(candidates.networks[n] if n >= 0 else msdnet, recipe, mix(setup.seed, abs(n))),))
             for n in todo]  # fmt: skip
    rows = rows_kept(_trained_curve, tasks, (images,), **setup.kept)
    return ComparedAnytime(candidates, _without_errors(rows), best, groups)


def _trained_curve(run: Run, images: ImageSplits) -> list[dict]:
    """On test images; without accuracy where the training diverged."""
    measure = partial(exit_accuracies, images=images.test, batch_size=EVALUATION_BATCH)
    net = initial_network(run, images.device)
    found = train_network(net, images.train, run.recipe, run.seed, measure)[run.recipe.steps]
    return _curve(run.architecture, found or repeat(math.nan))


def area_table(comparison: ComparedAnytime) -> pd.DataFrame:
    """A row a group: ``area_under`` the curves (%), of the chosen mean ± deviation over trainings, of others ± standard
    error over networks, how many these are, mean FLOPs and accuracy of the last exit."""
    last = comparison.curves.groupby("network").tail(1).set_index("network")
    areas, rows = comparison.areas, {}
    for group, members in comparison.members.items():
        over_trainings = with_deviation([areas[best].mean() for best in comparison.best])
        rows[group] = {
            "area (%)": over_trainings if group == CHOSEN else with_standard_error(areas[members]),
            "networks": len(set(members)), "FLOPs to the last exit": f"{last['FLOPs'][members].mean():.3g}",
            "accuracy of the last exit (%)": round(last["accuracy"][members].mean(), 1),
        }  # fmt: skip
    return pd.DataFrame(rows).T


def claims_of_areas(comparison: ComparedAnytime) -> dict[str, Measured]:
    """Points of area by which the networks chosen by the hypernetwork are ahead of the others (Fig. 3), within each
    training."""
    names = {"anytime-random": RANDOM, "anytime-geometry": GEOMETRY, "anytime-msdnet": MSDNET}
    others = {claim: mean_interval(comparison.areas[comparison.groups[group]]) for claim, group in names.items()}
    chosen = [mean_interval(comparison.areas[best]) for best in comparison.best]
    leads = [finite({claim: ours.minus(other) for claim, other in others.items()}) for ours in chosen]
    return claims_over_trainings(leads)


def draw_anytime(architecture: AnytimeArchitecture, ax: Axes) -> None:
    """Draw its nodes by order and scale, exits in red (GHN 2018 Figs. 9 and 10)."""
    net = architecture.build()
    places, read = list(enumerate(net.shrinks)), {maps[0] for maps in net.exits[:-1]}
    arrow = {"arrowstyle": "-", "connectionstyle": "arc3,rad=0.25", "color": "0.7"}
    for target, sources in zip(places[1:], net.sources):
        for source in sources:
            ax.annotate("", target, places[source], arrowprops=arrow)
    ax.scatter(*zip(*places), c=["tab:red" if i in read else "0.4" for i, _ in places], zorder=2)
    names = ["stem", *(name for cell in architecture.cells for name in ("cell", *(node.op for node in cell)))]
    for name, place in zip(names, places):
        ax.annotate(name, place, (2, 5), textcoords="offset points", rotation=40, fontsize=7)
    ax.set(xlabel="node", ylabel="image's side / map's", yscale="log", yticks=(1, 2, 4), yticklabels=(1, 2, 4))
    ax.margins(x=0.08, y=0.3)
    ax.grid(False)
    ax.minorticks_off()
    ax.invert_yaxis()
