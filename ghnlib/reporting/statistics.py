"""Numbers with their 95 % intervals, and the verdict on the claim that such a number is above 0."""

from collections.abc import Iterable, Mapping, Sequence
from math import hypot, isnan, nan
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from scipy import stats


class Measured(NamedTuple):
    """A number and the bounds of its interval (NaN if there is none).

    Attributes:
        n: over how many networks or runs.
        trainings: over how many trainings of the hypernetworks that it is a statement about; None: about none.
    """

    value: float
    low: float = nan
    high: float = nan
    n: int | None = None
    trainings: int | None = None

    def minus(self, other: Self) -> Self:
        """The difference, its interval that of independent estimates (MOVER, Zou 2007): wide if they share networks."""
        value = self.value - other.value
        low = value - hypot(self.value - self.low, other.high - other.value)
        high = value + hypot(self.high - self.value, other.value - other.low)
        return Measured(value, low, high, min((n for n in (self.n, other.n) if n), default=None))

    @property
    def count(self) -> str:
        """``n = 100, 3 trainings``, of these what there is."""
        trainings = number_of(self.trainings, "training") if self.trainings else ""
        return ", ".join(filter(None, (f"n = {self.n}" if self.n else "", trainings)))

    @property
    def verdict(self) -> str:
        """Held or not held where the interval lies on one side of 0, else not decided: a sign alone decides nothing,
        nor does one training of a hypernetwork."""
        if isnan(self.value):
            return "not testable at this scale"
        if self.trainings == 1:
            return "not decided (one training)"
        if isnan(self.low):
            return "not decided (no interval)"
        return "held" if self.low > 0 else "not held" if self.high <= 0 else "not decided"

    def __str__(self) -> str:
        if isnan(self.low):
            return f"{self.value:+.3g} (no interval)"
        return f"{self.verdict}: {self.value:+.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_and_error(values: Iterable[float]) -> dict[str, float | None]:
    """Number of values that are not NaN, their mean, deviation (of a sample, over n - 1) and standard error (deviation
    / sqrt(n)), both None of a single value."""
    values = pd.Series(list(values), dtype=float).dropna()
    several = len(values) > 1
    deviation, error = (float(values.std()), float(values.sem())) if several else (None, None)
    return {"n": len(values), "mean": float(values.mean()), "deviation": deviation, "standard_error": error}


def mean_interval(values: Iterable[float]) -> Measured:
    """Mean of the values that are not NaN with its interval by Student's t (none for a single value)."""
    values = np.asarray(list(values), dtype=float)
    values = values[~np.isnan(values)]
    n, mean = len(values), float(values.mean()) if len(values) else nan
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else nan
    return Measured(mean, mean - half, mean + half, n)


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Measured:
    """``mean_interval`` of a - b over paired observations; NaN: not observed."""
    return mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def over_trainings(found: Sequence[Measured]) -> Measured:
    """What was measured with each training of a hypernetwork (another seed), as a statement about its training.

    The mean; the half-width of its interval is the root of the sum of two squares, of Student's t interval over the
    trainings' values and of the mean half-width of their own intervals, over networks or runs. So it is wide where
    trainings differ, and where networks do.
    """
    values = [each.value for each in found]
    over_seeds = mean_interval(values)
    if len(found) == 1 or isnan(over_seeds.value):
        return found[0]._replace(trainings=len(found))
    mean, half = over_seeds.value, over_seeds.high - over_seeds.value
    own = [each for each in found if not isnan(each.low)]
    below, above = (sum(widths) / max(1, len(own)) for widths in
                    ([each.value - each.low for each in own], [each.high - each.value for each in own]))  # fmt: skip
    n = min((each.n for each in found if each.n), default=None)
    return Measured(mean, mean - hypot(half, below), mean + hypot(half, above), n, over_seeds.n)


def claims_over_trainings(found: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """``over_trainings`` of each claim that every training has."""
    return {key: over_trainings([each[key] for each in found]) for key in found[0] if all(key in f for f in found)}


def share_above_half(wins: int, n: int) -> Measured:
    """The share of ``wins`` among n minus a half, with its Clopper-Pearson interval."""
    share = stats.binomtest(wins, n)
    return Measured(*(float(x) - 0.5 for x in (share.statistic, *share.proportion_ci())), n)


def finite(found: Mapping[str, Measured]) -> dict[str, Measured]:
    """Those that are numbers."""
    return {key: each for key, each in found.items() if np.isfinite(each.value)}


def counted(rows: pd.DataFrame, score: str = "accuracy") -> pd.DataFrame:
    """The rows of networks that statistics are taken of: what diverged has a score of 0, what failed is left out."""
    return rows[rows["error"] == ""].fillna({score: 0.0})


def r_of(r: float, n: int) -> Measured:
    """Pearson's R over n observations with its interval by Fisher's transformation; none for 3 or fewer."""
    with np.errstate(divide="ignore"):  # of 1 it is infinite
        centre = np.arctanh(r)
    half = stats.norm.ppf(0.975) / (n - 3) ** 0.5 if n > 3 else nan
    return Measured(float(r), float(np.tanh(centre - half)), float(np.tanh(centre + half)), int(n))


def correlation(score: pd.Series, accuracy: pd.Series) -> Measured:
    """``r_of`` the pairs that are not NaN; not a number for fewer than 3 pairs or without variance."""
    pairs = pd.DataFrame({"score": score, "accuracy": accuracy}).dropna()
    if len(pairs) < 3 or (pairs.nunique() == 1).any():
        return Measured(nan, n=len(pairs))
    return r_of(stats.pearsonr(pairs["score"], pairs["accuracy"]).statistic, len(pairs))


def tau_of(tau: float, n: int) -> Measured:
    """Kendall's tau over n observations with its interval, by the variance 0.437 / (n - 4) of atanh(tau) (Fieller,
    Hartley and Pearson 1957); none for n < 5."""
    if n < 5:
        return Measured(float(tau), n=int(n))
    centre, half = np.arctanh(np.clip(tau, -0.999, 0.999)), 1.96 * (0.437 / (n - 4)) ** 0.5
    return Measured(float(tau), float(np.tanh(centre - half)), float(np.tanh(centre + half)), int(n))


def rank_correlations(scores: pd.DataFrame, accuracy: Sequence[float], top: int | None = None) -> pd.DataFrame:
    """Agreement of scores, one row an architecture, one column a method, with accuracies of the same architectures
    after training (GHN-3 Table 13, GHN 2018 Table 3). Missing values are left out. ``top``: only among so many
    architectures with the highest accuracy.

    One row a method: ``n``, Kendall's ``tau`` with the bounds of its interval, ``low`` and ``high``, and Pearson's
    ``r``; not a number for fewer than 3 architectures, the bounds for fewer than 5.
    """
    table = scores.assign(accuracy=list(accuracy))
    if top is not None:
        table = table.nlargest(top, "accuracy")
    rows = {}
    for method in scores.columns:
        pairs = table[[method, "accuracy"]].dropna()
        enough = len(pairs) > 2
        tau = tau_of(stats.kendalltau(*pairs.to_numpy().T).statistic if enough else nan, len(pairs))
        r = correlation(pairs[method], pairs["accuracy"]).value
        rows[method] = {"n": len(pairs), "tau": tau.value, "low": tau.low, "high": tau.high, "r": r}
    return pd.DataFrame(rows).T.astype({"n": int})


def top_against_random(score: Sequence[float], accuracy: Sequence[float], k: int, seed: int) -> dict[str, float]:
    """Random search with a surrogate: trained accuracy of the k highest scores against k architectures at random.
    ``n``: k; ``top``, mean accuracy of the k best by score; ``random``, of all; ``lead`` of the top, with bounds
    ``low`` and ``high``: what remains of it against 95 % of 10,000 random choices of k (GHN 2018 Table 1)."""
    accuracy = np.asarray(accuracy, dtype=float)
    top = accuracy[np.argsort(np.asarray(score), kind="stable")[::-1][:k]].mean()
    rng = np.random.default_rng(seed)
    drawn = accuracy[rng.permuted(np.tile(np.arange(len(accuracy)), (10_000, 1)), axis=1)[:, :k]].mean(1)
    low, high = top - np.quantile(drawn, (0.975, 0.025))
    mean = accuracy.mean()
    return {"n": k, "top": top, "random": mean, "lead": top - mean, "low": float(low), "high": float(high)}


def tables_over_trainings(tables: Sequence[pd.DataFrame], digits: int = 1) -> pd.DataFrame:
    """``mean ± deviation`` over trainings of equal tables, one a training; the mean alone of a single one."""
    stacked = pd.concat(tables, keys=range(len(tables))).astype(float)
    levels = list(range(1, stacked.index.nlevels))
    words = lambda values: with_deviation(values, digits)
    return stacked.groupby(level=levels, sort=False).agg(words)


def with_deviation(values: Iterable[float], digits: int = 1, ddof: int = 1) -> str:
    """``mean ± deviation`` (of a sample, over n - 1; ``ddof`` 0: of all) of the values that are not NaN; the value
    alone if all are the same, blank without one."""
    values = pd.Series(list(values), dtype=float).dropna()
    if values.empty:
        return ""
    spread = f" ± {values.std(ddof=ddof):.{digits}f}" if values.nunique() > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def number_of(count: int, noun: str) -> str:
    """Such as "1 training", "4 trainings"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def with_interval(found: Measured) -> str:
    """Such as "0.62 [0.50, 0.71]"."""
    if isnan(found.value):
        return "not testable"
    return f"{found.value:.2f}" + ("" if isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]")


def rate_in_words(lr: float, tried: Sequence[float]) -> str:
    """A learning rate that was chosen; says so if it is the smallest or largest of several that were tried, since a
    better one may lie beyond."""
    return f"{lr:g}" + " (end of grid)" * (len(tried) > 1 and lr in (min(tried), max(tried)))


def with_standard_error(values: pd.Series) -> str:
    """``mean ± standard error`` of the values that are not NaN, in their unit; ``mean (n = 2)`` of fewer than three,
    whose deviation says little."""
    spread = f"± {values.sem():.1f}" if values.count() > 2 else f"(n = {values.count()})"
    return f"{values.mean():.1f} {spread}"
