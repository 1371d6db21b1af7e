"""Initial parameters of a network before it is trained, by name: random, orthogonal, predicted and post-processed,
baselines that show what a prediction owes to its graph, and learned scales."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ghnlib.data.images import DataError, ImageSet
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import CLASS_ROLES
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.training.learned_scales import gradinit, learn_scales, nio

NOISE = 1e-5
"""Scale of the noise on predicted parameters (GHN-3 appendix)."""


@dataclass(frozen=True)
class Sources:
    """What initialisations draw on. ``seed``: of noise, shuffling, He's numbers and the order of images; ``ghn``,
    ``graph``: the hypernetwork and the network's graph; ``parameters``: values by name, instead of their prediction;
    ``peers``: graphs whose predictions are averaged; ``orth_from``, ``noise``: of GHN-orth, see ``orthogonalize`` and
    ``add_noise``; ``images``, ``held_out``, ``steps``, ``batch_size``: training and validation images of GradInit and
    NIO, and how many steps they take at most."""

    seed: int = 0
    ghn: GHN | None = None
    graph: Graph | None = None
    peers: Sequence[Graph] = ()
    orth_from: float = 0.0
    noise: float = 3e-5
    images: ImageSet | None = None
    held_out: ImageSet | None = None
    steps: int = 100
    batch_size: int = 64
    parameters: dict[str, Tensor] | None = None

    @cached_property
    def prediction(self) -> dict[str, Tensor] | None:
        """``parameters``, or what ``ghn`` predicts for ``graph``; None without them."""
        if self.parameters is None and self.ghn and self.graph:
            return self.ghn.predict(self.graph)
        return self.parameters


@torch.no_grad()
def initialize(name: str, net: nn.Module, sources: Sources) -> None:
    """Initialise a network, fresh from its constructor, in place. ``name``: a key of ``INITIALIZATIONS``. Raises
    ValueError for an unknown name, or if ``sources`` lack what it needs, DataError if given parameters do not fit the
    network."""
    if name not in INITIALIZATIONS:
        raise ValueError(f"unknown initialisation {name!r}; known: {', '.join(INITIALIZATIONS)}")
    apply, needs = INITIALIZATIONS[name]
    if missing := [need for need in needs if not getattr(sources, need)]:
        raise ValueError(f"initialisation {name!r} needs {', '.join(missing)} in its sources")
    apply(net, sources)


def he(net: nn.Module, sources: Sources) -> None:
    """Weights of convolutions and linear layers from N(0, 2 / fan_in), their biases 0 (He et al. 2015); all others,
    such as norm layers, layer scales and tables of positions, keep their values."""
    generator = torch.Generator().manual_seed(sources.seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = torch.empty_like(layer.weight, device="cpu")
            layer.weight.copy_(nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator))
            if layer.bias is not None:
                layer.bias.zero_()


def predicted_noisy(net: nn.Module, sources: Sources) -> None:
    """Predicted parameters with noise (GHN-3 appendix)."""
    _write(net, sources.prediction)
    add_noise(net, NOISE, torch.Generator().manual_seed(sources.seed))


def predicted_orthogonal(net: nn.Module, sources: Sources) -> None:
    """Predicted parameters with noise and orthogonal post-processing, both from a layer on (GHN-orth eq. 1 and 2)."""
    _write(net, sources.prediction)
    add_noise(net, sources.noise, torch.Generator().manual_seed(sources.seed), sources.orth_from)
    orthogonalize(net, sources.orth_from)


def predicted_perturbed(net: nn.Module, sources: Sources) -> None:
    """Predicted parameters with N(0, (half of the tensor's deviation)^2) added: as good if spread alone counts."""
    generator = torch.Generator().manual_seed(sources.seed)
    noise = lambda value: 0.5 * value.std(correction=0) * torch.randn(value.shape, generator=generator).to(value)
    _write(net, {name: value + noise(value) for name, value in sources.prediction.items()})


def predicted_mean(net: nn.Module, sources: Sources) -> None:
    """Mean over the ``peers`` of their predictions of the same role and shape: what can be known without the
    architecture. Tensors that no peer has keep their values."""
    found: dict[tuple, list[Tensor]] = {}
    for peer in sources.peers:
        values = sources.ghn.predict(peer)
        for key, name in _tensors(peer):
            if name in values:
                found.setdefault(key, []).append(values[name])
    means = {name: torch.stack(found[key]).mean(0) for key, name in _tensors(sources.graph) if key in found}
    _write(net, means)


def predicted_shuffled(net: nn.Module, sources: Sources) -> None:
    """Predictions for a graph that is not the network's, see ``shuffle``."""
    _write(net, sources.ghn.predict(shuffle(sources.graph, sources.seed)))


def shuffle(graph: Graph, seed: int) -> Graph:
    """The same nodes, and so names and shapes, at other places: all but input and classifier permuted, edges kept."""
    places = [i for i, node in enumerate(graph.nodes) if i and node.role not in CLASS_ROLES]
    nodes = list(graph.nodes)
    for place, origin in zip(places, np.random.default_rng(seed).permutation(places)):
        nodes[place] = graph.nodes[origin]
    return Graph(nodes, graph.edges, graph.skipped)


def _learned(net: nn.Module, sources: Sources, objective: Callable) -> None:
    batches, held_out = (part.stream(sources.batch_size, sources.seed) for part in (sources.images, sources.held_out))
    learn_scales(net, objective, islice(batches, sources.steps), next(held_out))


def _write(net: nn.Module, values: dict[str, Tensor]) -> None:
    own = dict(net.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            there = tuple(own[name].shape) if name in own else "no such parameter"
            raise DataError(f"{name} {tuple(value.shape)} does not fit the network, which has {there}.")
        own[name].copy_(value)


def _tensors(graph: Graph) -> Iterator[tuple[tuple, str]]:
    """(role, shape, whether a norm layer's bias) and name of every tensor to predict."""
    for node in graph.nodes:
        names = ((False, node.name), (True, node.norm_bias))
        yield from (((node.role, node.shape, bias), name) for bias, name in names if name)


@torch.no_grad()
def orthogonalize(net: nn.Module, orth_from: float = 0.0) -> None:
    """Replace weights by their orthogonal factor, in place (GHN-orth section 3).

    ``M = QR`` of every weight matrix M, ``M <- Q sign(diag R)``, of modules whose weight has at least two axes except
    the last, the classifier, and the first share ``orth_from`` of them (GHN-orth: 36 of 54 in ResNet-50, 93 of 113 in
    ConvNeXt-B).
    """
    for weight in _processed_weights(net, orth_from):
        matrix, transposed = _tall_matrix(weight)
        q, r = torch.linalg.qr(matrix)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        weight.copy_((q.T if transposed else q).reshape(weight.shape))


@torch.no_grad()
def add_noise(net: nn.Module, beta: float, generator: torch.Generator, orth_from: float = 0.0) -> None:
    """Break the symmetry of tiled weights, in place: ``w <- w + beta sigma N(0, 1)`` (GHN-orth eq. 2, GHN-3 appendix).

    sigma is the deviation of the correlations between rows of the weight matrix; the rows are those of the taller
    orientation. Weights of a single column have no correlation and are left alone.
    """
    for weight in _processed_weights(net, orth_from):
        sigma = correlation_deviation(weight)
        if sigma.isfinite():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(beta * float(sigma) * noise.to(weight))


def correlation_deviation(weight: Tensor) -> Tensor:
    """Standard deviation of the Pearson correlations between all rows of a weight's matrix, in its taller orientation.

    With centred rows of norm 1, the correlations R are X X^T: their sum is |sum of rows|^2, that of their squares
    |X^T X|^2, so that the (in * h * w)^2 values of R are not needed. NaN if a row is constant.
    """
    matrix = _tall_matrix(weight)[0].double()
    rows = matrix - matrix.mean(1, keepdim=True)
    rows /= rows.norm(dim=1, keepdim=True)
    count, total, squares = len(rows) ** 2, rows.sum(0).square().sum(), (rows.T @ rows).square().sum()
    return ((squares - total**2 / count) / (count - 1)).clamp_min(0).sqrt()


def _processed_weights(net: nn.Module, orth_from: float) -> list[Tensor]:
    weights = [m.weight for m in net.modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim > 1]
    return weights[round(orth_from * len(weights)) : -1]


def _tall_matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """(out, in * h * w), transposed if that has more columns than rows."""
    matrix = weight.detach().flatten(1)
    transposed = matrix.shape[0] < matrix.shape[1]
    return (matrix.T if transposed else matrix), transposed


_PREDICTED, _GHN = ("prediction",), ("ghn", "graph")
INITIALIZATIONS: dict[str, tuple[Callable[[nn.Module, Sources], None], tuple[str, ...]]] = {
    "random": (lambda net, sources: None, ()),
    "he": (he, ()),
    "orthogonal": (lambda net, sources: orthogonalize(net), ()),
    "gradinit": (partial(_learned, objective=gradinit), ("images", "held_out")),
    "nio": (partial(_learned, objective=nio), ("images", "held_out")),
    "ghn": (lambda net, sources: _write(net, sources.prediction), _PREDICTED),
    "ghn-noise": (predicted_noisy, _PREDICTED),
    "ghn-orth": (predicted_orthogonal, _PREDICTED),
    "ghn-perturbed": (predicted_perturbed, _PREDICTED),
    "ghn-mean": (predicted_mean, (*_GHN, "peers")),
    "ghn-shuffled": (predicted_shuffled, _GHN),
}
"""Name -> function that changes a network in place, fields of ``Sources`` that it needs. "random": what the
constructors of torch and torchvision make of a network."""
