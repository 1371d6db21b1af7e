"""Claims of the papers against metrics."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from ghnlib import plots
from ghnlib.claims import CLAIMS, claims_table, read_metrics, scales
from ghnlib.evaluation import mean_and_error, paired_interval
from ghnlib.intervals import Measured, measured
from ghnlib.params import read_yaml, validate
from ghnlib.run import NOTEBOOKS, available


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
    "finetune": {
        "paired": {"ghn3 - random": {"0 steps": difference(70.0), "1 epoch": difference(-8.0), "2 epochs": difference(0.5),
                                     "20 steps": difference(11.0), "4 steps": difference(-99.0)}},
        "tuned": {"20 steps": {}, "2 epochs": {}}, "wins": {"1 epoch": {"networks": 10, "wins": 9}},
        "resnet50_crossover": {"ghn1, sgd": 5, "ghn2, sgd": 40, "ghn2, adam": None},
    },
    "transfer": {
        "paired": {name: {"ghn3 - random": difference(value), "ghn3-orth - ghn3": difference(1.0)}
                   for name, value in (("first", 10.0), ("second", -10.0))},
        "accuracy": {name: {"trained": {"4 steps": mean(0.0), "40 steps": mean(90.0)}, "trained-orth": {"40 steps": mean(80.0)}}
                     for name in ("first", "second")},
        "families": {"first": {name: {"random": 60.0, "ghn3": 50.0} for name in ("small-convnext", "swin_t", "small-resnet")}},
        "correlation": {"ghn3": 0.3, "ghn3-orth": 0.1}, "average_precision": {"ghn3": 80.0, "random": 90.0},
    },
    "analysis": {
        "properties": {name: {"accuracy": tau(0.6, 0.5, 0.7)} for name in ("ghn2", "Neural Predictor")},
        "second": {"accuracy": tau(0.6, 0.5, 0.7)}, "limited_search": {"ghn1": {"n": 5, "lead": 2.0, "low": 0.5, "high": 4.0}},
        "clean_and_noisy": tau(0.5, 0.4, 0.6),
        "search": {part: {name: tau(0.3, 0.1, 0.5) for name in ("ghn1", "ghn2", "ghn3", "SGD, 10 steps", "one-shot")}
                   | {"snip": tau(0.1, 0.0, 0.2), "fisher": tau(0.2, 0.1, 0.3), "jacob_cov": tau(*[math.nan] * 3)}
                   for part in ("all", "top half")},
        "chosen": {name: {"plain": mean(value), "cutout, auxiliary head, drop path": mean(value)}
                   for name, value in (("ghn2", 90.0), ("DARTS", 80.0))},
        "log_variance_spread": {"ghn1": 2.0, "ghn2": 1.0},
        "random_search": {"ghn1": {"n": 5, "lead": 2.0, "low": 0.5, "high": 4.0}},
        "diversity_and_sparsity": {name: {"diversity": value, "sparsity (%)": 100 * value}
                                   for name, value in (("mlp", 0.0), ("ghn1", 0.2), ("ghn2", 0.1), ("trained", 0.9))},
        "matched_diversity": {"mlp": 0.0, "ghn2": 0.1, "ghn3": 0.3, "trained": 0.9},
        "distances": {"ghn2": {"l2": {"ResNet-34": 1.0, "ResNet-50 without skips": 0.5, "ViT": 2.0}, "frechet": {"test": 0.2, "nearest shifted": 0.1}}},
    },
    "anytime": {
        "ranking": {"all": {name: tau(0.3, 0.1, 0.5) for name in ("stacked", "separate", "passing", "synchronous", "forward-backward")}},
        "area": {name: mean(value) for name, value in (("random", 20.0), ("MSDNet", 40.0), ("chosen by GHN", 30.0))},
    },
}  # fmt: skip


SCALES = dict.fromkeys(("evaluate", "finetune", "transfer", "analysis", "anytime"), "small")
TABLE = claims_table(METRICS, SCALES)


def test_every_claim_finds_its_numbers():
    assert {(row.paper, row.published) for row in TABLE.itertuples()} == {(paper, number) for paper, _, number, *_ in CLAIMS}
    assert TABLE["ours"].notna().all() and TABLE["scale"].str.startswith("small").all()
    assert set(TABLE["verdict"]) == {"held", "not held", "not decided", "not decided (no interval)"}
    assert (TABLE["verdict"] == "not decided (no interval)").equals(TABLE["low"].isna())


def test_verdicts_follow_the_interval():
    rows = TABLE.set_index("claim")
    assert rows.loc["points without training: GHN-2 over MLP", "verdict"] == "held"
    assert rows.loc["points without training: GHN-2 over GHN-1", "verdict"] == "not decided"
    assert rows.loc["points without training: GHN-3 over GHN-2 (paper: T/m8)", "verdict"] == "not held"
    early = rows.loc["points after few steps: from GHN-3 over from random (paper: T/m8)"]
    assert (early["ours"], early["low"]) == (11.0, 9.0), "of the smallest budget"
    later = rows.loc["points after one epoch: from GHN-3 over from random (paper: XL/m16; T/m8: -1.1)"]
    assert (later["ours"], later["low"], later["high"], later["verdict"]) == (-8.0, -10.0, -6.0, "not held")
    last = rows.loc["points at the end of the longest training: from GHN-3 over from random (paper: XL/m16)"]
    assert (last["ours"], last["verdict"]) == (0.5, "not decided")
    bnfree = rows.loc["points that GHN-2 loses without batch norm"]
    assert bnfree["ours"] == 40.0 and bnfree["low"] == pytest.approx(40 - 2.147 * 2**0.5, abs=0.05)
    assert rows.loc["points: GHN-3 without training over one epoch of SGD (paper: T/m8)", "scale"] == "small, n = 8"
    clean = rows.loc["minus tau of accuracies on clean and noisy images (paper: CIFAR-10 only)"]
    assert (clean["ours"], clean["low"], clean["high"], clean["verdict"]) == (-0.5, -0.6, -0.4, "not held")
    # the smallest step of several, here from GHN-1 to GHN-2
    diversity = rows.loc["diversity: smaller step of MLP, GHN-1, GHN-2"]
    assert diversity["ours"] == pytest.approx(-0.1) and diversity["verdict"] == "not decided (no interval)"
    order = rows.loc["distance from ResNet-50 for GHN-2: smaller step of ResNet-34, ResNet-50 without skips, ViT"]
    assert (order["ours"], order["verdict"]) == (-0.5, "not decided (no interval)")
    best = rows.loc["tau with trained accuracy: GHN-3 over the best zero-cost proxy (paper: XL/m16)"]
    assert best["ours"] == pytest.approx(0.1), "over that of the largest tau that is a number"


def test_a_claim_has_a_row_for_each_dataset_family_and_optimiser():
    ours = TABLE.set_index("claim")["ours"]
    of = lambda start: {claim.split(", ", 1)[1]: value for claim, value in ours.items() if claim.startswith(start)}
    assert of("points on new classes: from GHN-3") == {"first": 10.0, "second": -10.0}
    assert of("points on new classes: trained networks") == {"first": 10.0, "second": 10.0}
    assert list(of("points on new classes, Swin")) == ["Swin: from GHN-3 over from random (paper: XL/m16), first, swin_t"]
    assert of("step from which") == {"ghn2, sgd": 40.0, "ghn2, adam": math.inf}, "a prediction may lead to the end"


def test_what_a_profile_lacks_is_not_testable():
    pairs = METRICS["evaluate"]["paired"]
    table = claims_table({"evaluate": {"paired": pairs}}, SCALES)
    untested = table[table["ours"].isna()]
    assert len(untested) == len(CLAIMS) - len(pairs) and (untested["scale"] == "").all()
    assert set(untested["verdict"]) == {"not testable at this scale"}


def test_steps_of_which_one_is_missing_are_not_testable():
    first = {"analysis": {"matched_diversity": {"mlp": 0.0, "ghn2": 0.1, "trained": 0.9}}}
    assert claims_table(first, SCALES)["ours"].isna().all()


def test_scales_name_images_steps_and_seeds_for_each_stage_with_claims():
    params = validate(read_yaml(Path(__file__).parent.parent / "params.yaml"))
    found = scales(available("claims", "", params))
    assert set(found) == {place.split("/")[0] for _, _, _, *places in CLAIMS for place in places if place}
    assert found["finetune"] == "digits 16 px, small, GHN 1600 steps, then 0.1 or 1 or 2 epochs, seeds: 3"


def test_metrics_are_those_of_the_stages_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reports/digits/metrics").mkdir(parents=True)
    for name in ("train-removed", "train-ghn3", "anytime", "evaluate", "architectures"):
        Path(f"reports/digits/metrics/{name}.json").write_text(json.dumps({"of": name}))
    found = read_metrics("digits", ["ghn2", "ghn3"])
    assert list(found.items()) == [(name, {"of": name}) for name in ("architectures", "train-ghn3", "evaluate", "anytime")]
    stages = set(NOTEBOOKS) - {"train", "claims"}
    for name in stages:
        Path(f"reports/digits/metrics/{name}.json").write_text("{}")
    assert set(read_metrics("digits", [])) == stages


def test_the_interval_of_a_difference_adds_those_of_both():
    found = Measured(5.0, 2.0, 9.0, 10).over(Measured(1.0, -3.0, 4.0, 7))
    assert found == (4.0, pytest.approx(4 - math.hypot(3, 3)), pytest.approx(4 + math.hypot(4, 4)), 7)


def test_a_mean_has_the_interval_that_its_observations_have():
    values = [1.0, 2.0, 4.0]
    assert measured(mean_and_error(values)) == pytest.approx(measured(paired_interval(values, [0.0, 0.0, 0.0])))
    assert str(measured(mean_and_error(values))) == "not decided: +2.33 [-1.46, 6.13]"
    assert str(measured(mean_and_error([-2.0]))) == "-2 (no interval)"
    assert measured({"networks": 10, "wins": 5}).value == 0 and measured({"networks": 74, "wins": 55}).verdict == "held"
    assert str(measured(tau(0.3, 0.125, 0.5))) == "held: +0.3 [0.125, 0.5]"


def test_a_single_value_has_no_standard_error():
    assert plots.with_standard_error(pd.Series([96.1, math.nan])) == "96.1 (n = 1)"
    assert plots.with_standard_error(pd.Series([90.0, math.nan, 92.0])) == "91.0 ± 0.7"
