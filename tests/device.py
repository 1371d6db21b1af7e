"""A device without hardware that refuses what a GPU refuses, for tests of code that has to run on one.

Its tensors hold one on the CPU, which computes the values: what ends there ends with the values of the CPU.
"""

import torch
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations whose index, and nothing else, may lie on the CPU."""
DRAWN = {"bernoulli_", "native_dropout", "randperm"}
"""Random numbers that may be drawn there: dropout, and which boxes a detector learns from. All else that is random is to be that of a run on the CPU."""
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace",
)  # fmt: skip


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnDevice(torch.Tensor):
    """A tensor of the device; ``held``: the one on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnDevice({self.held})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self):
        return self.held.tolist()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # read on a machine without the device

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        options = dict(options or {})
        _refuse(function, arguments, options)
        target = options.get("device", DEVICE)
        if "device" in options and target is not None:
            options["device"] = "cpu" if torch.device(target).type == NAME else target
        known = {id(value): value for value in tree_iter((arguments, options)) if type(value) is torch.Tensor}
        known |= {id(value.held): value for value in tree_iter((arguments, options)) if isinstance(value, OnDevice)}
        held = tree_map_only(OnDevice, lambda value: value.held, (arguments, options))
        result = function(*held[0], **held[1])
        if target is not None and torch.device(target).type != NAME:
            return result
        return tree_map_only(torch.Tensor, lambda value: known[id(value)] if id(value) in known else cls(value), result)


def _refuse(function, arguments, options):
    """Raise RuntimeError where CUDA would: tensors of two devices, generators of another."""
    if isinstance(options.get("generator"), torch.Generator):
        raise RuntimeError(f"{function}: expected a generator of the {NAME}, found one of the CPU")
    if torch.Tag.nondeterministic_seeded in function.tags and function.overloadpacket.__name__ not in DRAWN:
        raise RuntimeError(f"{function} on the {NAME}: random numbers are to be drawn on the CPU")
    if function in ACROSS:
        return
    if function in INDEXED and isinstance(arguments[0], OnDevice):
        arguments = (arguments[0], *arguments[2:])
    tensors = [value for value in tree_iter((arguments, options)) if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, OnDevice)]
    if there and any(value.ndim for value in tensors if not isinstance(value, OnDevice)):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {NAME} and cpu")


_setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)
LIBRARY = torch.library.Library("aten", "IMPL")


def _register(name):
    packet, _, overload = name.partition(".")
    function = getattr(getattr(aten, packet), overload or "default")

    def make(*arguments, **options):
        options.pop("pin_memory", None)
        return OnDevice(function(*arguments, **{**options, "device": "cpu"}))

    LIBRARY.impl(name, make, "PrivateUse1")


for factory in FACTORIES:
    _register(factory)


def _copy_from(source, target, non_blocking=False):
    """What ``torch.tensor(..., device=...)`` ends with."""
    target.held.copy_(source)
    return target


LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def _gru_cell(x, hidden, to_x, to_hidden, bias=None, hidden_bias=None):
    """As on the CPU: elsewhere torch takes a fused one, which the CPU has not."""
    linear = torch.nn.functional.linear
    ours = linear(x, to_x, bias).unsafe_chunk(3, 1)
    theirs = linear(hidden, to_hidden, hidden_bias).unsafe_chunk(3, 1)
    reset, update = (theirs[i].add_(ours[i]).sigmoid_() for i in range(2))
    new = ours[2].add(theirs[2].mul_(reset)).tanh_()
    return (hidden - new).mul_(update).add_(new)


LIBRARY.impl("gru_cell", _gru_cell, "AutogradPrivateUse1")
