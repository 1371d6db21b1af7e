"""Claims of the papers against metrics."""

import math

import pytest

from ghnlib.claims import CLAIMS, claims_table
from ghnlib.evaluation import mean_and_error, paired_interval
from ghnlib.intervals import Measured, measured


def mean(value, error=1.0, n=20):
    return {"mean": value, "standard_error": error, "n": n}


def difference(value, half=2.0, n=10):
    return {"n": n, "mean": value, "low": value - half, "high": value + half}


def tau(value, low, high):
    return {"n": 40, "tau": value, "low": low, "high": high, "r": value}


METRICS = {
    "evaluate": {
        "paired": {
            "ghn2 - mlp": {"n": 9, "mean": 3.0, "low": 1.0, "high": 5.0},
            "ghn2 - ghn1": {"n": 9, "mean": 3.0, "low": -1.0, "high": 7.0},
            "ghn3 - ghn2": {"n": 9, "mean": -3.0, "low": -5.0, "high": -1.0},
            "ghn2 - random": difference(57.0), "ghn3 - SGD, 1 epoch": difference(-1.0, n=8),
            "prediction - gradinit": difference(9.0),
        },
        "accuracy": {
            "ghn2": {"test": mean(70.0), "bnfree": mean(30.0)},
        },
        "training_statistics_gain": {"ghn2": difference(5.0)},
        "error_and_size": {"ghn2": {"path": tau(0.3, 0.1, 0.5), "nodes": tau(0.0, -0.2, 0.2)}},
        "costs": {"ghn2-m1": {"grad_norm": 7.0}, "ghn2-m8": {"grad_norm": 2.0}},
    },
    "finetune": {"paired": {"ghn3 - random": {
        "0 steps": difference(70.0), "20 steps": difference(11.0), "4 steps": difference(-99.0), "1 epoch": difference(-8.0)}}},
    "transfer": {"paired": {"other classes": {"ghn3 - random": difference(10.0), "ghn3-orth - ghn3": difference(1.0)}}},
    "analysis": {
        "properties": {name: {"accuracy": tau(0.6, 0.5, 0.7)} for name in ("ghn2", "Neural Predictor")},
        "second": {"accuracy": tau(0.6, 0.5, 0.7)}, "limited_search": {"ghn1": {"n": 5, "lead": 2.0, "low": 0.5, "high": 4.0}},
        "clean_and_noisy": tau(0.5, 0.4, 0.6),
        "search": {"all": {name: tau(0.3, 0.1, 0.5) for name in ("ghn1", "ghn2", "ghn3", "SGD, 10 steps", "one-shot")}},
        "random_search": {"ghn1": {"n": 5, "lead": 2.0, "low": 0.5, "high": 4.0}},
        "diversity_and_sparsity": {name: {"diversity": value}
                                   for name, value in (("mlp", 0.0), ("ghn1", 0.2), ("ghn2", 0.1), ("trained", 0.9))},
        "matched_diversity": {"mlp": 0.0, "ghn2": 0.1, "ghn3": 0.3, "trained": 0.9},
        "distances": {"ghn2": {"l2": {"ResNet-34": 1.0, "ViT": 2.0}, "frechet": {"test": 0.2, "nearest shifted": 0.1}}},
    },
    "anytime": {
        "ranking": {"all": {name: tau(0.3, 0.1, 0.5) for name in ("stacked", "separate", "synchronous", "forward-backward")}},
        "area": {name: mean(value) for name, value in (("random", 20.0), ("MSDNet", 40.0), ("chosen by GHN", 30.0))},
    },
}  # fmt: skip


def test_every_claim_finds_its_numbers():
    table = claims_table(METRICS)
    assert len(table) == len(CLAIMS) and table["ours"].notna().all()
    signs = {"held (no interval)", "not held (no interval)"}
    assert set(table["verdict"]) == {"held", "not held", "not decided", *signs}
    assert table["verdict"].isin(signs).equals(table["low"].isna())


def test_verdicts_follow_the_interval():
    rows = claims_table(METRICS).set_index("claim")
    assert rows.loc["points without training: GHN-2 over MLP", "verdict"] == "held"
    assert rows.loc["points without training: GHN-2 over GHN-1", "verdict"] == "not decided"
    assert rows.loc["points without training: GHN-3 over GHN-2", "verdict"] == "not held"
    early = rows.loc["points after few steps: from GHN-3 over from random"]
    assert (early["ours"], early["low"]) == (11.0, 9.0)
    later = rows.loc["points after one epoch: from random over from GHN-3"]
    assert (later["ours"], later["low"], later["high"]) == (8.0, 6.0, 10.0)
    bnfree = rows.loc["points that GHN-2 loses without batch norm"]
    assert bnfree["ours"] == 40.0 and bnfree["low"] == pytest.approx(40 - 2.147 * 2**0.5, abs=0.05)
    assert rows.loc["points: GHN-3 without training over one epoch of SGD", "networks"] == 8
    clean = rows.loc["minus tau of accuracies on clean and noisy images"]
    assert (clean["ours"], clean["low"], clean["high"], clean["verdict"]) == (-0.5, -0.6, -0.4, "not held")
    # the smallest step of several, here from GHN-1 to GHN-2
    diversity = rows.loc["diversity: smaller step of MLP, GHN-1, GHN-2"]
    assert diversity["ours"] == pytest.approx(-0.1) and diversity["verdict"] == "not held (no interval)"


def test_what_a_profile_lacks_is_not_testable():
    pairs = METRICS["evaluate"]["paired"]
    table = claims_table({"evaluate": {"paired": pairs}})
    untested = table[table["ours"].isna()]
    assert len(untested) == len(CLAIMS) - len(pairs)
    assert set(untested["verdict"]) == {"not testable at this scale"}


def test_the_interval_of_a_difference_adds_those_of_both():
    found = Measured(5.0, 2.0, 9.0, 10).over(Measured(1.0, -3.0, 4.0, 7))
    assert found == (4.0, pytest.approx(4 - math.hypot(3, 3)), pytest.approx(4 + math.hypot(4, 4)), 7)


def test_a_mean_has_the_interval_that_its_observations_have():
    values = [1.0, 2.0, 4.0]
    assert measured(mean_and_error(values)) == pytest.approx(measured(paired_interval(values, [0.0, 0.0, 0.0])))
    assert str(measured(mean_and_error(values))) == "not decided: +2.33 [-1.46, 6.13]"
    assert str(measured(mean_and_error([-2.0]))) == "not held (no interval): -2"
    assert str(measured(tau(0.3, 0.125, 0.5))) == "held: +0.3 [0.125, 0.5]"
