"""Ranking architectures without training them: zero-cost proxies, and how well a ranking agrees with accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from ghnlib.architectures import Architecture
from ghnlib.evaluation import accuracy, map_kept
from ghnlib.finetuning import Run, TrainingRecipe, initial_network
from ghnlib.images import Augment, ImageSet, mix


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
    keep = lambda module, args, out: outputs.append(out) if isinstance(module, nn.Conv2d) else None
    with register_module_forward_hook(keep):
        loss = F.cross_entropy(net(images), labels)
    gradients = torch.autograd.grad(loss, outputs)
    return sum(float((a.detach() * g).sum((2, 3)).square().mean(0).sum()) / 2 for a, g in zip(outputs, gradients))


def jacob_cov(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """- sum(log(v) + 1 / v) over v = 1e-5 + the eigenvalues of the correlations between images' input gradients.

    Not a number where two images have no gradient or the same one.
    """
    images = images.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(net(images).sum(), images)
    correlations = jacobian.flatten(1).double().corrcoef()
    if not correlations.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(correlations) + 1e-5
    return -float((torch.log(values) + 1 / values).sum())


def synflow_bn(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of w * dR/dw with all parameters replaced by their absolute values and R the sum of outputs for an input of
    ones, in double precision."""
    with _absolute_doubles(net):
        total = net(torch.ones_like(images[:1], dtype=torch.float64)).sum()
        return sum(float((w * g).sum()) for w, g in _gradients(net, total))


def synflow(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """``synflow_bn`` with batch norm passed by."""
    pass_by = lambda module, args, out: args[0] if isinstance(module, nn.BatchNorm2d) else None
    with register_module_forward_hook(pass_by):
        return synflow_bn(net, images, labels)


PROXIES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    proxy.__name__: proxy for proxy in (grad_norm, snip, fisher, jacob_cov, plain, synflow, synflow_bn)
}
"""Zero-cost proxies of GHN-3 Table 13: a score of a network with random parameters from one batch, images (b, 3, s, s)
and labels (b,); the higher, the better."""


def zero_cost_scores(
    architectures: Sequence[Architecture], images: ImageSet, batch_size: int, seed: int, processes: int = 1,
    folder: str | Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Each proxy of each architecture at random initialisation, on its first training batch: one row a network.

    Initialisation and batch are those that a ``Run`` with seed ``mix(seed, index)`` begins with. ``folder``: see
    ``map_kept``.
    """
    tasks = [(a, mix(seed, i)) for i, a in enumerate(architectures)]
    return pd.DataFrame(map_kept(_zero_cost, tasks, (images, batch_size), processes, folder))


def _zero_cost(architecture: Architecture, seed: int, images: ImageSet, batch_size: int) -> dict[str, float]:
    net = initial_network(Run(architecture, TrainingRecipe(0, 1.0), seed))
    x, y = next(images.stream(batch_size, seed))
    return {name: proxy(net, x, y) for name, proxy in PROXIES.items()}


def train_one_shot(
    architectures: Sequence[Architecture], images: ImageSet, steps: int, batch_size: int, lr: float, seed: int,
    augment: Augment | None = None,
) -> dict[tuple[str, torch.Size], Tensor]:  # fmt: skip
    """Parameters that all architectures share (the one-shot model of GHN 2018 Table 3; Bender et al. 2018).

    A parameter belongs to its name and shape. Each step of SGD (momentum, cosine schedule) trains those of one
    architecture drawn at random.
    """
    torch.manual_seed(seed)
    chosen = np.random.default_rng(seed).integers(len(architectures), size=steps)
    shared: dict[tuple[str, torch.Size], nn.Parameter] = {}
    networks: dict[int, nn.Module] = {}
    for index in np.unique(chosen):
        networks[index] = net = architectures[index].build(device="cpu").train()
        for name, parameter in net.named_parameters():
            shared.setdefault((name, parameter.shape), parameter)
        net.to("meta")  # of its parameters only those that are shared stay
    optimizer = torch.optim.SGD(shared.values(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for index, (x, y) in zip(chosen, images.stream(batch_size, seed, augment=augment)):
        net = networks[index]
        own = {name: shared[name, parameter.shape] for name, parameter in net.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(functional_call(net, own, (x,)), y).backward()
        norm = nn.utils.clip_grad_norm_(own.values(), 5.0)
        if norm.isfinite():  # one architecture that overflows must not spoil what the others share
            optimizer.step()
        schedule.step()
    return {key: parameter.detach() for key, parameter in shared.items()}


def one_shot_scores(
    shared: Mapping[tuple[str, torch.Size], Tensor], architectures: Sequence[Architecture], images: ImageSet, seed: int
) -> pd.DataFrame:
    """One row a network: ``accuracy`` (percent) with the shared parameters, batch norm with statistics of the batch;
    ``shared``, the share of its parameter values that they provide (the others are random)."""
    rows = []
    for i, architecture in enumerate(architectures):
        torch.manual_seed(mix(seed, i))
        net = architecture.build(device="cpu")
        own = {name: shared[name, p.shape] for name, p in net.named_parameters() if (name, p.shape) in shared}
        known = sum(p.numel() for p in own.values()) / architecture.num_params
        rows.append({"accuracy": accuracy(net, images, parameters=own), "shared": known})
    return pd.DataFrame(rows)


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


def search_costs(
    training: pd.DataFrame, image: float, analysis: Mapping, batch_size: int, validation: int
) -> pd.DataFrame:
    """What ranking architectures takes (GHN Table 3, in hours there).

    Args:
        training: of the hypernetworks, as of ``training_costs``.
        image: FLOPs of a forward pass with one image, of the average architecture.
        analysis: ``checkpoints``, ``one_shot_steps`` and ``images`` of a proxy's batch.
        batch_size: images of a training step.
        validation: images that accuracy is measured on.

    Returns:
        One row a method. Before the ranking: ``steps``, training steps of networks, and ``TFLOPs``; for each
        architecture ranked: ``steps each`` and ``GFLOPs each``, accuracy included (prediction is not counted).
    """
    step, score = 3 * image * batch_size, image * validation
    rows = {name: (row["steps"] * row["meta_batch"], row["flops"], 0, score) for name, row in training.iterrows()}
    rows |= {f"SGD, {steps} steps": (0, 0, steps, steps * step + score) for steps in analysis["checkpoints"]}
    rows["one-shot"] = analysis["one_shot_steps"], analysis["one_shot_steps"] * step, 0, score
    for proxy in PROXIES:  # synaptic flow needs one image
        rows[proxy] = 0, 0, 1, 3 * image * (1 if proxy.startswith("synflow") else analysis["images"])
    table = pd.DataFrame(rows, index=["steps", "TFLOPs", "steps each", "GFLOPs each"]).T.astype(float)
    return table / [1, 1e12, 1, 1e9]


def tau_interval(tau: float, n: int) -> tuple[float, float]:
    """95 % interval of Kendall's tau over n observations, by the variance 0.437 / (n - 4) of atanh(tau) (Fieller,
    Hartley and Pearson 1957); not a number for n < 5."""
    if n < 5:
        return float("nan"), float("nan")
    centre, half = np.arctanh(np.clip(tau, -0.999, 0.999)), 1.96 * (0.437 / (n - 4)) ** 0.5
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))


def top_against_random(score: Sequence[float], accuracy: Sequence[float], k: int, seed: int) -> dict[str, float]:
    """Random search with a surrogate: trained accuracy of the k highest scores against k architectures at random.

    Returns:
        ``n``: k; ``top``, mean accuracy of the k best by score; ``random``, of all; ``lead`` of the top, with bounds
        ``low`` and ``high``: what remains of it against 95 % of 10,000 random choices of k (GHN 2018 Table 1).
    """
    accuracy = np.asarray(accuracy, dtype=float)
    top = accuracy[np.argsort(np.asarray(score), kind="stable")[::-1][:k]].mean()
    rng = np.random.default_rng(seed)
    drawn = accuracy[rng.permuted(np.tile(np.arange(len(accuracy)), (10_000, 1)), axis=1)[:, :k]].mean(1)
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
