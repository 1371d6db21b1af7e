"""The block space of GHN 2018, a part of the report on it: hypernetworks rank blocks (Tables 3 and 4, Fig. 5) and
choose among them (Tables 1 and 2).

Hypernetworks are trained once a seed, and lists of what they say have one entry a training; networks trained from
random initialisation, the ground truth, are the same for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from ghnlib.config import GHNConfig, Recipe
from ghnlib.data.images import mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.dataset import DeepNets
from ghnlib.deepnets.ghn2018 import AnytimeSpace, BlockArchitecture, BlockSpace
from ghnlib.experiments.one_shot import CEILING, ONE_SHOT, one_shot_scores, train_one_shot
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.measuring.costs import inference_flops, step_flops
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    correlation,
    finite,
    mean_interval,
    with_deviation,
    with_interval,
    with_standard_error,
)
from ghnlib.training.jobs import train_on
from ghnlib.training.networks import EVALUATION_BATCH, Run, diverged, run_all

REFINEMENTS = {"weight_norm": "weight normalisation", "shape_encoding": "shape encoding", "layernorm": "layer norm"}
"""Keys of ``GHNConfig`` -> what of GHN-2 they add to the hypernetwork of 2018."""
PUBLISHED = "vanilla"
"""The variant that is GHN 2018 as published."""
RANDOM, TOP, TOP_BEST = "random", "GHN Top", "GHN Top-Best"
DRAWN = 4
"""Times as many networks at random as a hypernetwork chooses: their mean is what all choices are compared with."""
REGULARISED = {"drop_path": 0.4, "auxiliary_weight": 0.5}
"""Training of the architectures that a search chooses, with an auxiliary head at two thirds (section 5.1)."""


def networks_of(setup: Setup, space: BlockSpace | AnytimeSpace, split: str, size: int) -> DeepNets:
    """Architectures of a space for the images."""
    return DeepNets(split, setup.seed, space, len(setup.images.classes), setup.images.side, size)


def train_in_space(
    setup: Setup, space: BlockSpace | AnytimeSpace, name: str, config: GHNConfig, recipe: Recipe
) -> list[GHN]:
    """Train a hypernetwork on architectures of a space with each seed, or resume that, in folders NAME-SEED of the
    stage's."""
    pool, val = (networks_of(setup, space, split, size) for split, size in
                 (("train", setup.anytime.train_networks), ("val", setup.anytime.val_networks)))  # fmt: skip
    about = {"data": setup.data.learnt_from, "space": space, "networks": len(pool), "seed": setup.seed}
    trained = []
    for seed in setup.anytime.seeds:
        print(f"{name}, seed {seed}:", flush=True)
        folder = setup.folder / f"{name}-{seed}"
        trained.append(train_on(pool, val, setup.images, config, recipe, seed, folder, setup.augment, about))
    return trained


# Ranking blocks ------------------------------------------------------------------------------------------------------


def train_variants(setup: Setup) -> dict[str, list[GHN]]:
    """The trainings of each variant, on blocks with few nodes."""
    settings = setup.anytime
    return {
        name: train_in_space(setup, block_space(setup, settings.train_nodes(name)), name, settings.config(name),
                             settings.recipe_of(name))
        for name in settings.variants
    }  # fmt: skip


def block_space(setup: Setup, train_nodes: int) -> BlockSpace:
    """The space of blocks, with so many nodes in training."""
    blocks = setup.anytime.blocks
    return BlockSpace(nodes=blocks.nodes, cells=(blocks.cells,) * 2, width=blocks.width,
                      stem_pool=float(blocks.stem_pool), variations={"train": {"nodes": train_nodes}})  # fmt: skip


def blocks_of(setup: Setup, split: str, size: int) -> list[BlockArchitecture]:
    """Blocks that are ranked ("test") or searched ("search")."""
    return list(networks_of(setup, block_space(setup, setup.anytime.blocks.nodes), split, size))


class Ranking(NamedTuple):
    """How well blocks are ranked without training them. ``scores``: of each training, rows are architectures, columns
    accuracy (%) with the parameters of each variant, on validation images; ``baselines``: the same after few SGD steps
    and of a one-shot model, and the number of ``parameters``; ``trained``: rows of ``run_all`` of the same
    architectures from random initialisation, twice, on the same images."""

    scores: Sequence[pd.DataFrame]
    baselines: pd.DataFrame
    trained: pd.DataFrame

    @property
    def failed(self) -> list[str]:
        """What the trainings are called that diverged or failed: their networks are left out."""
        return diverged(self.trained)

    @property
    def truths(self) -> pd.DataFrame:
        """Accuracy (%) after each of both trainings, rows are architectures; their mean is the ground truth."""
        return self.trained.pivot(index="network", columns="run", values="accuracy")

    def correlations(self, half: bool = False) -> list[dict[str, Measured]]:
        """Of each training and method, and of ``CEILING``, the ``correlation`` with the ground truth; among all, or
        the better half of the architectures (GHN 2018 Table 3)."""
        truth = self.truths.mean(axis=1, skipna=False)
        among = truth.nlargest(len(truth) // 2).index if half else truth.index
        of = lambda table: {name: correlation(table.loc[among, name], truth[among]) for name in table}
        fixed = of(self.baselines) | {CEILING: correlation(self.truths.loc[among, 0], self.truths.loc[among, 1])}
        return [of(table) | fixed for table in self.scores]


def rank_blocks(setup: Setup, hypernetworks: Mapping[str, Sequence[GHN]]) -> Ranking:
    """Rank larger blocks than those of the trainings, and train them twice."""
    blocks, images = setup.anytime.blocks, setup.images
    architectures = blocks_of(setup, "test", blocks.networks)
    trainings = [dict(zip(hypernetworks, ghns)) for ghns in zip(*hypernetworks.values())]
    scores = [setup.validated(ghns, architectures) for ghns in trainings]
    searched = blocks_of(setup, "search", setup.anytime.train_networks)
    baselines = {}
    for share, steps in sgd_steps(setup).items():
        found = _train_each(setup, dict(enumerate(architectures)), steps, runs=(2,))
        baselines[f"SGD, {100 * share:.2g}%"] = found["accuracy"]
    shared = train_one_shot(searched, images.train, setup.recipe(setup.anytime.sgd, blocks.one_shot_steps), setup.seed)
    baselines[ONE_SHOT] = one_shot_scores(shared, architectures, images.val, setup.seed)["accuracy"]
    baselines["parameters"] = [architecture.num_params for architecture in architectures]
    trained = _train_each(setup, dict(enumerate(architectures)), blocks.steps, runs=(0, 1))
    return Ranking(scores, pd.DataFrame(baselines), trained)


def sgd_steps(setup: Setup) -> dict[float, int]:
    """Shares of the ground truth's SGD steps -> so many steps, of those that are a step at least."""
    steps = {share: round(share * setup.anytime.blocks.steps) for share in setup.anytime.blocks.shares}
    return {share: count for share, count in steps.items() if count}


def _train_each(
    setup: Setup, networks: Mapping[int, BlockArchitecture], steps: int, runs: Sequence[int],
    images: ImageSplits | None = None, **regularised: float,
) -> pd.DataFrame:  # fmt: skip
    """Rows of ``run_all`` by ``network``, a key, and ``run``: ``accuracy`` on validation images, ``test accuracy``.
    ``regularised``: fields of the recipe, with an auxiliary head."""
    images, recipe = images or setup.images, replace(setup.recipe(setup.anytime.sgd, steps), **regularised)
    todo = [
        Run(net, recipe, mix(setup.seed, i, run), labels={"network": i, "run": run}, auxiliary=bool(regularised))
        for run in runs for i, net in networks.items()
    ]  # fmt: skip
    measure = partial(_accuracies, images=images)
    return run_all(todo, images.train, measure, **setup.kept)


def _accuracies(net: nn.Module, images: ImageSplits) -> dict[str, float]:
    found = {"accuracy": images.val, "test accuracy": images.test}
    return {name: top_accuracies(net, part, EVALUATION_BATCH)["accuracy"] for name, part in found.items()}


def ranking_table(setup: Setup, ranking: Ranking) -> pd.DataFrame:
    """A row a method: T, nodes of training blocks, what of GHN-2 it has, if any has; mean accuracy (%) and Pearson's R
    with trained accuracy, of hypernetworks the mean ± deviation over trainings, of others R with its interval."""
    rows = {}
    for name in setup.anytime.variants:
        config = setup.anytime.config(name)
        rows[name] = {
            "T": config.layers, "training nodes": setup.anytime.train_nodes(name),
            "refinements of GHN-2": ", ".join(words for key, words in REFINEMENTS.items() if getattr(config, key)),
            "accuracy (%)": with_deviation([scores[name].mean() for scores in ranking.scores]),
        }  # fmt: skip
    table = pd.DataFrame(rows).T.replace("", None).dropna(axis=1, how="all")
    table = table.reindex([*rows, *ranking.baselines, CEILING])
    for title, half in (("R, all", False), ("R, top half", True)):
        found = ranking.correlations(half)
        table[title] = [
            with_deviation([training[name].value for training in found], 2) if name in rows
            else with_interval(found[0][name]) for name in table.index
        ]  # fmt: skip
    return table


def claims_of_ranking(ranking: Ranking) -> dict[str, Measured]:
    """Pearson's R with trained accuracy of GHN 2018 as published, and by how much it is higher than that of another
    (Fig. 5, Tables 3 and 4); differences within a training."""
    pairs = {"blocks-stacked-separate": (PUBLISHED, "separate"), "blocks-passing-separate": ("passing", "separate"),
             "blocks-forward-backward": (PUBLISHED, "synchronous"),
             "blocks-one-shot": (PUBLISHED, ONE_SHOT)}  # fmt: skip
    claims = []
    for every, half in zip(ranking.correlations(), ranking.correlations(half=True)):
        own = {"blocks-stacked": every.get(PUBLISHED), "blocks-top-half": half.get(PUBLISHED)}
        own |= {claim: every[a].minus(every[b]) for claim, (a, b) in pairs.items() if {a, b} <= set(every)}
        claims.append(finite({name: found for name, found in own.items() if found}))
    return claims_over_trainings(claims)


def lines_of_design(setup: Setup, ranking: Ranking) -> list[tuple[str, pd.DataFrame]]:
    """Where three variants or more differ in T ("layers") or "training nodes" alone (Fig. 5): which, and rows of it and
    ``R``, one a training."""
    variants = setup.anytime
    table = pd.DataFrame([
        {**asdict(variants.config(name)), **asdict(variants.recipe_of(name)),
         "training nodes": variants.train_nodes(name), "R": found[name].value}
        for found in ranking.correlations() for name in variants.variants
    ])  # fmt: skip
    lines = []
    for axis in ("layers", "training nodes"):
        same = table.drop(columns=[axis, "R"]).map(str).agg("|".join, axis=1)
        lines += [(axis, rows[[axis, "R"]].sort_values(axis)) for _, rows in table.groupby(same)
                  if rows[axis].nunique() >= 3]  # fmt: skip
    return lines


# Choosing blocks -----------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """Blocks that GHN 2018 chooses among random ones, trained (Tables 1 and 2). ``networks``: those searched; ``best``:
    of each training the indices of those with the highest accuracy with predicted parameters; ``drawn``: at random,
    ``DRAWN`` times as many; ``trained``: rows of ``run_all``, of each of them."""

    networks: Sequence[BlockArchitecture]
    best: Sequence[list[int]]
    drawn: list[int]
    trained: pd.DataFrame

    @property
    def tested(self) -> pd.Series:
        """Test accuracy (%) by network."""
        return self.trained.set_index("network").reindex(columns=["test accuracy"])["test accuracy"]

    @property
    def top_best(self) -> list[int]:
        """Of each training the best on validation images after training."""
        validated = self.trained.set_index("network")["accuracy"].fillna(0)
        return [int(validated[best].idxmax()) for best in self.best]

    @property
    def claims(self) -> dict[str, Measured]:
        """Points by which the chosen are ahead of random ones (Table 1)."""
        drawn = mean_interval(self.tested[self.drawn])
        leads = [mean_interval(self.tested[best]).minus(drawn) for best in self.best]
        return claims_over_trainings([finite({"blocks-top": lead}) for lead in leads])


def search_blocks(setup: Setup, hypernetworks: Sequence[GHN]) -> Search:
    """Let each training of a hypernetwork choose, and train what they choose as published, see ``REGULARISED``."""
    search = setup.anytime.search
    networks = blocks_of(setup, "search", search.candidates)
    scores = setup.validated(dict(enumerate(hypernetworks)), networks)
    best = [scores[k].nlargest(search.chosen).index.tolist() for k in scores]
    count = min(search.candidates, DRAWN * search.chosen)
    drawn = np.random.default_rng(setup.seed).choice(search.candidates, count, replace=False).tolist()
    todo = {i: networks[i] for i in sorted({*drawn, *sum(best, [])})}
    return Search(networks, best, drawn, _train_each(setup, todo, search.steps, runs=(0,), **REGULARISED))


def search_table(setup: Setup, found: Search) -> pd.DataFrame:
    """Rows "random", ``TOP``, ``TOP_BEST`` (GHN 2018 Table 1): test accuracy (%) and parameters (thousands), over
    trainings mean ± deviation, of random ones mean ± standard error over networks; TFLOPs that the choice takes."""
    settings, networks, tested = setup.anytime, found.networks, found.tested
    search, name = settings.search, next(iter(settings.variants))
    recipe, space = settings.recipe_of(name), block_space(setup, settings.train_nodes(name))
    pool, image = networks_of(setup, space, "train", 5), step_flops(networks[:5]) / 3
    training = recipe.steps * recipe.meta_batch * recipe.batch_size * step_flops(list(pool))
    top = training + search.candidates * len(setup.images.val) * image
    top_best = top + search.chosen * search.steps * settings.sgd.batch_size * 3 * image
    sizes = pd.Series([network.num_params / 1e3 for network in networks])
    over = lambda values, groups: with_deviation([values[group].mean() for group in groups])
    single = [[i] for i in found.top_best]
    rows = {
        RANDOM: (with_standard_error(tested[found.drawn]), with_standard_error(sizes[found.drawn]), 0.0),
        TOP: (over(tested, found.best), over(sizes, found.best), top),
        TOP_BEST: (over(tested, single), over(sizes, single), top_best),
    }
    columns = ["test accuracy (%)", "parameters (thousands)", "TFLOPs"]
    return pd.DataFrame(rows, columns).T.assign(TFLOPs=lambda t: (t["TFLOPs"] / 1e12).map("{:.3g}".format))


class TransferredBlocks(NamedTuple):
    """Blocks transferred to other images (Table 2). ``rows``: by network channels ``C``, ``MFLOPs``, ``test accuracy``
    (%); ``differs``: whether these are another dataset."""

    best: Sequence[int]
    drawn: Sequence[int]
    rows: pd.DataFrame
    differs: bool

    @property
    def claims(self) -> dict[str, Measured]:
        """Points by which the best block is ahead of random ones; the same source at another resolution is no second
        dataset."""
        tested = self.rows["test accuracy"]
        leads = [Measured(*[tested[i]] * 3).minus(mean_interval(tested[self.drawn])) for i in self.best]
        return claims_over_trainings([finite({"blocks-transfer": lead}) for lead in leads]) if self.differs else {}


def transfer_blocks(setup: Setup, found: Search) -> TransferredBlocks | None:
    """Train the best block of each training and the random ones on the images of ``search.second``, each as wide as
    the limit of FLOPs allows."""
    search = setup.anytime.search
    if search.second is None:
        return None
    images, todo = setup.other_images(search.second), {}
    drawn = found.drawn[: search.chosen]
    for i in sorted({*found.top_best, *drawn}):
        todo[i] = widest(found.networks[i].adapted(len(images.classes), images.side), 1e6 * search.mflops)
    rows = _train_each(setup, todo, search.steps, runs=(0,), images=images).set_index("network")
    sizes = pd.DataFrame({i: {"C": a.C, "MFLOPs": inference_flops(a) / 1e6} for i, a in todo.items()}).T
    table = sizes.join(rows).reindex(columns=["C", "MFLOPs", "test accuracy"])
    return TransferredBlocks(found.top_best, drawn, table, setup.differs(search.second))


def widest(architecture: BlockArchitecture, limit: float) -> BlockArchitecture:
    """The architecture with as many channels, an even number, as ``limit`` FLOPs an image allow; 2 at least."""
    own = replace(architecture, C=2 * max(1, int(architecture.C * (limit / inference_flops(architecture)) ** 0.5)))
    while own.C > 2 and inference_flops(own) > limit:
        own = replace(own, C=own.C - 2)
    return own
