"""Initialisations that learn one scale for each parameter tensor on training images: GradInit and NIO.

Their objectives map a loss (a function of parameters, images and labels), parameters by name, images (B, 3, s, s) and
labels (B,) to whether a gradient of the loss is larger than ``GAMMA``, and what is to be minimised: then its norm.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SMALLEST = 0.01
"""Lower bound of the scales (GradInit section 3): signs stay, and no tensor loses its influence."""
GAMMA = 1.0
"""Norm of the gradient above which only this norm is minimised (both papers)."""
EVERY, PATIENCE, GAIN = 5, 4, 0.01
"""Convergence: the objective on held-out images, looked at after so many steps, has so often not fallen by so much."""
Batch = tuple[Tensor, Tensor]
Objective = Callable[..., tuple[bool, Tensor]]


def learn_scales(
    net: nn.Module, objective: Objective, batches: Iterable[Batch], held_out: Batch, lr: float = 0.03
) -> int:
    """Multiply every parameter tensor, in place, by a scale that lowers ``objective`` (GradInit algorithm 1, NIO
    algorithm 2): one step of Adam with rate ``lr`` for each batch, until the objective converges on a batch of held-out
    images, is not finite, or batches end. The scales are those with the lowest objective there. Returns how many steps
    were taken."""
    initial = {name: p.detach().clone() for name, p in net.named_parameters()}
    scales = {name: torch.ones((), device=p.device, requires_grad=True) for name, p in initial.items()}
    optimizer, loss, steps = torch.optim.Adam(scales.values(), lr), loss_of(net), 0
    value_on = lambda batch: objective(loss, {name: scales[name] * p for name, p in initial.items()}, *batch)
    copied = lambda: {name: scale.detach().clone() for name, scale in scales.items()}
    best, lowest, waited = copied(), (True, math.inf), 0

    def note_if_lowest() -> bool:
        """Whether the scales of now have been no better for as long as patience goes."""
        nonlocal best, lowest, waited
        constrained, value = value_on(held_out)
        # one that respects the bound of the norm is lower than any other
        if value.isfinite() and (constrained, value.item() + GAIN) < lowest:
            best, lowest, waited = copied(), (constrained, value.item()), 0
        else:
            waited += 1
        return waited >= PATIENCE

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        note_if_lowest()
        for steps, batch in enumerate(batches, start=1):
            _, value = value_on(batch)
            if not value.isfinite():
                break
            optimizer.zero_grad()
            value.backward(inputs=list(scales.values()))
            optimizer.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(list(scales.values()), SMALLEST)
            if steps % EVERY == 0 and note_if_lowest():
                break
        note_if_lowest()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(best[name])
    return steps


def loss_of(net: nn.Module) -> Callable[..., Tensor]:
    """Cross-entropy in training mode, a function of parameters, images and labels. Running statistics stay."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    return lambda parameters, x, y: F.cross_entropy(torch.func.functional_call(net, parameters | buffers, (x,)), y)


def gradinit(
    loss: Callable, parameters: dict[str, Tensor], x: Tensor, y: Tensor, eta: float = 0.1
) -> tuple[bool, Tensor]:
    """The loss after one step of SGD with rate ``eta`` (Zhu et al. 2021), or the gradient's norm if above ``GAMMA``.

    The step is taken on the first two thirds of the batch and its loss on the last two: half of the images are new.
    """
    share = -(-2 * len(x) // 3)
    gradient = _gradient(loss, parameters, x[:share], y[:share])
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    if norm > GAMMA:
        return True, norm
    after = {name: value - eta * g for (name, value), g in zip(parameters.items(), gradient)}
    return False, loss(after, x[-share:], y[-share:])


def nio(loss: Callable, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[bool, Tensor]:
    """Negative GradCosine (Yang et al. 2022), or the mean norm of the gradients if that is above ``GAMMA``."""
    norm, cosine = grad_cosine(loss, parameters, x, y)
    return (True, norm) if norm > GAMMA else (False, -cosine)


def grad_cosine(
    loss: Callable, parameters: dict[str, Tensor], x: Tensor, y: Tensor, parts: int = 2, overlap: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Mean norm of the gradients of ``parts`` sub-batches, and mean cosine between two of them (the paper's mean also
    has each with itself, a constant). Each sub-batch reaches by a share ``overlap`` of its size into the next."""
    size = len(x) // parts
    indices = [torch.arange(start, start + round(size * (1 + overlap))) % len(x) for start in range(0, len(x), size)]
    gradients = [_gradient(loss, parameters, x[index], y[index]) for index in indices[:parts]]
    flat = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
    norms = flat.norm(dim=1)
    directions = flat / norms[:, None]
    cosines = directions @ directions.T
    return norms.mean(), (cosines.sum() - cosines.trace()) / (parts * (parts - 1))


def _gradient(loss: Callable, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    values = list(parameters.values())
    return torch.autograd.grad(loss(parameters, x, y), values, create_graph=True, materialize_grads=True)
