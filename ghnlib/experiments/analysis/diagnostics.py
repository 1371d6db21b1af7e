"""What predicted parameters look like: diversity, copies, sparsity, activations (PPUDA appendix C, GHN-3 section 5), a
part of the report on analysis."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.experiments.analysis.properties import Trained
from ghnlib.experiments.setup import Setup
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.reporting.statistics import Measured, finite
from ghnlib.training.initialization import Sources, initialize
from ghnlib.training.networks import Run, TrainingRecipe, initial_network, on_cpu, train_network

Networks = Mapping[str, Sequence[dict[str, Tensor]]]
"""By where parameters come from ("random", a hypernetwork, "trained"): parameters of the same networks, by name."""


def networks_of(predictions: Mapping[str, list[dict[str, Tensor]]], trained: Trained) -> Networks:
    """Random, predicted and trained parameters of the first networks, on the CPU."""
    predicted = {name: [on_cpu(of.items()) for of in networks] for name, networks in predictions.items()}
    return {"random": trained.before, **predicted, "trained": trained.after}


class Diversity(NamedTuple):
    """Of predictions of one training of the hypernetworks. ``table``: one row a source of parameters: ``diversity``,
    ``sparsity (%)`` and ``copies (%)``; ``by_shape``: shape and number of tensors -> source -> diversity, channels of
    random and trained networks matched."""

    table: pd.DataFrame
    by_shape: dict[str, dict[str, float]]

    @property
    def matched(self) -> dict[str, float]:
        """Of the most common shape."""
        return next(iter(self.by_shape.values()))

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Table 12 and GHN-3 Table 9."""
        return finite({
            "diversity-trained": _least_step(self.table["diversity"], "ghn2", "trained"),
            "diversity-order": _least_step(self.table["diversity"], "mlp", "ghn1", "ghn2"),
            "sparsity-order": _least_step(self.table["sparsity (%)"], "mlp", "ghn1", "ghn2"),
            "diversity-matched": _least_step(self.matched, "mlp", "ghn2", "ghn3", "trained"),
        })  # fmt: skip


def _least_step(values: Mapping[str, float], *order: str) -> Measured:
    """The least of the steps from one to the next; not a number where one is missing."""
    return Measured(float(np.min([values.get(b, np.nan) - values.get(a, np.nan) for a, b in pairwise(order)])))


def shape_name(shape: Sequence[int]) -> str:
    """Such as "16x1x3x3"."""
    return "x".join(map(str, shape))


def compare_diversity(networks: Networks) -> Diversity:
    """Diversity, sparsity and copies of parameters by where they come from, of all tensors of the shape that most
    tensors have; diversity also of the next two shapes."""
    shapes = common_shapes(networks["random"], 3)
    names = [f"{shape_name(shape)} ({len(tensors_of(networks['random'], shape))} tensors)" for shape in shapes]
    rows, by_shape = {}, {name: {} for name in names}
    for source, parameters in networks.items():
        rows[source] = {
            "diversity": diversity(tensors_of(parameters, shapes[0])),
            "sparsity (%)": 100 * np.mean([sparsity(first_weight(net)) for net in parameters]),
            "copies (%)": 100 * np.mean([duplicated_filters(net) for net in parameters]),
        }
        measure = matched_diversity if source in ("random", "trained") else diversity
        for name, shape in zip(names, shapes):
            by_shape[name][source] = measure(tensors_of(parameters, shape))
    return Diversity(pd.DataFrame(rows).T, by_shape)


HE, TRAINED = "He initialisation", "trained"


class Activations(NamedTuple):
    """Of one network with parameters of one training of the hypernetworks. ``variances``: of each layer's output, in
    order of execution, by where the parameters come from: ``HE``, ``TRAINED``, a hypernetwork, "NAME, start" (the same
    before its training); "ghn2, start, to scale": these weights divided by ``scales["ghn2"]``, the mean factor of their
    deviation from He's; "ghn2, start, to scale, shuffled": the values of each tensor at random places too."""

    variances: dict[str, list[float]]
    scales: dict[str, float]

    @property
    def table(self) -> pd.DataFrame:
        """A row a source: spread, the deviation over layers of log10 variance; the factor between its variances and
        He's, mean over layers of the logarithms' distance; and that of weights at the start."""
        logs = {name: np.log10(np.maximum(values, 1e-12)) for name, values in self.variances.items()}
        rows = {
            name: {
                "deviation of log10 variance": of.std(),
                "factor from He": 10 ** np.abs(of - logs[HE]).mean(),
                "weights' scale": self.scales.get(name.removesuffix(", start"), np.nan) if "start" in name else np.nan,
            }
            for name, of in logs.items()
        }
        return pd.DataFrame(rows).T

    @property
    def claims(self) -> dict[str, Measured]:
        """Of PPUDA Fig. 8: one network."""
        return finite({"activation-spread": _least_step(self.table["deviation of log10 variance"], "ghn2", "ghn1")})


def compare_activations(setup: Setup, recipe: TrainingRecipe) -> dict[str, list[Activations]]:
    """Variance of the output of each convolution and linear layer on a batch of validation images: for each network of
    ``analysis.activations``, and each training of the hypernetworks (PPUDA Fig. 8, GHN-3 Figs. 6 and 9). ``recipe``: of
    the trained network."""
    batch, _ = next(setup.images.val.batches(setup.analysis.images))
    return {name: _activations(setup, name, recipe, batch) for name in setup.analysis.activations}


@torch.no_grad()
def _activations(setup: Setup, name: str, recipe: TrainingRecipe, batch: Tensor) -> list[Activations]:
    train, steps = setup.images.train, setup.analysis.activation_steps
    is_vit = name == "vit"  # of DeepNets-1M; others are torchvision's
    architecture = setup.split("predefined")[1] if is_vit else NamedNetwork(len(train.classes), train.side, name)
    torch.manual_seed(setup.seed)  # of what He initialisation leaves as it is built
    graph, net = architecture.graph, architecture.build(device="cpu").to(batch.device).eval()
    initialize("he", net, Sources(seed=setup.seed))
    shared = {HE: activation_variances(net, batch)}
    if steps:
        run = Run(architecture, replace(recipe, steps=steps), setup.seed)
        with torch.enable_grad():
            own = initial_network(run, batch.device)
            train_network(own, train, run.recipe, run.seed, lambda net: None)
        shared[TRAINED] = activation_variances(net, batch, dict(own.named_parameters()))
    found = []
    for seed, ghns in zip(setup.train.seeds, setup.trainings):
        variances, scales = dict(shared), {}
        for source, ghn in ghns.items():
            torch.manual_seed(seed)  # as its training began
            start = GHN(ghn.config).to(batch.device).predict(graph)
            scales[source] = scale_from_he(start)
            variances[source] = activation_variances(net, batch, ghn.predict(graph))
            variances[f"{source}, start"] = activation_variances(net, batch, start)
            if source == "ghn2":
                scaled = {key: p / scales[source] if p.ndim > 1 else p for key, p in start.items()}
                shuffled = {key: p.flatten()[torch.randperm(p.numel())].view_as(p) for key, p in scaled.items()}
                variances[f"{source}, start, to scale"] = activation_variances(net, batch, scaled)
                variances[f"{source}, start, to scale, shuffled"] = activation_variances(net, batch, shuffled)
        found.append(Activations(variances, scales))
    return found


def scale_from_he(parameters: Mapping[str, Tensor]) -> float:
    """Deviation of weights over that of He initialisation, sqrt(2 / fan_in); geometric mean over tensors of two or four
    axes."""
    weights = [p for p in parameters.values() if p.ndim in (2, 4)]
    return float(np.exp(np.mean([float((p.std() * (p[0].numel() / 2) ** 0.5).log()) for p in weights])))


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
    """The ``count`` shapes that most tensors of convolutions with kernels larger than 1x1 have."""
    shapes = Counter(tuple(p.shape) for parameters in networks for p in parameters.values())
    larger = [shape for shape in shapes if len(shape) == 4 and shape[-1] > 1]
    return sorted(larger, key=lambda shape: (shapes[shape], shape), reverse=True)[:count]


def tensors_of(networks: Sequence[dict[str, Tensor]], shape: tuple[int, ...]) -> list[Tensor]:
    """All tensors of a shape, of all networks."""
    return [p for parameters in networks for p in parameters.values() if p.shape == shape]


@torch.no_grad()
def activation_variances(net: nn.Module, images: Tensor, parameters: dict[str, Tensor] | None = None) -> list[float]:
    """Variance over all elements of each convolution's and linear layer's output for images (b, 3, s, s), in order of
    execution. With ``parameters`` the network may be on the meta device."""
    variances: list[float] = []

    def measure(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            variances.append(float(output.var()))

    with register_module_forward_hook(measure):
        torch.func.functional_call(net, parameters or {}, (images,))
    return variances
