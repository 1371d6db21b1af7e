"""What predicted parameters look like: diversity, copies, sparsity, activations (PPUDA appendix C, GHN-3 section 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


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
