"""What a regression on embeddings chooses, trained beside published cells (PPUDA Table 9), a part of the report on
analysis."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.genotypes import GENOTYPES, Genotype
from ghnlib.data.images import mix
from ghnlib.experiments.analysis.properties import Trained, embed, regression
from ghnlib.experiments.setup import Setup
from ghnlib.reporting.statistics import Measured, claims_over_trainings, finite, mean_interval, with_deviation
from ghnlib.training.networks import Accuracy, Run, TrainingRecipe, run_all

PLAIN, REGULARISED = "plain", "cutout, auxiliary head, drop path"


class Chosen(NamedTuple):
    """Architectures that a regression on embeddings chooses, and published ones, trained. ``rows``: one a training:
    ``choice`` (number of the hypernetworks' training), ``architecture``, ``parameters``, ``training``, ``seed``,
    ``accuracy`` (percent, test images)."""

    rows: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """A row an architecture: thousand parameters, accuracy by training; mean ± deviation over the choices."""
        by = ["architecture", "choice"]
        table = self.rows.groupby([*by, "training"], sort=False)["accuracy"].mean().unstack("training", sort=False)
        table.insert(0, "thousand parameters", self.rows.groupby(by)["parameters"].first() / 1e3)
        words = table.groupby("architecture", sort=False).agg(with_deviation)
        return words.rename_axis(index=None, columns=None)

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Table 9: within a choice over seeds, then over the choices."""
        return claims_over_trainings([_chosen_claims(rows) for _, rows in self.rows.groupby("choice")])


def _chosen_claims(rows: pd.DataFrame) -> dict[str, Measured]:
    found = {}
    for claim, training in (("chosen-over-darts", PLAIN), ("chosen-over-darts-regularised", REGULARISED)):
        by_seed = rows[rows["training"] == training].pivot(index="seed", columns="architecture", values="accuracy")
        if {"ghn2", "DARTS"} <= set(by_seed):
            ours, theirs = (mean_interval(by_seed[name]) for name in ("ghn2", "DARTS"))
            found[claim] = ours.minus(theirs)
    return finite(found)


def chosen_architectures(
    setup: Setup, trained: Trained, embedded: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, Architecture]]:
    """For each training of the hypernetworks: of architectures that nothing was trained on (the split for search) those
    whose accuracy a regression on embeddings of GHN-1 and GHN-2 (or, without these, the last hypernetwork) predicts
    highest; and the cells of DARTS and P-DARTS in networks as deep as the last of these and, nearly, as large (PPUDA
    Table 9)."""
    names = [name for name in embedded[0] if name in ("ghn1", "ghn2")] or list(embedded[0])[-1:]
    searched, sound = setup.split("search", setup.analysis.search_networks), trained.sound
    graphs, learnt_from = [a.graph for a in searched], trained.table.loc[sound, "accuracy"].to_numpy()
    found = []
    for ghns, states in zip(setup.trainings, embedded):
        chosen = {}
        for name in names:
            model = regression(setup.analysis.svr).fit(states[name][sound], learnt_from)
            chosen[name] = searched[int(model.predict(embed(ghns[name], graphs)).argmax())]
        like = chosen[names[-1]]
        found.append(chosen | {name: as_large(GENOTYPES[name], like) for name in ("DARTS", "PDARTS")})
    return found


def as_large(genotype: Genotype, like: Architecture) -> Architecture:
    """An architecture of these cells as deep as another, with the channels that bring it nearest in parameters."""
    sizes = {key: getattr(like, key) for key in ("n_cells", "num_classes", "input_size")}
    widths = [Architecture(genotype, C, **sizes) for C in range(2, 8 * like.C + 1)]
    return min(widths, key=lambda a: abs(a.num_params - like.num_params))


def train_chosen(setup: Setup, choices: Sequence[Mapping[str, Architecture]], recipe: TrainingRecipe) -> Chosen:
    """Train architectures plainly, and with cutout, auxiliary head and drop path (PPUDA Table 9), so also for longer.
    ``choices``: of each training of the hypernetworks; each is trained with seeds of its own."""
    chosen, images = setup.analysis.chosen, setup.images
    plain = replace(recipe, steps=chosen.steps[0], bn_batches=2)
    regularised = replace(plain, augment=replace(plain.augment, cutout=chosen.cutout), drop_path=chosen.drop_path)
    recipes = {PLAIN: plain, REGULARISED: regularised}
    recipes |= {f"{REGULARISED}, {n} steps": replace(regularised, steps=n) for n in chosen.steps[1:]}
    runs = [
        Run(a, own, mix(seed, i), auxiliary=training != PLAIN,
            labels={"choice": i, "architecture": name, "parameters": a.num_params, "training": training})
        for i, architectures in enumerate(choices)
        for name, a in architectures.items()
        for training, own in recipes.items()
        for seed in chosen.seeds
    ]  # fmt: skip
    rows = run_all(runs, images.train, Accuracy(images.test), **setup.kept)
    return Chosen(rows[["choice", "architecture", "parameters", "training", "seed", "accuracy"]])
