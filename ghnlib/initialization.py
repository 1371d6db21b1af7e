"""Initial parameters of a network before it is trained: random, orthogonal, predicted, and post-processing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def orthogonalize(net: nn.Module, first_layer: int = 0) -> None:
    """Replace weights by their orthogonal factor, in place (GHN-orth section 3).

    ``M = QR`` of every weight matrix M, ``M <- Q sign(diag R)``, from layer ``first_layer`` on (counted from 1 over
    modules whose weight has at least two axes) except the last such layer, the classifier.
    """
    with torch.no_grad():
        for weight in _processed_weights(net, first_layer):
            matrix, transposed = _tall_matrix(weight)
            q, r = torch.linalg.qr(matrix)
            q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
            weight.copy_((q.T if transposed else q).reshape(weight.shape))


def add_noise(net: nn.Module, beta: float, generator: torch.Generator, first_layer: int = 0) -> None:
    """Break the symmetry of tiled weights, in place: ``w <- w + beta sigma N(0, 1)`` (GHN-orth eq. 2, GHN-3 appendix).

    sigma is the deviation of the correlations between rows of the weight matrix; the rows are those of the taller
    orientation. Weights of a single column have no correlation and are left alone.
    """
    with torch.no_grad():
        for weight in _processed_weights(net, first_layer):
            sigma = row_correlations(weight).std()
            if sigma.isfinite():
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(beta * sigma * noise.to(weight))


def row_correlations(weight: Tensor) -> Tensor:
    """Pearson correlations between the rows of a weight's matrix, in its taller orientation: (rows, rows)."""
    return torch.corrcoef(_tall_matrix(weight)[0])


def _processed_weights(net: nn.Module, first_layer: int) -> Iterator[Tensor]:
    weights = [m.weight for m in net.modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim > 1]
    for layer, weight in enumerate(weights[:-1], start=1):
        if layer >= first_layer:
            yield weight


def _tall_matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """(out, in * h * w), transposed if that has more columns than rows."""
    matrix = weight.detach().flatten(1)
    transposed = matrix.shape[0] < matrix.shape[1]
    return (matrix.T if transposed else matrix), transposed
