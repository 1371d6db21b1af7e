"""Claims of the four papers against a profile's metrics: a number, its 95 % interval, a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import nan

import pandas as pd

from ghnlib.intervals import Measured, measured

_TEST, _SPLITS = "evaluate/accuracy", "analysis/distances/ghn2"
_MATCHED, _DIVERSITY = "analysis/matched_diversity", "analysis/diversity_and_sparsity"
_TAU, _PAIRED, _TUNED, _NEW = "analysis/search/all", "evaluate/paired", "finetune/paired", "transfer/paired/*"
_RANKING, _AREA = "anytime/ranking/all", "anytime/area"

CLAIMS = (
    ("PPUDA Table 3", "points without training: GHN-2 over MLP", "24.7", f"{_PAIRED}/ghn2 - mlp"),
    ("PPUDA Table 3", "points without training: GHN-2 over GHN-1", "15.5", f"{_PAIRED}/ghn2 - ghn1"),
    ("PPUDA Table 3", "points: GHN-2 over random parameters", "56.9", f"{_PAIRED}/ghn2 - random"),
    ("PPUDA Table 3", "points that GHN-2 loses without batch norm", "30.1",
     f"{_TEST}/ghn2/bnfree", f"{_TEST}/ghn2/test"),
    ("PPUDA C.1", "points of GHN-2: batch norm with training statistics over those of a batch", "4.8",
     "evaluate/training_statistics_gain/ghn2"),
    ("PPUDA Fig. 6 f", "tau of GHN-2's error and mean shortest path", "not legible",
     "evaluate/error_and_size/ghn2/path"),
    ("PPUDA Fig. 6 g", "tau of GHN-2's error and nodes", "not legible", "evaluate/error_and_size/ghn2/nodes"),
    ("PPUDA Fig. 9", "gradient norm of GHN-2: small over large meta-batch", "4.7",
     "evaluate/costs/ghn2-m8/grad_norm", "evaluate/costs/ghn2-m1/grad_norm"),
    ("GHN-3 Table 11", "points without training: GHN-3 over GHN-2", "4.7", f"{_PAIRED}/ghn3 - ghn2"),
    ("GHN-3 Table 11", "points: GHN-3 without training over one epoch of SGD", "1.3",
     f"{_PAIRED}/ghn3 - SGD, 1 epoch"),
    ("GHN-3 Table 2", "points after few steps: from GHN-3 over from random", "26.7",
     f"{_TUNED}/ghn3 - random/steps"),
    ("GHN-3 Table 2", "points after one epoch: from random over from GHN-3", "1.1",
     f"{_TUNED}/ghn3 - random/1 epoch", ""),
    ("GHN-3 Table 6", "points after few steps: from a prediction over from GradInit", "13.9",
     f"{_PAIRED}/prediction - gradinit"),
    ("GHN-3 Table 7", "points on new classes: from GHN-3 over from random", "11.3",
     f"{_NEW}/ghn3 - random"),
    ("GHN-orth Table 1", "points on new classes: orthogonal factor over as predicted", "4.0",
     f"{_NEW}/ghn3-orth - ghn3"),
    ("PPUDA section 5.2", "tau of accuracy and its prediction from GHN-2's embeddings", "0.8",
     "analysis/properties/ghn2/accuracy"),
    ("PPUDA Fig. 4", "tau of accuracy and its prediction: GHN-2's embeddings over Neural Predictor", "not legible",
     "analysis/properties/Neural Predictor/accuracy", "analysis/properties/ghn2/accuracy"),
    ("PPUDA section 5.2", "tau: GHN-2's embeddings over accuracy with its parameters", "0.4",
     f"{_TAU}/ghn2", "analysis/properties/ghn2/accuracy"),
    ("PPUDA Fig. 11", "minus tau of accuracies on clean and noisy images", "0.40", "analysis/clean_and_noisy", ""),
    ("PPUDA Fig. 11", "tau of accuracies on two datasets", "0.29", "analysis/second/accuracy"),
    ("GHN-3 Table 13", "tau of trained accuracy and accuracy with GHN-3's parameters", "0.22", f"{_TAU}/ghn3"),
    ("GHN-3 Table 13", "tau with trained accuracy: GHN-3 over GHN-2", "0.06", f"{_TAU}/ghn2", f"{_TAU}/ghn3"),
    ("GHN Table 3", "tau with trained accuracy: GHN-1 over 10 SGD steps (paper: R, 50 epochs)", "0.42",
     f"{_TAU}/SGD, 10 steps", f"{_TAU}/ghn1"),
    ("GHN Table 3", "tau with trained accuracy: GHN-1 over a one-shot model (paper: R, 50 epochs)", "0.10",
     f"{_TAU}/one-shot", f"{_TAU}/ghn1"),
    ("GHN Table 1", "points of trained networks: best by GHN-1 over random choice", "1.1",
     "analysis/random_search/ghn1"),
    ("GHN Table 2", "points on a second dataset, FLOPs limited: best by GHN-1 over random choice", "not reported",
     "analysis/limited_search/ghn1"),
    ("PPUDA Table 12", "diversity of parameters: trained over GHN-2", "0.81",
     f"{_DIVERSITY}/ghn2/diversity", f"{_DIVERSITY}/trained/diversity"),
    ("PPUDA Table 12", "diversity: smaller step of MLP, GHN-1, GHN-2", "0.06",
     *(f"{_DIVERSITY}/{name}/diversity" for name in ("mlp", "ghn1", "ghn2"))),
    ("GHN-3 Table 9", "diversity: smallest step of MLP, GHN-2, GHN-3, trained (matched)", "0.027",
     *(f"{_MATCHED}/{name}" for name in ("mlp", "ghn2", "ghn3", "trained"))),
    ("PPUDA Table 10", "distance from ResNet-50 for GHN-2: ViT over ResNet-34", "not legible",
     f"{_SPLITS}/l2/ResNet-34", f"{_SPLITS}/l2/ViT"),
    ("PPUDA Table 11", "Frechet distance from training for GHN-2: nearest shifted split over test", "0.29",
     f"{_SPLITS}/frechet/test", f"{_SPLITS}/frechet/nearest shifted"),
    ("GHN Table 3", "tau of trained accuracy and accuracy with a stacked GHN's parameters (paper: R)", "0.68",
     f"{_RANKING}/stacked"),
    ("GHN Table 4", "tau with trained accuracy: stacked over separate modules (paper: R)", "0.44",
     f"{_RANKING}/separate", f"{_RANKING}/stacked"),
    ("GHN Fig. 5", "tau with trained accuracy: forward-backward over synchronous", "not legible",
     f"{_RANKING}/synchronous", f"{_RANKING}/forward-backward"),
    ("GHN Fig. 3", "area under accuracy over FLOPs: chosen by GHN over random networks", "not legible",
     f"{_AREA}/random", f"{_AREA}/chosen by GHN"),
    ("GHN Fig. 3", "area under accuracy over FLOPs: chosen by GHN over MSDNet", "not legible",
     f"{_AREA}/MSDNet", f"{_AREA}/chosen by GHN"),
)  # fmt: skip
"""Paper; the claim, that a number is above 0; the published number; where ours is in the metrics. Several places: the
least step from one to the next ("" is 0)."""


def claims_table(metrics: Mapping) -> pd.DataFrame:
    """One row a claim: ``paper``, ``claim``, ``published``, ``ours``, ``low``, ``high``, ``networks``, ``verdict``.

    Verdicts: ``Measured``. What the profile has no metrics of is not testable at this scale.

    Args:
        metrics: those of all stages, by stage (reports/PROFILE/metrics.json).
    """
    rows = []
    for paper, claim, published, *places in CLAIMS:
        try:
            found = [_read(metrics, place) for place in places]
            ours = min((b.over(a) for a, b in pairwise(found)), default=found[0])
        except (LookupError, ValueError):
            ours = Measured(nan)
        rows.append((paper, claim, published, *ours, ours.verdict))
    columns = ["paper", "claim", "published", "ours", "low", "high", "networks", "verdict"]
    table = pd.DataFrame(rows, columns=columns).astype({"networks": "Int64"})
    return table.assign(**{name: table[name].map(lambda x: float(f"{x:.3g}")) for name in ("ours", "low", "high")})


def _read(metrics: Mapping, place: str) -> Measured:
    found = metrics if place else 0.0
    for key in filter(None, place.split("/")):
        if key == "*":  # the first dataset
            key = next(iter(found))
        elif key == "steps":  # the longest training that is counted in steps
            key = max((name for name in found if name.endswith(" steps")), key=lambda name: int(name.split()[0]))
        found = found[key]
    if isinstance(found, Mapping):
        return measured(found)
    return Measured(found, *(() if place else (found, found)))
