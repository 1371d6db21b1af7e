"""What predicted parameters look like: diversity, copies, sparsity, activations (PPUDA appendix C, GHN-3 section 5), a
part of the report on analysis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ghnlib.experiments.properties import Trained
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.reporting.statistics import Measured

Networks = Mapping[str, Sequence[dict[str, Tensor]]]
"""By where parameters come from ("random", a hypernetwork, "trained"): parameters of the same networks, by name."""


def networks_of(predictions: Mapping[str, list[dict[str, Tensor]]], trained: Trained) -> Networks:
    """Random, predicted and trained parameters of the first networks."""
    return {"random": trained.before, **predictions, "trained": trained.after}


class Diversity(NamedTuple):
    """``table``: one row a source of parameters: ``networks``, ``diversity``, ``sparsity (%)`` and ``copies (%)``;
    ``by_shape``: shape -> source -> diversity, channels of random and trained networks matched."""

    table: pd.DataFrame
    by_shape: dict[str, dict[str, float]]

    @property
    def matched(self) -> dict[str, float]:
        """Of the most common shape."""
        return next(iter(self.by_shape.values()))

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Table 12 and GHN-3 Table 9: one training each, no intervals."""
        found = {
            "diversity-trained": _least_step(self.table["diversity"], ("ghn2", "trained")),
            "diversity-order": _least_step(self.table["diversity"], ("mlp", "ghn1", "ghn2")),
            "sparsity-order": _least_step(self.table["sparsity (%)"], ("mlp", "ghn1", "ghn2")),
            "diversity-matched": _least_step(self.matched, ("mlp", "ghn2", "ghn3", "trained")),
        }
        return {name: Measured(step) for name, step in found.items() if np.isfinite(step)}


def _least_step(values: Mapping[str, float], order: Sequence[str]) -> float:
    """The least of the steps from one to the next; not a number where one is missing."""
    return float(np.min([values.get(b, np.nan) - values.get(a, np.nan) for a, b in pairwise(order)]))


def shape_name(shape: Sequence[int]) -> str:
    """Such as "16x1x3x3"."""
    return "x".join(map(str, shape))


def compare_diversity(networks: Networks) -> Diversity:
    """Diversity, sparsity and copies of parameters by where they come from, of the three most common shapes."""
    shapes = common_shapes(networks["random"], 3)
    rows, by_shape = {}, {shape_name(shape): {} for shape in shapes}
    for source, parameters in networks.items():
        tensors = tensors_of(parameters, shapes[0])
        rows[source] = {
            "networks": len(tensors),
            "diversity": diversity(tensors),
            "sparsity (%)": 100 * np.mean([sparsity(first_weight(net)) for net in parameters]),
            "copies (%)": 100 * np.mean([duplicated_filters(net) for net in parameters]),
        }
        measure = matched_diversity if source in ("random", "trained") else diversity
        for shape in shapes:
            by_shape[shape_name(shape)][source] = measure(tensors_of(parameters, shape))
    return Diversity(pd.DataFrame(rows).T.astype({"networks": int}), by_shape)


class Activations(NamedTuple):
    """``variances``: of each layer's output, in order of execution, by where the parameters come from; "NAME, start":
    from a hypernetwork before its training."""

    variances: dict[str, list[float]]

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation over layers of log10 variance."""
        return {name: float(np.std(np.log10(np.maximum(v, 1e-12)))) for name, v in self.variances.items()}

    def distance_from_random(self, name: str) -> float:
        """Of a hypernetwork's start from random parameters: the factor between variances, mean over layers of the
        logarithms' distance."""
        logs = [np.log10(self.variances[source]) for source in (f"{name}, start", "random")]
        return 10 ** float(np.abs(logs[0] - logs[1]).mean())

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Fig. 8: one network, no interval."""
        spread = self.spread
        step = spread.get("ghn1", np.nan) - spread.get("ghn2", np.nan)
        return {"activation-spread": Measured(step)} if np.isfinite(step) else {}


def compare_activations(setup: Setup, networks: Networks, trained: Trained) -> Activations:
    """Variance of the output of each convolution and linear layer on a batch of validation images, of the deepest
    network (PPUDA Fig. 8, GHN-3 Fig. 6)."""
    deepest = max(range(len(trained.before)), key=lambda i: len(trained.graphs[i]))
    graph, net = trained.graphs[deepest], trained.architectures[deepest].build(device="meta").eval()
    batch, _ = next(setup.images.val.batches(setup.analysis.images))
    found = {source: activation_variances(net, batch, nets[deepest]) for source, nets in networks.items()}
    for name in networks:
        if name in setup.hypernetworks:
            torch.manual_seed(setup.seed)
            with torch.no_grad():
                start = GHN(setup.hypernetworks[name].config).predict(graph)
            found[f"{name}, start"] = activation_variances(net, batch, start)
    return Activations(found)


def diversity(tensors: Iterable[Tensor]) -> float:
    """Mean of 1 - |cosine| over pairs of different tensors of one shape (PPUDA Table 12); 0 if they are all parallel.

    Independent Gaussian tensors with D entries give 1 - sqrt(2 / (pi D)).
    """
    rows = torch.nn.functional.normalize(torch.stack([t.detach().flatten() for t in tensors]), dim=1)
    n = len(rows)
    return float((1 - (rows @ rows.T).abs())[~torch.eye(n, dtype=torch.bool)].mean())


def matched_diversity(tensors: Iterable[Tensor]) -> float:
    """``diversity`` after the output channels of each pair are matched for the largest cosine (GHN-3 Table 9: trained
    networks, whose channels have no order; Hungarian algorithm). Not a number for a single tensor."""
    rows = [t.detach().flatten(1) / t.detach().norm() for t in tensors]  # (out, in * h * w)
    cosines = []
    for a, b in combinations(rows, 2):
        products = a @ b.T
        cosines.append(float(products[linear_sum_assignment(products, maximize=True)].sum().abs()))
    return 1 - float(torch.tensor(cosines).mean())


def singular_values(tensors: Iterable[Tensor]) -> Tensor:
    """Singular values of tensors (out, in, h, w) of one shape as matrices (out, in * h * w): in descending order,
    relative to each tensor's largest, mean over tensors; (min(out, in * h * w),)."""
    values = torch.linalg.svdvals(torch.stack(list(tensors)).flatten(2))
    return (values / values[:, :1]).mean(0)


def duplicated_filters(parameters: dict[str, Tensor]) -> float:
    """Share of a network's filters, in convolutions with at least 9 weights a filter, with a cosine above 0.99 to an
    earlier filter of their layer. Random filters of 9 weights: two in 10^8 pairs."""
    copies = []
    for weight in parameters.values():
        if weight.ndim == 4 and weight[0].numel() >= 9:
            rows = torch.nn.functional.normalize(weight.detach().flatten(1), dim=1)
            copies.append(((rows @ rows.T).tril(-1) > 0.99).any(1))
    return float(torch.cat(copies).float().mean())


def sparsity(weight: Tensor) -> float:
    """Share of entries smaller in magnitude than 0.05 (PPUDA Table 12: of first layers)."""
    return float((weight.detach().abs() < 0.05).float().mean())


def first_weight(parameters: dict[str, Tensor]) -> Tensor:
    """The first convolution's weight of a network."""
    return next(p for name, p in parameters.items() if name.startswith("stem") and p.ndim == 4)


def common_shapes(networks: Sequence[dict[str, Tensor]], count: int) -> list[tuple[int, ...]]:
    """The ``count`` shapes of convolutions with kernels larger than 1x1 that most networks have a tensor of."""
    counts: Counter[tuple[int, ...]] = Counter()
    for parameters in networks:
        counts.update({tuple(p.shape) for p in parameters.values() if p.ndim == 4 and p.shape[-1] > 1})
    return sorted(counts, key=lambda shape: (counts[shape], shape), reverse=True)[:count]


def tensors_of(networks: Sequence[dict[str, Tensor]], shape: tuple[int, ...]) -> list[Tensor]:
    """The first tensor of a shape of each network that has one."""
    found = (next((p for p in parameters.values() if p.shape == shape), None) for parameters in networks)
    return [tensor for tensor in found if tensor is not None]


@torch.no_grad()
def activation_variances(net: nn.Module, images: Tensor, parameters: dict[str, Tensor] | None = None) -> list[float]:
    """Variance over all elements of each convolution's and linear layer's output, in order of execution.

    Args:
        net: the network; with ``parameters`` it may be on the meta device.
        images: one batch (b, 3, s, s).
    """
    variances: list[float] = []

    def measure(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            variances.append(float(output.var()))

    with register_module_forward_hook(measure):
        net(images) if parameters is None else torch.func.functional_call(net, parameters, (images,))
    return variances
