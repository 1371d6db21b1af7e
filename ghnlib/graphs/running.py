"""What happens to a network's copy while it runs: shortcuts for slow functions, a note of the parameters it uses."""

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ghnlib.graphs.copying import TraceError


class Watch(TorchFunctionMode):
    """Notes the parameters that functions take while it is entered, and refuses the caller's own tensors.
    ``follow``: ``torch.no_grad()`` has no effect, so that autograd follows what runs under it.

    Attributes:
        used: id of a parameter of the copy -> whether autograd followed one of its uses.
        read: integers of the input, such as tokens, and what is computed of them in integers, by id.
        looked_up: ids of the parameters of the copy that such integers are looked up in; autograd does not tell.
    """

    def __init__(self, net: nn.Module, shadow: nn.Module, follow: bool):
        super().__init__()
        self.follow = follow
        self.title = type(net).__name__
        self.theirs = {
            id(tensor): name for named in (net.named_parameters, net.named_buffers) for name, tensor in named()
        }
        self.ours = {id(parameter) for parameter in shadow.parameters()}
        self.used: dict[int, bool] = {}
        self.read: dict[int, Tensor] = {}
        self.looked_up: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.follow and function is torch._C._set_grad_enabled:
            return None
        if function == SET_REQUIRES_GRAD and args[0].requires_grad:  # of its input, which is no leaf here
            return None
        asks, reads = _asks(function), False
        if not asks:
            for tensor in _tensors_among((*args, *kwargs.values())):
                if id(tensor) in self.ours:
                    self.used[id(tensor)] = self.used.get(id(tensor), False) or torch.is_grad_enabled()
                elif id(tensor) in self.theirs:
                    raise TraceError(self.leak(id(tensor)))
            reads = bool(self.read) and self.looks_up([*_tensors_among((*args, *kwargs.values()))])
        result = function(*args, **kwargs)
        if reads:
            self.note(_tensors_among([result]))
        return result

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Integers that come from the input."""
        self.read.update((id(tensor), tensor) for tensor in tensors if not tensor.dtype.is_floating_point)

    def looks_up(self, tensors: list[Tensor]) -> bool:
        """Whether a function of these tensors reads integers of the input, and if so in which parameters."""
        reads = any(id(tensor) in self.read for tensor in tensors)
        self.looked_up.update(id(tensor) for tensor in tensors if reads and id(tensor) in self.ours)
        return reads

    def leak(self, tensor: int) -> str:
        return (
            f"{self.title} cannot be traced: a hook, or a forward that was replaced, runs the network itself, here its "
            f"{self.theirs[tensor]}, not the copy that is traced. It must reach the network through its arguments, "
            "variables of its own or global ones, or be a method of a module's class"
        )


SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__
QUESTIONS = {"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "ndimension", "get_device"}
VIEWS = {"data", "T", "mT", "H", "mH", "real"}


def _asks(function: Callable) -> bool:
    """Of functions of a tensor that tell its shape, type or device, as its attributes do but for some."""
    name = getattr(function, "__name__", "")
    return name in QUESTIONS or name == "__get__" and getattr(function.__self__, "__name__", "") not in VIEWS


def _tensors_among(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))


class _Shortcut(torch.autograd.Function):
    """Stands for a function whose kernel on the meta device is written in Python and takes milliseconds."""

    @staticmethod
    def forward(ctx, shape, x, *parameters):
        return x.new_empty(shape)


class BatchNorm(_Shortcut):
    """(x, weight, bias) -> like x."""


class Norm(_Shortcut):
    """The same of layer and group norm."""


class Linear(_Shortcut):
    """(x, weight, bias) -> (..., out)."""


class Attention(_Shortcut):
    """(query, key, value, bias of the scores) -> (..., queries, value channels). Torch's own kernels are recorded
    under this name too.
    """


class Recurrent(_Shortcut):
    """One layer in one direction: (x, weight of inputs, weight of states, biases..., first states...) -> states."""


# parameters have the names of torch's, by which functions may be called


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.shape[-1] != weight.shape[-1]:
        shapes = tuple(weight.shape), tuple(input.shape)
        raise RuntimeError("a weight of shape {} cannot be applied to an input of {}".format(*shapes))
    return Linear.apply((*input.shape[:-1], *weight.shape[:-1]), input, weight, bias)


def _batch_norm(input: Tensor, running_mean, running_var, weight=None, bias=None, *rest, **options) -> Tensor:
    return BatchNorm.apply(input.shape, input, weight, bias)


def _layer_or_group_norm(input: Tensor, sizes=None, weight=None, bias=None, *rest, **options) -> Tensor:
    return Norm.apply(input.shape, input, weight, bias)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options,
) -> Tensor:  # fmt: skip
    result = Attention.apply((*query.shape[:-1], value.shape[-1]), query, key, value, attn_mask)
    if result.grad_fn is not None:  # a mask that has gradients is a bias of the scores
        result.grad_fn._saved_is_causal = is_causal or attn_mask is not None and not attn_mask.requires_grad
    return result


def _like(name: str) -> Callable[..., Tensor]:
    """x -> like x, recorded under this name."""
    function = type(name, (_Shortcut,), {})
    return lambda input, *rest, **options: function.apply(input.shape, input)


def _recurrent(function: Callable) -> Callable:
    """A stack of recurrent layers, as ``nn.LSTM`` and its like call it. ``function`` serves packed sequences."""

    def run(input: Tensor, hx, weights, has_biases, layers, dropout, training, bidirectional, batch_first):
        directions = 2 if bidirectional else 1
        if not isinstance(has_biases, bool):  # of a packed sequence the arguments are others
            return function(input, hx, weights, has_biases, layers, dropout, training, bidirectional, batch_first)
        size = len(weights) // layers // directions  # of inputs, states, biases, and of projected states
        cells = [weights[i : i + size] for i in range(0, len(weights), size)]
        firsts, lasts = hx if isinstance(hx, (list, tuple)) else (hx,), []
        for layer in range(layers):
            pair = [
                Recurrent.apply((*input.shape[:-1], cell[1].shape[1]), input, *cell, *firsts)
                for cell in cells[layer * directions : (layer + 1) * directions]
            ]
            lasts += [states.select(1 if batch_first else 0, -1) for states in pair]
            input = torch.cat(pair, -1) if bidirectional else pair[0]
        return (input, *(torch.stack(lasts) for _ in firsts))

    return run


def _cell(input: Tensor, hx, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None):
    """One step of a recurrent layer, as ``nn.LSTMCell`` and its like call it."""
    firsts = hx if isinstance(hx, (list, tuple)) else (hx,)
    states = Recurrent.apply((*input.shape[:-1], w_hh.shape[1]), input, w_ih, w_hh, b_ih, b_hh, *firsts)
    return (states, states) if len(firsts) > 1 else states


def _written_out(function: FunctionType) -> Callable:
    """A function of torch that calls others, which modes see, as they would not while they handle the function."""
    unseen = {**function.__globals__, "has_torch_function": lambda tensors: False}
    body = FunctionType(function.__code__, unseen, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__

    def run(*args, **options):
        with Shortcuts():
            return body(*args, **options)

    return run


SHORTCUTS: dict[Callable, Callable] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.layer_norm, F.group_norm), _layer_or_group_norm),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _written_out(F.multi_head_attention_forward),
    **dict.fromkeys((F.relu, F.relu6, F.hardtanh, F.gelu), _like("Activation")),
    **dict.fromkeys((F.hardswish, F.hardsigmoid), _like("HardActivation")),
    F.dropout: _like("Dropout"),
    **{function: _recurrent(function) for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
}


class Shortcuts(TorchFunctionMode):
    """Replaces the functions of ``SHORTCUTS`` while it is entered; a ResNet-50 then takes a tenth of the time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return SHORTCUTS.get(function, function)(*args, **(kwargs or {}))
