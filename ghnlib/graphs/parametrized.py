"""Tensors that a layer computes from its parameters: torch's parametrizations, weight and spectral norm, pruning.

Graphs see through them: the layer's weight is one parameter under the name that it has without (``"3.weight"``).
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

ITERATIONS = 15
"""Of the power method for the largest singular value of a new weight, as torch takes for its first one."""


def parts_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The module's computed tensors: attribute -> names, within the module, of the parameters they are made of."""
    found: dict[str, tuple[str, ...]] = {}
    if is_parametrized(module):
        for attribute, group in module.parametrizations.items():
            names = (name for name, _ in group.named_parameters())
            found[attribute] = tuple(f"parametrizations.{attribute}.{name}" for name in names)
    for attribute, hook in _hooks(module):
        suffixes = ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)
        found[attribute] = tuple(attribute + suffix for suffix in suffixes)
    return found


def _hooks(module: nn.Module) -> Iterator[tuple[str, WeightNorm | SpectralNorm | BasePruningMethod]]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name, hook
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook


def parts_in(net: nn.Module) -> dict[str, str]:
    """Each parameter of the network that another tensor is computed from -> that tensor's name."""
    modules = ((f"{name}." if name else "", module) for name, module in net.named_modules(remove_duplicate=False))
    whole = ((prefix, attribute, parts) for prefix, module in modules for attribute, parts in parts_of(module).items())
    return {prefix + part: prefix + attribute for prefix, attribute, parts in whole for part in parts}


def see_through(module: nn.Module, made: dict[tuple[int, ...], nn.Parameter]) -> None:
    """Turn the computed tensors of a module of a copy into parameters. Torch's own ways would change the class, which
    the copy shares with its original. ``made``: those of other modules, since parts may be shared.
    """
    with torch.no_grad():
        computed = {name: (parts, getattr(module, name)) for name, parts in parts_of(module).items()}
    keys = {name: tuple(id(_tensor(module, part)) for part in parts) for name, (parts, _) in computed.items()}
    hooks = [hook for _, hook in _hooks(module)]
    if is_parametrized(module):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook in hooks]:
        del module._forward_pre_hooks[key]
    for name, (parts, value) in computed.items():
        vars(module).pop(name, None)
        for part in parts:
            module._parameters.pop(part, None)
        setattr(module, name, made.setdefault(keys[name], nn.Parameter(value.detach().clone())))


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def unfold(net: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a graph's parameters as values of the tensors that the network has: one of ``"3.weight"`` becomes
    those of the parameters that ``3.weight`` is computed from, and of its buffers, as ``right_inverse`` says: an
    orthogonal weight is written as the orthogonal one that torch makes of it. All others stay. What has no way back is
    left out.
    """
    result: dict[str, Tensor] = {}
    modules = dict(net.named_modules(remove_duplicate=False))
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        if attribute in parts_of(module):
            prefix = f"{owner}." if owner else ""
            result |= {prefix + part: each for part, each in _parts(module, attribute, value.detach()).items()}
        else:
            result[name] = value
    return result


def _parts(module: nn.Module, attribute: str, value: Tensor) -> dict[str, Tensor]:
    for name, hook in _hooks(module):
        if name == attribute and isinstance(hook, WeightNorm):
            return {f"{name}_g": torch.norm_except_dim(value, 2, hook.dim), f"{name}_v": value}
        if name == attribute:
            return {f"{name}_orig": value}
    prefix, twin = f"parametrizations.{attribute}.", copy.deepcopy(module)
    group = twin.parametrizations[attribute]
    original = next(group.parameters())
    kept = torch.random.fork_rng([original.device] if original.is_cuda else [])  # orthogonal bases are filled up
    with suppress(Exception), torch.no_grad(), kept:  # whatever an own parametrization's right_inverse refuses with
        setattr(twin, attribute, value.to(original.device, original.dtype))
        return {prefix + name: tensor.detach() for name, tensor in (*group.named_parameters(), *group.named_buffers())}
    return {f"{prefix}original": value} if getattr(group, "original", value[:0]).shape == value.shape else {}


def settle(net: nn.Module, names: Collection[str]) -> None:
    """Bring what belongs to parts that were written up to date: the singular vectors of spectral norm, which in
    evaluation mode would scale the new weight by those of the old one, and computed tensors that a layer keeps.
    """
    for whole in {whole for part, whole in parts_in(net).items() if part in names}:
        owner, _, attribute = whole.rpartition(".")
        module = net.get_submodule(owner)
        for name, hook in _hooks(module):
            if isinstance(hook, SpectralNorm) and name == attribute:
                for _ in range(ITERATIONS):
                    hook.compute_weight(module, do_power_iteration=True)
            hook(module, None)
        for step in module.parametrizations[attribute] if is_parametrized(module, attribute) else ():
            if isinstance(step, _SpectralNorm) and hasattr(step, "_u"):
                matrix = step._reshape_weight_to_matrix(module.parametrizations[attribute].original)
                step._power_method(matrix, ITERATIONS)
