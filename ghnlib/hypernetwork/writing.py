"""Writing predicted parameters into a network: which may be written, all or none, and what is reported."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ghnlib.graphs.parametrized import parts_in, settle, unfold

BATCH = 64
"""Images of one tensor that are averaged over together for statistics of batch norm, as in PPUDA appendix C.1."""
FROZEN = "frozen (requires_grad=False)"

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class InitializationReport:
    """What ``GHN.initialize`` did to a network.

    Attributes:
        predicted: names of the parameters that were written.
        skipped: name -> why it kept its value; with it weights that are buffers, and quantised layers.
        tied: another name of a written parameter -> its name in ``predicted``.
        notes: rows that kept their values, running statistics that belong to other weights.
    """

    predicted: list[str]
    skipped: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.predicted)} parameters predicted, {len(self.skipped)} kept"]
        lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {name}: tied to {other}, which is predicted" for name, other in self.tied.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


class Prediction(NamedTuple):
    """Values for a network's parameters, as its graph names them. ``kept``: name -> why it is not to be written, for
    all without a value, and for some with one.
    """

    net: nn.Module
    values: Mapping[str, Tensor]
    kept: Mapping[str, str]


def write(predictions: Sequence[Prediction], batch_norm: Tensor | Iterable | None = None) -> list[InitializationReport]:
    """Write into all networks, or into none if anything is wrong. ``batch_norm``: see ``GHN.initialize``. Raises
    ValueError if a value does not fit its parameter, or all that could be written is frozen."""
    chosen = [_chosen(prediction) for prediction in predictions]
    with ExitStack() as stack:
        for net, _, _ in predictions if batch_norm is not None else ():
            stack.enter_context(_undone_on_error(net))
        for (net, _, _), values in zip(predictions, chosen):
            with torch.inference_mode(_is_inference(net)), torch.no_grad():  # the only mode that may write to such
                _fill(net, values)
                if batch_norm is not None:
                    like = next(parameter for parameter in net.parameters() if parameter.is_floating_point())
                    update_bn(_batches(batch_norm, like), net)
    return [_report(*each, batch_norm is not None) for each in zip(predictions, chosen)]


def names_of(net: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each distinct parameter with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


# --- what may be written ---------------------------------------------------------------------------------------------


def protected(net: nn.Module, only: Patterns = None, exclude: Patterns = None) -> dict[str, str]:
    """Names of the parameters that are not to be written -> why. A parameter goes by any of its names, and by that of
    the weight that is computed from it, which is not written unless all of its parts may be. Raises TypeError for what
    is no network, ValueError for a pattern that no name matches or a network on the meta device."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"initialize writes into networks, not into {type(net).__name__}: predict returns parameters")
    if any(parameter.is_meta for parameter in net.parameters()):
        raise ValueError("the network is on the meta device: move it with net.to_empty(device='cpu') first")
    whole, names = parts_in(net), names_of(net)
    every = [name for group in names.values() for name in group]
    every += dict.fromkeys(whole.values())
    wanted, unwanted = _matching(only, every, "only"), _matching(exclude, every, "exclude")
    reasons: dict[str, str] = {}
    for parameter, group in names.items():
        reason, known_as = _unwritable(parameter), {*group, *(whole[name] for name in group if name in whole)}
        if not unwanted.isdisjoint(known_as):
            reason = reason or "left out by exclude"
        if only is not None and wanted.isdisjoint(known_as):
            reason = reason or "not in only"
        if only is None and not parameter.requires_grad:
            reason = reason or FROZEN
        reasons |= dict.fromkeys(known_as, reason) if reason else {}
    return reasons


def _matching(patterns: Patterns, names: list[str], keyword: str) -> set[str]:
    found: set[str] = set()
    if isinstance(patterns, nn.Module):
        raise TypeError(f"{keyword} is a {type(patterns).__name__}: it takes names of parameters, such as 'layer4.*'")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            known = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
            layer = f"{pattern}.*"
            raise ValueError(f"{keyword}={pattern!r} matches no parameter (a layer's are {layer!r}); there are {known}")
        found |= matches
    return found


def _unwritable(parameter: nn.Parameter) -> str:
    if nn.parameter.is_lazy(parameter):
        return "has no shape yet"
    if not parameter.is_floating_point():
        return f"holds {str(parameter.dtype).removeprefix('torch.')}, not real numbers"
    if type(parameter.data) is not Tensor:
        return f"packed in a {type(parameter.data).__name__}"
    if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride())):
        return "expanded: its values share memory"
    return ""


def _chosen(prediction: Prediction) -> dict[str, Tensor]:
    """Names of the network's tensors with the values to write, all of which fit."""
    net, values, kept = prediction
    chosen = unfold(net, {name: value for name, value in values.items() if name not in kept})
    tensors = _tensors(net)
    for name, value in chosen.items():
        if name not in tensors or tensors[name].shape != value.shape or value.is_meta:
            there = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is no parameter"
            predicted = f"{tuple(value.shape)} on {value.device} is predicted"
            raise ValueError(f"{name!r} {there}, but {predicted}; nothing was written")
    if values and not chosen and FROZEN in kept.values():
        raise ValueError("all parameters to write are frozen (requires_grad=False): only='*' writes them all the same")
    return chosen


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}


# --- writing ---------------------------------------------------------------------------------------------------------


def _is_inference(net: nn.Module) -> bool:
    return any(tensor.is_inference() for tensor in _tensors(net).values())


def _fill(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    tensors, paddings = _tensors(net), _paddings(net)
    for name, value in values.items():
        tensor, row = tensors[name], paddings.get(tensors[name])
        padding = None if row is None else tensor[row].clone()
        tensor.copy_(value)
        if padding is not None:
            tensor[row] = padding
    settle(net, values)


def _paddings(net: nn.Module) -> dict[Tensor, int]:
    """Tables of embeddings with their row for padding."""
    layers = [module for module in net.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {layer.weight: layer.padding_idx for layer in layers if layer.padding_idx is not None}


@contextmanager
def _undone_on_error(net: nn.Module) -> Iterator[None]:
    """The network as it was if anything fails, and each of its modules in its mode in any case."""
    tensors, modules = [*net.parameters(), *net.buffers()], list(net.modules())
    values, modes = [tensor.detach().clone() for tensor in tensors], [module.training for module in modules]
    momenta = {module: module.momentum for module in modules if isinstance(module, _BatchNorm)}
    try:
        yield
    except BaseException:
        with torch.inference_mode(_is_inference(net)), torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
        raise
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode
        for module, momentum in momenta.items():
            module.momentum = momentum


def _batches(images: Tensor | Iterable, like: Tensor) -> Iterator:
    """Batches of nearly one size: a last batch of few images would weigh as much as any other."""
    if isinstance(images, Tensor):
        images = images.tensor_split(math.ceil(len(images) / BATCH)) if len(images) else ()
    empty = True
    for batch in images:
        batch, empty = batch[0] if isinstance(batch, (list, tuple)) else batch, False
        if not isinstance(batch, Tensor) or not batch.isfinite().all():
            what = "values that are not finite" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise ValueError(
                f"batch_norm has {what}: pass images (n, C, H, W), or batches of them, alone or with labels"
            )
        yield batch.to(like.device, like.dtype if batch.is_floating_point() else batch.dtype)
    if empty:
        raise ValueError("batch_norm has no images; an iterator serves one network: pass a tensor, list or DataLoader")


# --- reporting -------------------------------------------------------------------------------------------------------


def _report(prediction: Prediction, chosen: Mapping[str, Tensor], estimated: bool) -> InitializationReport:
    net, _, kept = prediction
    names, skipped, tied = names_of(net), {}, {}
    for group in names.values():
        written = next((name for name in group if name in chosen), "")
        tied |= {name: written for name in group if written and name != written}
        skipped |= {name: kept[name] for name in group if not written}
    known = {*parts_in(net).values(), *(name for group in names.values() for name in group)}
    skipped |= {name: reason for name, reason in kept.items() if name not in known}  # quantised layers' weights
    buffers = [name for name, _ in net.named_buffers() if name.rpartition(".")[2] in ("weight", "bias")]
    skipped |= dict.fromkeys(buffers, "a buffer, not a parameter")
    predicted = [name for name in chosen if name in known]
    return InitializationReport(predicted, skipped, tied, list(_notes(net, chosen, estimated)))


def _notes(net: nn.Module, chosen: Mapping[str, Tensor], estimated: bool) -> Iterator[str]:
    names = {parameter: group for parameter, group in names_of(net).items() if any(name in chosen for name in group)}
    for table, row in _paddings(net).items():
        if table in names:
            yield f"{names[table][0]}: row {row} is padding and kept its values"
    layers = {name: layer for name, layer in net.named_modules() if getattr(layer, "running_mean", None) is not None}
    batch_norms = [] if estimated else [name for name, layer in layers.items() if isinstance(layer, _BatchNorm)]
    others = [name for name, layer in layers.items() if not isinstance(layer, _BatchNorm)]
    for stale, remedy in (batch_norms, "; batch_norm=images makes them anew"), (others, ""):
        if chosen and stale:
            which = ", ..., ".join(dict.fromkeys([stale[0], stale[-1]]))
            yield f"running statistics (in {len(stale)}: {which}) do not belong to the new weights{remedy}"
