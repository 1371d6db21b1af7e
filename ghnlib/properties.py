"""Properties of trained networks and their prediction from graph embeddings (PPUDA section 5.2); distances."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from warnings import catch_warnings

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn import config_context
from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from torch import Tensor, nn

from ghnlib.architectures import Architecture
from ghnlib.data import ImageSplits
from ghnlib.evaluation import accuracy, inference_flops, map_kept
from ghnlib.finetuning import EVALUATION_BATCH, Run, TrainingRecipe, initial_network, train_network
from ghnlib.graph import PRIMITIVES, Graph
from ghnlib.images import ImageSet, mix
from ghnlib.search import tau_interval

Parameters = dict[str, Tensor]
PROPERTIES = ("accuracy", "noisy accuracy", "FLOPs", "seconds", "convergence")


@dataclass(frozen=True)
class NoisyImages:
    """Images with Gaussian noise, the same at each pass: ``noise`` is its deviation for pixels in 0..1, clipped there
    (PPUDA: 0.08 on CIFAR-10, 0.18 on ImageNet)."""

    images: ImageSet
    noise: float
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``ImageSet.batches``, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.images.mean, self.images.std))
        for x, y in self.images.batches(batch_size):
            noisy = x * std + mean + self.noise * torch.randn(x.shape, generator=generator)
            yield (noisy.clamp(0, 1) - mean) / std, y


def train_and_measure(
    architectures: Sequence[Architecture],
    images: ImageSplits,
    recipe: TrainingRecipe,
    analysis: Mapping,
    seed: int,
    folder: str | Path,
    processes: int,
) -> tuple[pd.DataFrame, list[Parameters], list[Parameters]]:
    """Train each architecture from random initialisation and measure it, in parallel processes: on validation images
    where nothing else is said.

    Args:
        folder: where finished networks are kept, see ``map_kept``.
        analysis: ``checkpoints`` (steps at which accuracy is measured too), ``noise``, ``converged`` (percent),
            ``seconds`` (whether inference is timed too) and ``networks``, how many networks' parameters are wanted.

    Returns:
        One row a network: ``index``, ``accuracy`` and ``noisy accuracy`` (percent, not a number if the loss was not
        finite), ``test accuracy`` (of test images), "accuracy, N steps" of each checkpoint, ``FLOPs`` of one image,
        ``convergence`` (see ``steps_to``), ``parameters`` and, if wanted, ``seconds`` (see ``inference_seconds``). Then
        the first networks' parameters before and after training.
    """
    settings = {key: analysis[key] for key in ("checkpoints", "noise", "converged", "seconds")}
    kept = analysis["networks"]
    tasks = [(a, mix(seed, i), i < kept) for i, a in enumerate(architectures)]
    rows, before, after = zip(*map_kept(_measure, tasks, (recipe, settings, images), processes, folder))
    return pd.DataFrame(rows).rename_axis("index").reset_index(), list(before[:kept]), list(after[:kept])


def _measure(
    network: Architecture, seed: int, keep: bool, recipe: TrainingRecipe, settings: dict, images: ImageSplits
) -> tuple[dict[str, float], Parameters, Parameters]:
    net = initial_network(Run(network, recipe, seed))
    before = {name: p.detach().clone() for name, p in net.named_parameters() if keep}
    score = lambda net: accuracy(net, images.val, EVALUATION_BATCH)
    curve = train_network(net, images.train, recipe, seed, score, settings["checkpoints"])
    final = curve.pop(recipe.steps)
    row = {
        "accuracy": final,
        "noisy accuracy": accuracy(net, NoisyImages(images.val, settings["noise"], seed), EVALUATION_BATCH),
        "test accuracy": accuracy(net, images.test, EVALUATION_BATCH),
        "FLOPs": inference_flops(network),
        "convergence": steps_to({0: 100 / len(images.classes), **curve, recipe.steps: final}, settings["converged"]),
        "parameters": network.num_params,
        **{f"accuracy, {step} steps": value for step, value in curve.items()},
    }
    if settings["seconds"]:
        row["seconds"] = inference_seconds(net, next(images.val.batches(EVALUATION_BATCH))[0])
    return row, before, {name: p.detach() for name, p in net.named_parameters() if keep}


@torch.no_grad()
def inference_seconds(net: nn.Module, images: Tensor) -> float:
    """Median time of five forward passes of a network with a batch (b, 3, s, s), after one to warm up; other processes
    that share the machine lengthen it."""
    return float(np.median(timeit.repeat(lambda: net(images), number=1, repeat=6)[1:]))


def steps_to(curve: Mapping[int, float], target: float) -> float:
    """Steps after which accuracy first reaches ``target``, linear between the points of the curve (step -> accuracy).

    The last step where it never does: PPUDA caps its iterations to 95 % training accuracy too.
    """
    steps, values = zip(*sorted(curve.items()))
    return float(np.interp(target, np.maximum.accumulate(np.nan_to_num(values)), steps))


def regression(grid: Mapping[str, Sequence]) -> TransformedTargetRegressor:
    """An SVR of a property on graph embeddings, both scaled by the networks that it learns from (PPUDA section 5.2).

    Args:
        grid: values of SVR's ``C``, ``gamma`` and ``epsilon``; cross-validation on those networks chooses among them.
    """
    svr = make_pipeline(StandardScaler(), SVR())
    search = GridSearchCV(svr, {f"svr__{name}": list(values) for name, values in grid.items()}, cv=3)
    return TransformedTargetRegressor(search, transformer=StandardScaler(), check_inverse=False)


def predict_property(features: np.ndarray, target: np.ndarray, grid: Mapping[str, Sequence]) -> dict[str, float]:
    """Kendall's tau between a property and its cross-validated prediction by ``regression`` (PPUDA Fig. 4).

    Args:
        features: (networks, d); target: (networks,). grid: see ``regression``.

    Returns:
        ``n`` networks, ``tau`` (mean over five divisions into folds), its ``deviation`` over them and 95 % interval
        over networks.
    """
    model, x, y = regression(grid), features.astype(float), target.astype(float)
    with config_context(assume_finite=True, skip_parameter_validation=True):  # the checks take half of the time
        predict = lambda train, held_out: model.fit(x[train], y[train]).predict(x[held_out])
        return _cross_validated(predict, target, range(5))


class NeuralPredictor(nn.Module):
    """Graph convolutions on primitives and edges alone (Wen et al. 2020; the baseline of PPUDA Fig. 4): each layer
    is half the sum of the ReLUs of what comes along the edges and against them; then the mean over nodes and two linear
    layers. ``forward``: what ``_joined`` returns -> (networks,)."""

    def __init__(self, hidden: int = 64, layers: int = 3):
        super().__init__()
        widths = list(pairwise([len(PRIMITIVES), *[hidden] * layers]))
        self.forwards, self.backwards = (nn.ModuleList(nn.Linear(a, b) for a, b in widths) for _ in range(2))
        # means over nodes hardly differ between graphs, by less than the usual eps
        self.norm = nn.BatchNorm1d(hidden, eps=1e-12, momentum=None)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, joined: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        along, against, pooling, nodes = joined
        for forward, backward in zip(self.forwards, self.backwards):
            nodes = (F.relu(forward(along @ nodes)) + F.relu(backward(against @ nodes))) / 2
        return self.head(self.norm(pooling @ nodes)).squeeze(1)


def _joined(graphs: Sequence[Graph]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n nodes of graphs side by side: means along and against edges (n, n) and over each graph (graphs, n), one-hot
    primitives (n, primitives)."""
    sizes = np.array([len(graph) for graph in graphs])
    owner, total = np.repeat(np.arange(len(graphs)), sizes), np.arange(sizes.sum())
    edges = np.concatenate([graph.edges + start for graph, start in zip(graphs, np.cumsum(sizes) - sizes)])
    sources, targets = np.concatenate([edges, np.stack([total, total], 1)]).T  # each node hears itself too
    ops = torch.tensor([PRIMITIVES.index(node.op) for graph in graphs for node in graph.nodes])
    primitives = F.one_hot(ops, len(PRIMITIVES)).float()
    return _averages(targets, sources), _averages(sources, targets), _averages(owner, total), primitives


def _averages(rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Sparse matrix with the mean over the columns that each row is listed with."""
    values = torch.from_numpy(1 / np.bincount(rows)[rows]).float()
    averages = torch.sparse_coo_tensor(np.stack([rows, columns]), values, check_invariants=True)
    with catch_warnings(action="ignore", category=UserWarning):  # CSR, twice as fast, is called beta
        return averages.to_sparse_csr()


def predict_from_graphs(graphs: Sequence[Graph], target: np.ndarray) -> dict[str, float]:
    """``predict_property`` by a ``NeuralPredictor`` and one division into folds; it is trained anew for each fold."""

    def predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(target[train, None])
        parts = np.array_split(np.random.default_rng(0).permutation(train), -(-len(train) // 10))
        batches = [(_joined([graphs[i] for i in part]), scaler.transform(target[part, None])[:, 0]) for part in parts]
        net = _trained_predictor([(joined, torch.from_numpy(y).float()) for joined, y in batches])
        with torch.no_grad():
            predicted = net(_joined([graphs[i] for i in held_out]))[:, None].numpy()
        return scaler.inverse_transform(predicted)[:, 0]

    return _cross_validated(predict, target, [0])


def _trained_predictor(batches: Sequence[tuple[tuple, Tensor]]) -> NeuralPredictor:
    """``batches``: graphs as of ``_joined`` and their standardised property (graphs,); each step learns from one."""
    steps = 25 * len(batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NeuralPredictor()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for joined, goal in islice(cycle(batches), steps):
        optimizer.zero_grad()
        F.mse_loss(net(joined), goal).backward()
        optimizer.step()
        schedule.step()
    net.norm.reset_running_stats()
    with torch.no_grad():
        for joined, _ in batches:
            net(joined)
    return net.eval()


def _cross_validated(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray], target: np.ndarray, seeds: Sequence[int]
) -> dict[str, float]:
    """What ``predict_property`` returns. ``predict``: indices to learn from, indices to predict -> predictions."""
    predicted, taus = np.empty(len(target)), []
    for seed in seeds:
        for train, held_out in KFold(5, shuffle=True, random_state=seed).split(predicted):
            predicted[held_out] = predict(train, held_out)
        taus.append(stats.kendalltau(predicted, target).statistic)
    low, high = tau_interval(np.mean(taus), len(target))
    return {"n": len(target), "tau": float(np.mean(taus)), "deviation": float(np.std(taus)), "low": low, "high": high}


def without_skips(net: nn.Module) -> nn.Module:
    """A ResNet of torchvision whose bottlenecks become chains of their own layers, in place (PPUDA Table 10)."""
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for i, b in enumerate(list(stage)):
            stage[i] = nn.Sequential(b.conv1, b.bn1, b.relu, b.conv2, b.bn2, b.relu, b.conv3, b.bn3, b.relu)
    return net


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` of two samples (n, d) of embeddings (PPUDA Table 11).

    Not a number for fewer than two networks; for few it is biased upwards, alike for samples of one size.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the trace of the root is the sum of the roots of eigenvalues, also where few networks make the product singular
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum())
