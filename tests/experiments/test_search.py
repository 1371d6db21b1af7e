"""Ranking and choosing architectures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from shared import digits, params, pool, tiny

from ghnlib.architectures.genotypes import GENOTYPES
from ghnlib.data.images import Augment
from ghnlib.experiments.analysis import search
from ghnlib.experiments.analysis.chosen import PLAIN, REGULARISED, Chosen, as_large, train_chosen
from ghnlib.experiments.analysis.properties import Predicted, Trained
from ghnlib.experiments.analysis.search import ranking_scores, rankings, search_costs
from ghnlib.experiments.one_shot import CEILING, one_shot_scores, train_one_shot
from ghnlib.experiments.setup import Setup
from ghnlib.reporting.statistics import Measured, mean_interval, over_trainings, rank_correlations, with_deviation
from ghnlib.training.networks import TrainingRecipe


def test_costs_of_ranking_count_what_happens_before_and_for_each_architecture():
    training = pd.DataFrame({"ghn1": {"steps": 100, "meta_batch": 2, "flops": 3e12}}).T
    changes = {"checkpoints": (10,), "one_shot_steps": 20, "images": 64, "property_steps": 60}
    analysis = params().analysis.model_copy(update=changes)
    costs = search_costs(training, image=1e9, analysis=analysis, batch_size=32, validation=500)
    assert costs.loc["ghn1"].tolist() == pytest.approx([200, 3, 0, 500])
    assert costs.loc["SGD, 10 steps"].tolist() == pytest.approx([0, 0, 10, 10 * 3 * 32 + 500])
    assert costs.loc[CEILING].tolist() == pytest.approx([0, 0, 60, 60 * 3 * 32 + 500])
    assert costs.loc["one-shot"].tolist() == pytest.approx([20, 20 * 3 * 32 / 1000, 0, 500])
    assert costs.loc["snip", "GFLOPs each"] == 64 * costs.loc["synflow", "GFLOPs each"]


def test_a_one_shot_model_learns_what_architectures_share():
    images = digits(seed=0, image_size=8)
    few = pool("train", 2, input_size=8)
    trained, untrained = (train_one_shot(few[:1], images.train, TrainingRecipe(n, 0.05), seed=0) for n in (25, 1))
    assert trained.keys() == untrained.keys()
    own, other = one_shot_scores(trained, few, images.val, seed=0).itertuples(index=False)
    assert own.accuracy > one_shot_scores(untrained, few[:1], images.val, seed=0)["accuracy"][0] + 10
    assert own.shared == 1 > other.shared > 0
    again = train_one_shot(few[:1], images.train, TrainingRecipe(1, 0.05), seed=0)
    assert all(torch.equal(value, again[key]) for key, value in untrained.items())


def rows_of(**taus):
    """Rows of ``rank_correlations`` whose R is twice tau."""
    rows = {
        name: {"n": 40, "tau": tau, "low": tau - 0.1, "high": tau + 0.1, "r": 2 * tau} for name, tau in taus.items()
    }
    return pd.DataFrame(rows).T.astype({"n": int})


def test_claims_of_ranking_compare_with_the_best_proxy_and_leave_out_what_was_not_ranked():
    every = rows_of(ghn1=0.3, ghn2=0.2, ghn3=0.4, snip=0.1, plain=0.3, **{"one-shot": np.nan, "SGD, 2 steps": 0.1})
    found = {"all": every, "of test": rows_of(ghn2=0.1), "top half": rows_of(ghn1=0.1)}
    properties = {"ghn2": {"accuracy": Predicted(Measured(0.6, 0.5, 0.7, 40), 0.0)}}
    claims = search.claims_of_ranking([found], [properties], few=2)
    values = {name: round(measured.value, 6) for name, measured in claims.items()}
    assert values == {
        "ranking-ghn3": 0.4, "ranking-ghn3-ghn2": 0.2, "ranking-ghn3-proxies": 0.1, "top-half-ghn1": 0.2,
        "ranking-ghn1-steps": 0.4, "property-over-prediction": 0.5,
    }  # fmt: skip
    other = found | {"all": every.assign(tau=every["tau"] + 0.2)}
    claim = search.claims_of_ranking([found, other], [properties] * 2, few=2)["ranking-ghn3"]
    assert claim.value == pytest.approx(0.5) and claim.trainings == 2


def test_the_ceiling_is_of_a_share_trained_with_another_seed(tmp_path):
    small = params("tiny")
    changes = {"variants": ("ghn2",), "repeated_networks": 3, "property_steps": 4, "checkpoints": (1,)}
    setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=small.data, deepnets=small.deepnets, train=small.train,
                  analysis=small.analysis.model_copy(update=changes))  # fmt: skip
    few = digits(image_size=16)
    vars(setup)["images"] = type(few)(*(part.few_shot(8, seed=0) for part in (few.train, few.val, few.test)))
    vars(setup)["hypernetworks"] = {"ghn2": {0: tiny("gated_gnn"), 5: tiny("gated_gnn", layernorm=False)}}
    table = pd.DataFrame({"accuracy": [30.0, 40.0, 50.0, 20.0, 60.0], "parameters": 1.0})
    trained = Trained(pool(size=5, input_size=16), table, [], [], TrainingRecipe(4, 0.02))
    scores, _ = ranking_scores(setup, trained)
    assert [each[CEILING].notna().tolist() for each in scores] == [[True, False, True, False, True]] * 2
    assert not scores[0]["ghn2"].equals(scores[1]["ghn2"]) and scores[0]["snip"].equals(scores[1]["snip"])
    assert scores[0]["SGD, 1 steps"].notna().all()
    found = [rankings(setup, trained, each) for each in scores]
    assert found[0]["all"].loc[CEILING, "n"] == 3
    shown = search.ranking_table(found, ["ghn2"])
    rs = [each["all"].loc["ghn2", "r"] for each in found]
    assert shown.loc[CEILING, "tau, all"] == "n = 3"
    assert shown.loc["ghn2", "R, all"] == with_deviation(rs, 2)


def test_what_a_search_chose_is_compared_within_a_choice():
    rows = [(choice, name, 1000.0, training, seed, value + seed + 10 * choice * (name == "ghn2"))
            for name, value in (("ghn2", 80.0), ("DARTS", 70.0)) for training in (PLAIN, REGULARISED)
            for seed in (0, 1) for choice in (0, 1)]  # fmt: skip
    names = ["choice", "architecture", "parameters", "training", "seed", "accuracy"]
    chosen = Chosen(pd.DataFrame(rows, columns=names))
    one = [mean_interval([value, value + 1]).minus(mean_interval([70.0, 71.0])) for value in (80.0, 90.0)]
    assert chosen.claims == dict.fromkeys(("chosen-over-darts", "chosen-over-darts-regularised"), over_trainings(one))
    assert chosen.table.loc["ghn2"].tolist() == ["1.0", "85.5 ± 7.1", "85.5 ± 7.1"]
    single = Chosen(chosen.rows[chosen.rows["choice"] == 0]).claims["chosen-over-darts"]
    assert single.verdict == "not decided (one training)"


def test_published_cells_are_compared_at_the_same_size():
    like = pool(input_size=16)[0]
    for name in ("DARTS", "PDARTS"):
        found = as_large(GENOTYPES[name], like)
        assert found.n_cells == like.n_cells and found.C > 1
        gap = abs(found.num_params - like.num_params)
        neighbours = [replace(found, C=found.C + step) for step in (1, -1)]
        assert all(abs(other.num_params - like.num_params) >= gap for other in neighbours)


def test_chosen_architectures_are_trained_plainly_and_regularised(tmp_path):
    tiny = params("tiny")
    images = digits(image_size=16)
    setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=tiny.data, analysis=tiny.analysis)
    setup.__dict__["images"] = images
    recipe = TrainingRecipe(3, 0.02, augment=Augment(1))
    found = train_chosen(setup, [{"a": pool(input_size=16)[0]}] * 2, recipe)
    assert found.rows["training"].tolist() == [PLAIN, REGULARISED, f"{REGULARISED}, 3 steps"] * 2
    assert found.rows["accuracy"].notna().all()
    assert found.rows.groupby("choice")["seed"].first().nunique() == 2  # equal choices are not one training twice


def test_a_surrogate_without_a_score_is_not_chosen():
    setup = Setup("analysis", "tiny", 0, folder=None, train=params("tiny").train, analysis=params("tiny").analysis)
    scores = pd.DataFrame({name: [5.0, np.nan, 3.0, 1.0, 2.0] for name in params("tiny").train.variants})
    found = search.random_search(setup, scores, scores["ghn1"] < 9, pd.Series([50.0, 0.0, 40.0, 30.0, 20.0]))
    everyone = search.random_search(setup, scores, pd.Series([True] * 5), pd.Series([50.0, 0.0, 40.0, 30.0, 20.0]))
    assert found["ghn1"]["top"] == everyone["ghn1"]["top"] == 45.0
    claim = search.claims_of_search("random-search", [found, everyone])["random-search"]
    assert claim.trainings == 2 and claim.value == pytest.approx((found["ghn1"]["lead"] + everyone["ghn1"]["lead"]) / 2)


def test_a_ranking_without_a_score_says_so():
    rows = rows_of(ghn1=0.3, few=0.3, broken=np.nan)
    rows.loc["few", "n"] = 9
    table = search.ranking_table([{"all": rows}], [])
    assert table.loc["few", "tau, all"].endswith("], n = 9")
    assert table.loc["broken", "tau, all"] == "not testable" and table.loc["ghn1", "tau, all"].startswith("0.30 [0.09")
    assert rank_correlations(pd.DataFrame({"x": [1.0, np.nan]}), [1.0, 2.0])["tau"].isna().all()
