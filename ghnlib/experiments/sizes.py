"""Accuracy without training against the size of networks (PPUDA Figs. 6 f, g and 10), a part of the report on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from ghnlib.experiments.evaluate import Evaluation
from ghnlib.reporting.statistics import Measured, mean_interval, of_row, rank_correlations


def error_and_size(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Kendall's tau of error and size over rows of an ``Evaluation``, by method: rows ``path`` and ``nodes`` of
    ``rank_correlations`` (PPUDA Fig. 6 f, g)."""
    groups = rows.groupby("method", sort=False)
    return {name: rank_correlations(own[["path", "nodes"]], 100 - own["accuracy"]) for name, own in groups}


def tau_table(taus: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """``error_and_size`` with intervals in words, a row a method."""
    words = lambda row: f"{row['tau']:+.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return pd.DataFrame({name: own.apply(words, axis=1) for name, own in taus.items()}).T


def claims_of_size(taus: Mapping[str, pd.DataFrame]) -> dict[str, Measured]:
    """Of PPUDA Fig. 6 f, g, from ``error_and_size``."""
    of_ghn2 = taus.get("ghn2")
    return {} if of_ghn2 is None else {f"error-and-{size}": of_row(row) for size, row in of_ghn2.iterrows()}


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
    rows = evaluation.sampled[evaluation.sampled["method"] == evaluation.best]
    with_norm, without = rows[rows["batch_norm"]], rows[~rows["batch_norm"]]
    return mean_interval(with_norm["accuracy"]).over(mean_interval(without["accuracy"]))
