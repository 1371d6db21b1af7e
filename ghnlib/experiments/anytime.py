"""The report on GHN 2018: hypernetworks rank the blocks of its space (section 5, Table 4), and networks that are asked
for an answer at any budget of FLOPs (section 3.2, Fig. 3).

Networks with exits map images to a list of logits, one an exit in order of cost: ``AnytimeNetwork`` and ``MSDNet``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from ghnlib.config import GHNConfig, Recipe
from ghnlib.data.images import ImageSet, mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.dataset import DeepNets
from ghnlib.deepnets.ghn2018 import AnytimeArchitecture, AnytimeSpace, BlockSpace
from ghnlib.experiments.msdnet import MSDNetArchitecture, exit_flops
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import evaluate_predictions, exit_accuracies
from ghnlib.measuring.kept import rows_kept
from ghnlib.reporting.statistics import Measured, mean_interval, of_row, rank_correlations, with_standard_error
from ghnlib.training.jobs import train_on
from ghnlib.training.networks import (
    EVALUATION_BATCH,
    Accuracy,
    Run,
    TrainingRecipe,
    diverged,
    initial_network,
    run_all,
    train_network,
)

REFINEMENTS = {"weight_norm": "weight normalisation", "shape_encoding": "shape encoding", "layernorm": "layer norm"}
"""Keys of ``GHNConfig`` -> what of GHN-2 they add to the hypernetwork of 2018."""
CHOSEN, RANDOM = "chosen by GHN", "random"
PREDICTED = "predicted parameters of the chosen"


def networks_of(setup: Setup, space: BlockSpace | AnytimeSpace, split: str, size: int) -> DeepNets:
    """Architectures of a space for the images."""
    return DeepNets(split, setup.seed, space, len(setup.images.classes), setup.images.side, size)


def train_in_space(setup: Setup, space: BlockSpace | AnytimeSpace, name: str, config: GHNConfig, recipe: Recipe) -> GHN:
    """Train a hypernetwork on architectures of a space, or resume that, in the folder NAME of the stage's."""
    pool, val = (networks_of(setup, space, split, size) for split, size in
                 (("train", setup.anytime.train_networks), ("val", setup.anytime.val_networks)))  # fmt: skip
    about = {"data": setup.data.model_dump(exclude={"shift", "flip", "test_per_class", "download"}), "space": space,
             "networks": len(pool)}  # fmt: skip
    folder = setup.folder / name
    return train_on(pool, val, setup.images, config, recipe, setup.seed, folder, setup.augment, about).cpu()


def _sgd(setup: Setup, steps: int) -> TrainingRecipe:
    return TrainingRecipe(steps, setup.anytime.lr, setup.anytime.batch_size, augment=setup.augment)


class Ranking(NamedTuple):
    """How well hypernetworks rank blocks.

    Attributes:
        scores: rows are architectures, columns accuracy (%) with the parameters of each hypernetwork, by its name, and
            the number of ``parameters``; on validation images.
        trained: rows of ``run_all`` of the same architectures from random initialisation, on the same images.
        correlations: ``rank_correlations`` of "all" architectures, and of the "top half" after training.
    """

    scores: pd.DataFrame
    trained: pd.DataFrame
    correlations: dict[str, pd.DataFrame]

    @property
    def failed(self) -> list[str]:
        """What the trainings are called that diverged or failed, which are left out."""
        return diverged(self.trained)


def rank_blocks(setup: Setup) -> Ranking:
    """Train each hypernetwork on blocks with few nodes and rank larger ones; the ground truth are these, trained."""
    blocks, images, scores = setup.anytime.blocks, setup.images, {}
    architectures = list(networks_of(setup, _block_space(setup, blocks.nodes), "test", blocks.networks))
    for name in setup.anytime.variants:
        space = _block_space(setup, setup.anytime.train_nodes(name))
        ghn = train_in_space(setup, space, name, setup.anytime.config(name), setup.anytime.recipe_of(name))
        predicted = evaluate_predictions(ghn, architectures, images.val, processes=setup.processes, folder=setup.folder)
        scores[name] = predicted["accuracy"]
    table = pd.DataFrame(scores).assign(parameters=[architecture.num_params for architecture in architectures])
    recipe = _sgd(setup, blocks.steps)
    runs = [Run(network, recipe, setup.seed, labels={"network": i}) for i, network in enumerate(architectures)]
    trained = run_all(runs, images.train, Accuracy(images.val), processes=setup.processes, folder=setup.folder)
    parts = {"all": None, "top half": len(architectures) // 2}
    correlations = {part: rank_correlations(table, trained["accuracy"], top) for part, top in parts.items()}
    return Ranking(table, trained, correlations)


def _block_space(setup: Setup, train_nodes: int) -> BlockSpace:
    blocks = setup.anytime.blocks
    return BlockSpace(nodes=blocks.nodes, cells=(blocks.cells,) * 2, width=blocks.width,
                      stem_pool=float(blocks.stem_pool), variations={"train": {"nodes": train_nodes}})  # fmt: skip


def ranking_table(setup: Setup, ranking: Ranking) -> pd.DataFrame:
    """A row a hypernetwork, and ``parameters``: T, nodes of training blocks, what of GHN-2 it has, mean accuracy (%),
    Kendall's tau with its interval and Pearson's r with trained accuracy."""
    rows = {}
    for name in setup.anytime.variants:
        config = setup.anytime.config(name)
        rows[name] = {
            "T": config.layers, "training nodes": setup.anytime.train_nodes(name),
            "of GHN-2": ", ".join(words for key, words in REFINEMENTS.items() if getattr(config, key)),
            "accuracy (%)": f"{ranking.scores[name].mean():.1f}",
        }  # fmt: skip
    table = pd.DataFrame(rows).T.reindex(ranking.scores.columns)
    for part, found in ranking.correlations.items():
        table[f"tau, {part}"] = [_with_interval(of_row(row)) for _, row in found.iterrows()]
        table[f"R, {part}"] = found["r"].round(2)
    return table


def _with_interval(tau: Measured) -> str:
    return f"{tau.value:.2f}" + ("" if math.isnan(tau.low) else f" [{tau.low:.2f}, {tau.high:.2f}]")


def claims_of_ranking(ranking: Ranking) -> dict[str, Measured]:
    """Rank correlations with trained accuracy, of all architectures: of the stacked hypernetwork, and by how much one
    is higher than another (Fig. 5, Tables 3 and 4)."""
    taus = {name: of_row(row) for name, row in ranking.correlations["all"].dropna(subset="tau").iterrows()}
    pairs = {"blocks-stacked-separate": ("stacked", "separate"), "blocks-passing-separate": ("passing", "separate"),
             "blocks-forward-backward": ("forward-backward", "synchronous")}  # fmt: skip
    claims = {"blocks-stacked": taus["stacked"]} if "stacked" in taus else {}
    return claims | {claim: taus[a].over(taus[b]) for claim, (a, b) in pairs.items() if {a, b} <= set(taus)}


def lines_of_design(setup: Setup, ranking: Ranking) -> list[tuple[str, pd.DataFrame]]:
    """Where three variants or more differ in T ("layers") or "training nodes" alone (Fig. 5): which, and rows of it and
    ``tau``."""
    variants = setup.anytime
    table = pd.DataFrame([
        {**asdict(variants.config(name)), **asdict(variants.recipe_of(name)),
         "training nodes": variants.train_nodes(name), "tau": ranking.correlations["all"].loc[name, "tau"]}
        for name in variants.variants
    ])  # fmt: skip
    lines = []
    for axis in ("layers", "training nodes"):
        same = table.drop(columns=[axis, "tau"]).map(str).agg("|".join, axis=1)
        lines += [(axis, rows[[axis, "tau"]].sort_values(axis)) for _, rows in table.groupby(same) if len(rows) >= 3]
    return lines


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
    """Anytime networks with predicted parameters.

    Attributes:
        curves: ``FLOPs`` and ``accuracy`` (%) on validation images of each ``network`` and ``exit``.
        chance: accuracy (%) below the first exit's FLOPs.
    """

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
    def areas(self) -> pd.Series:
        """That of each network."""
        curves = self.curves.groupby("network")
        return pd.Series({network: self.area(curve) for network, curve in curves}, name="predicted area")


def predict_candidates(setup: Setup) -> Candidates:
    """Train a hypernetwork on anytime networks of random size, as the first of the variants, and predict others."""
    exits, settings = setup.anytime.exits, setup.anytime
    space = AnytimeSpace(nodes=tuple((n, n) for n in exits.nodes), exits=exits.exits, width=exits.width)
    config = GHNConfig(**settings.ghn.model_dump() | {"anytime": True})
    ghn = train_in_space(setup, space, "exits", config, settings.recipe_of(next(iter(settings.variants))))
    networks = list(networks_of(setup, space, "test", exits.candidates))
    tasks = [({"network": i}, (network,)) for i, network in enumerate(networks)]
    rows = rows_kept(_predicted_curve, tasks, (ghn, setup.images.val), setup.processes, setup.folder)
    return Candidates(networks, _without_errors(rows), setup.chance)


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
class Comparison:
    """Anytime networks trained from random initialisation.

    Attributes:
        curves: ``FLOPs`` and ``accuracy`` (%) on test images of each ``group``, ``network`` and ``exit``; of a network
            whose training diverged without accuracy.
        best, drawn: indices of the candidates of the groups "chosen by GHN" and "random".
    """

    candidates: Candidates
    curves: pd.DataFrame
    best: Sequence[int]
    drawn: Sequence[int]

    @property
    def failed(self) -> list[str]:
        """The networks whose training diverged, which are left out."""
        rows = self.curves[self.curves["accuracy"].isna() & (self.curves["exit"] == 0)]
        return [f"{row.group}, network {row.network}" for row in rows.itertuples()]

    @cached_property
    def areas(self) -> pd.Series:
        """Area under the curve (%) by group and network, NaN of a diverged one."""
        curves = self.curves.groupby(["group", "network"], sort=False)
        return pd.Series({key: self.candidates.area(curve) for key, curve in curves})

    @property
    def with_predicted(self) -> pd.DataFrame:
        """All curves, and those of the chosen networks with predicted parameters."""
        predicted = [
            self.candidates.curves[self.candidates.curves["network"] == i].assign(group=PREDICTED, network=n)
            for n, i in enumerate(self.best)
        ]
        return pd.concat([self.curves, *predicted])[["exit", "FLOPs", "accuracy", "group", "network"]]

    def mean_curves(self, points: int = 100) -> pd.DataFrame:
        """Mean accuracy (%) of each group's networks at budgets of FLOPs: rows are budgets, columns groups."""
        budgets, means = np.linspace(*self.candidates.budgets, points), {}
        for group, rows in self.with_predicted.dropna(subset="accuracy").groupby("group", sort=False):
            curves = [
                np.interp(budgets, curve["FLOPs"], curve["accuracy"], left=self.candidates.chance)
                for _, curve in rows.groupby("network")
            ]
            means[group] = np.mean(curves, axis=0)
        return pd.DataFrame(means, index=pd.Index(budgets, name="FLOPs"))

    @property
    def msdnet_cost(self) -> float:
        """FLOPs up to the last exit: those of the MSDNet over those of the chosen networks."""
        costs = self.curves.groupby(["group", "network"])["FLOPs"].max().groupby(level=0).mean()
        return float(costs["MSDNet"] / costs[CHOSEN])

    def agreement(self) -> pd.Series:
        """``rank_correlations`` of predicted and trained areas; a network of both groups counts once."""
        members = {RANDOM: self.drawn, CHOSEN: self.best}
        trained = {members[group][n]: area for group in members for n, area in self.areas[group].items()}
        both = pd.DataFrame({"predicted": self.candidates.areas[list(trained)], "trained": trained})
        return rank_correlations(both[["predicted"]], both["trained"]).loc["predicted"]


def compare_anytime(setup: Setup, candidates: Candidates) -> Comparison:
    """Train the candidates with the largest predicted area, as many drawn from them all, and as often an ``MSDNet``
    with the FLOPs of the chosen."""
    exits, images = setup.anytime.exits, setup.images
    best = candidates.areas.nlargest(exits.chosen).index
    drawn = np.random.default_rng(setup.seed).choice(len(candidates.networks), exits.chosen, replace=False)
    cost = candidates.curves.groupby("network")["FLOPs"].max()[best].mean()
    msdnet = MSDNetArchitecture.of_flops(
        cost, scales=3, layers=exits.exits + 2, exits=exits.exits + 1, num_classes=len(images.classes),
        input_size=images.side,
    )  # fmt: skip
    groups = {CHOSEN: [candidates.networks[i] for i in best], RANDOM: [candidates.networks[i] for i in drawn],
              "MSDNet": [msdnet] * exits.chosen}  # fmt: skip
    recipe = _sgd(setup, exits.steps)
    tasks = [({"group": group, "network": i}, (Run(network, recipe, mix(setup.seed, i)),))
             for group, networks in groups.items() for i, network in enumerate(networks)]  # fmt: skip
    rows = rows_kept(_trained_curve, tasks, (images,), setup.processes, setup.folder)
    return Comparison(candidates, _without_errors(rows), list(best), drawn.tolist())


def _trained_curve(run: Run, images: ImageSplits) -> list[dict]:
    """On test images; without accuracy where the training diverged."""
    measure = partial(exit_accuracies, images=images.test, batch_size=EVALUATION_BATCH)
    found = train_network(initial_network(run), images.train, run.recipe, run.seed, measure)[run.recipe.steps]
    return _curve(run.architecture, found or repeat(math.nan))


def area_table(comparison: Comparison) -> pd.DataFrame:
    """A row a group: ``area_under`` the curves (%), mean ± standard error over networks, how many these are,
    mean FLOPs and accuracy of the last exit."""
    last = comparison.curves.groupby(["group", "network"], sort=False).tail(1).groupby("group", sort=False)
    areas = comparison.areas.groupby(level=0, sort=False)
    return pd.DataFrame({
        "area (%)": areas.agg(with_standard_error), "networks": areas.count(),
        "FLOPs to the last exit": last["FLOPs"].mean().map("{:.3g}".format),
        "accuracy of the last exit (%)": last["accuracy"].mean().round(1),
    })  # fmt: skip


def claims_of_areas(comparison: Comparison) -> dict[str, Measured]:
    """Points of area by which the networks chosen by the hypernetwork are ahead of the others (Fig. 3)."""
    means = {group: mean_interval(areas) for group, areas in comparison.areas.dropna().groupby(level=0)}
    pairs = {"anytime-random": (CHOSEN, RANDOM), "anytime-msdnet": (CHOSEN, "MSDNet")}
    return {claim: means[a].over(means[b]) for claim, (a, b) in pairs.items() if {a, b} <= set(means)}
