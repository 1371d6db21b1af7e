"""Claims of the papers against what the stages recorded."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ghnlib.params_file import read_yaml, validate
from ghnlib.pipeline.claims import (
    agreement,
    claims_table,
    headline,
    read_metrics,
    recorded_claims,
    scales,
    write_claims,
)
from ghnlib.pipeline.notebooks import NOTEBOOKS
from ghnlib.reporting.publish import known_claims
from ghnlib.reporting.statistics import Measured

ROOT = Path(__file__).parents[2]
SCALES = {stage: f"{stage}'s scale" for stage in (*NOTEBOOKS, "networks", "detection")}
NEEDS_XL = "not testable at this scale (needs GHN-3-XL, m = 16)"
COLUMNS = ["paper", "claim", "published", "ours", "low", "high", "scale", "verdict", "differs"]


def recorded(**stages):
    """Metrics that hold claims, after a round through JSON as the pipeline's have."""
    claims = {stage: {"claims": {key: found._asdict() for key, found in of.items()}} for stage, of in stages.items()}
    return json.loads(json.dumps(claims))


METRICS = recorded(
    transfer={
        "new-classes/second": Measured(-10.0, -12.0, -8.0, 4),
        "new-classes/first": Measured(10.0, 8.0, 12.0, 4),
        "orth": Measured(1.0, -1.0, 3.0, 4),
    },
    evaluate={"without-training-ghn2-mlp": Measured(10.5376, 9.7198, 11.3554, 100)},
    finetune={"resnet50-crossover/ghn2, adam": Measured(math.inf)},
    analysis={"frechet-nearest": Measured(math.nan), "diversity-order": Measured(-0.000012345)},
) | {"anytime": {"area": {}}}


def test_rows_join_the_published_number_with_ours():
    row = claims_table(METRICS, SCALES).set_index("claim").loc["points without training: GHN-2 over MLP"]
    assert row.to_dict() == {
        "paper": "PPUDA Table 3", "published": "24.7", "ours": 10.5, "low": 9.72, "high": 11.4,
        "scale": "evaluate's scale, n = 100", "verdict": "held", "differs": "",
    }  # fmt: skip


def test_rows_stand_in_the_order_of_the_claims_whoever_recorded_first():
    table = claims_table(METRICS, SCALES)
    own = [claim.claim for claim in known_claims().values()]
    assert list(table.columns) == COLUMNS
    assert (
        table["claim"]
        .map(lambda text: next(i for i, claim in enumerate(own) if text.startswith(claim)))
        .is_monotonic_increasing
    )
    assert len(table) == len(own) + 1, "a claim about two datasets has two rows"


def test_several_of_a_kind_have_a_row_each_in_the_order_they_were_recorded():
    rows = claims_table(METRICS, SCALES).set_index("claim")["verdict"]
    rows = rows[rows.index.str.startswith("points on new classes: from GHN-3")]
    assert list(rows.items()) == [
        ("points on new classes: from GHN-3 over from random (paper: XL/m16), second", NEEDS_XL),
        ("points on new classes: from GHN-3 over from random (paper: XL/m16), first", NEEDS_XL),
    ]


def test_a_number_of_other_hypernetworks_than_the_papers_is_shown_and_decides_nothing():
    rows = claims_table(METRICS, SCALES).set_index("claim")
    row = rows.loc["points on new classes: from GHN-3 over from random (paper: XL/m16), first"]
    assert (row["ours"], row["low"], row["scale"]) == (10.0, 8.0, "transfer's scale, n = 4")
    assert row["verdict"] == NEEDS_XL and claims_table({}, {})["verdict"].str.startswith("not testable at this").all()


def test_a_number_without_an_interval_decides_nothing():
    rows = claims_table(METRICS, SCALES).set_index("claim")
    never = rows.loc["step from which He initialisation is ahead of GHN-2 on ResNet-50, ghn2, adam"]
    assert (never["ours"], never["verdict"]) == (math.inf, "not decided (no interval)")
    assert never["scale"] == "finetune's scale", "without a number of networks"
    small = rows.loc["diversity: smaller step of MLP, GHN-1, GHN-2"]
    assert (small["ours"], small["verdict"]) == (-1.23e-5, "not decided (no interval)")


def test_where_ours_contradicts_a_paper_it_is_said_what_differs():
    noisy, against = known_claims()["clean-and-noisy"], {"clean-and-noisy": Measured(-0.9, -0.95, -0.85, 36)}
    rows = claims_table(recorded(analysis=against), SCALES).set_index("claim")
    assert rows.loc[noisy.claim, "differs"] == noisy.differs != ""
    assert (rows.loc[rows["verdict"] != "not held", "differs"] == "").all()


def test_what_no_stage_could_measure_is_not_testable():
    table = claims_table(METRICS, SCALES)
    untested = table[table["ours"].isna()]
    assert untested["verdict"].str.startswith("not testable at this scale").all() and (untested["scale"] == "").all()
    assert "Frechet distance from training for GHN-2: nearest shifted split over test" in set(untested["claim"])
    assert len(table) - len(untested) == 6
    assert claims_table({}, {})["paper"].tolist() == [claim.paper for claim in known_claims().values()]


def test_a_claim_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError, match=r"claims\.yaml has no claim 'ghn9'"):
        recorded_claims(recorded(evaluate={"ghn9/test": Measured(1.0)}))


def test_a_claim_of_another_stage_is_an_error():
    with pytest.raises(ValueError, match=r"evaluate has recorded 'orth/digits'.*of transfer"):
        recorded_claims(recorded(evaluate={"orth/digits": Measured(1.0)}))


def test_scales_name_images_steps_and_seeds_for_each_stage_with_claims():
    found = scales(validate(read_yaml(ROOT / "params.yaml")))
    assert set(found) == {claim.scale or claim.stage for claim in known_claims().values()}
    assert found["finetune"].startswith("digits 8 px, small, GHN 3000 steps")
    assert found["finetune"].endswith(" steps, 4 training seeds, then 0.1 or 1 epochs, seeds: 4")


def test_scales_name_both_ends_of_several_lengths_of_training():
    raw = read_yaml(ROOT / "params.yaml")
    raw["data"] |= {"root": "data/cifar10-jpeg", "image_size": None}
    raw["train"]["variants"]["mlp"]["steps"] = 200
    raw["train"]["variants"]["ghn1"]["steps"] = 400
    assert scales(validate(raw))["evaluate"] == "cifar10-jpeg, small, GHN 200 to 3000 steps, 4 training seeds"


def test_metrics_are_those_of_the_stages_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reports/digits/metrics").mkdir(parents=True)
    for name in ("train-removed", "train-ghn3", "anytime", "evaluate", "architectures"):
        Path(f"reports/digits/metrics/{name}.json").write_text(json.dumps({"of": name}))
    found = read_metrics("digits", ["ghn2", "ghn3"])
    assert list(found.items()) == [
        (name, {"of": name}) for name in ("architectures", "train-ghn3", "evaluate", "anytime")
    ]
    stages = set(NOTEBOOKS) - {"train", "claims"}
    for name in stages:
        Path(f"reports/digits/metrics/{name}.json").write_text("{}")
    assert set(read_metrics("digits", [])) == stages


def test_written_claims_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = claims_table(METRICS, SCALES)
    write_claims("digits", METRICS, table)
    blank = dict.fromkeys(("ours", "low", "high"), "")
    again = pd.read_csv("reports/digits/claims.csv", keep_default_na=False, na_values=blank)
    pd.testing.assert_frame_equal(again, table)
    verdicts = {"held": (table["verdict"] == "held").sum(), "not held": (table["verdict"] == "not held").sum()}
    metrics = json.loads(Path("reports/digits/metrics.json").read_text())
    assert metrics == {"claims": verdicts, "from": "provenance.json"} and verdicts["held"] >= 1


def test_the_headline_is_a_few_numbers():
    without = {"ghn3": {"test": {"mean": 85.7123}, "wide": {"mean": 1.0}}, "SGD, 1 epoch": {"test": {"mean": 58.2}}}
    tuned = {"random": {"0 steps": {"mean": 10.0}, "1 epoch": {"mean": 64.84}}}
    metrics = {"evaluate": {"accuracy": without}, "finetune": {"accuracy": tuned}}
    assert headline(metrics, claims_table({}, {})) == {
        "test": {"ghn3": 85.7}, "tuned": {"random": 64.8}, "claims": {"held": 0, "not held": 0}, "from": "provenance.json",
    }  # fmt: skip


def test_claims_and_the_readme_need_no_torch():
    code = "import sys, ghnlib.pipeline.claims, ghnlib.pipeline.readme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_two_runs_agree_where_verdicts_are_the_same_and_numbers_within_intervals():
    def table(**rows):
        frame = pd.DataFrame(rows, index=["ours", "low", "high", "verdict"]).T
        return frame.astype({"ours": float, "low": float, "high": float}).assign(paper="P", claim=list(rows))

    first = table(
        a=(5, 4, 6, "held"),
        b=(1, -1, 3, "not decided"),
        c=(-5, -6, -4, "not held"),
        d=(3, math.nan, math.nan, "not decided"),
    )
    second = table(
        a=(5.5, 4, 7, "held"), b=(3.5, 1, 6, "held"), c=(5, 4, 6, "held"), d=(4, math.nan, math.nan, "not decided")
    )
    found = agreement(first, second)
    assert (found.compared, found.decided, found.same, found.outside) == (3, 2, 1, ["b", "c"])
    assert found.largest == pytest.approx(10 * 2 * 1.96 / 8**0.5) and found.of == "c"
    assert str(found) == (
        "1 of 2 claims decided in both have the same verdict, 2 of 3 numbers lie outside the other's interval; largest "
        "difference 13.9 standard errors (c)"
    )
    assert agreement(first, first)[:4] == (3, 2, 2, []) and agreement(first, first).largest == 0
