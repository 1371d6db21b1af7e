"""Ranking architectures without training them, a part of the report on analysis: accuracy with predicted parameters
beside few SGD steps, a one-shot model and zero-cost proxies; what random search chooses so."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import ImageSet, mix
from ghnlib.experiments.analysis.properties import Predictions, Trained, of_test, sweet_spot, train_and_measure
from ghnlib.experiments.analysis.proxies import PROXIES
from ghnlib.experiments.evaluate.scaling import training_costs
from ghnlib.experiments.one_shot import CEILING, ONE_SHOT, one_shot_scores, train_one_shot
from ghnlib.experiments.setup import Setup
from ghnlib.measuring.kept import map_kept
from ghnlib.params import Analysis
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    finite,
    mean_and_error,
    r_of,
    rank_correlations,
    tau_of,
    top_against_random,
    with_deviation,
    with_interval,
)
from ghnlib.training.networks import Accuracy, Run, TrainingRecipe, initial_network, run_all


class OneShot(NamedTuple):
    """A model whose parameters all architectures share, on the architectures that are ranked. ``constant``: accuracy of
    one answer to all validation images."""

    scores: pd.DataFrame
    constant: float

    @property
    def learnt(self) -> dict[str, float]:
        """Its accuracy, see ``mean_and_error``."""
        return mean_and_error(self.scores["accuracy"])

    @property
    def by_chance(self) -> bool:
        """Whether it is no better than one answer to all images: its ranking then says nothing."""
        return self.learnt["mean"] - 2 * (self.learnt["standard_error"] or 0.0) <= self.constant


def ranking_scores(setup: Setup, trained: Trained) -> tuple[list[pd.DataFrame], OneShot]:
    """For each training of the hypernetworks a score of each method (a column) for each architecture: accuracy with
    predicted parameters; and, the same in each, accuracy after few SGD steps, of a one-shot model (missing where it has
    not learnt), zero-cost proxies, number of parameters. ``CEILING``: accuracy when trained as long as the ground truth
    but with another seed, of a share of the architectures, missing of others; no ranking can agree better."""
    analysis, architectures, seed, images = setup.analysis, trained.architectures, setup.seed, setup.images
    everyone = range(len(architectures))
    repeated = np.linspace(0, len(architectures) - 1, min(analysis.repeated_networks, len(architectures))).round()
    budgets = {f"SGD, {steps} steps": (steps, everyone) for steps in analysis.checkpoints}
    budgets[CEILING] = trained.recipe.steps, repeated.astype(int).tolist()
    shared = pd.DataFrame(index=everyone)
    for name, (steps, chosen) in budgets.items():
        recipe = replace(trained.recipe, steps=steps)
        runs = [Run(architectures[i], recipe, mix(seed, i, steps)) for i in chosen]
        found = run_all(runs, images.train, Accuracy(images.val, analysis.score), **setup.kept)
        shared[name] = pd.Series(found["accuracy"].to_numpy(), index=chosen)
    shared = shared.join(zero_cost_scores(setup, architectures))
    one_shot = _one_shot(setup, trained)
    shared[ONE_SHOT] = np.nan if one_shot.by_chance else one_shot.scores["accuracy"]
    shared["parameters"] = trained.table["parameters"]
    predicted = [setup.validated(ghns, architectures, analysis.score) for ghns in setup.trainings]
    return [scores.join(shared) for scores in predicted], one_shot


def zero_cost_scores(setup: Setup, architectures: Sequence[Architecture]) -> pd.DataFrame:
    """Each proxy of each architecture at random initialisation, on its first training batch: one row a network.

    Initialisation and batch are those that a ``Run`` with seed ``mix(seed, index)`` begins with.
    """
    runs = [(Run(a, TrainingRecipe(0, 1.0), mix(setup.seed, i)),) for i, a in enumerate(architectures)]
    common = (setup.images.train, setup.analysis.images)
    return pd.DataFrame(map_kept(_zero_cost, runs, common, **setup.kept))


def _zero_cost(run: Run, images: ImageSet, batch_size: int) -> dict[str, float]:
    net = initial_network(run, images.device)
    x, y = next(images.stream(batch_size, run.seed))
    return {name: proxy(net, x, y) for name, proxy in PROXIES.items()}


def _one_shot(setup: Setup, trained: Trained) -> OneShot:
    analysis, images, recipe = setup.analysis, setup.images, trained.recipe
    length = replace(recipe, steps=analysis.one_shot_steps)
    shared = train_one_shot(setup.split("train"), images.train, length, setup.seed)
    scores = one_shot_scores(shared, trained.architectures, images.val, setup.seed, analysis.score)
    answers = images.val.labels.bincount().sort(descending=True).values[: 5 if analysis.score == "top5" else 1]
    return OneShot(scores, 100 * float(answers.sum()) / len(images.val))


RANDOM = "random ranking"
TOP_OF = 100
"""The better half is of so many architectures (GHN 2018: 50 of 100)."""


def rankings(setup: Setup, trained: Trained, scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """``rank_correlations`` of scores with trained accuracies, of "all" networks, of those "of test" and of the "top
    half" of the first ``TOP_OF``; the row ``RANDOM`` is the mean of 200 random rankings."""
    table, sound = trained.table, trained.sound
    chance = pd.DataFrame(np.random.default_rng(setup.seed).normal(size=(len(table), 200)))
    few = table[sound][:TOP_OF]
    parts = {"all": (table[sound], None), "of test": (table[of_test(setup, trained)], None)}
    found = {}
    for part, (among, top) in (parts | {"top half": (few, len(few) // 2)}).items():
        ours, drawn = (rank_correlations(s.loc[among.index], among["accuracy"], top) for s in (scores, chance))
        found[part] = pd.concat([ours, drawn.mean().to_frame(RANDOM).T]).astype({"n": int})
    return found


def _measured(rows: pd.DataFrame, key: str) -> dict[str, Measured]:
    """``tau`` or ``r`` of each row of ``rank_correlations``, with its interval."""
    of = {"tau": tau_of, "r": r_of}[key]
    return {name: of(row[key], row["n"]) for name, row in rows.iterrows()}


def claims_of_ranking(
    found: Sequence[Mapping[str, pd.DataFrame]], properties: Sequence[Predictions], few: int
) -> dict[str, Measured]:
    """Of GHN-3 Table 13 and PPUDA section 5.2 (tau), of GHN Table 3 (R); what was not ranked is left out. ``found``:
    ``rankings`` of each training; ``properties``: ``predict_properties``; ``few``: SGD steps that GHN-1 is compared
    with."""
    return claims_over_trainings([_ranking_claims(*each, few) for each in zip(found, properties)])


def _ranking_claims(found: Mapping[str, pd.DataFrame], properties: Predictions, few: int) -> dict[str, Measured]:
    every, tested = (finite(_measured(found[part], "tau")) for part in ("all", "of test"))
    rs, half = (finite(_measured(found[part], "r")) for part in ("all", "top half"))
    best = max((name for name in PROXIES if name in every), key=lambda name: every[name].value, default="")
    pairs = {
        "ranking-ghn3-ghn2": (every, "ghn3", "ghn2"),
        "ranking-ghn3-proxies": (every, "ghn3", best),
        "ranking-ghn1-steps": (rs, "ghn1", f"SGD, {few} steps"),
        "ranking-ghn1-one-shot": (rs, "ghn1", ONE_SHOT),
        "top-half-ghn1-one-shot": (half, "ghn1", ONE_SHOT),
    }
    claims = {name: of[a].minus(of[b]) for name, (of, a, b) in pairs.items() if a in of and b in of}
    claims |= {"ranking-ghn3": every["ghn3"]} if "ghn3" in every else {}
    claims |= {"top-half-ghn1": half["ghn1"]} if "ghn1" in half else {}
    if "ghn2" in tested and "ghn2" in properties:
        claims["property-over-prediction"] = properties["ghn2"]["accuracy"].tau.minus(tested["ghn2"])
    return claims


def ranking_table(found: Sequence[Mapping[str, pd.DataFrame]], hypernetworks: Sequence[str]) -> pd.DataFrame:
    """One row a method: tau and R of each part, of hypernetworks mean ± deviation over trainings, of others with their
    intervals, and with n where it is less than the others'. ``found``: ``rankings`` of each training."""
    columns: dict[str, dict[str, str]] = {}
    for part, rows in found[0].items():
        for key, title in (("tau", "tau"), ("r", "R")):
            columns[f"{title}, {part}"] = {
                name: with_deviation([each[part].loc[name, key] for each in found], 2)
                if name in hypernetworks else _in_words(measured, rows["n"].max())
                for name, measured in _measured(rows, key).items()
            }  # fmt: skip
    return pd.DataFrame(columns)


def _in_words(found: Measured, most: int) -> str:
    n = f"n = {found.n}"
    if 0 < found.n < 5:
        return n  # any order of so few is likely by chance
    return f"{with_interval(found)}, {n}" if 0 < found.n < most else with_interval(found)


def costs_of_search(setup: Setup, trained: Trained) -> pd.DataFrame:
    """``search_costs`` of the setup."""
    training = training_costs(setup, trained.architectures[:5], setup.analysed)
    image = trained.table["FLOPs"].mean()
    return search_costs(training, image, setup.analysis, trained.recipe.batch_size, len(setup.images.val))


def search_costs(
    training: pd.DataFrame, image: float, analysis: Analysis, batch_size: int, validation: int
) -> pd.DataFrame:
    """What ranking architectures takes (GHN Table 3, in hours there). ``training``: of the hypernetworks, as of
    ``training_costs``; ``image``: FLOPs of a forward pass with one image, of the average architecture; ``batch_size``:
    images of a training step; ``validation``: images that accuracy is measured on.

    Returns one row a method. Before the ranking: ``steps``, training steps of networks, and ``TFLOPs``; for each
    architecture ranked: ``steps each`` and ``GFLOPs each``, accuracy included (prediction is not counted).
    """
    step, score = 3 * image * batch_size, image * validation
    rows = {name: (row["steps"] * row["meta_batch"], row["flops"], 0, score) for name, row in training.iterrows()}
    rows |= {f"SGD, {steps} steps": (0, 0, steps, steps * step + score) for steps in analysis.checkpoints}
    rows[CEILING] = 0, 0, analysis.property_steps, analysis.property_steps * step + score
    rows[ONE_SHOT] = analysis.one_shot_steps, analysis.one_shot_steps * step, 0, score
    for proxy in PROXIES:  # synaptic flow needs one image, grasp a gradient of its gradient too
        images = 1 if proxy.startswith("synflow") else analysis.images * (3 if proxy == "grasp" else 1)
        rows[proxy] = 0, 0, 1, 3 * image * images
    table = pd.DataFrame(rows, index=["steps", "TFLOPs", "steps each", "GFLOPs each"]).T.astype(float)
    return table / [1, 1e12, 1, 1e9]


# Choosing ------------------------------------------------------------------------------------------------------------


def random_search(
    setup: Setup, scores: pd.DataFrame, among: pd.Series, test_accuracy: pd.Series
) -> dict[str, dict[str, float]]:
    """``top_against_random`` of each hypernetwork's score on validation images, in accuracy on test ones (GHN Table 1).
    ``among``: which of the architectures (networks,) may be chosen."""
    top, seed = setup.analysis.top, setup.seed
    chosen = {name: among & scores[name].notna() for name in setup.analysed}
    return {n: top_against_random(scores.loc[rows, n], test_accuracy[rows], top, seed) for n, rows in chosen.items()}


def claims_of_search(name: str, found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Measured]:
    """The lead of GHN-1 as the claim ``name``; ``found``: ``random_search`` of each training."""
    keys = ("lead", "low", "high", "n")
    leads = [{name: Measured(*(each["ghn1"][key] for key in keys))} for each in found if "ghn1" in each]
    return claims_over_trainings(leads) if leads else {}


class Second(NamedTuple):
    """The same architectures trained on other images. ``source_differs``: whether these are another dataset; ``table``:
    as of ``train_and_measure``, on the index of all architectures; ``both``: which have an accuracy on both; ``taus``:
    of each property on both datasets; ``limited``: ``random_search`` below the median of FLOPs, of each training;
    ``side``: pixels."""

    source_differs: bool
    side: int
    table: pd.DataFrame
    both: pd.Series
    taus: dict[str, Measured]
    limited: list[dict[str, dict[str, float]]]
    agreement: pd.DataFrame

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Figs. 6 g and 11 and GHN Table 2; the same source at another resolution is no second dataset."""
        if not self.source_differs:
            return {}
        claims = {"two-datasets": self.taus["accuracy"]} if "accuracy" in self.taus else {}
        spot = sweet_spot(self.table["second, path"], 100 - self.table["second, test accuracy"])
        claims |= {"error-and-path-second": spot.curvature} if spot else {}
        return claims | claims_of_search("limited-search", self.limited)


def second_dataset(setup: Setup, trained: Trained, scores: Sequence[pd.DataFrame]) -> Second | None:
    """The first architectures trained on the images of ``analysis.second``, if any (PPUDA Figs. 6 g and 11, GHN Table
    2). ``scores``: of each training of the hypernetworks."""
    analysis = setup.analysis
    if analysis.second is None:
        return None
    other = setup.other_images(analysis.second)
    adapted = [a.adapted(len(other.classes), other.side) for a in trained.architectures[: analysis.second_networks]]
    keys = trained.properties
    table = train_and_measure(setup, adapted, other, kept=0).table[[*keys, "test accuracy", "path"]]
    table = table.add_prefix("second, ")
    both = trained.sound & table["second, accuracy"].reindex(trained.table.index).notna()
    pairs = trained.table.join(table)[both]
    across = pairs.corr("kendall").loc[keys, [f"second, {key}" for key in keys]]
    taus = {key: tau_of(across.loc[key, f"second, {key}"], int(both.sum())) for key in keys}
    allowed = both & (trained.table["FLOPs"] <= trained.table["FLOPs"].median())
    test = table["second, test accuracy"].reindex(trained.table.index)
    limited = [random_search(setup, each, allowed, test) for each in scores]
    return Second(setup.differs(analysis.second), other.side, table, both, finite(taus), limited, across)
