"""Operator calls of a piece of code, and how often it waits for the device."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FETCHED = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
"""What copies a tensor to the host without an operator of its own where that is the device."""
WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
COPYING = {"aten::_to_copy", "aten::copy_"}


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, returns = function._schema.name, function._schema.returns
        result = function(*args, **(kwargs or {}))
        self.counts["calls"] += 1
        is_view = any(value.alias_info and not value.alias_info.is_write for value in returns)
        self.counts["launches"] += not is_view
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        blocking = name in COPYING and not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
        self.counts["waits"] += name in WAITING or (blocking and len({t.device.type for t in tensors}) > 1)
        return result


class _Fetches(TorchFunctionMode):
    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counts["waits"] += function in FETCHED and args[0].device.type == "cpu"
        return function(*args, **(kwargs or {}))


@contextmanager
def counted():
    """Within, ``calls`` of operators, ``launches`` (without views, which start nothing on the device) and ``waits`` are
    counted: values fetched, copies between devices that block. On a CPU every fetch counts as one."""
    counts: Counter = Counter()
    with _Operators(counts), _Fetches(counts):
        yield counts
