"""Ranking and choosing architectures."""

import numpy as np
import pandas as pd
import pytest
import torch
from shared import digits, params, pool

from ghnlib.data.images import Augment
from ghnlib.experiments import search
from ghnlib.experiments.search import PLAIN, REGULARISED, Chosen, one_shot_scores, search_costs, train_one_shot
from ghnlib.experiments.setup import Setup
from ghnlib.reporting.statistics import mean_interval, rank_correlations
from ghnlib.training.networks import TrainingRecipe


def test_costs_of_ranking_count_what_happens_before_and_for_each_architecture():
    training = pd.DataFrame({"ghn1": {"steps": 100, "meta_batch": 2, "flops": 3e12}}).T
    changes = {"checkpoints": (10,), "one_shot_steps": 20, "images": 64}
    analysis = params().analysis.model_copy(update=changes)
    costs = search_costs(training, image=1e9, analysis=analysis, batch_size=32, validation=500)
    assert costs.loc["ghn1"].tolist() == pytest.approx([200, 3, 0, 500])
    assert costs.loc["SGD, 10 steps"].tolist() == pytest.approx([0, 0, 10, 10 * 3 * 32 + 500])
    assert costs.loc["one-shot"].tolist() == pytest.approx([20, 20 * 3 * 32 / 1000, 0, 500])
    assert costs.loc["snip", "GFLOPs each"] == 64 * costs.loc["synflow", "GFLOPs each"]


def test_a_one_shot_model_learns_what_architectures_share():
    images = digits(seed=0, image_size=8)
    few = pool("train", 2, input_size=8)
    trained, untrained = (train_one_shot(few[:1], images.train, steps, 32, 0.05, seed=0) for steps in (25, 1))
    assert trained.keys() == untrained.keys()
    own, other = one_shot_scores(trained, few, images.val, seed=0).itertuples(index=False)
    assert own.accuracy > one_shot_scores(untrained, few[:1], images.val, seed=0)["accuracy"][0] + 10
    assert own.shared == 1 > other.shared > 0
    again = train_one_shot(few[:1], images.train, 1, 32, 0.05, seed=0)
    assert all(torch.equal(value, again[key]) for key, value in untrained.items())


def rows_of(**taus):
    rows = {name: {"n": 40, "tau": tau, "low": tau - 0.1, "high": tau + 0.1, "r": tau} for name, tau in taus.items()}
    return pd.DataFrame(rows).T.astype({"n": int})


def test_claims_of_ranking_compare_with_the_best_proxy_and_leave_out_what_was_not_ranked():
    every = rows_of(ghn1=0.3, ghn2=0.2, ghn3=0.5, snip=0.1, plain=0.4, **{"one-shot": np.nan})
    properties = {"ghn2": {"accuracy": {"tau": 0.6, "low": 0.5, "high": 0.7, "n": 40}}}
    claims = search.claims_of_ranking({"all": every, "top half": rows_of(ghn1=0.1)}, properties)
    values = {name: round(measured.value, 6) for name, measured in claims.items()}
    assert values == {
        "ranking-ghn3": 0.5, "ranking-ghn3-ghn2": 0.3, "ranking-ghn3-proxies": 0.1, "top-half-ghn1": 0.1,
        "property-over-prediction": 0.4,
    }  # fmt: skip


def test_what_a_search_chose_is_compared_over_seeds():
    rows = [(name, training, seed, value + seed) for name, value in (("ghn2", 80.0), ("DARTS", 70.0))
            for training in (PLAIN, REGULARISED) for seed in (0, 1)]  # fmt: skip
    chosen = Chosen(pd.DataFrame(rows, columns=["architecture", "training", "seed", "accuracy"]))
    expected = mean_interval([80.0, 81.0]).over(mean_interval([70.0, 71.0]))
    assert chosen.claims == {"chosen-over-darts": expected, "chosen-over-darts-regularised": expected}
    assert chosen.summary["DARTS"][PLAIN]["mean"] == 70.5
    assert Chosen(chosen.rows[chosen.rows["seed"] == 0]).claims["chosen-over-darts"].verdict.startswith("not decided")


def test_chosen_architectures_are_trained_plainly_and_regularised(tmp_path):
    tiny = params("tiny")
    images = digits(image_size=16)
    setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=tiny.data, analysis=tiny.analysis)
    setup.__dict__["images"] = images
    recipe = TrainingRecipe(3, 0.02, augment=Augment(1))
    found = search.train_chosen(setup, {"a": pool(input_size=16)[0]}, recipe)
    assert found.rows["training"].tolist() == [PLAIN, REGULARISED] and found.rows["accuracy"].notna().all()


def test_a_surrogate_without_a_score_is_not_chosen():
    setup = Setup("analysis", "tiny", 0, folder=None, train=params("tiny").train, analysis=params("tiny").analysis)
    scores = pd.DataFrame({name: [5.0, np.nan, 3.0, 1.0, 2.0] for name in params("tiny").train.variants})
    found = search.random_search(setup, scores, scores["ghn1"] < 9, pd.Series([50.0, 0.0, 40.0, 30.0, 20.0]))
    everyone = search.random_search(setup, scores, pd.Series([True] * 5), pd.Series([50.0, 0.0, 40.0, 30.0, 20.0]))
    assert found["ghn1"]["top"] == everyone["ghn1"]["top"] == 45.0


def test_a_ranking_without_a_score_says_so():
    table = search.ranking_table({"all": rows_of(ghn1=0.3, broken=np.nan)}, pd.DataFrame({"steps": {"ghn1": 2.0}}))
    assert table.loc["broken", "tau, all"] == "not testable" and table.loc["ghn1", "tau, all"].startswith("0.30 [")
    assert rank_correlations(pd.DataFrame({"x": [1.0, np.nan]}), [1.0, 2.0])["tau"].isna().all()
