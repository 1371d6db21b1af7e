"""Zero-cost proxies: scores of networks that are not trained, a part of the report on search (GHN-3 Table 13)."""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook


def grad_norm(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over weight tensors of the norm of the loss's gradient."""
    return sum(float(g.norm()) for _, g in _gradients(net, F.cross_entropy(net(images), labels)))


def snip(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of |w * dL/dw|."""
    return sum(float((w * g).abs().sum()) for w, g in _gradients(net, F.cross_entropy(net(images), labels)))


def plain(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum of w * dL/dw."""
    return sum(float((w * g).sum()) for w, g in _gradients(net, F.cross_entropy(net(images), labels)))


def grasp(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """- sum of w * (H g), H the Hessian of the loss and g its gradient."""
    weights = _weights(net)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        loss = F.cross_entropy(net(images), labels)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    product = sum((g * g.detach()).sum() for g in gradients if g is not None)
    curved = torch.autograd.grad(product, weights, allow_unused=True)
    return -sum(float((w.detach() * h).sum()) for w, h in zip(weights, curved) if h is not None)


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
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
    ones = torch.ones_like(images[:2], dtype=torch.float64)  # of one image, batch norm refuses maps of 1x1
    return sum(float((w * g).sum()) for w, g in _gradients(net, net(ones).mean(0).sum()))


def synflow(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """``synflow_bn`` with batch norm passed by."""
    pass_by = lambda module, args, out: args[0] if isinstance(module, nn.BatchNorm2d) else None
    with register_module_forward_hook(pass_by):
        return synflow_bn(net, images, labels)


PROXIES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    proxy.__name__: proxy for proxy in (grad_norm, snip, grasp, fisher, jacob_cov, plain, synflow, synflow_bn)
}
"""Zero-cost proxies of GHN-3 Table 13: a score of a network with random parameters from one batch, images (b, 3, s, s)
and labels (b,); the higher, the better."""


def _gradients(net: nn.Module, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of convolutions and linear layers that a value depends on, with their gradients."""
    weights = _weights(net)
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return ((w.detach(), g) for w, g in zip(weights, gradients) if g is not None)


def _weights(net: nn.Module) -> list[Tensor]:
    """Of convolutions and linear layers."""
    return [module.weight for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
