"""Accuracy of predicted weights that are rounded to few bits (GHN-Q, Yun and Wong 2022), a part of the report on
accuracy without training."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.experiments.evaluate.accuracy import KEYS, Evaluation, means_by_split, predict_and_evaluate
from ghnlib.experiments.setup import Setup
from ghnlib.measuring.accuracy import NOT_FINITE
from ghnlib.reporting.statistics import counted, with_deviation


@dataclass(frozen=True)
class Quantised:
    """Rows as of ``predict_and_evaluate`` and a column ``weights``: "float", "8 bits", ..."""

    rows: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """One row a variant, one column a kind of weights: accuracy (%), mean ± deviation over trainings."""
        means = self.rows.groupby(["method", "weights", "seed"], sort=False)["accuracy"].mean()
        table = means.groupby(level=["method", "weights"], sort=False).agg(with_deviation).unstack(sort=False)
        return table.rename_axis(index=None, columns=None)

    @property
    def metrics(self) -> dict[str, dict[str, object]]:
        """Kind of weights -> ``means_by_split``."""
        return {weights: means_by_split(rows) for weights, rows in self.rows.groupby("weights", sort=False)}


def evaluate_quantised(setup: Setup, test: Sequence[Architecture], evaluation: Evaluation) -> Quantised:
    """The first test architectures with predicted weights of each of ``evaluate.bits``, beside float32; no rows without
    bits."""
    few, bits = dict(enumerate(test[: setup.evaluate.quantised_networks])), setup.evaluate.bits
    parts = [predict_and_evaluate(setup, {"test": few}, bits=b).assign(weights=f"{b} bits") for b in bits]
    exact = evaluation.rows[evaluation.rows["method"].isin(evaluation.variants) & (evaluation.rows["split"] == "test")]
    exact = exact[exact["index"].isin(few)].assign(weights="float")[: None if bits else 0]
    rows = pd.concat([exact, *parts])[[*KEYS, "weights", "accuracy", "error"]]
    return Quantised(counted(rows.replace({"error": {NOT_FINITE: ""}})))
