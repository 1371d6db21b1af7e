"""What predicted parameters look like: diversity, sparsity, variance of activations (PPUDA appendix C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def diversity(tensors: Iterable[Tensor]) -> float:
    """Mean of 1 - |cosine| over pairs of different tensors of one shape (PPUDA Table 12); 0 if they are all parallel.

    Independent Gaussian tensors with D entries give 1 - sqrt(2 / (pi D)).
    """
    rows = torch.nn.functional.normalize(torch.stack([t.detach().flatten() for t in tensors]), dim=1)
    n = len(rows)
    return float((1 - (rows @ rows.T).abs())[~torch.eye(n, dtype=torch.bool)].mean())


def sparsity(weight: Tensor, threshold: float = 0.05) -> float:
    """Share of entries smaller in magnitude than the threshold (PPUDA Table 12: first layers, 0.05)."""
    return float((weight.detach().abs() < threshold).float().mean())


def first_weight(parameters: dict[str, Tensor]) -> Tensor:
    """The first convolution's weight of a network."""
    return next(p for name, p in parameters.items() if name.startswith("stem") and p.ndim == 4)


def most_common_shape(predictions: Sequence[dict[str, Tensor]], axes: int = 4) -> tuple[int, ...]:
    """The shape that most networks have at least one tensor of, among shapes with that many axes and a 3x3 kernel."""
    counts: Counter[tuple[int, ...]] = Counter()
    for prediction in predictions:
        counts.update({tuple(p.shape) for p in prediction.values() if p.ndim == axes and p.shape[-1] == 3})
    return max(counts, key=lambda shape: (counts[shape], shape))


@torch.no_grad()
def activation_variances(net: nn.Module, images: Tensor, parameters: dict[str, Tensor] | None = None) -> list[float]:
    """Variance over all elements of each convolution's and linear layer's output, in order of execution.

    Args:
        net: the network; with ``parameters`` it may be on the meta device.
        images: one batch (b, 3, s, s).
    """
    variances: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: variances.append(float(output.var())))
        for module in net.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        net(images) if parameters is None else torch.func.functional_call(net, parameters, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return variances
