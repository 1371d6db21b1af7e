"""The report on accuracy without training: networks with predicted parameters, yardsticks trained from random ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NEWER, torchvision_classifiers
from ghnlib.data.images import ImageSet
from ghnlib.experiments.evaluate.ablations import bases
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.splits import describe
from ghnlib.measuring.accuracy import NOT_FINITE, SCORES, evaluate_predictions, evaluate_torchvision
from ghnlib.reporting.publish import EVALUATED
from ghnlib.reporting.statistics import (
    Measured,
    counted,
    mean_and_error,
    mean_interval,
    over_trainings,
    paired_interval,
    with_deviation,
    with_standard_error,
)
from ghnlib.training.networks import Accuracy, Run, run_all

NETWORK = ["method", "split", "index"]
KEYS = ["method", "seed", "split", "index"]
PAIRS = {
    "ghn3 - mlp": "",  # no paper compares these two
    "continued - scratch": "",  # profiles/fashion.yaml
    "ghn3 - ghn2": "without-training-ghn3-ghn2",
    "ghn2 - mlp": "without-training-ghn2-mlp",
    "ghn2 - ghn1": "without-training-ghn2-ghn1",
    "ghn2 - random": "without-training-ghn2-random",
    "ghn3 - SGD, 1 epoch": "without-training-ghn3-epoch",
}
"""Methods that are compared network by network -> the claim that the first is better, if there is one."""


@dataclass(frozen=True)
class Evaluation:
    """Test accuracy of networks by method: hypernetworks by their variant, "random", "SGD, 1 epoch", ...

    Attributes:
        rows: one a method, seed (of the hypernetwork's training; of others the only one) and architecture: ``method``,
            ``seed``, ``split``, ``index``, ``accuracy``, ``top5`` and further metrics (percent), ``error``, and what
            ``describe`` says of the architecture.
        variants: all hypernetworks. compared: those that figures show, trained for as many steps as the first, or more,
            without networks of one's own; of an ablation's rows MLP and the best alone.
        best: the hypernetwork with the highest accuracy on validation images, on average over its trainings, of those
            trained without networks of one's own.
    """

    rows: pd.DataFrame
    variants: Sequence[str]
    compared: Sequence[str]
    best: str

    def scored_by(self, metric: str) -> Self:
        """The same with another metric in the place of accuracy."""
        return replace(self, rows=self.rows.assign(accuracy=self.rows[metric]))

    @property
    def tidy(self) -> pd.DataFrame:
        """All rows as a file: the architecture before its scores, of which accuracy is called ``top1``."""
        scores = [*(name for name in SCORES if name in self.rows), "error"]
        described = self.rows.columns.drop([*KEYS, *scores])
        return self.rows[[*KEYS, *described, *scores]].rename(columns={"accuracy": "top1"})

    @property
    def missing(self) -> pd.DataFrame:
        """The rows without accuracy."""
        return self.rows[self.rows["accuracy"].isna()]

    @property
    def diverged(self) -> pd.DataFrame:
        """The missing ones whose scores or training were not finite."""
        return self.missing[self.missing["error"].isin(["", NOT_FINITE])]

    @cached_property
    def counted(self) -> pd.DataFrame:
        """Rows that statistics are taken of, see ``counted``; scores that are not finite are no failure."""
        return counted(self.rows.replace({"error": {NOT_FINITE: ""}}))

    @cached_property
    def sampled(self) -> pd.DataFrame:
        """The counted rows of all splits but "predefined", of each architecture one: mean scores over trainings."""
        rows = self.counted[self.counted["split"] != "predefined"]
        networks = rows.groupby(NETWORK, sort=False)
        return networks.first().assign(**networks[["accuracy", "top5"]].mean()).reset_index()

    @property
    def shown(self) -> pd.DataFrame:
        """The sampled rows of compared hypernetworks."""
        return self.sampled[self.sampled["method"].isin(self.compared)]

    @cached_property
    def test(self) -> pd.DataFrame:
        """Accuracy on the split "test", mean over trainings: rows are architectures by index, columns methods."""
        return self._table(self.sampled[self.sampled["split"] == "test"])

    @cached_property
    def tests(self) -> list[pd.DataFrame]:
        """The same of each training: of all hypernetworks those with one seed, of other methods the only values."""
        rows = self.counted[self.counted["split"] == "test"]
        predicted = rows["method"].isin(self.variants)
        return [self._table(rows[~predicted | (rows["seed"] == seed)]) for seed in rows["seed"][predicted].unique()]

    def _table(self, rows: pd.DataFrame) -> pd.DataFrame:
        table = rows.pivot_table(index="index", columns="method", values="accuracy")
        return table[[name for name in self.methods if name in table]]

    @property
    def methods(self) -> list[str]:
        """In the order of tables: random parameters, hypernetworks, trained networks."""
        yardsticks = [name for name in self.rows["method"].unique() if name not in (*self.variants, "random")]
        return ["random", *self.variants, *yardsticks]

    @property
    def shown_methods(self) -> list[str]:
        """Those that figures show: random parameters, compared hypernetworks, trained networks."""
        return [name for name in self.methods if name in self.compared or name not in self.variants]

    def scores(self, method: str, split: str, *, batch_norm: bool) -> list[pd.Series]:
        """Accuracies (percent) of a method on networks of a split with or without batch norm, of each training."""
        own = (self.counted["method"] == method) & (self.counted["split"] == split)
        rows = self.counted[own & (self.counted["batch_norm"] == batch_norm)]
        return [of_training["accuracy"] for _, of_training in rows.groupby("seed", sort=False)]


def evaluation_splits(setup: Setup) -> dict[str, list[Architecture]]:
    """The architectures that are evaluated, by split: test, out-of-distribution and predefined ones."""
    return {split: list(setup.split(split)) for split in (*EVALUATED, "predefined")}


def evaluate_networks(setup: Setup, splits: Mapping[str, Sequence[Architecture]]) -> Evaluation:
    """Evaluate all hypernetworks on all architectures, and the yardsticks of ``train_from_random``."""
    chosen = {split: dict(enumerate(members)) for split, members in splits.items()}
    large = {"predefined": chosen.pop("predefined")}  # at last: processes that have had such a network are replaced
    predicted = pd.concat([predict_and_evaluate(setup, part) for part in (chosen, large)], ignore_index=True)
    described = pd.concat([describe(split, architectures) for split, architectures in splits.items()])
    rows = pd.concat([predicted, train_from_random(setup, splits)]).merge(described, on=["split", "index"])
    recipes = {name: setup.train.recipe_of(name) for name in setup.train.variants}
    plain = setup.train.plain
    final = {name: validation_accuracy(setup, name).groupby("seed")["validation_accuracy"].last() for name in plain}
    best = max(plain, key=lambda name: final[name].mean())
    left_out = set(bases(setup.train)) - {"mlp", best}
    compared = [name for name in plain if recipes[name].steps >= recipes[plain[0]].steps and name not in left_out]
    return Evaluation(rows, list(recipes), compared, best)


def validation_accuracy(setup: Setup, variant: str) -> pd.DataFrame:
    """The rows of a variant's histories that have a ``validation_accuracy``."""
    return setup.history(variant).dropna(subset="validation_accuracy")


def predict_and_evaluate(
    setup: Setup,
    chosen: Mapping[str, Mapping[int | str, Architecture]],
    statistics: tuple[ImageSet, int, int] | None = None,
    bits: int | None = None,
) -> pd.DataFrame:
    """Test accuracy with the predictions of each hypernetwork.

    Args:
        chosen: split -> index (or a name) -> architecture.
        statistics, bits: of batch norm and of weights, see ``evaluate_predictions``.

    Returns:
        Rows ``method`` (the variant), ``seed``, ``split``, ``index``, ``accuracy``, ``top5``, metrics, ``error``.
    """
    places = pd.DataFrame([(split, i) for split, members in chosen.items() for i in members], columns=KEYS[2:])
    networks = [architecture for members in chosen.values() for architecture in members.values()]
    options = {"statistics": statistics, "metrics": setup.metrics[1:], "bits": bits, **setup.kept}
    parts = []
    for variant, trainings in setup.hypernetworks.items():
        for seed, ghn in trainings.items():
            rows = evaluate_predictions(ghn, networks, setup.images.test, setup.evaluate.batch_size, **options)
            parts.append(places.join(rows.drop(columns="index")).assign(method=variant, seed=seed))
    return pd.concat(parts, ignore_index=True)


def train_from_random(setup: Setup, splits: Mapping[str, Sequence[Architecture]]) -> pd.DataFrame:
    """Yardsticks: random parameters, and these after one epoch and the full budget of SGD.

    Args:
        splits: of each but "predefined" the first architectures are trained, as many as ``setup.evaluate`` says.

    Returns:
        One row a network: ``method``, ``seed``, ``split``, ``index``, ``accuracy`` and further metrics (percent; NaN if
        it diverged), ``error``.
    """
    section, images = setup.evaluate, setup.images
    epoch = images.train.steps_per_epoch(section.sgd.batch_size)
    runs = []
    names = {0: "random", 1: "SGD, 1 epoch"}
    for epochs in sorted({*names, section.epochs}):
        name = names.get(epochs, f"SGD, {epochs} epochs")
        count = section.trained_networks if epochs else section.random_networks
        recipe = setup.recipe(section.sgd, epochs * epoch)
        for split, architectures in splits.items():
            few = architectures[: {"test": count, "predefined": 0}.get(split, section.ood_networks)]
            labels = [{"method": name, "seed": setup.seed, "split": split, "index": i} for i in range(len(few))]
            runs += [Run(a, recipe, setup.seed, labels=label) for a, label in zip(few, labels)]
    results = run_all(runs, images.train, Accuracy(images.test, metrics=setup.metrics[1:]), **setup.kept)
    return results.reindex(columns=[*KEYS, *setup.metrics, "error"])


def accuracy_table(evaluation: Evaluation) -> pd.DataFrame:
    """One row a method: accuracies (percent) by split and of each predefined network, of hypernetworks mean ± deviation
    over trainings, of others mean ± standard error over architectures; of the test split also deviation over
    architectures, best and top-5; numbers of architectures."""
    of_test = evaluation.sampled[evaluation.sampled["split"] == "test"].groupby("method")
    places = evaluation.counted["split"].mask(evaluation.counted["split"] == "predefined", evaluation.counted["index"])
    groups = evaluation.counted.assign(split=places).groupby(["method", "split"], sort=False)
    cells = {place: _cell(rows, "accuracy", place[0] in evaluation.variants) for place, rows in groups}
    table = pd.Series(cells).unstack().reindex(evaluation.methods).rename(columns={0: "ResNet-50", 1: "ViT"})
    table = table.reindex(columns=[*EVALUATED, "ResNet-50", "ViT"])
    table["deviation, test"] = of_test["accuracy"].std(ddof=0).round(1)
    table["best of test"] = of_test["accuracy"].max().round(1)
    top5 = {method: _cell(rows, "top5", True) for (method, split), rows in groups if split == "test"}
    table["top-5, test"] = pd.Series(top5)[of_test["top5"].count() > 0]
    table["n test"] = of_test.size()
    table["n others"] = evaluation.sampled[evaluation.sampled["split"] == "wide"].groupby("method").size()
    return table.rename_axis(index=None, columns=None)


def _cell(rows: pd.DataFrame, score: str, predicted: bool) -> str:
    """Mean ± deviation over trainings of what is predicted, else mean ± standard error."""
    return with_deviation(rows.groupby("seed")[score].mean()) if predicted else with_standard_error(rows[score])


def leads(evaluation: Evaluation) -> dict[str, Measured]:
    """Points by which the first method of each of ``PAIRS`` is ahead of the second on test architectures, paired by
    architecture and by seed of training."""
    found = {}
    for pair in PAIRS:
        a, b = pair.split(" - ")
        if {a, b} <= set(evaluation.test):
            found[pair] = over_trainings([paired_interval(test[a], test[b]) for test in evaluation.tests])
    return found


def claims_without_training(evaluation: Evaluation) -> dict[str, Measured]:
    """Of PPUDA Table 3 and GHN-3 Table 11. "Without batch norm": the split bnfree against networks of the split test
    that have it, as nearly all of the papers' do."""
    found = {PAIRS[pair]: lead for pair, lead in leads(evaluation).items() if PAIRS[pair]}
    with_norm = evaluation.scores("ghn2", "test", batch_norm=True)
    without = evaluation.scores("ghn2", "bnfree", batch_norm=False)
    if with_norm and without:
        losses = [mean_interval(a).minus(mean_interval(b)) for a, b in zip(with_norm, without)]
        found["without-batch-norm"] = over_trainings(losses)
    return found


class Protocols(NamedTuple):
    """Batch norm with statistics of each test batch, or of training batches (PPUDA appendix C.1).

    ``table``: accuracies by both, a row "VARIANT, SPLIT"; ``gains``: variant -> split -> points of the second.
    """

    table: pd.DataFrame
    gains: dict[str, dict[str, Measured]]

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA appendix C.1."""
        return {"training-statistics": self.gains["ghn2"]["test"]} if "test" in self.gains.get("ghn2", {}) else {}


def compare_batch_norm(setup: Setup, splits: Mapping[str, Sequence[Architecture]], evaluation: Evaluation) -> Protocols:
    """Evaluate the first architectures with batch norm of each split by the other protocol too."""
    count, of_batch, of_training = setup.evaluate.bn_networks, "batches of test images", "training batches"
    normed = evaluation.rows[evaluation.rows["batch_norm"]].groupby("split", sort=False)["index"].unique()
    few = {
        split: {i: splits[split][i] for i in index[:count]} for split, index in normed.items() if split != "predefined"
    }
    statistics = setup.images.train, setup.evaluate.bn_batches, setup.seed
    other = predict_and_evaluate(setup, few, statistics).rename(columns={"accuracy": of_training})
    rows = evaluation.counted.rename(columns={"accuracy": of_batch})[[*KEYS, of_batch]]
    groups = rows.merge(other[[*KEYS, of_training]]).groupby(["method", "split"], sort=False)
    found = {
        where: over_trainings([paired_interval(own[of_training], own[of_batch]) for _, own in pairs.groupby("seed")])
        for where, pairs in groups
    }
    cells = {where: [_cell(pairs, column, True) for column in (of_batch, of_training)] for where, pairs in groups}
    table = pd.DataFrame(cells, index=[of_batch, of_training]).T.assign(difference=pd.Series(found).map(str))
    gains: dict[str, dict[str, Measured]] = {variant: {} for variant in evaluation.variants}
    for (variant, split), gain in found.items():
        gains[variant][split] = gain
    return Protocols(table.set_axis(table.index.map(", ".join)), gains)


def best_networks(evaluation: Evaluation, count: int = 5) -> pd.DataFrame:
    """The test architectures that the best hypernetwork serves best, by index: what they are, accuracy by method."""
    rows = evaluation.rows[(evaluation.rows["split"] == "test") & (evaluation.rows["method"] == evaluation.best)]
    described = rows.groupby("index")[["nodes", "path", "depth", "width", "parameters", "batch_norm"]].first()
    top = evaluation.test[evaluation.best].nlargest(count).index
    return described.loc[top].join(evaluation.test.round(1))


def evaluate_torchvision_networks(setup: Setup) -> pd.DataFrame:
    """torchvision's classifiers with parameters of each hypernetwork (GHN-3 section 5.1), if ``evaluate`` asks for it.

    Returns:
        Rows ``network``, ``accuracy``, ``top5``, metrics, ``error``, ``method`` (the variant), ``seed``, ``split``
        ("PyTorch split" or "newer"); none if it does not.
    """
    parts = [pd.DataFrame(columns=["network", "accuracy", "top5", "error", "method", "seed", "split"])]
    if setup.evaluate.torchvision:
        names, images, batch_size = torchvision_classifiers(), setup.images.test, setup.evaluate.batch_size
        for variant, seed in setup.train.trainings.values():
            ghn = setup.hypernetworks[variant][seed]
            rows = evaluate_torchvision(ghn, names, images, batch_size, **setup.kept, metrics=setup.metrics[1:])
            split = np.where(rows["network"].isin(NEWER), "newer", "PyTorch split")
            parts.append(rows.assign(method=variant, seed=seed, split=split))
    return pd.concat(parts[1:] or parts)


def torchvision_table(rows: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Accuracy of torchvision's networks, mean over trainings, a row a variant: mean ± deviation over the networks of
    each split, and of ResNet-50."""
    words = lambda values: f"{with_deviation(values, 2, ddof=0)} (n = {values.count()})"
    means = rows.dropna(subset="accuracy").groupby(["method", "split", "network"], as_index=False)["accuracy"].mean()
    by_split = means.groupby(["method", "split"])["accuracy"].agg(words).unstack()
    of_resnet = means[means["network"] == "resnet50"].set_index("method")["accuracy"].round(2)
    return by_split.assign(**{"ResNet-50": of_resnet}).reindex(variants).rename_axis(index=None, columns=None)


def means_by_split(rows: pd.DataFrame, score: str = "accuracy") -> dict[str, dict[str, dict[str, float]]]:
    """Method -> split -> ``mean_and_error`` over networks of a score, its mean over trainings; ``trainings``: their
    number; ``over_trainings``: deviation of their means (of a sample), if there are several."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (method, split), part in rows.dropna(subset=score).groupby(["method", "split"], sort=False):
        means = part.groupby("seed")[score].mean()
        of_networks = mean_and_error(part.groupby([c for c in ("index", "network") if c in part])[score].mean())
        of_trainings = {"trainings": len(means), "over_trainings": float(means.std())}
        found.setdefault(method, {})[split] = of_networks | of_trainings
    return found
