"""Accuracy without training against the size of networks (PPUDA Fig. 10), a part of the report on it."""

from typing import NamedTuple

import pandas as pd

from ghnlib.experiments.evaluate.accuracy import Evaluation
from ghnlib.reporting.statistics import Measured, mean_interval, over_trainings


class Panel(NamedTuple):
    """Accuracy against a column ``x`` of ``rows``, whose name in words is ``label``."""

    x: str
    label: str
    rows: pd.DataFrame


def size_panels(evaluation: Evaluation) -> list[Panel]:
    """Accuracy of compared methods against width, depth, nodes (the mean of each fifth of the networks) and, without
    batch norm, depth (PPUDA Fig. 10)."""
    rows = evaluation.sampled[evaluation.sampled["method"].isin(evaluation.shown_methods)]
    fifth = rows.groupby(pd.qcut(rows["nodes"], 5, duplicates="drop"), observed=True)["nodes"].transform("mean")
    rows = rows.assign(fifth=fifth.round())
    normed, bare = rows[rows["batch_norm"]], rows[~rows["batch_norm"]]
    return [
        Panel("width", "width: channels C", normed[normed["split"].isin(["test", "wide"])]),
        Panel("depth", "depth: cells", normed[normed["split"].isin(["test", "deep"])]),
        Panel("fifth", "nodes", normed),
        Panel("depth", "depth without batch norm: cells", bare),
    ]


def size_correlations(evaluation: Evaluation) -> pd.Series:
    """Spearman correlation of the best hypernetwork's accuracy with each of ``size_panels``."""
    own = {p.label: p.rows.loc[p.rows["method"] == evaluation.best, ["accuracy", p.x]] for p in size_panels(evaluation)}
    return pd.Series({label: rows.corr("spearman").iloc[0, 1] for label, rows in own.items()})


def norm_gap(evaluation: Evaluation) -> Measured:
    """Points by which the best hypernetwork's predictions are better for networks with batch norm than for those
    without, over all splits (PPUDA Fig. 10)."""
    rows = evaluation.counted[
        (evaluation.counted["method"] == evaluation.best) & (evaluation.counted["split"] != "predefined")
    ]
    parts = ([mean_interval(own.loc[own["batch_norm"] == normed, "accuracy"]) for normed in (True, False)]
             for _, own in rows.groupby("seed"))  # fmt: skip
    return over_trainings([with_norm.minus(without) for with_norm, without in parts])
