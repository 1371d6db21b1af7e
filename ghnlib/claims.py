"""Claims of the four papers against a profile's metrics: a number, its 95 % interval, a verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import filter as matching
from itertools import pairwise
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd

from ghnlib.intervals import Measured, measured

_TEST, _PAIRED, _TUNED = "evaluate/accuracy", "evaluate/paired", "finetune/paired"
_NEW, _FAMILY = "transfer/paired/*", "transfer/families/*"
_SPLITS, _MATCHED, _PROPERTY = "analysis/distances/ghn2", "analysis/matched_diversity", "analysis/properties"
_FIRST, _CHOSEN, _SPREAD = "analysis/diversity_and_sparsity", "analysis/chosen", "analysis/log_variance_spread"
_TAU, _TOP = "analysis/search/all", "analysis/search/top half"
_PROXIES = "grad_norm|snip|fisher|jacob_cov|plain|synflow|synflow_bn"
_RANKING, _AREA = "anytime/ranking/all", "anytime/area"
_REGULARISED = "cutout, auxiliary head, drop path"

CLAIMS = (
    ("PPUDA Table 3", "points without training: GHN-2 over MLP", "24.7", f"{_PAIRED}/ghn2 - mlp"),
    ("PPUDA Table 3", "points without training: GHN-2 over GHN-1", "15.5", f"{_PAIRED}/ghn2 - ghn1"),
    ("PPUDA Table 3", "points: GHN-2 over random parameters (paper: over chance)", "56.9", f"{_PAIRED}/ghn2 - random"),
    ("PPUDA Table 3", "points that GHN-2 loses without batch norm", "30.1",
     f"{_TEST}/ghn2/bnfree", f"{_TEST}/ghn2/test"),
    ("PPUDA C.1", "points of GHN-2: batch norm with training statistics over those of a batch", "4.8",
     "evaluate/training_statistics_gain/ghn2"),
    ("PPUDA Fig. 6 f", "tau of GHN-2's error and mean shortest path", "not legible",
     "evaluate/error_and_size/ghn2/path"),
    ("PPUDA Fig. 6 g", "tau of GHN-2's error and nodes", "not legible", "evaluate/error_and_size/ghn2/nodes"),
    ("PPUDA Fig. 8", "spread over layers of log10 variance of activations: GHN-1 over GHN-2", "not legible",
     f"{_SPREAD}/ghn2", f"{_SPREAD}/ghn1"),
    ("PPUDA Fig. 9", "gradient norm of GHN-2: small over large meta-batch", "4.7",
     "evaluate/costs/ghn2-m8/grad_norm", "evaluate/costs/ghn2-m1/grad_norm"),
    ("PPUDA Fig. 13", "step from which He initialisation is ahead of GHN-2 on ResNet-50", "about 5 epochs",
     "finetune/resnet50_crossover/ghn2, *"),
    ("PPUDA section 5.2", "tau of accuracy and its prediction from GHN-2's embeddings", "about 0.8",
     f"{_PROPERTY}/ghn2/accuracy"),
    ("PPUDA section 5.2", "tau: GHN-2's embeddings over accuracy with its parameters", "about 0.4",
     f"{_TAU}/ghn2", f"{_PROPERTY}/ghn2/accuracy"),
    ("PPUDA Fig. 4", "tau of accuracy and its prediction: GHN-2's embeddings over Neural Predictor", "not legible",
     f"{_PROPERTY}/Neural Predictor/accuracy", f"{_PROPERTY}/ghn2/accuracy"),
    ("PPUDA Table 9", "points of trained networks: chosen by GHN-2 over DARTS", "0.83",
     f"{_CHOSEN}/DARTS/plain", f"{_CHOSEN}/ghn2/plain"),
    ("PPUDA Table 9", "points of trained networks, regularised: chosen by GHN-2 over DARTS", "0.74",
     f"{_CHOSEN}/DARTS/{_REGULARISED}", f"{_CHOSEN}/ghn2/{_REGULARISED}"),
    ("PPUDA Fig. 11", "minus tau of accuracies on clean and noisy images (paper: CIFAR-10 only)", "0.40",
     "analysis/clean_and_noisy", ""),
    ("PPUDA Fig. 11", "tau of accuracies on two datasets", "0.29", "analysis/second/accuracy"),
    ("PPUDA Table 10", "distance from ResNet-50 for GHN-2: ViT over ResNet-34", "not legible",
     f"{_SPLITS}/l2/ResNet-34", f"{_SPLITS}/l2/ViT"),
    ("PPUDA Table 10", "distance from ResNet-50 for GHN-2: smaller step of ResNet-34, ResNet-50 without skips, ViT",
     "not legible", *(f"{_SPLITS}/l2/{name}" for name in ("ResNet-34", "ResNet-50 without skips", "ViT"))),
    ("PPUDA Table 11", "Frechet distance from training for GHN-2: nearest shifted split over test", "0.29",
     f"{_SPLITS}/frechet/test", f"{_SPLITS}/frechet/nearest shifted"),
    ("PPUDA Table 12", "diversity of parameters: trained over GHN-2", "0.81",
     f"{_FIRST}/ghn2/diversity", f"{_FIRST}/trained/diversity"),
    ("PPUDA Table 12", "diversity: smaller step of MLP, GHN-1, GHN-2", "0.06",
     *(f"{_FIRST}/{name}/diversity" for name in ("mlp", "ghn1", "ghn2"))),
    ("PPUDA Table 12", "% of small first weights: smaller step of MLP, GHN-1, GHN-2", "4",
     *(f"{_FIRST}/{name}/sparsity (%)" for name in ("mlp", "ghn1", "ghn2"))),
    ("GHN-3 Table 11", "points without training: GHN-3 over GHN-2 (paper: T/m8)", "4.7", f"{_PAIRED}/ghn3 - ghn2"),
    ("GHN-3 Table 11", "points: GHN-3 without training over one epoch of SGD (paper: T/m8)", "1.3",
     f"{_PAIRED}/ghn3 - SGD, 1 epoch"),
    ("GHN-3 Table 2", "points after few steps: from GHN-3 over from random (paper: T/m8)", "26.7",
     f"{_TUNED}/ghn3 - random/<shortest>"),
    ("GHN-3 Table 2", "points after one epoch: from GHN-3 over from random (paper: XL/m16; T/m8: -1.1)", "15.4",
     f"{_TUNED}/ghn3 - random/1 epoch"),
    ("GHN-3 Table 4", "share of networks ahead from GHN-3 after one epoch, over a half (paper: XL/m16)", "0.24",
     "finetune/wins/1 epoch"),
    ("GHN-3 Table 6", "points after few steps: from a prediction over from GradInit (paper: XL/m16)", "13.9",
     f"{_PAIRED}/prediction - gradinit"),
    ("GHN-3 Table 6", "points at the end of the longest training: from GHN-3 over from random (paper: XL/m16)", "0.2",
     f"{_TUNED}/ghn3 - random/<longest>"),
    ("GHN-3 Table 7", "points on new classes: from GHN-3 over from random (paper: XL/m16)", "11.3",
     f"{_NEW}/ghn3 - random"),
    ("GHN-3 Table 7", "points on new classes, ConvNeXt: from GHN-3 over from random (paper: XL/m16)", "7.3",
     f"{_FAMILY}/*convnext*/random", f"{_FAMILY}/*convnext*/ghn3"),
    ("GHN-3 Table 7", "points on new classes, Swin: from GHN-3 over from random (paper: XL/m16)", "5.8",
     f"{_FAMILY}/*swin*/random", f"{_FAMILY}/*swin*/ghn3"),
    ("GHN-3 Table 8", "points of average precision in detection: from GHN-3 over from random (paper: XL/m16)", "40.4",
     "transfer/average_precision/random", "transfer/average_precision/ghn3"),
    ("GHN-3 Table 9", "diversity: smallest step of MLP, GHN-2, GHN-3, trained, matched (paper: XL/m16)", "0.027",
     *(f"{_MATCHED}/{name}" for name in ("mlp", "ghn2", "ghn3", "trained"))),
    ("GHN-3 Table 13", "tau of trained accuracy and accuracy with GHN-3's parameters (paper: T/m8)", "0.22",
     f"{_TAU}/ghn3"),
    ("GHN-3 Table 13", "tau with trained accuracy: GHN-3 over GHN-2 (paper: T/m8)", "0.06",
     f"{_TAU}/ghn2", f"{_TAU}/ghn3"),
    ("GHN-3 Table 13", "tau with trained accuracy: GHN-3 over the best zero-cost proxy (paper: XL/m16)", "0.01",
     f"{_TAU}/{_PROXIES}", f"{_TAU}/ghn3"),
    ("GHN-orth Table 1", "points on new classes: orthogonal factor over as predicted (paper: GHN-2)", "4.0",
     f"{_NEW}/ghn3-orth - ghn3"),
    ("GHN-orth", "points on new classes: trained networks over the same with orthogonal factor", "not reported",
     "transfer/accuracy/*/trained-orth/<last>", "transfer/accuracy/*/trained/<last>"),
    ("GHN-orth Fig. 2", "mean |correlation| of filters: as predicted over orthogonal factor", "not legible",
     "transfer/correlation/ghn3-orth", "transfer/correlation/ghn3"),
    ("GHN Table 1", "points of trained networks: best by GHN-1 over random choice", "1.1",
     "analysis/random_search/ghn1"),
    ("GHN Table 2", "points on a second dataset, FLOPs limited: best by GHN-1 over random choice", "not reported",
     "analysis/limited_search/ghn1"),
    ("GHN Table 3", "tau with trained accuracy: GHN-1 over 10 SGD steps", "R 0.42",
     f"{_TAU}/SGD, 10 steps", f"{_TAU}/ghn1"),
    ("GHN Table 3", "tau with trained accuracy: GHN-1 over a one-shot model", "R 0.10",
     f"{_TAU}/one-shot", f"{_TAU}/ghn1"),
    ("GHN Table 3", "tau with trained accuracy, better half: GHN-1", "R 0.48", f"{_TOP}/ghn1"),
    ("GHN Table 3", "tau with trained accuracy, better half: GHN-1 over a one-shot model", "R 0.17",
     f"{_TOP}/one-shot", f"{_TOP}/ghn1"),
    ("GHN Table 3", "tau of trained accuracy and accuracy with a stacked GHN's parameters", "R 0.68",
     f"{_RANKING}/stacked"),
    ("GHN Table 4", "tau with trained accuracy: stacked over separate modules", "R 0.44",
     f"{_RANKING}/separate", f"{_RANKING}/stacked"),
    ("GHN Table 4", "tau with trained accuracy: passing alone over separate modules", "R 0.20",
     f"{_RANKING}/separate", f"{_RANKING}/passing"),
    ("GHN Fig. 5", "tau with trained accuracy: forward-backward over synchronous", "not legible",
     f"{_RANKING}/synchronous", f"{_RANKING}/forward-backward"),
    ("GHN Fig. 3", "points of area under accuracy over FLOPs: chosen by GHN over random networks", "not legible",
     f"{_AREA}/random", f"{_AREA}/chosen by GHN"),
    ("GHN Fig. 3", "points of area under accuracy over FLOPs: chosen by GHN over a simplified MSDNet", "not legible",
     f"{_AREA}/MSDNet", f"{_AREA}/chosen by GHN"),
)  # fmt: skip
"""Paper; the claim, that a number is above 0; the published number; where ours is in the metrics. Several places: the
least step from one to the next ("" is 0). A key with * stands for each that matches, a row each; names between | for
the one of the largest tau; <last> for the last key, <shortest> and <longest> for budgets of fine-tuning."""


def read_metrics(profile: str, variants: Sequence[str]) -> dict[str, Any]:
    """What each stage measured, by stage: those of reports/PROFILE/metrics that the pipeline has now."""
    stages = ["architectures", *(f"train-{name}" for name in variants)]
    stages += ["evaluate", "finetune", "transfer", "analysis", "anytime"]
    files = {stage: Path("reports", profile, "metrics", f"{stage}.json") for stage in stages}
    return {stage: json.loads(path.read_text()) for stage, path in files.items() if path.exists()}


def scales(params: Mapping[str, Any]) -> dict[str, str]:
    """By stage: images, space of architectures, SGD steps, seeds. ``params``: by name, as a notebook gets them."""
    data, tuning, transfer, anytime = (params[name] for name in ("data", "finetune", "transfer", "anytime"))
    images = Path(data["root"] or data["source"]).name + (f" {side} px" if (side := data["image_size"]) else "")
    steps = sorted({variant["recipe"]["steps"] for variant in params["variants"].values()})
    space = f"{images}, {params['deepnets']['scale']}"
    ghn = f"{space}, GHN {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))} steps"
    budgets = " or ".join(f"{epochs:g}" for epochs in tuning["budgets"])
    return {
        "evaluate": f"{ghn}, 1 seed",
        "finetune": f"{ghn}, then {budgets} epochs, seeds: {len(tuning['seeds'])}",
        "transfer": f"{space}, GHN {transfer['train_steps']} steps, then {transfer['steps']} on "
        f"{transfer['per_class']} images a class, seeds: {len(transfer['seeds'])}",
        "analysis": f"{ghn}, networks {params['analysis']['property_steps']} steps, 1 seed",
        "anytime": f"{images}, {anytime['blocks']['cells']} blocks, GHN {anytime['recipe']['steps']} steps, networks "
        f"{anytime['blocks']['steps']} or {anytime['exits']['steps']}, 1 seed",
    }


def claims_table(metrics: Mapping, scales: Mapping[str, str]) -> pd.DataFrame:
    """Rows for each claim: ``paper``, ``claim``, ``published``, ``ours``, ``low``, ``high``, ``scale``, ``verdict``.

    Verdicts: ``Measured``. What the profile has no metrics of is not testable at this scale.

    Args:
        metrics: those of all stages, by stage (reports/PROFILE/metrics.json).
        scales: of each stage.
    """
    rows = []
    for paper, claim, published, *places in CLAIMS:
        for keys, ours in _measured_at(metrics, places):
            scale = "" if isnan(ours.value) else scales[places[0].split("/")[0]]
            scale += f", n = {ours.n}" if ours.n and scale else ""
            rows.append((paper, ", ".join((claim, *keys)), published, *ours[:3], scale, ours.verdict))
    columns = ["paper", "claim", "published", "ours", "low", "high", "scale", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(**{name: table[name].map(lambda x: float(f"{x:.3g}")) for name in ("ours", "low", "high")})


def _measured_at(metrics: Mapping, places: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Measured]]:
    """The least step between places, not a number where one is missing, by the keys that their patterns match."""
    found = [_found(metrics, place) for place in places]
    for keys in dict.fromkeys(keys for part in found for keys in part if keys) or [()]:
        parts = [part.get(keys, part.get((), Measured(nan))) for part in found]
        steps = [b.over(a) for a, b in pairwise(parts)] or parts
        yield keys, min(steps, key=lambda step: -inf if isnan(step.value) else step.value)


def _found(metrics: Mapping, place: str) -> dict[tuple[str, ...], Measured]:
    budgets = list(metrics.get("finetune", {}).get("tuned", {})) or [""]
    place = place.replace("<shortest>", budgets[0]).replace("<longest>", budgets[-1])
    found: dict[tuple[str, ...], Any] = {(): metrics if place else Measured(0.0, 0.0, 0.0)}
    for key in filter(None, place.split("/")):
        found = {
            (*keys, name) if "*" in key else keys: part[name]
            for keys, part in found.items()
            for name in _names(part, key)
        }
    return {keys: _number(part) for keys, part in found.items()}


def _names(part: Mapping, key: str) -> list[str]:
    if "|" in key:
        taus = {name: part[name]["tau"] for name in key.split("|") if name in part and not isnan(part[name]["tau"])}
        return sorted(taus, key=lambda name: -taus[name])[:1]
    if key == "<last>":
        return list(part)[-1:]
    return matching(part, key) if "*" in key else [key] * (key in part)


def _number(found: Any) -> Measured:
    if isinstance(found, Measured):
        return found
    if isinstance(found, Mapping):
        return measured(found)
    return Measured(inf if found is None else found)  # a crossover that never came
