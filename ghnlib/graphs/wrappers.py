"""Networks within other modules that add no parameters: DataParallel, torch.compile, a dictionary around the output."""

from collections.abc import Iterator

from torch import nn


def wrapped(net: nn.Module) -> Iterator[nn.Module]:
    """The module, the one within it that has all of its parameters, the one within that, ..."""
    yield net
    parts = [part for part in net.children() if any(True for _ in part.parameters())]
    if len(parts) == 1 and not any(True for _ in net.parameters(recurse=False)):
        yield from wrapped(parts[0])


def is_a(net: nn.Module, name: str) -> bool:
    """Whether the module, or one that it wraps, is of a class of that name or of one derived from it."""
    return any(cls.__name__ == name for module in wrapped(net) for cls in type(module).__mro__)
