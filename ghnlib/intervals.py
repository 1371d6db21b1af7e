"""A number with its 95 % interval, and the verdict on the claim that it is above 0. Apart from the table of claims, so
that an edit there measures nothing anew."""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot, isnan, nan
from typing import NamedTuple


class Measured(NamedTuple):
    """A number, the bounds of its interval (NaN if there is none), of how many networks or seeds."""

    value: float
    low: float = nan
    high: float = nan
    n: int | None = None

    def over(self, other: Measured) -> Measured:
        """The difference, its interval that of independent estimates (MOVER, Zou 2007): wide if they share networks."""
        value = self.value - other.value
        low = value - hypot(self.value - self.low, other.high - other.value)
        high = value + hypot(self.high - self.value, other.value - other.low)
        return Measured(value, low, high, min((n for n in (self.n, other.n) if n), default=None))

    @property
    def verdict(self) -> str:
        """Held or not held where the interval lies on one side of 0, else not decided: a sign alone decides nothing."""
        if isnan(self.value):
            return "not testable at this scale"
        if isnan(self.low):
            return "not decided (no interval)"
        return "held" if self.low > 0 else "not held" if self.high <= 0 else "not decided"

    def __str__(self) -> str:
        if isnan(self.low):
            return f"{self.value:+.3g} (no interval)"
        return f"{self.verdict}: {self.value:+.3g} [{self.low:.3g}, {self.high:.3g}]"


def measured(found: Mapping) -> Measured:
    """What ``paired_interval``, ``mean_and_error`` (interval by Student's t), ``rank_correlations`` or
    ``top_against_random`` have found, or the share of ``wins`` above a half (Clopper-Pearson interval)."""
    from scipy import stats  # takes a second, and not all need it

    if "wins" in found:
        n, share = found["networks"], stats.binomtest(found["wins"], found["networks"])
        return Measured(*(x - 0.5 for x in (share.statistic, *share.proportion_ci())), n)
    value, n = next(found[key] for key in ("mean", "tau", "lead") if key in found), int(found["n"])
    half = stats.t.ppf(0.975, n - 1) * found.get("standard_error", nan) * (n / max(1, n - 1)) ** 0.5
    return Measured(value, found.get("low", value - half), found.get("high", value + half), n)
