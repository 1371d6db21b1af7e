"""Claims of the papers against metrics."""

import math

import pytest

from ghnlib.claims import CLAIMS, Measured, claims_table


def mean(value, error=1.0, n=20):
    return {"mean": value, "standard_error": error, "n": n}


def tau(value, low, high):
    return {"n": 40, "tau": value, "low": low, "high": high, "r": value}


METRICS = {
    "evaluate": {
        "paired": {
            "ghn2 - mlp": {"n": 9, "mean": 3.0, "low": 1.0, "high": 5.0},
            "ghn2 - ghn1": {"n": 9, "mean": 3.0, "low": -1.0, "high": 7.0},
            "ghn3 - ghn2": {"n": 9, "mean": -3.0, "low": -5.0, "high": -1.0},
        },
        "accuracy": {
            "ghn2": {"test": mean(70.0), "bnfree": mean(30.0)}, "ghn3": {"test": mean(60.0)},
            "random": {"test": mean(10.0)}, "SGD, 1 epoch": {"test": mean(61.0, n=8)},
        },
        "costs": {"ghn2-m1": {"grad_norm": 7.0}, "ghn2-m8": {"grad_norm": 2.0}},
    },
    "finetune": {
        "accuracy": {
            "ghn3": {"0 steps": mean(80.0), "20 steps": mean(81.0), "4 steps": mean(0.0), "1 epoch": mean(82.0)},
            "random": {"0 steps": mean(10.0), "20 steps": mean(70.0), "4 steps": mean(99.0), "1 epoch": mean(90.0)},
        }
    },
    "transfer": {"accuracy": {"other classes": {
        name: {"0 steps": mean(0.0), "50 steps": mean(value)}
        for name, value in (("random", 50.0), ("ghn3", 60.0), ("ghn3-orth", 61.0))}}},
    "analysis": {
        "properties": {"ghn2": {"accuracy": tau(0.6, 0.5, 0.7)}},
        "clean_and_noisy": tau(0.5, 0.4, 0.6),
        "search": {"all": {name: tau(0.3, 0.1, 0.5) for name in ("ghn1", "ghn2", "ghn3", "SGD, 10 steps")}},
        "random_search": {"ghn1": {"n": 5, "lead": 2.0, "low": 0.5, "high": 4.0}},
        "diversity_and_sparsity": {name: {"diversity": value}
                                   for name, value in (("mlp", 0.0), ("ghn1", 0.2), ("ghn2", 0.1), ("trained", 0.9))},
        "matched_diversity": {"mlp": 0.0, "ghn2": 0.1, "ghn3": 0.3, "trained": 0.9},
        "distances": {"ghn2": {"l2": {"ResNet-34": 1.0, "ViT": 2.0}, "frechet": {"test": 0.2, "nearest shifted": 0.1}}},
    },
}  # fmt: skip


def test_every_claim_finds_its_numbers():
    table = claims_table(METRICS)
    assert len(table) == len(CLAIMS) and table["ours"].notna().all()
    assert set(table["verdict"]) == {"held", "not held", "not decided"}


def test_verdicts_follow_the_interval():
    rows = claims_table(METRICS).set_index("claim")
    assert rows.loc["points without training: GHN-2 over MLP", "verdict"] == "held"
    assert rows.loc["points without training: GHN-2 over GHN-1", "verdict"] == "not decided"
    assert rows.loc["points without training: GHN-3 over GHN-2", "verdict"] == "not held"
    early = rows.loc["points after few steps: from GHN-3 over from random"]
    assert early["ours"] == 11.0 and early["low"] == pytest.approx(11 - 1.96 * 2**0.5, rel=1e-2)
    assert rows.loc["points: GHN-3 without training over one epoch of SGD", "networks"] == 8
    clean = rows.loc["minus tau of accuracies on clean and noisy images"]
    assert (clean["ours"], clean["low"], clean["high"], clean["verdict"]) == (-0.5, -0.6, -0.4, "not held")
    # the smallest step of several, here from GHN-1 to GHN-2
    diversity = rows.loc["diversity: smaller step of MLP, GHN-1, GHN-2"]
    assert diversity["ours"] == pytest.approx(-0.1) and diversity["verdict"] == "not held"


def test_what_a_profile_lacks_is_not_testable():
    table = claims_table({"evaluate": {"paired": METRICS["evaluate"]["paired"]}})
    untested = table[table["ours"].isna()]
    assert len(untested) == len(CLAIMS) - 3
    assert set(untested["verdict"]) == {"not testable at this scale"}


def test_the_interval_of_a_difference_adds_those_of_both():
    found = Measured(5.0, 2.0, 9.0, 10).over(Measured(1.0, -3.0, 4.0, 7))
    assert found == (4.0, pytest.approx(4 - math.hypot(3, 3)), pytest.approx(4 + math.hypot(4, 4)), 7)
