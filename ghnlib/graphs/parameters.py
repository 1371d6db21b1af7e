"""Which parameters become nodes of a graph, and where the released hypernetworks differ from the right structure."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import networkx as nx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ghnlib.graphs.copying import Quantised
from ghnlib.graphs.nodes import Node, Role
from ghnlib.graphs.vocabulary import RANKS, REGISTERED
from ghnlib.graphs.wrappers import is_a


class Parameter(NamedTuple):
    """A parameter of the traced network. ``op``: its primitive, "" when it has no node and ``reason`` says why.
    ``norm_bias``: for a norm weight, the name of the bias that shares its node. ``aliases``: other names of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    op: str = ""
    role: Role = Role.OPERATION
    norm_bias: str = ""
    reason: str = ""
    aliases: tuple[str, ...] = ()


class Convention(NamedTuple):
    """How one family of hypernetworks was shown its graphs.

    ``layers``: recognised layer kinds (keys of ``LAYERS``). ``first_output``: trace only the first output.
    ``pool_by_keepdim``: a mean is a global pooling iff it keeps its dimensions, also inside squeeze-and-excitation.
    ``hard_gate``: squeeze-and-excitation is seen only behind a hard activation two steps before the product.
    ``pool_first``: SqueezeNet's pooling moves before its last convolution.
    ``flags_by_position``: the classifier is whatever weight and bias stand at the last two positions.
    ``primitives``: of the registered ones, those that are known besides.
    """

    layers: frozenset[str]
    first_output: bool = False
    pool_by_keepdim: bool = False
    hard_gate: bool = False
    pool_first: bool = False
    flags_by_position: bool = False
    primitives: tuple[str, ...] = ()


def conv_op(groups: int, dilation: Sequence[int]) -> str:
    """The primitive of a convolution."""
    if groups == 1:
        return "conv"
    return "dil_conv" if min(dilation) > 1 else "sep_conv"


class LayerKind(NamedTuple):
    """One kind of layer: how to recognise it, its weights' primitive and role, its parameters' names and rank."""

    matches: Callable[[nn.Module], bool]
    op: str
    role: Role
    rank: int
    weights: tuple[str, ...] = ("weight",)
    biases: tuple[str, ...] = ("bias",)


def _is(*classes: type) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _named(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: any(cls.__name__ in names for cls in type(module).__mro__)


ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
LAYERS = {
    "conv": LayerKind(_is(nn.Conv2d), "conv", Role.CONV, 4),
    "linear": LayerKind(_is(nn.Linear), "conv", Role.LINEAR, 2),
    "conv1d_hf": LayerKind(_named("Conv1D"), "conv", Role.LINEAR, 2),
    "attention": LayerKind(_is(nn.MultiheadAttention), "conv", Role.LINEAR, 2, ATTENTION_WEIGHTS, ("in_proj_bias",)),
    "bn2d": LayerKind(_is(nn.BatchNorm2d, nn.SyncBatchNorm), "bn", Role.NORM, 1),
    "bn": LayerKind(_is(_BatchNorm), "bn", Role.NORM, 1),
    "layer_norm": LayerKind(_is(nn.LayerNorm), "ln", Role.NORM, 1),
    "other_norm": LayerKind(_is(nn.GroupNorm, nn.RMSNorm, _InstanceNorm), "ln", Role.NORM, 1),
    "norm_by_name": LayerKind(lambda module: "norm" in type(module).__name__.lower(), "ln", Role.NORM, 1),
    "recurrent": LayerKind(_is(nn.RNNBase, nn.RNNCellBase), "conv", Role.LINEAR, 2),
    "embedding": LayerKind(_is(nn.Embedding), "pos_enc", Role.LINEAR, 2, biases=()),
    "pos_enc": LayerKind(_named("PosEnc"), "pos_enc", Role.POSITION, 4, biases=()),
    "vit_encoder": LayerKind(_named("Encoder"), "pos_enc", Role.POSITION, 3, ("pos_embedding",), ()),
}
_PPUDA_LAYERS = frozenset({"conv", "linear", "bn2d", "layer_norm", "pos_enc"})
_GHN3_LAYERS = _PPUDA_LAYERS | {"conv1d_hf", "attention", "embedding", "vit_encoder"}

CONVENTIONS = {
    "correct": Convention(frozenset(LAYERS)),
    "ghn3": Convention(_GHN3_LAYERS, pool_first=True, flags_by_position=True),
    "ppuda": Convention(_PPUDA_LAYERS, first_output=True, pool_by_keepdim=True, hard_gate=True, flags_by_position=True),
}

RECURRENT = re.compile(r"_[ih][hr](_l\d+(_reverse)?)?$")
"""Ends of the names of a recurrent layer's weights and biases: ``weight_ih_l0``, of a cell ``weight_ih``."""
POSITION = re.compile(r"(^|[._])(abs_)?pos(ition)?(al)?_?(emb|enc)[a-z]*(_?\d+)?$")
REASONS = (
    (
        re.compile(
            r"(cls|class|dist(illation)?|det(ection)?|reg|mask)_?(token|embedding)s?(_\d+)?$|(^|\.)(register_tokens|token|cls)$"
        ),
        "class token",
    ),
    (re.compile(r"layer_scale|(^|\.)((gamma|lambda)(_?\d+)?|ls\d?(\.\w+)?)$"), "layer scale"),
    (re.compile(r"rel(ative)?_(pos|h|w|height|width)|(height|width)_rel|attention_bias"), "relative position bias"),
    (re.compile(r"logit_scale|temperature|(^|\.)tau$"), "logit scale"),
    (POSITION, "positional encoding of an unsupported layer"),
)


def parameters_of(net: nn.Module, convention: Convention) -> Iterator[tuple[nn.Parameter, Parameter]]:
    """Each distinct parameter tensor with what is known of it, in registration order. A tied one goes by the first of
    its names under which a layer is known."""
    modules, names = dict(net.named_modules(remove_duplicate=False)), {}
    for name, tensor in net.named_parameters(remove_duplicate=False):
        names.setdefault(tensor, []).append(name)
    shapes = {name: tensor.shape for tensor, (name, *_) in names.items()}
    for tensor, group in names.items():
        as_named = []
        for name in group[:1] if convention.flags_by_position else group:
            owner, _, attribute = name.rpartition(".")
            as_named.append(classify(name, attribute, tuple(tensor.shape), modules[owner], convention))
        parameter = next((found for found in as_named if found.op), as_named[0])
        aliases = [name for name in group if name != parameter.name]
        if shapes.get(parameter.norm_bias) != tensor.shape:  # a buffer, a flag, another layer's or of another shape
            parameter = parameter._replace(norm_bias="")
        yield tensor, parameter._replace(aliases=tuple(aliases))


def classify(name: str, attribute: str, shape: tuple[int, ...], module: nn.Module, convention: Convention) -> Parameter:
    """What a parameter becomes, decided by the layer that owns it."""
    part = RECURRENT.sub("", attribute)
    for layer in _known(convention):
        if not layer.matches(module):
            continue
        if part in layer.weights and len(shape) == layer.rank:
            norm_bias = name.removesuffix(attribute) + "".join(layer.biases[:1]) if layer.role is Role.NORM else ""
            op = conv_op(module.groups, module.dilation) if layer == LAYERS["conv"] else layer.op
            return Parameter(name, shape, op, layer.role, norm_bias)
        if part in layer.biases and layer.role is not Role.NORM:
            return Parameter(name, shape, "bias", Role.BIAS)
    if "vit_encoder" in convention.layers and _is_position(name, shape, convention):
        return Parameter(name, shape, "pos_enc", Role.POSITION)
    return Parameter(name, shape, reason=_reason(name, module, convention))


def _known(convention: Convention) -> Iterator[LayerKind]:
    """Registered layers first: they may be more special than what else knows them."""
    for op in convention.primitives:
        layers, role, weights, biases = REGISTERED[op]
        yield from (LayerKind(_is(*layers), op, role, rank, weights, biases) for rank in RANKS.get(role, ()))
    yield from (layer for kind, layer in LAYERS.items() if kind in convention.layers)


def _is_position(name: str, shape: tuple[int, ...], convention: Convention) -> bool:
    """Hand-written vision transformers keep a (1, tokens, channels) table beside their layers."""
    known = not convention.flags_by_position and POSITION.search(name) and not re.search("rel", name)
    return bool(known) and len(shape) in (3, 4) and shape[0] == 1 and min(shape[1:]) > 1


def _reason(name: str, module: nn.Module, convention: Convention) -> str:
    if isinstance(module, Quantised):
        return "quantised: its weights are packed"
    for pattern, reason in REASONS:
        if pattern.search(name):
            return reason
    known = any(layer.matches(module) for layer in _known(convention))
    return f"unsupported {'parameter of' if known else 'layer'} {type(module).__name__}"


def out_of_reach(convention: str, net: nn.Module, nodes: list[Node], wiring: nx.DiGraph) -> str:
    """Why the released code of a convention fails on this network; "" if it does not."""
    if convention == "ppuda" and is_a(net, "VisionTransformer"):
        return "refuses vision transformers"
    if convention != "ghn3":
        return ""
    # linear layers without bias were cut off, except before a softmax and in Swin's patch merging
    linear = {i for i, node in enumerate(nodes) if node.role is Role.LINEAR and node.op == "conv"}
    linear -= {source for source, target in wiring.edges if nodes[target].op in ("bias", "msa")}
    cut = sorted(nodes[i].name for i in linear if not nodes[i].name.endswith("reduction.weight"))
    return f"cuts {len(cut)} linear layers without bias off the graph ({cut[0]}, ...)" if cut else ""
