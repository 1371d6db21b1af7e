"""One forward pass of a network on the meta device, recorded by autograd: no arithmetic, no memory for weights.

Autograd sees functional code as well as modules (PPUDA appendix A), and a function's place in the recording is its
place in the forward pass.
"""

import copy
import inspect
import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ghnlib.graphs.copying import TraceError, copy_of
from ghnlib.graphs.running import Shortcuts, Watch
from ghnlib.graphs.wrappers import is_a, wrapped

BATCH = 2  # batch normalisation in training mode refuses a single value per channel
ACCUMULATE = "torch::autograd::AccumulateGrad"
UNUSED = "not used in the forward pass"
NO_GRAD = (
    "used under torch.no_grad(), so it gets no gradient: predicted only if only= names it and nothing there changes it"
)
LOGITS = "logits"


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
    """A forward pass. ``inputs``: the leaves that are data. ``steps``: every function behind an output, after its
    inputs. ``outputs``: positions of the steps that made the outputs; of those called logits alone, if there are any.
    ``used``: parameters that functions took, by id, and whether autograd followed. ``unused``: why not, of all others.
    ``looked_up``: parameters, by id, that integers of the input are looked up in.
    """

    network: nn.Module
    inputs: list[Tensor]
    steps: list[Step]
    outputs: list[int]
    used: dict[int, bool]
    unused: dict[int, str]
    looked_up: set[int]

    def why_unseen(self, key: int, first_output: bool) -> str:
        """Why no step takes a parameter."""
        if key in self.unused:
            return self.unused[key]
        if not self.used[key]:
            return NO_GRAD
        if first_output:
            return "not used for the first output, and the convention has no other"
        return "used, but detached: autograd finds no output that depends on it"


def record(
    net: nn.Module,
    input_shape: int | tuple[int, ...] | None,
    first_output: bool,
    example: Any,
    no_grad: bool,
) -> Recording:
    """Run a copy of a network once. The network, its mode and the random state stay as they are.

    A forward pass that needs the values of tensors is repeated with them, if the network has its weights.

    Args:
        input_shape, example, no_grad: see ``Graph.from_module``.
        first_output: leave out what only other outputs (auxiliary heads) need.

    Raises:
        TraceError: the forward pass fails, or no output depends on a parameter.
    """
    # compiled functions run as they were written; torch's compiler takes seconds to import
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), _random_state_kept(net), eager:
        try:
            run = _Run(net, input_shape, example, no_grad, on_meta=True)
            outputs = run.outputs()
        except ForwardError as error:
            if any(parameter.is_meta for parameter in net.parameters()):
                raise
            run = _Run(net, input_shape, example, no_grad, on_meta=False)
            outputs = run.outputs()
            reason = str(error.__cause__)[:120]
            text = f"{type(net).__name__} needs values to run ({reason}); this is its graph for a random input"
            warnings.warn(text, stacklevel=4)
        used, others = dict(run.watch.used), run.used_in_the_other_mode()
        if run.shadow.training and len(others) > len(used) and others >= set(used):  # it skips layers at random
            run.shadow.eval()
            run.watch.used = {}
            outputs = run.outputs()
            used = dict(run.watch.used)
        unused = run.reasons_of_disuse(set(used), others)
    outputs.sort(key=lambda named: not named[0].startswith(LOGITS))
    called_logits = sum(name.startswith(LOGITS) for name, _ in outputs)
    tensors = [tensor for _, tensor in outputs[:1] if first_output] or [tensor for _, tensor in outputs]
    steps = recorded_steps(tensors)
    place = {step.function: i for i, step in enumerate(steps)}
    ends = [place[tensor.grad_fn] for tensor in tensors[: called_logits or None]]
    return Recording(run.shadow, run.leaves, steps, ends, used, unused, run.watch.looked_up)


class _Run:
    """A copy of the network, what it is called with, and a watch on its parameters."""

    def __init__(
        self, net: nn.Module, input_shape: int | tuple[int, ...] | None, example: Any, no_grad: bool, on_meta: bool
    ):
        self.shadow = copy_of(net, on_meta)
        self.watch = Watch(net, self.shadow, follow=not no_grad)
        self.on_meta, self.shape = on_meta, None
        if example is None:
            self.shape = _shape_of(_default_size(self.shadow) if input_shape is None else input_shape)
            weight = next((p for p in self.shadow.parameters() if p.is_floating_point()), torch.empty(0, device="meta"))
            example = torch.randn(BATCH, *self.shape, dtype=weight.dtype, device=weight.device)
        self.given = "example" if self.shape is None else "" if input_shape is None else "shape"
        self.call = _with_tensors(_call(net, example), self.leaf)
        self.leaves = [tensor for _, tensor in _tensors(self.call) if tensor.requires_grad]

    def leaf(self, tensor: Tensor) -> Tensor:
        twin = torch.empty_like(tensor, device="meta") if self.on_meta else tensor.detach().clone()
        return twin.requires_grad_(tensor.is_floating_point())

    def outputs(self) -> list[tuple[str, Tensor]]:
        """The differentiable outputs with their names, of one forward pass."""
        try:
            result = self.forward()
        except TraceError:
            raise
        except Exception as error:
            raise ForwardError(self.failure(error)) from error
        outputs = [(name, tensor) for name, tensor in _tensors(result) if tensor.grad_fn is not None]
        if not outputs:
            raise TraceError(
                f"{type(self.shadow).__name__} cannot be traced: no output depends on its parameters through autograd. "
                "Its forward must return a tensor, or tensors in a tuple or dictionary, that nothing detaches"
            )
        return outputs

    def forward(self) -> Any:
        try:
            with Shortcuts() if self.on_meta else nullcontext(), self.watch:
                return self.once()
        except Exception as error:
            if self.on_meta and not isinstance(error, TraceError):
                with suppress(Exception), torch.device("meta"), Shortcuts(), self.watch:  # it makes tensors on the CPU
                    return self.once()
            raise

    def once(self) -> Any:
        self.watch.note(tensor for _, tensor in _tensors(self.call))
        args, kwargs = _with_tensors(self.call, Tensor.clone)  # a leaf would not stand an in-place first layer
        return self.shadow(*args, **kwargs)

    def used_in_the_other_mode(self) -> set[int]:
        """Parameters that a run in training instead of evaluation mode, or the reverse, uses, if this one left any out.
        The copy is in its mode again."""
        modes = {module: module.training for module in self.shadow.modules()}
        used, self.watch.used = self.watch.used, {}
        if len(used) < sum(1 for _ in self.shadow.parameters()):
            with suppress(Exception), torch.no_grad():
                self.shadow.train(not self.shadow.training)
                self.forward()
        others, self.watch.used = set(self.watch.used), used
        for module, mode in modes.items():
            module.training = mode
        return others

    def reasons_of_disuse(self, used: set[int], others: set[int]) -> dict[int, str]:
        """Of the parameters that no function took. ``others``: those that the other mode uses."""
        reason = UNUSED if self.on_meta else f"{UNUSED} of a random input, by whose values it decides"
        mode, call = ("evaluation", "eval") if self.shadow.training else ("training", "train")
        other = f"runs in {mode} mode only, as auxiliary heads do: net.{call}() before tracing gives it a node"
        missing = {id(parameter) for parameter in self.shadow.parameters()} - used
        return {key: other if key in others else reason for key in missing}

    def failure(self, error: Exception) -> str:
        title = type(self.shadow).__name__
        names = {id(module): name for name, module in self.shadow.named_modules()}
        name, frame = "", error.__traceback__
        while frame is not None:
            name = names.get(id(frame.tb_frame.f_locals.get("self")), name)
            frame = frame.tb_next
        where = f"module {name!r} ({type(self.shadow.get_submodule(name)).__name__})" if name else "its own forward"
        what = {"example": "the example", "shape": f"an input of shape {self.shape}"}
        several = (
            "If it takes tokens, several inputs or a dictionary, pass example=: a tensor, a tuple of arguments, or a "
            "dictionary"
        )
        remedy = {
            "example": "Check that the network runs on the example",
            "shape": several,
            "": f"If the network takes other images, pass input_shape=(channels, height, width). {several}",
        }[self.given]
        values = ". If its forward decides by the values of tensors, it can be traced off the meta device only"
        return (
            f"{title} cannot be traced on {what.get(self.given, f'the default input shape {self.shape}')}: {where} "
            f"fails with: {error}. {remedy}{values if self.on_meta else ''}"
        )


def _default_size(net: nn.Module) -> int | tuple[int, ...]:
    default = 299 if is_a(net, "Inception3") else 224
    return next((m.expected_input_sz for m in wrapped(net) if hasattr(m, "expected_input_sz")), default)


def _shape_of(size: Any) -> tuple[int, ...]:
    """Of one input, from its shape or the side of an image."""
    try:
        shape = tuple(map(operator.index, size if isinstance(size, Iterable) else (3, size, size)))
    except TypeError:
        shape = (0,)
    if min(shape, default=1) < 1:
        raise ValueError(f"input_shape={size!r}: (channels, height, width), or the side of images with three channels")
    return shape


def _call(net: nn.Module, example: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        with suppress(TypeError):  # its keys are not the names of arguments: it is the only one
            _signature(net).bind(**example)
            return (), dict(example)
    return (example,), {}


def _signature(net: nn.Module) -> inspect.Signature:
    """Of the forward of a network, or of the first that it wraps whose forward names its arguments."""
    found = [inspect.signature(module.forward) for module in wrapped(net)]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = (each for each in found if any(p.kind not in variable for p in each.parameters.values()))
    return next(named, found[0])


def _with_tensors(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested containers with other tensors."""
    return copy.deepcopy(structure, {id(tensor): change(tensor) for _, tensor in _tensors(structure)})


def _tensors(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors within nested tuples, lists, mappings and plain result objects, in order, with their names there."""
    if isinstance(result, Tensor):
        yield name, result
        return
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        result = result._asdict()
    if isinstance(result, (list, tuple)):
        parts = [(name, part) for part in result]
    elif is_dataclass(result) and not isinstance(result, Mapping):
        parts = [(each.name, getattr(result, each.name, None)) for each in fields(result)]
    else:
        parts = result.items() if isinstance(result, Mapping) else getattr(result, "__dict__", {}).items()
    for key, part in parts:
        yield from _tensors(part, str(key))


@contextmanager
def _random_state_kept(net: nn.Module) -> Iterator[None]:
    """Random choices of a forward pass are always the same, and the caller's go on as if there were none."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng({parameter.device for parameter in net.parameters() if parameter.is_cuda}):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
    """AddBackward0 is an Add; attention is Attention, whatever kernel the device and the version of torch chose. Raises
    TraceError for a function that hides others."""
    if name.startswith("CheckpointFunction"):
        raise TraceError("torch.utils.checkpoint hides layers from autograd: call it with use_reentrant=False")
    return "Attention" if name.startswith("ScaledDotProduct") else name.split("Backward")[0]
