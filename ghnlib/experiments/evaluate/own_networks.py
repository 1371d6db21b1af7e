"""Networks of one's own in the report on accuracy without training: what it brings to train on some of them."""

from dataclasses import dataclass

import pandas as pd

from ghnlib.architectures.vision import own_networks
from ghnlib.experiments.evaluate.accuracy import Evaluation, predict_and_evaluate
from ghnlib.experiments.setup import Setup
from ghnlib.reporting.statistics import with_deviation

GROUPS = "trained on", "unseen"


@dataclass(frozen=True)
class OwnNetworks:
    """Test accuracy (percent) with predicted parameters.

    Attributes:
        rows: ``method`` (the variant), ``seed``, ``group`` ("trained on": those of ``deepnets.extra``, by variants with
            an ``extra_share``; "unseen": those of ``evaluate.unseen``, by all), ``network``, ``accuracy``, ``error``;
            none where no variant has an ``extra_share``.
        test: the same of test architectures, mean by method and seed.
    """

    rows: pd.DataFrame
    test: pd.Series

    @property
    def table(self) -> pd.DataFrame:
        """A row a variant: accuracy on each network, their means by group and that on test architectures, each mean ±
        deviation over trainings."""
        rows = self.rows.dropna(subset="accuracy")
        cells = [rows.groupby(["method", "network", "seed"])["accuracy"].mean()]
        cells += [rows.groupby(["method", "group", "seed"])["accuracy"].mean().rename(index="mean, {}".format, level=1)]
        cells += [pd.concat({"mean, test": self.test}).swaplevel(0, 1)]
        table = pd.concat(cells).groupby(level=[0, 1], sort=False).agg(with_deviation).unstack()
        order = [*rows["network"].unique(), *(f"mean, {group}" for group in GROUPS), "mean, test"]
        return table.reindex(index=rows["method"].unique(), columns=order).rename_axis(index=None, columns=None)

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Variant -> group and network -> accuracy, mean over trainings."""
        rows = self.rows.dropna(subset="accuracy")
        found: dict[str, dict[str, float]] = {}
        for column in "group", "network":
            for (method, name), accuracy in rows.groupby(["method", column])["accuracy"].mean().items():
                found.setdefault(method, {})[name] = accuracy
        return found


def evaluate_own_networks(setup: Setup, evaluation: Evaluation) -> OwnNetworks:
    """Evaluate every hypernetwork on the networks of ``deepnets.extra`` and ``evaluate.unseen``, if one was trained on
    such. Raises DataError, see ``own_networks``."""
    counted = evaluation.counted[evaluation.counted["split"] == "test"]
    test = counted.groupby(["method", "seed"])["accuracy"].mean().loc[list(evaluation.variants)]
    if not any(setup.train.recipe_of(name).extra_share for name in setup.train.variants):
        return OwnNetworks(pd.DataFrame(columns=["method", "seed", "group", "network", "accuracy", "error"]), test)
    sizes = len(setup.images.classes), setup.images.side
    chosen = {group: dict(zip(names, own_networks(names, *sizes)))
              for group, names in zip(GROUPS, (setup.deepnets.extra, setup.evaluate.unseen))}  # fmt: skip
    rows = predict_and_evaluate(setup, chosen).rename(columns={"split": "group", "index": "network"})
    return OwnNetworks(rows.assign(network=rows["network"].str.rpartition(":")[2]), test)
