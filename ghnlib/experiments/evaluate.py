"""The report on accuracy without training: networks with predicted parameters, yardsticks trained from random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NEWER, torchvision_classifiers
from ghnlib.data.images import ImageSet
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.splits import OUT_OF_DISTRIBUTION, describe
from ghnlib.measuring.accuracy import NOT_FINITE, evaluate_predictions, evaluate_torchvision
from ghnlib.reporting.statistics import (
    Measured,
    mean_and_error,
    mean_interval,
    paired_interval,
    with_standard_error,
)
from ghnlib.training.networks import Accuracy, Run, TrainingRecipe, run_all

KEYS = ["method", "split", "index"]
PAIRS = {
    "ghn3 - mlp": "",  # no paper compares these two
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
        rows: one a method and architecture: ``method``, ``split``, ``index``, ``accuracy`` and ``top5`` (percent),
            ``error``, and what ``describe`` says of the architecture.
        variants: all hypernetworks. compared: those that figures show, trained for as many steps as the first, or more.
        best: the hypernetwork with the highest accuracy on validation images.
    """

    rows: pd.DataFrame
    variants: Sequence[str]
    compared: Sequence[str]
    best: str

    @property
    def tidy(self) -> pd.DataFrame:
        """All rows as a file: the architecture before its scores, of which accuracy is called ``top1``."""
        scores = ["accuracy", "top5", "error"]
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
        """Rows that statistics are taken of: what has diverged has 0 %, what has failed is left out."""
        accuracy = self.rows["accuracy"].mask(self.rows.index.isin(self.diverged.index), 0.0)
        return self.rows.assign(accuracy=accuracy).dropna(subset="accuracy")

    @cached_property
    def sampled(self) -> pd.DataFrame:
        """The counted rows of all splits but "predefined"."""
        return self.counted[self.counted["split"] != "predefined"]

    @property
    def shown(self) -> pd.DataFrame:
        """The sampled rows of compared hypernetworks."""
        return self.sampled[self.sampled["method"].isin(self.compared)]

    @cached_property
    def test(self) -> pd.DataFrame:
        """Accuracy on the split "test": rows are architectures by index, columns methods."""
        rows = self.counted[self.counted["split"] == "test"]
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

    def scores(self, method: str, split: str = "test") -> pd.Series:
        """Accuracies (percent) of a method on a split."""
        rows = self.counted
        return rows.loc[(rows["method"] == method) & (rows["split"] == split), "accuracy"]


def evaluation_splits(setup: Setup) -> dict[str, list[Architecture]]:
    """The architectures that are evaluated, by split: test, out-of-distribution and predefined ones."""
    return {split: list(setup.split(split)) for split in ("test", *OUT_OF_DISTRIBUTION, "predefined")}


def evaluate_networks(setup: Setup, splits: Mapping[str, Sequence[Architecture]]) -> Evaluation:
    """Evaluate all hypernetworks on all architectures, and the yardsticks of ``train_from_random``."""
    predicted = predict_and_evaluate(setup, {split: dict(enumerate(members)) for split, members in splits.items()})
    described = pd.concat([describe(split, architectures) for split, architectures in splits.items()])
    rows = pd.concat([predicted, train_from_random(setup, splits)]).merge(described, on=["split", "index"])
    steps = {name: setup.train.recipe_of(name).steps for name in setup.train.variants}
    compared = [name for name in steps if steps[name] >= next(iter(steps.values()))]
    best = max(steps, key=lambda name: validation_accuracy(setup, name)["validation_accuracy"].iloc[-1])
    return Evaluation(rows, list(steps), compared, best)


def validation_accuracy(setup: Setup, variant: str) -> pd.DataFrame:
    """The rows of a training's history that have a ``validation_accuracy``."""
    return setup.history(variant).dropna(subset="validation_accuracy")


def predict_and_evaluate(
    setup: Setup,
    chosen: Mapping[str, Mapping[int, Architecture]],
    statistics: tuple[ImageSet, int, int] | None = None,
) -> pd.DataFrame:
    """Test accuracy with the predictions of each hypernetwork.

    Args:
        chosen: split -> index -> architecture.
        statistics: of batch norm, see ``evaluate_predictions``.

    Returns:
        Rows ``method`` (the variant), ``split``, ``index``, ``accuracy``, ``top5``, ``error``.
    """
    places = pd.DataFrame([(split, i) for split, members in chosen.items() for i in members], columns=KEYS[1:])
    networks = [architecture for members in chosen.values() for architecture in members.values()]
    batch_size, parts = setup.evaluate.batch_size, []
    for variant, ghn in setup.hypernetworks.items():
        images, processes, folder = setup.images.test, setup.processes, setup.folder
        rows = evaluate_predictions(ghn, networks, images, batch_size, processes, folder, statistics)
        parts.append(places.join(rows.drop(columns="index")).assign(method=variant))
        print(f"{variant}: {len(networks)} architectures evaluated", flush=True)
    return pd.concat(parts, ignore_index=True)


def train_from_random(setup: Setup, splits: Mapping[str, Sequence[Architecture]]) -> pd.DataFrame:
    """Yardsticks: random parameters, and these after one epoch and the full budget of SGD.

    Args:
        splits: of each but "predefined" the first architectures are trained, as many as ``setup.evaluate`` says.

    Returns:
        One row a network: ``method``, ``split``, ``index``, ``accuracy`` (percent; NaN if it diverged), ``error``.
    """
    section, images = setup.evaluate, setup.images
    epoch = len(images.train) // section.train_batch_size
    runs = []
    for name, count, epochs in (
        ("random", section.random_networks, 0),
        ("SGD, 1 epoch", section.trained_networks, 1),
        (f"SGD, {section.epochs} epochs", section.trained_networks, section.epochs),
    ):
        recipe = TrainingRecipe(epochs * epoch, section.lr, section.train_batch_size, augment=setup.augment)
        for split, architectures in splits.items():
            few = architectures[: {"test": count, "predefined": 0}.get(split, section.ood_networks)]
            labels = [{"method": name, "split": split, "index": i} for i in range(len(few))]
            runs += [Run(a, recipe, setup.seed, labels=label) for a, label in zip(few, labels)]
    results = run_all(runs, images.train, Accuracy(images.test), processes=setup.processes, folder=setup.folder)
    return results[[*KEYS, "accuracy", "error"]]


def accuracy_table(evaluation: Evaluation) -> pd.DataFrame:
    """One row a method: accuracies (percent) by split, mean ± standard error over architectures, and of each predefined
    network; of the test split also deviation, best and top-5; numbers of architectures."""
    of_test = evaluation.counted[evaluation.counted["split"] == "test"].groupby("method")
    cells = evaluation.sampled.groupby(["method", "split"])["accuracy"].agg(with_standard_error)
    table = cells.unstack().reindex(evaluation.methods)[["test", *OUT_OF_DISTRIBUTION]]
    for i, name in enumerate(("ResNet-50", "ViT")):
        rows = evaluation.counted[(evaluation.counted["split"] == "predefined") & (evaluation.counted["index"] == i)]
        table[name] = rows.set_index("method")["accuracy"].round(1)
    table["deviation, test"] = of_test["accuracy"].std(ddof=0).round(1)
    table["best of test"] = of_test["accuracy"].max().round(1)
    top5 = of_test["top5"].agg(with_standard_error)
    table["top-5, test"] = top5[of_test["top5"].count() > 0]
    table["n test"] = of_test.size()
    table["n others"] = evaluation.counted[evaluation.counted["split"] == "wide"].groupby("method").size()
    return table.rename_axis(index=None, columns=None)


def leads(evaluation: Evaluation) -> dict[str, Measured]:
    """Points by which the first method of each of ``PAIRS`` is ahead of the second on test architectures."""
    test, found = evaluation.test, {}
    for pair in PAIRS:
        a, b = pair.split(" - ")
        if {a, b} <= set(test):
            found[pair] = paired_interval(test[a], test[b])
    return found


def claims_without_training(evaluation: Evaluation) -> dict[str, Measured]:
    """Of PPUDA Table 3 and GHN-3 Table 11."""
    found = {PAIRS[pair]: lead for pair, lead in leads(evaluation).items() if PAIRS[pair]}
    with_norm, without = evaluation.scores("ghn2"), evaluation.scores("ghn2", "bnfree")
    if len(with_norm) and len(without):
        found["without-batch-norm"] = mean_interval(with_norm).over(mean_interval(without))
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
    found = {where: paired_interval(pairs[of_training], pairs[of_batch]) for where, pairs in groups}
    table = groups[[of_batch, of_training]].agg(with_standard_error).assign(difference=pd.Series(found).map(str))
    gains: dict[str, dict[str, Measured]] = {variant: {} for variant in evaluation.variants}
    for (variant, split), gain in found.items():
        gains[variant][split] = gain
    return Protocols(table.set_axis(table.index.map(", ".join)), gains)


def best_networks(evaluation: Evaluation, count: int = 5) -> pd.DataFrame:
    """The test architectures that the best hypernetwork serves best, by index: what they are, accuracy by method."""
    rows = evaluation.rows[(evaluation.rows["split"] == "test") & (evaluation.rows["method"] == evaluation.best)]
    described = rows.set_index("index")[["nodes", "path", "depth", "width", "parameters", "batch_norm"]]
    top = evaluation.test[evaluation.best].nlargest(count).index
    return described.loc[top].join(evaluation.test.round(1))


def evaluate_torchvision_networks(setup: Setup) -> pd.DataFrame:
    """torchvision's classifiers with parameters of each hypernetwork (GHN-3 section 5.1), if ``evaluate`` asks for it.

    Returns:
        Rows ``network``, ``accuracy``, ``top5``, ``error``, ``method`` (the variant), ``split`` ("PyTorch split" or
        "newer"); none if it does not.
    """
    parts = [pd.DataFrame(columns=["network", "accuracy", "top5", "error", "method", "split"])]
    if setup.evaluate.torchvision:
        names, images, batch_size = torchvision_classifiers(), setup.images.test, setup.evaluate.batch_size
        for variant, ghn in setup.hypernetworks.items():
            rows = evaluate_torchvision(ghn, names, images, batch_size, setup.processes, setup.folder)
            split = np.where(rows["network"].isin(NEWER), "newer", "PyTorch split")
            parts.append(rows.assign(method=variant, split=split))
    return pd.concat(parts[1:] or parts)


def torchvision_table(rows: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Accuracy of torchvision's networks, a row a variant: mean ± deviation by split, and of ResNet-50."""
    words = lambda values: f"{values.mean():.2f} ± {values.std(ddof=0):.2f} (n = {values.count()})"
    by_split = rows.dropna(subset="accuracy").groupby(["method", "split"])["accuracy"].agg(words).unstack()
    of_resnet = rows[rows["network"] == "resnet50"].set_index("method")["accuracy"].round(2)
    return by_split.assign(**{"ResNet-50": of_resnet}).reindex(variants).rename_axis(index=None, columns=None)


def means_by_split(rows: pd.DataFrame, score: str = "accuracy") -> dict[str, dict[str, dict[str, float]]]:
    """Method -> split -> ``mean_and_error`` of a score over the networks that have one."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (method, split), part in rows.dropna(subset=score).groupby(["method", "split"], sort=False):
        found.setdefault(method, {})[split] = mean_and_error(part[score])
    return found
