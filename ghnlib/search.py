"""Ranking architectures without training them: zero-cost proxies, and how well a ranking agrees with accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from scipy import stats
from torch import Tensor, nn

from ghnlib.architectures import Architecture
from ghnlib.finetuning import Run, TrainingRecipe, initial_network
from ghnlib.images import ImageSet, mix


def grad_norm(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over weight tensors of the norm of the loss's gradient."""
    return sum(float(g.norm()) for _, g in _gradients(net, F.cross_entropy(net(images), labels)))


def snip(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of |w * dL/dw|."""
    return sum(float((w * g).abs().sum()) for w, g in _gradients(net, F.cross_entropy(net(images), labels)))


def plain(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of w * dL/dw."""
    return sum(float((w * g).sum()) for w, g in _gradients(net, F.cross_entropy(net(images), labels)))


def fisher(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over convolutions' output channels of half the mean over images of (sum over positions of a * dL/da)^2."""
    outputs: list[Tensor] = []
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda module, args, out: outputs.append(out)) for module in convolutions]
    try:
        loss = F.cross_entropy(net(images), labels)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(loss, outputs)
    return sum(float((a.detach() * g).sum((2, 3)).square().mean(0).sum()) / 2 for a, g in zip(outputs, gradients))


def jacob_cov(net: nn.Module, images: Tensor, labels: Tensor, k: float = 1e-5) -> float:
    """- sum(log(v + k) + 1 / (v + k)) over the eigenvalues v of the correlations between images' input gradients.

    Not a number where two images have no gradient or the same one.
    """
    images = images.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(net(images).sum(), images)
    correlations = jacobian.flatten(1).double().corrcoef()
    if not correlations.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(correlations)
    return -float((torch.log(values + k) + 1 / (values + k)).sum())


def synflow_bn(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of w * dR/dw with all parameters replaced by their absolute values and R the sum of outputs for an input of
    ones, in double precision."""
    with _absolute_doubles(net):
        total = net(torch.ones_like(images[:1], dtype=torch.float64)).sum()
        return sum(float((w * g).sum()) for w, g in _gradients(net, total))


def synflow(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """``synflow_bn`` with batch norm passed by."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(lambda module, args, out: args[0]) for module in norms]
    try:
        return synflow_bn(net, images, labels)
    finally:
        for hook in hooks:
            hook.remove()


PROXIES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    proxy.__name__: proxy for proxy in (grad_norm, snip, fisher, jacob_cov, plain, synflow, synflow_bn)
}
"""Zero-cost proxies of GHN-3 Table 13: a score of a network with random parameters from one batch, images (b, 3, s, s)
and labels (b,); the higher, the better."""


def zero_cost_scores(
    architectures: Sequence[Architecture], images: ImageSet, batch_size: int, seed: int, processes: int = 1
) -> pd.DataFrame:
    """Each proxy of each architecture at random initialisation, on its first training batch: one row a network.

    Initialisation and batch are those that a ``Run`` with seed ``mix(seed, index)`` begins with.
    """
    tasks = (delayed(_zero_cost)(a, images, batch_size, mix(seed, i)) for i, a in enumerate(architectures))
    return pd.DataFrame(Parallel(processes)(tasks))


def _zero_cost(architecture: Architecture, images: ImageSet, batch_size: int, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    net = initial_network(Run(architecture, TrainingRecipe(0, 1.0), seed))
    x, y = next(images.stream(batch_size, seed))
    return {name: proxy(net, x, y) for name, proxy in PROXIES.items()}


def rank_correlations(scores: pd.DataFrame, accuracy: Sequence[float], top: int | None = None) -> pd.DataFrame:
    """Agreement of scores with accuracies after training (GHN-3 Table 13, GHN 2018 Table 3).

    Args:
        scores: one row an architecture, one column a method; missing values are left out.
        accuracy: of the same architectures, trained.
        top: only among so many architectures with the highest accuracy.

    Returns:
        One row a method: ``n``, Kendall's ``tau`` with the bounds of its interval, ``low`` and ``high``, and Pearson's
        ``r``; not a number for fewer than 3 architectures, the bounds for fewer than 5.
    """
    table = scores.assign(accuracy=list(accuracy))
    if top is not None:
        table = table.nlargest(top, "accuracy")
    rows = {}
    for method in scores.columns:
        pairs = table[[method, "accuracy"]].dropna()
        enough = len(pairs) > 2
        tau = stats.kendalltau(*pairs.to_numpy().T).statistic if enough else float("nan")
        r = stats.pearsonr(*pairs.to_numpy().T).statistic if enough else float("nan")
        low, high = tau_interval(tau, len(pairs))
        rows[method] = {"n": len(pairs), "tau": float(tau), "low": low, "high": high, "r": float(r)}
    return pd.DataFrame(rows).T.astype({"n": int})


def tau_interval(tau: float, n: int) -> tuple[float, float]:
    """95 % interval of Kendall's tau over n observations, by the variance 0.437 / (n - 4) of atanh(tau) (Fieller,
    Hartley and Pearson 1957); not a number for n < 5."""
    if n < 5:
        return float("nan"), float("nan")
    centre, half = np.arctanh(np.clip(tau, -0.999, 0.999)), 1.96 * (0.437 / (n - 4)) ** 0.5
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def top_against_random(
    score: Sequence[float], accuracy: Sequence[float], k: int, seed: int, draws: int = 10_000
) -> dict[str, float]:
    """Random search with a surrogate: trained accuracy of the k highest scores against k architectures at random.

    Returns:
        ``n``: k; ``top``, mean accuracy of the k best by score; ``random``, of all; ``lead`` of the top, with bounds
        ``low`` and ``high``: what remains of it against 95 % of random choices of k (GHN 2018 Table 1).
    """
    accuracy = np.asarray(accuracy, dtype=float)
    top = accuracy[np.argsort(np.asarray(score), kind="stable")[::-1][:k]].mean()
    rng = np.random.default_rng(seed)
    drawn = accuracy[rng.permuted(np.tile(np.arange(len(accuracy)), (draws, 1)), axis=1)[:, :k]].mean(1)
    low, high = top - np.quantile(drawn, (0.975, 0.025))
    mean = accuracy.mean()
    return {"n": k, "top": top, "random": mean, "lead": top - mean, "low": float(low), "high": float(high)}


def _gradients(net: nn.Module, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of convolutions and linear layers that a value depends on, with their gradients."""
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return ((w.detach(), g) for w, g in zip(weights, gradients) if g is not None)


@contextmanager
def _absolute_doubles(net: nn.Module) -> Iterator[None]:
    """Within, parameters and buffers are absolute values in double precision."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dtype = next(net.parameters()).dtype
    try:
        net.double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.abs_()
        yield
    finally:
        net.to(dtype).load_state_dict(before)
