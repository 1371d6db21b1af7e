"""One forward pass of a network on the meta device, recorded by autograd: no arithmetic, no memory for weights.

Autograd sees functional code as well as modules (PPUDA appendix A), and a function's place in the recording is its
place in the forward pass.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BATCH = 2  # batch normalisation in training mode refuses a single value per channel
ACCUMULATE = "torch::autograd::AccumulateGrad"


class TraceError(RuntimeError):
    """A network cannot be turned into a graph; the message names the module and says what to do."""


class ForwardError(TraceError):
    """The forward pass failed."""


class Step(NamedTuple):
    """One recorded function. ``kind``: "Add" for AddBackward0. ``inputs``: places of earlier steps, None: constant."""

    kind: str
    function: Any
    inputs: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the function's first result."""
        return tuple(self.function._input_metadata[0].shape)

    @property
    def is_vector(self) -> bool:
        """At most one number per channel: (B, C, 1, 1), (B, C) and the like."""
        return sum(side > 1 for side in self.shape[1:]) <= 1

    @property
    def is_spatial_mean(self) -> bool:
        """A mean of (B, C, H, W), (B, H, W, C), (B, tokens, C) or (B, C, positions), not one inside a normalisation."""
        shape = getattr(self.function, "_saved_self_sym_sizes", ())
        keeps_dims = getattr(self.function, "_saved_keepdim", False)
        dims = getattr(self.function, "_saved_dim", ())
        dims = {dim - 2**64 + len(shape) if dim >= 2**63 else dim for dim in dims}  # autograd reads -1 as unsigned
        if len(shape) < 3 or 0 in dims:
            return False
        if len(shape) == 3:
            return len(dims) == 1 and (dims == {1} or not keeps_dims)
        return len(dims) == len(shape) - 2


class Recording(NamedTuple):
    """A forward pass. ``image``: the input, a leaf. ``steps``: every function behind an output, after its inputs.
    ``output``: position of the step that made the first output.
    """

    network: nn.Module
    image: Tensor
    steps: list[Step]
    output: int


def record(net: nn.Module, input_shape: tuple[int, ...] | None = None, first_output: bool = False) -> Recording:
    """Run a copy of a network once. The network, its mode and the random state stay as they are.

    A forward pass that needs the values of tensors is repeated with them, if the network has its weights.

    Args:
        input_shape: of one image, (channels, height, width); None: see ``Graph.from_module``.
        first_output: leave out what only other outputs (auxiliary heads) need.

    Raises:
        TraceError: the forward pass fails, or no output depends on a parameter.
    """
    with torch.inference_mode(False), torch.enable_grad(), _random_state_kept(net):
        try:
            shadow = copy_of(net, on_meta=True)
            image, outputs = _run(shadow, input_shape)
        except ForwardError as error:
            if any(parameter.is_meta for parameter in net.parameters()):
                raise
            shadow = copy_of(net, on_meta=False)
            image, outputs = _run(shadow, input_shape)
            reason = str(error.__cause__)[:120]
            text = f"{type(net).__name__} needs values to run ({reason}); this is its graph for a random input"
            warnings.warn(text, stacklevel=4)
    steps = recorded_steps(outputs[:1] if first_output else outputs)
    output = next(i for i, step in enumerate(steps) if step.function is outputs[0].grad_fn)
    return Recording(shadow, image, steps, output)


# --- the copy --------------------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copy_of(net: nn.Module, on_meta: bool) -> nn.Module:
    """A copy without the caller's hooks, all of it trainable; ``on_meta``: without weights.

    Raises:
        TraceError: a lazy module has no shapes yet, or a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, module in net.named_modules():
        _check(name, module)
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _twin(tensor, on_meta)
    try:
        shadow = copy.deepcopy(net, memo)
    except Exception as error:
        text = f"{type(net).__name__} cannot be traced because copy.deepcopy fails on it: {error}. Keep what cannot be"
        raise TraceError(f"{text} copied out of the module, or give its class a __deepcopy__") from error
    for hooks in (getattr(module, kind) for module in shadow.modules() for kind in HOOKS):
        # those of torch.nn.utils compute weights (weight norm, pruning); any other may write into the caller's state
        for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
            del hooks[key]
    return shadow


def _check(name: str, module: nn.Module) -> None:
    where = f"module {name!r} ({type(module).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(f"{where} is TorchScript, which autograd cannot match with modules: trace its Python original")
    if any(map(nn.parameter.is_lazy, (*module._parameters.values(), *module._buffers.values()))):
        raise TraceError(f"{where} is lazy and has no shapes yet: run the network once, then trace")


def _twin(tensor: Tensor, on_meta: bool) -> Tensor:
    twin = torch.empty_like(tensor, device="meta") if on_meta else tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return twin
    return nn.Parameter(twin, requires_grad=tensor.is_floating_point() or tensor.is_complex())


# --- the forward pass ------------------------------------------------------------------------------------------------


def _run(shadow: nn.Module, input_shape: tuple[int, ...] | None) -> tuple[Tensor, list[Tensor]]:
    """One forward pass: the input and the differentiable outputs."""
    size = getattr(shadow, "expected_input_sz", 299 if type(shadow).__name__ == "Inception3" else 224)
    shape = tuple(input_shape or ((3, size, size) if isinstance(size, int) else size))
    weight = next((p for p in shadow.parameters() if p.is_floating_point()), torch.empty(0, device="meta"))
    image = torch.randn(BATCH, *shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    try:
        result = _forward(shadow, image)
    except Exception as error:
        raise ForwardError(_failure(shadow, shape, input_shape is not None, error)) from error
    outputs = [tensor for tensor in _tensors(result) if tensor.grad_fn is not None]
    if not outputs:
        raise TraceError(
            f"{type(shadow).__name__} cannot be traced: no output depends on its parameters through autograd. Its "
            "forward must return a tensor, or tensors in a tuple or dictionary, that nothing detaches"
        )
    return image, outputs


def _forward(shadow: nn.Module, image: Tensor) -> Any:
    if not image.is_meta:
        return shadow(image.clone())
    try:
        with Shortcuts():
            return shadow(image.clone())  # a leaf would not stand an in-place first layer
    except Exception:
        with suppress(Exception), torch.device("meta"), Shortcuts():  # a forward that makes tensors on the CPU
            return shadow(image.clone())
        raise


@contextmanager
def _random_state_kept(net: nn.Module) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng({parameter.device for parameter in net.parameters() if parameter.is_cuda}):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors within nested tuples, lists, mappings and plain result objects, in order."""
    if isinstance(result, Tensor):
        yield result
        return
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, (list, tuple)):
        result = vars(result).values() if hasattr(result, "__dict__") else ()
    for part in result:
        yield from _tensors(part)


def _failure(shadow: nn.Module, shape: tuple[int, ...], given: bool, error: Exception) -> str:
    names = {id(module): name for name, module in shadow.named_modules()}
    name, frame = "", error.__traceback__
    while frame is not None:
        name = names.get(id(frame.tb_frame.f_locals.get("self")), name)
        frame = frame.tb_next
    where = f"module {name!r} ({type(shadow.get_submodule(name)).__name__})" if name else "its own forward"
    image = f"an input of shape {shape}" if given else f"the default input shape {shape}"
    return (
        f"{type(shadow).__name__} cannot be traced on {image}: {where} fails with: {error}. If the network takes other "
        "inputs, pass input_shape=(channels, height, width). If its forward decides by the values of tensors, it can "
        "be traced off the meta device only"
    )


# --- shortcuts -------------------------------------------------------------------------------------------------------


class _Shortcut(torch.autograd.Function):
    """Stands for a function whose kernel on the meta device is written in Python and takes milliseconds."""

    @staticmethod
    def forward(ctx, shape, x, *parameters):
        return x.new_empty(shape)


class Norm(_Shortcut):
    """(x, weight, bias) -> like x."""


class Linear(_Shortcut):
    """(x, weight, bias) -> (..., out)."""


class Activation(_Shortcut):
    """x -> like x."""


class HardActivation(_Shortcut):
    """x -> like x."""


class Attention(_Shortcut):
    """(query, key, value, bias of the scores) -> (..., queries, value channels). Torch's own kernels are recorded
    under this name too.
    """


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f"a weight of shape {tuple(weight.shape)} cannot be applied to an input of {tuple(x.shape)}")
    return Linear.apply((*x.shape[:-1], *weight.shape[:-1]), x, weight, bias)


def _batch_norm(x: Tensor, mean, variance, weight: Tensor | None = None, bias: Tensor | None = None, *rest, **options):
    return Norm.apply(x.shape, x, weight, bias)


def _layer_norm(x: Tensor, shape, weight: Tensor | None = None, bias: Tensor | None = None, *rest, **options):
    return Norm.apply(x.shape, x, weight, bias)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest, **options) -> Tensor:
    return Attention.apply((*query.shape[:-1], value.shape[-1]), query, key, value, attn_mask)


def _like(function: type[_Shortcut]) -> Callable[..., Tensor]:
    return lambda x, *rest, **options: function.apply(x.shape, x)


SHORTCUTS: dict[Callable, Callable] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.relu, F.relu6, F.hardtanh, F.gelu, F.dropout), _like(Activation)),
    **dict.fromkeys((F.hardswish, F.hardsigmoid), _like(HardActivation)),
}


class Shortcuts(TorchFunctionMode):
    """Replaces the functions of ``SHORTCUTS`` while it is entered; a ResNet-50 then takes 20 ms instead of 100."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return SHORTCUTS.get(function, function)(*args, **(kwargs or {}))


# --- the recording ---------------------------------------------------------------------------------------------------


def recorded_steps(outputs: list[Tensor]) -> list[Step]:
    """All functions behind the outputs, each after those it depends on (explicit stack: networks are deep)."""
    position: dict[Any, int] = {}
    steps: list[Step] = []
    stack = [output.grad_fn for output in reversed(outputs)]
    while stack:
        function = stack[-1]
        if function in position:
            stack.pop()
            continue
        inputs = [edge[0] for edge in function.next_functions]
        waiting = [f for f in inputs if f is not None and f not in position]
        if waiting:
            stack.extend(reversed(waiting))
            continue
        stack.pop()
        position[function] = len(steps)
        places = tuple(None if f is None else position[f] for f in inputs)
        steps.append(Step(kind_of(function.name()), function, places))
    return steps


def kind_of(name: str) -> str:
    """AddBackward0 is an Add; attention is Attention, whatever kernel the device and the version of torch chose."""
    if name.startswith("CheckpointFunction"):
        raise TraceError("torch.utils.checkpoint hides layers from autograd: call it with use_reentrant=False")
    return "Attention" if name.startswith("ScaledDotProduct") else name.split("Backward")[0]
