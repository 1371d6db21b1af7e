"""The copy of a network that tracing runs, so that the caller's network is neither run nor changed.

What a copy of modules alone would lose is honoured: a ``forward`` replaced on an instance, hooks and wrapped functions
(they are bound to the copy, with copies of what else they reach), attributes of parameters.
"""

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from sys import stdlib_module_names
from threading import Lock, RLock
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.nn.modules.batchnorm import _BatchNorm

from ghnlib.graphs.parametrized import parts_of, see_through


class TraceError(RuntimeError):
    """A network cannot be turned into a graph; the message names the module and says what to do."""


class Quantised(nn.Module):
    """Stands for a dynamically quantised linear layer, whose weights are packed integers."""

    def __init__(self, layer: DynamicLinear, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features, device=device))
        self.bias = nn.Parameter(torch.empty(layer.out_features, device=device)) if layer.bias() is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class LocalBatchNorm(nn.SyncBatchNorm):
    """Synchronised batch norm outside its process group."""

    forward = _BatchNorm.forward

    def _check_input_dim(self, x: Tensor) -> None:
        """Any input with channels will do."""


SHARED = dict.fromkeys((ContextVar, type(Lock()), type(RLock())), lambda value: "itself")
"""Types that cannot be copied and hold nothing of a network: reduced to a text, the copy has the same object."""


@patch.dict(copyreg.dispatch_table, SHARED)
def copy_of(net: nn.Module, on_meta: bool) -> nn.Module:
    """A copy, all of it trainable, with weights that are computed from others as parameters of their own; ``on_meta``:
    without values.

    Raises:
        TraceError: a lazy, sharded or quantised module, or one that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, module in net.named_modules():
        _check(name, module)
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = _twin(value, on_meta)
            elif type(value) in (OrderedDict, dict, set) and not value:  # a dozen in a module, and deepcopy is slow
                memo[id(value)] = type(value)()
    adopt = _Adoption(memo, on_meta)
    for name, module in reversed(list(net.named_modules())):  # inner modules first: deepcopy recurses
        try:
            adopt.contents(module, copy.deepcopy(module, memo))
        except Exception as error:
            raise TraceError(
                f"module {name!r} ({type(module).__name__}): {_uncopyable(module, on_meta)} cannot be copied for "
                f"tracing: {error}. Keep what cannot be copied out of the module, remove the hook, or give its class a "
                "__deepcopy__"
            ) from error
    shadow, made = memo[id(net)], {}
    for module in list(shadow.modules()):
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = LocalBatchNorm
        for name, child in module._modules.items():
            if isinstance(child, DynamicLinear):
                module._modules[name] = Quantised(child, "meta" if on_meta else "cpu")
        if parts_of(module):
            see_through(module, made)
    return shadow


def _check(name: str, module: nn.Module) -> None:
    where = f"module {name!r} ({type(module).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(f"{where} is TorchScript, which autograd cannot match with modules: trace its Python original")
    tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if any(map(nn.parameter.is_lazy, tensors)):
        raise TraceError(f"{where} is lazy and has no shapes yet: run the network once, then trace")
    if any(hasattr(tensor, "device_mesh") for tensor in tensors):
        raise TraceError(f"{where} is sharded (DTensor): make the graph, or initialize, before the network is sharded")
    packed = ".quantized." in f"{type(module).__module__}." and not name.endswith("_packed_params")
    if packed and not isinstance(module, (DynamicLinear, FloatFunctional)):
        raise TraceError(
            f"{where} is quantised, so autograd cannot follow it: trace the network before it is quantised"
        )


def _twin(tensor: Tensor, on_meta: bool) -> Tensor:
    if tensor.is_meta and tensor.layout is torch.strided:  # empty_like takes ten times as long
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    else:
        twin = torch.empty_like(tensor, device="meta") if on_meta else tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return twin
    return nn.Parameter(twin, requires_grad=tensor.is_floating_point() or tensor.is_complex())


class _Adoption:
    """Functions that belong to modules are made to reach the copy. ``memo``: as of deepcopy, id of what the caller
    has -> what the copy has.
    """

    def __init__(self, memo: dict[int, Any], on_meta: bool):
        self.memo, self.on_meta = memo, on_meta

    def contents(self, module: nn.Module, twin: nn.Module) -> None:
        """Functions among a module's attributes and hooks, and the attributes of its tensors."""
        if twin is module:  # by its own __deepcopy__
            return
        for key, value in list(vars(module).items()):
            if key in vars(twin) and isinstance(value, CALLABLE):
                vars(twin)[key] = self.of(value)
            elif isinstance(value, dict) and key in vars(twin):
                vars(twin)[key].update((name, self.of(f)) for name, f in value.items() if isinstance(f, CALLABLE))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and vars(tensor):
                vars(self.memo[id(tensor)]).update((name, self.of(value)) for name, value in vars(tensor).items())

    def of(self, value: Any) -> Any:
        """What stands in the copy for something that a function reaches."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, MethodType):
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, partial):
            options = {name: self.of(each) for name, each in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **options)
        if isinstance(value, Tensor):
            return self.memo.setdefault(id(value), _twin(value, self.on_meta))
        if isinstance(value, (type, ModuleType, BuiltinFunctionType)):
            return value
        return copy.deepcopy(value, self.memo)

    def function(self, function: FunctionType) -> Callable:
        if compiled := getattr(function, "_torchdynamo_orig_callable", None):
            return self.of(compiled)
        used = {} if _is_library(function) else _globals(function)
        if not used and not function.__closure__:
            return function
        cells = tuple(CellType() for _ in function.__closure__ or ())
        values = dict(function.__globals__) if used else function.__globals__
        twin = FunctionType(function.__code__, values, function.__name__, function.__defaults__, cells)
        twin.__kwdefaults__, twin.__qualname__ = function.__kwdefaults__, function.__qualname__
        self.memo[id(function)] = twin  # it may reach itself
        for cell, theirs in zip(cells, function.__closure__ or ()):
            if theirs != CellType():
                cell.cell_contents = self.of(theirs.cell_contents)
        values.update((name, self.of(value)) for name, value in used.items())
        return twin


CALLABLE = (FunctionType, MethodType, partial)


def _uncopyable(module: nn.Module, on_meta: bool) -> str:
    """Names the attribute or hook of a module that cannot be copied, though its inner modules can."""
    adopt = _Adoption({}, on_meta)  # what was copied before the failure is only half made
    for key, value in vars(module).items():
        if key == "_modules":
            continue
        for each in value.values() if isinstance(value, dict) else (value,):
            try:
                adopt.of(each)
            except Exception:
                return f"its {key} ({getattr(each, '__qualname__', type(each).__name__)})"
    return "it"


def _is_library(function: FunctionType) -> bool:
    root = (function.__module__ or "").partition(".")[0]
    return root == "torch" or root in stdlib_module_names - {"__main__"}


def _globals(function: FunctionType) -> dict[str, Any]:
    """The global variables that a function reads by name, but for modules and classes."""
    found = {name: function.__globals__.get(name) for name in _names(function.__code__)}
    fixed = (type, ModuleType, BuiltinFunctionType, type(None))
    return {name: value for name, value in found.items() if not isinstance(value, fixed)}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
