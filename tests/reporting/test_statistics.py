"""Numbers with their intervals, and verdicts on claims."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ghnlib.reporting import statistics
from ghnlib.reporting.statistics import Measured

NAN = math.nan


@pytest.mark.parametrize(("measured", "verdict", "text"), [
    (Measured(0.3, 0.125, 0.5, 9), "held", "held: +0.3 [0.125, 0.5]"),
    (Measured(-3.0, -5.0, 0.0), "not held", "not held: -3 [-5, 0]"),
    (Measured(1.0, 0.0, 2.0), "not decided", "not decided: +1 [0, 2]"),
    (Measured(-1.0, -2.0, 0.1), "not decided", "not decided: -1 [-2, 0.1]"),
    (Measured(5.0), "not decided (no interval)", "+5 (no interval)"),
    (Measured(math.inf), "not decided (no interval)", "+inf (no interval)"),
    (Measured(NAN), "not testable at this scale", "+nan (no interval)"),
])  # fmt: skip
def test_verdicts_follow_the_interval(measured, verdict, text):
    assert measured.verdict == verdict and str(measured) == text


def test_the_interval_of_a_difference_adds_those_of_both():
    found = Measured(5.0, 2.0, 9.0, 10).minus(Measured(1.0, -3.0, 4.0, 7))
    assert found[:4] == (4.0, pytest.approx(4 - math.hypot(3, 3)), pytest.approx(4 + math.hypot(4, 4)), 7)
    assert Measured(5.0, n=3).minus(Measured(1.0, 0.0, 2.0)).verdict == "not decided (no interval)"


def test_means_leave_out_networks_that_failed():
    expected = {"n": 2, "mean": 2.0, "deviation": pytest.approx(2**0.5), "standard_error": pytest.approx(1.0)}
    assert statistics.mean_and_error([1.0, NAN, 3.0]) == expected
    assert statistics.mean_and_error([3.0]) == {"n": 1, "mean": 3.0, "deviation": None, "standard_error": None}
    assert statistics.mean_interval([1.0, NAN, 3.0]) == statistics.mean_interval([1.0, 3.0])


def test_the_interval_of_a_mean_is_that_of_students_t():
    found = statistics.mean_interval([1.0, 2.0, 4.0])
    test = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval()
    assert found[:4] == pytest.approx((7 / 3, test.low, test.high, 3))


@pytest.mark.parametrize(("values", "value", "n"), [([-2.0], -2.0, 1), ([], NAN, 0), ([NAN], NAN, 0)])
def test_a_mean_of_one_or_none_has_no_interval(values, value, n):
    found = statistics.mean_interval(values)
    assert found[:4] == pytest.approx((value, NAN, NAN, n), nan_ok=True)


def test_pairs_of_which_one_is_missing_are_left_out():
    pairs = [3.0, 5.0, NAN, 4.0], [1.0, 2.0, 3.0, NAN]
    assert statistics.paired_interval(*pairs) == statistics.mean_interval([2.0, 3.0])
    with pytest.raises(ValueError, match="broadcast"):
        statistics.paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_the_share_of_wins_has_an_exact_interval():
    assert statistics.share_above_half(5, 10).value == 0
    assert statistics.share_above_half(55, 74).verdict == "held"
    none = statistics.share_above_half(0, 3)
    assert none[:4] == (-0.5, -0.5, pytest.approx(1 - 0.025 ** (1 / 3) - 0.5), 3)


def test_fewer_than_three_values_have_no_standard_error():
    assert statistics.with_standard_error(pd.Series([96.1, NAN])) == "96.1 (n = 1)"
    assert statistics.with_standard_error(pd.Series([90.0, NAN, 92.0])) == "91.0 (n = 2)"
    assert statistics.with_standard_error(pd.Series([90.0, 91.0, 92.0])) == f"91.0 ± {3**-0.5:.1f}"


def test_a_rate_at_an_end_of_several_is_marked():
    words = [statistics.rate_in_words(lr, (0.01, 0.1, 0.03)) for lr in (0.01, 0.03, 0.1)]
    assert words == ["0.01 (end of grid)", "0.03", "0.1 (end of grid)"]
    assert statistics.rate_in_words(0.01, (0.01,)) == "0.01"


def test_rank_correlations_leave_out_what_is_missing():
    accuracy = [10.0, 20.0, 30.0, 40.0, 50.0]
    scores = pd.DataFrame({"same": [1, 2, 3, 4, 5], "reversed": [5, 4, 3, 2, 1], "holes": [1, None, 3, None, 9]})
    table = statistics.rank_correlations(scores, accuracy)
    assert table["tau"].to_dict() == pytest.approx({"same": 1.0, "reversed": -1.0, "holes": 1.0})
    assert table.loc["same", "r"] == pytest.approx(1.0)
    assert table["n"].tolist() == [5, 5, 3]
    best = statistics.rank_correlations(scores, accuracy, top=3)
    assert best["n"].tolist() == [3, 3, 2] and math.isnan(best.loc["holes", "tau"])


def test_the_interval_of_tau_is_that_of_its_normalised_value():
    assert statistics.tau_of(0.3, 40)[1:3] == pytest.approx((0.0933, 0.482), abs=1e-3)
    _, low, high, *_ = statistics.tau_of(0.0, 40)
    assert low == -high < 0
    assert all(math.isnan(bound) for bound in statistics.tau_of(0.5, 4)[1:3])


def test_a_tau_is_measured_with_its_interval():
    scores = pd.DataFrame({"x": [1.0, 3.0, 2.0, 4.0, 5.0, 6.0]})
    table = statistics.rank_correlations(scores, range(6))
    found = statistics.tau_of(table.loc["x", "tau"], table.loc["x", "n"])
    expected = (pytest.approx(13 / 15), found.low, found.high, 6)
    assert found[:4] == statistics.tau_of(table.loc["x", "tau"], 6)[:4] == expected
    assert found.low < found.value < found.high and type(found.n) is int


def test_the_interval_of_tau_covers_its_expectation():
    """Of normal pairs with correlation 0.6 the expected tau is 2 / pi arcsin(0.6)."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        x, noise = rng.normal(size=(2, 30))
        tau = statistics.rank_correlations(pd.DataFrame({"x": x}), 0.6 * x + 0.8 * noise).loc["x"]
        covered += tau["low"] < 2 / math.pi * math.asin(0.6) < tau["high"]
    assert 0.9 < covered / 300 < 0.99


def test_a_surrogate_is_compared_with_random_choice():
    accuracy = np.arange(10.0)
    found = statistics.top_against_random(accuracy, accuracy, k=2, seed=0)
    assert (found["top"], found["random"], found["lead"]) == (8.5, 4.5, 4.0)
    assert 0 <= found["low"] < found["lead"] < found["high"] <= 8
    assert statistics.top_against_random(-accuracy, accuracy, k=2, seed=0)["high"] <= 0
    everyone = statistics.top_against_random(accuracy, accuracy, k=10, seed=0)
    assert everyone["low"] == everyone["high"] == 0


def test_over_trainings_the_interval_joins_that_over_seeds_and_that_over_networks():
    found = statistics.over_trainings(
        [Measured(3.0, 1.0, 4.0, 10), Measured(5.0, 4.0, 8.0, 9), Measured(7.0, 4.0, 9.0, 10)]
    )
    half = stats.t.ppf(0.975, 2) * 2 / 3**0.5
    assert found[:2] == (5.0, pytest.approx(5 - math.hypot(half, 2.0)))
    assert found[2:] == (pytest.approx(5 + math.hypot(half, 2.0)), 9, 3) and found.verdict == "not decided"
    assert found.count == "n = 9, 3 trainings"
    plain = statistics.over_trainings([Measured(1.0), Measured(1.1), Measured(1.2)])
    assert plain.low == pytest.approx(1.1 - stats.t.ppf(0.975, 2) * 0.1 / 3**0.5) and plain.verdict == "held"


def test_one_training_keeps_its_interval_and_decides_nothing():
    found = statistics.over_trainings([Measured(3.0, 1.0, 4.0, 10)])
    assert found == (3.0, 1.0, 4.0, 10, 1) and found.verdict == "not decided (one training)"
    assert math.isnan(statistics.over_trainings([Measured(math.nan), Measured(math.nan)]).value)


def test_claims_over_trainings_are_those_that_every_training_has():
    a, b = {"x": Measured(1.0, 0.5, 1.5), "y": Measured(1.0)}, {"x": Measured(3.0, 2.5, 3.5)}
    assert statistics.claims_over_trainings([a, b]) == {"x": statistics.over_trainings([a["x"], b["x"]])}


def test_tables_over_trainings_show_mean_and_deviation():
    tables = [pd.DataFrame({"a": [1.0, 2.0], "b": [math.nan, 4.0]}, index=["x", "y"]) + shift for shift in (0, 2)]
    found = statistics.tables_over_trainings(tables)
    assert found.loc["x"].tolist() == ["2.0 ± 1.4", ""] and found.loc["y", "b"] == "5.0 ± 1.4"
    assert statistics.tables_over_trainings(tables[:1], 2).loc["y", "a"] == "2.00"


def test_correlation_has_the_interval_of_fisher():
    score, accuracy = pd.Series([1.0, 2, 3, 4, 5, math.nan]), pd.Series([2.0, 1, 4, 3, 6, 7])
    found, expected = statistics.correlation(score, accuracy), stats.pearsonr(score[:5], accuracy[:5])
    assert found[:4] == pytest.approx((expected.statistic, *expected.confidence_interval(), 5))
    assert statistics.rank_correlations(score.to_frame("x"), accuracy).loc["x", "r"] == found.value
    assert math.isnan(statistics.correlation(pd.Series([1.0, 1, 1]), accuracy).value)
    assert math.isnan(statistics.correlation(score[:3], accuracy[:3]).low)
    assert statistics.r_of(1.0, 9)[:3] == (1, 1, 1)


def test_numbers_are_shown_with_their_interval():
    shown = [statistics.with_interval(statistics.Measured(*each)) for each in ((0.5, 0.25, 0.75), (0.5,), (math.nan,))]
    assert shown == ["0.50 [0.25, 0.75]", "0.50", "not testable"]


def test_what_diverged_counts_as_0_and_what_failed_is_left_out():
    rows = pd.DataFrame({"ap": [5.0, math.nan, math.nan], "loss": math.nan, "error": ["", "", "ValueError: no"]})
    assert statistics.counted(rows, "ap")["ap"].tolist() == [5.0, 0.0]
    assert statistics.counted(rows, "ap")["loss"].isna().all()
