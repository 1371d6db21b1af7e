"""Properties of trained networks and their prediction from graph embeddings (PPUDA section 5.2)."""

import timeit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import NamedTuple, Self
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

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import ImageSet, mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.splits import SPLITS
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.splits import graph_statistics
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import PRIMITIVES
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.measuring.costs import inference_flops
from ghnlib.measuring.kept import map_kept
from ghnlib.params import Regression
from ghnlib.reporting.statistics import Measured, claims_over_trainings, finite, tau_of, with_deviation
from ghnlib.training.networks import EVALUATION_BATCH, Run, TrainingRecipe, initial_network, on_cpu, train_network

Parameters = dict[str, Tensor]
PROPERTIES = ("accuracy", "noisy accuracy", "FLOPs", "seconds", "convergence")
SEEDS = range(5)
"""Of the five runs of a regression (PPUDA appendix C.2)."""
LEARNT = 20
"""Training images of each class that training accuracy is measured on."""
EMBEDDED_TOGETHER = 4
"""Graphs: a gated GNN then does several in the steps of one, and no large matrix of distances."""


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
        device = self.images.device
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.images.mean, self.images.std))
        for x, y in self.images.batches(batch_size):
            noisy = x * std + mean + self.noise * torch.randn(x.shape, generator=generator).to(device)
            yield (noisy.clamp(0, 1) - mean) / std, y


class Trained(NamedTuple):
    """Architectures trained from random initialisation. ``table``: see ``train_and_measure``; ``before``, ``after``:
    the first networks' parameters before and after training; ``recipe``: of the training."""

    architectures: Sequence[Architecture]
    table: pd.DataFrame
    before: list[Parameters]
    after: list[Parameters]
    recipe: TrainingRecipe

    @property
    def sound(self) -> pd.Series:
        """Which networks have an accuracy: their loss stayed finite."""
        return self.table["accuracy"].notna()

    @property
    def measured(self) -> list[str]:
        """The properties that were measured."""
        return [key for key in PROPERTIES if key in self.table]

    @property
    def properties(self) -> list[str]:
        """Those that differ between networks; accuracy always."""
        differ = self.table[self.sound].nunique() > 1
        return [key for key in self.measured if key == "accuracy" or differ[key]]

    @property
    def graphs(self) -> list[Graph]:
        """Of the architectures."""
        return [architecture.graph for architecture in self.architectures]


def property_networks(setup: Setup) -> list[Architecture]:
    """The architectures of the ground truth: half of val, half of test, of each split those with batch norm first."""
    count = setup.analysis.property_networks
    found = []
    for name, size in {"val": count // 2, "test": count - count // 2}.items():
        split = setup.split(name, max(size, SPLITS[name].size))
        found += sorted(split, key=lambda architecture: architecture.norm is None)[:size]
    return found


def of_test(setup: Setup, trained: Trained) -> pd.Series:
    """Which sound networks regressions are tested on: those of test, they learn from those of val."""
    return trained.sound & (trained.table.index >= setup.analysis.property_networks // 2)


def train_and_measure(
    setup: Setup, architectures: Sequence[Architecture], images: ImageSplits | None = None, kept: int | None = None
) -> Trained:
    """Train each architecture from random initialisation and measure it, in parallel processes: on validation images,
    of the setup or others, where nothing else is said (the section ``analysis`` of params.yaml). ``kept``: how many
    networks' parameters are wanted; None: ``analysis.networks``.

    In ``table`` one row a network: ``index``, ``accuracy`` and ``noisy accuracy`` (percent, top-1 or as
    ``analysis.score`` says; NaN if the loss was not finite), ``test accuracy`` (of test images), "accuracy, N steps" of
    each checkpoint, ``FLOPs`` of one image, ``convergence`` (see ``steps_to``; of accuracy on ``LEARNT`` training
    images of each class), ``parameters``, ``path`` (mean shortest path of its graph) and, if wanted, ``seconds`` (see
    ``inference_seconds``).
    """
    analysis = setup.analysis
    kept = analysis.networks if kept is None else kept
    recipe = setup.recipe(analysis.sgd, analysis.property_steps)
    tasks = [(Run(a, recipe, mix(setup.seed, i)), i < kept) for i, a in enumerate(architectures)]
    settings = analysis.checkpoints, analysis.score, analysis.noise, analysis.converged, analysis.seconds
    common = (settings, images or setup.images)
    rows, before, after = zip(*map_kept(_measure, tasks, common, **setup.kept))
    table = pd.DataFrame(rows).rename_axis("index").reset_index()
    return Trained(architectures, table, list(before[:kept]), list(after[:kept]), recipe)


def _measure(
    run: Run, keep: bool, settings: tuple[Sequence[int], str, float, float, bool], images: ImageSplits
) -> tuple[dict[str, float], Parameters, Parameters]:
    (checkpoints, name, noise, converged, seconds), net = settings, initial_network(run, images.train.device)
    before = on_cpu(net.named_parameters()) if keep else {}
    steps, classes = run.recipe.steps, len(images.classes)
    fewest = int(images.train.labels.bincount(minlength=classes).min())
    learnt = images.train.few_shot(min(LEARNT, fewest), run.seed)

    def score(net: nn.Module, *parts: ImageSet | NoisyImages) -> list[float]:
        return [top_accuracies(net, part, EVALUATION_BATCH)[name] for part in parts]

    between = [steps // 5, steps // 2]
    on_both = lambda net: score(net, images.val, learnt)
    found = train_network(net, images.train, run.recipe, run.seed, on_both, [*checkpoints, *between])
    curve = {step: (np.nan, np.nan) if values is None else values for step, values in found.items()}
    noisy, test = score(net, NoisyImages(images.val, noise, run.seed), images.test)
    by_chance = min(100.0, 100 * (5 if name == "top5" else 1) / classes)
    row = {
        "accuracy": curve[steps][0],
        "noisy accuracy": noisy,
        "test accuracy": test,
        "FLOPs": inference_flops(run.architecture),
        "convergence": steps_to({0: by_chance} | {step: values[1] for step, values in curve.items()}, converged),
        "parameters": run.architecture.num_params,
        "path": graph_statistics(run.architecture.graph)["path"],
        **{f"accuracy, {step} steps": curve[step][0] for step in checkpoints if step < steps},
    }
    if seconds:
        row["seconds"] = inference_seconds(net, next(images.val.batches(EVALUATION_BATCH))[0])
    return row, before, on_cpu(net.named_parameters()) if keep else {}


@torch.no_grad()
def inference_seconds(net: nn.Module, images: Tensor) -> float:
    """Median time of five forward passes of a network with a batch (b, 3, s, s), after one to warm up; other processes
    that share the machine lengthen it."""
    forward = lambda: net(images).cpu()  # a GPU is done when its answer is here
    return float(np.median(timeit.repeat(forward, number=1, repeat=6)[1:]))


def steps_to(curve: Mapping[int, float], target: float) -> float:
    """Steps after which accuracy first reaches ``target``, linear between the points of the curve (step -> accuracy).

    The last step where it never does: PPUDA caps its iterations to 95 % training accuracy too. At step 0, chance.
    """
    steps, values = zip(*sorted(curve.items()))
    return float(np.interp(target, np.maximum.accumulate(np.nan_to_num(values)), steps))


@torch.no_grad()
def embed(ghn: GHN, graphs: Sequence[Graph]) -> np.ndarray:
    """(networks, d): see ``GHN.embed``."""
    parts = (graphs[i : i + EMBEDDED_TOGETHER] for i in range(0, len(graphs), EMBEDDED_TOGETHER))
    return np.concatenate([ghn.embed(part).cpu().numpy() for part in parts])


def regression(grid: Regression, seed: int = 0) -> TransformedTargetRegressor:
    """An SVR of a property on graph embeddings, both scaled by the networks that it learns from (PPUDA section 5.2).
    ``grid``: values of its ``C``, ``gamma`` and ``epsilon``; 5-fold cross-validation on those networks chooses, with
    folds by ``seed``."""
    svr, values = make_pipeline(StandardScaler(), SVR()), grid.model_dump()
    folds = KFold(5, shuffle=True, random_state=seed)
    options = {f"svr__{name}": list(chosen) for name, chosen in values.items()}
    search = GridSearchCV(svr, options, cv=folds, scoring="neg_mean_squared_error")
    return TransformedTargetRegressor(search, transformer=StandardScaler(), check_inverse=False)


class Predicted(NamedTuple):
    """Agreement of a property with its predictions on networks of the test. ``tau``: Kendall's, mean over ``SEEDS`` (a
    constant prediction counts as 0), its interval over networks; ``deviation``: of tau over seeds."""

    tau: Measured
    deviation: float

    @classmethod
    def of(cls, predicted: Sequence[np.ndarray], target: np.ndarray) -> Self:
        """``predicted``: (networks,) by each seed; ``target``: the property (networks,)."""
        taus = np.nan_to_num([stats.kendalltau(each, target).statistic for each in predicted])
        return cls(tau_of(taus.mean(), len(target)), float(taus.std()))

    @property
    def metrics(self) -> dict[str, float]:
        """In one mapping."""
        tau = self.tau
        return {"n": tau.n, "tau": tau.value, "deviation": self.deviation, "low": tau.low, "high": tau.high}


Predictions = Mapping[str, Mapping[str, Predicted]]
"""By what a property is predicted from (a hypernetwork's embeddings, "FLOPs") and by property."""


def predict_property(features: np.ndarray, target: np.ndarray, fitted: np.ndarray, grid: Regression) -> Predicted:
    """A property (networks,) predicted by ``regression`` from features (networks, d), learnt from the networks that are
    ``fitted`` (networks,), tested on the others (PPUDA Fig. 4)."""
    x, y = features.astype(float), target.astype(float)
    with config_context(assume_finite=True, skip_parameter_validation=True):  # the checks take half of the time
        predicted = [regression(grid, seed).fit(x[fitted], y[fitted]).predict(x[~fitted]) for seed in SEEDS]
    return Predicted.of(predicted, y[~fitted])


PREDICTOR = "Neural Predictor"


def predict_properties(
    setup: Setup, trained: Trained, embedded: Sequence[Mapping[str, np.ndarray]]
) -> list[Predictions]:
    """How well each property is predicted, for each training of the hypernetworks: from embeddings (networks, d) by
    hypernetwork; and, the same in each, from random ones, from the logarithms of parameters and FLOPs, and by
    ``NeuralPredictor``. Learnt from networks of val, tested on those of test."""
    table, sound, keys = trained.table, trained.sound.to_numpy(), trained.properties
    fitted = ~of_test(setup, trained).to_numpy()[sound]
    logs = np.log10(table[["parameters", "FLOPs"]].to_numpy())
    targets = table[keys].assign(FLOPs=logs[:, 1])[sound]
    graphs = [graph for graph, is_sound in zip(trained.graphs, sound) if is_sound]

    def by_features(inputs: Mapping[str, np.ndarray]) -> dict[str, dict[str, Predicted]]:
        return {name: {key: predict_property(features[sound], targets[key].to_numpy(), fitted, setup.analysis.svr)
                       for key in keys} for name, features in inputs.items()}  # fmt: skip

    noise = np.random.default_rng(setup.seed).normal(size=(len(table), 32))
    shared = by_features({"random embedding": noise, "parameters": logs[:, :1], "FLOPs": logs[:, 1:]})
    shared[PREDICTOR] = {key: predict_from_graphs(graphs, targets[key].to_numpy(), fitted) for key in keys}
    return [by_features(states) | shared for states in embedded]


def table_of_properties(found: Sequence[Predictions], hypernetworks: Sequence[str]) -> pd.DataFrame:
    """Taus, a row a kind of features: of hypernetworks mean ± deviation over their trainings, of others over seeds."""
    rows = {}
    for name, row in found[0].items():
        if name in hypernetworks:
            rows[name] = {key: with_deviation([each[name][key].tau.value for each in found], 2) for key in row}
        else:
            rows[name] = {key: f"{tau.value:.2f} ± {deviation:.2f}" for key, (tau, deviation) in row.items()}
    return pd.DataFrame(rows).T


class SweetSpot(NamedTuple):
    """A parabola through errors by mean shortest path. ``coefficients``: of the squared, the plain and the zeroth power
    of the path; ``curvature``: points a squared deviation of the path, above 0 if the error is least in between."""

    coefficients: np.ndarray
    curvature: Measured

    @property
    def lowest(self) -> float:
        """The path at the parabola's vertex."""
        return float(-self.coefficients[1] / (2 * self.coefficients[0]))


def sweet_spot(path: pd.Series, error: pd.Series) -> SweetSpot | None:
    """Least squares of trained networks' error (percent) on their mean shortest path (PPUDA Fig. 6 f, g), with
    Student's t interval; None for fewer than 5 networks or 3 different paths."""
    rows = pd.DataFrame({"path": path, "error": error}).dropna()
    if rows["path"].nunique() < 3 or len(rows) < 5:
        return None
    coefficients, covariance = np.polyfit(rows["path"], rows["error"], 2, cov=True)
    value, half = coefficients[0], stats.t.ppf(0.975, len(rows) - 3) * covariance[0, 0] ** 0.5
    scaled = rows["path"].var(ddof=0) * np.array([value, value - half, value + half])
    return SweetSpot(coefficients, Measured(*map(float, scaled), len(rows)))


def claims_of_properties(found: Sequence[Predictions], trained: Trained) -> dict[str, Measured]:
    """Of PPUDA section 5.2 and Figs. 4, 6 f and 11. ``found``: of each training, see ``predict_properties``."""
    rows = trained.table[trained.sound]
    spot = sweet_spot(rows["path"], 100 - rows["test accuracy"])
    noisy = tau_of(rows["accuracy"].corr(rows["noisy accuracy"], "kendall"), len(rows))
    single = {"clean-and-noisy": Measured(0.0, 0.0, 0.0).minus(noisy)}
    single |= {"error-and-path": spot.curvature} if spot else {}
    return finite(claims_over_trainings([_property_claims(each) for each in found]) | single)


def _property_claims(found: Predictions) -> dict[str, Measured]:
    if "ghn2" not in found:
        return {}
    of_ghn2, of_predictor = (found[name]["accuracy"].tau for name in ("ghn2", PREDICTOR))
    return {"property-accuracy": of_ghn2, "property-over-neural-predictor": of_ghn2.minus(of_predictor)}


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


def predict_from_graphs(graphs: Sequence[Graph], target: np.ndarray, fitted: np.ndarray) -> Predicted:
    """``predict_property`` by a ``NeuralPredictor``, trained anew with each seed."""
    train, tested = np.flatnonzero(fitted), np.flatnonzero(~fitted)
    scaler, unseen = StandardScaler().fit(target[train, None]), _joined([graphs[i] for i in tested])
    parts = np.array_split(np.random.default_rng(0).permutation(train), -(-len(train) // 10))
    scaled = torch.from_numpy(scaler.transform(target[:, None])[:, 0]).float()
    batches = [(_joined([graphs[i] for i in part]), scaled[part]) for part in parts]
    predicted = []
    for seed in SEEDS:
        net = _trained_predictor(batches, seed)
        with torch.no_grad():
            predicted.append(net(unseen).numpy())
    return Predicted.of(predicted, target[tested])


def _trained_predictor(batches: Sequence[tuple[tuple, Tensor]], seed: int) -> NeuralPredictor:
    """``batches``: graphs as of ``_joined`` and their standardised property (graphs,); each step learns from one."""
    steps = 25 * len(batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
