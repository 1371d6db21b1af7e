"""What the training of hypernetworks costs and gives by size and meta-batch, a part of the report on accuracy without
training."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ghnlib.architectures.architecture import Architecture
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.measuring.costs import flops, step_flops

TOP1 = "top-1, test (%)"
"""The column of costs with mean accuracy on test architectures, where there is one."""


def training_costs(
    setup: Setup, architectures: Sequence[Architecture], variants: Iterable[str] | None = None
) -> pd.DataFrame:
    """What the training of hypernetworks took (GHN-3 Figs. 1 and 3, PPUDA Fig. 9).

    Args:
        architectures: FLOPs are counted of the average one.
        variants: None: all.

    Returns:
        One row a variant: ``encoder``, ``hid``, ``layers``, ``steps``, ``meta_batch``, ``parameters``, ``flops`` of a
        training, mean and deviation over all steps of the norm of the gradient before clipping, means over trainings.
    """
    of_image, graphs = step_flops(architectures), [architecture.graph for architecture in architectures]
    names = setup.train.variants if variants is None else variants
    return pd.DataFrame({name: _training_cost(setup, name, graphs, of_image) for name in names}).T.infer_objects()


def _training_cost(setup: Setup, variant: str, graphs: Sequence[Graph], of_image: float) -> dict[str, Any]:
    ghn, *_ = setup.hypernetworks[variant].values()
    recipe, history = setup.train.recipe_of(variant), setup.history(variant)
    predicting = flops(lambda: [ghn([graph], predict_class_layers=True) for graph in graphs])
    of_network = recipe.batch_size * of_image + 3 * predicting / len(graphs)
    mean = history["grad_norm"].mean()
    square = (history["grad_norm"] ** 2 + history["grad_norm_deviation"] ** 2).mean()
    return {
        "encoder": ghn.config.encoder,
        "hid": ghn.config.hid,
        "layers": ghn.config.layers,
        "steps": recipe.steps,
        "meta_batch": recipe.meta_batch,
        "parameters": sum(p.numel() for p in ghn.parameters()),
        "flops": recipe.steps * recipe.meta_batch * of_network,
        "grad_norm": mean,
        "grad_norm_deviation": max(0.0, square - mean**2) ** 0.5,
    }


def scaling_points(costs: pd.DataFrame, compared: Sequence[str]) -> pd.DataFrame:
    """Costs as they are drawn: ``million parameters``, ``TFLOPs of training``, ``model`` (encoder and size) and
    ``line``, the same for equal models of equal steps that differ in their meta-batch, missing for others; whether a
    point is ``named``: of many only those ``compared``."""
    model = [f"{row['encoder']}, d = {row['hid']}, {row['layers']} layers" for _, row in costs.iterrows()]
    points = costs.assign(model=model)
    points["million parameters"] = costs["parameters"] / 1e6
    points["TFLOPs of training"] = costs["flops"] / 1e12
    batches = points.groupby(["model", "steps"])["meta_batch"]
    apart = (batches.transform("nunique") == batches.transform("size")) & (batches.transform("size") > 1)
    points["line"] = (points["model"] + ", " + points["steps"].astype(str) + " steps").where(apart)
    return points.assign(named=[len(points) < 8 or name in compared for name in points.index])


def gradient_by_meta_batch(costs: pd.DataFrame) -> pd.DataFrame:
    """Mean over variants of equal encoder, steps and meta-batch, where there are several meta-batches (PPUDA Fig. 9):
    columns ``TOP1``, ``grad_norm`` and ``grad_norm_deviation``."""
    means = costs.groupby(["encoder", "steps", "meta_batch"])[[TOP1, "grad_norm", "grad_norm_deviation"]].mean()
    return means.groupby(level=["encoder", "steps"]).filter(lambda rows: len(rows) > 1)


def losses_by_meta_batch(setup: Setup, points: pd.DataFrame) -> pd.DataFrame:
    """Histories of the models of ``scaling_points`` that were trained with several meta-batches: rows ``model``,
    ``variant`` (with its meta-batch m), ``step``, ``loss``."""
    several = points.groupby("model").filter(lambda rows: rows["meta_batch"].nunique() > 1)
    parts = [pd.DataFrame(columns=["model", "variant", "step", "loss"])]
    for variant, row in several.sort_values("meta_batch").iterrows():
        history = setup.history(variant).groupby("step", as_index=False)["loss"].mean()
        parts.append(history.assign(model=row["model"], variant=f"{variant}, m = {row['meta_batch']}"))
    return pd.concat(parts[1:] or parts, ignore_index=True)
