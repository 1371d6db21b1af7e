"""Parameters of layers that nothing knows, known by the functions that take them: ``F.conv2d(x, net.kernel)``."""

from collections.abc import Sequence
from typing import NamedTuple

from ghnlib.graphs.nodes import Role
from ghnlib.graphs.parameters import Parameter, conv_op
from ghnlib.graphs.recording import Step


class Use(NamedTuple):
    """How the function of a layer takes parameters: its places of weight and bias, and what such a weight is. The data
    come just before the weight.
    """

    weight: int
    bias: int
    op: str
    role: Role


USES = {
    "Convolution": Use(1, 2, "conv", Role.CONV),
    **dict.fromkeys(("Linear", "Mm"), Use(1, 2, "conv", Role.LINEAR)),
    "Addmm": Use(2, 0, "conv", Role.LINEAR),
    **dict.fromkeys(("BatchNorm", "NativeBatchNorm", "CudnnBatchNorm"), Use(1, 2, "bn", Role.NORM)),
    **dict.fromkeys(("Norm", "NativeLayerNorm", "NativeGroupNorm"), Use(1, 2, "ln", Role.NORM)),
}
AXES = {Role.CONV: 4, Role.LINEAR: 2, Role.NORM: 1}
PRODUCTS = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1}
"""Products of two matrices -> place of the first; a bias comes before it."""
VIEWS = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand", "Clone")


def known_by_use(step: Step, steps: Sequence[Step], lone: Sequence[Parameter | None]) -> dict[int, Parameter]:
    """The parameters among a function's inputs, by place, in the roles in which it takes them: a layer's weight and
    bias, a matrix that is multiplied with data as in ``x @ weight`` and the bias added to that, or a (1, tokens,
    channels) table that is added to data.

    Args:
        steps: of the recording.
        lone: for each input the one parameter that it is, or is computed from, without data; None: it is not so.
    """
    sources = [None if i is None else steps[i] for i in step.inputs]
    unknown = [_unknown(*each) for each in zip(sources, lone, strict=True)]
    if step.kind == "Add":
        return _added(step, steps, unknown)
    if step.kind in PRODUCTS:
        return _multiplied(PRODUCTS[step.kind], lone, unknown)
    use = USES.get(step.kind)
    taken = dict(enumerate(unknown))
    weight = taken.get(use.weight) if use else None
    if weight is None or len(weight.shape) != AXES[use.role] or getattr(step.function, "_saved_transposed", False):
        return {}
    op = use.op
    if use.role is Role.CONV:
        op = conv_op(step.function._saved_groups, step.function._saved_dilation)
    known = {use.weight: weight._replace(op=op, role=use.role)}
    bias = taken.get(use.bias)
    if bias and use.role is not Role.NORM:
        known[use.bias] = bias._replace(op="bias", role=Role.BIAS)
    elif bias and bias.shape == weight.shape:
        known[use.weight] = known[use.weight]._replace(norm_bias=bias.name)
    return known


def _unknown(source: Step | None, parameter: Parameter | None) -> Parameter | None:
    """The parameter of an unsupported layer behind an input, all of it: a transposed matrix has its sides."""
    if parameter is None or not parameter.reason.startswith("unsupported"):
        return None
    if len(parameter.shape) == 2:
        return parameter if sorted(source.shape[-2:]) == sorted(parameter.shape) else None
    return parameter if source.shape == parameter.shape else None


def _added(step: Step, steps: Sequence[Step], unknown: Sequence[Parameter | None]) -> dict[int, Parameter]:
    known = {}
    for i, parameter in enumerate(unknown):
        if _is_table(parameter, step):
            known[i] = parameter._replace(op="pos_enc", role=Role.POSITION)
        elif _is_vector(parameter) and _is_product(step.inputs[1 - i], steps):
            known[i] = parameter._replace(op="bias", role=Role.BIAS)
    return known


def _multiplied(
    first: int, lone: Sequence[Parameter | None], unknown: Sequence[Parameter | None]
) -> dict[int, Parameter]:
    """The matrix of a product, whichever factor it is, if the other is no parameter; and the bias before it."""
    for i, other in (first, first + 1), (first + 1, first):
        if unknown[i] and len(unknown[i].shape) == 2 and lone[other] is None:
            known = {i: unknown[i]._replace(op="conv", role=Role.LINEAR)}
            biases = {0: unknown[0]._replace(op="bias", role=Role.BIAS)} if first and _is_vector(unknown[0]) else {}
            return known | biases
    return {}


def _is_product(place: int | None, steps: Sequence[Step]) -> bool:
    while place is not None and steps[place].kind in VIEWS:
        (place,) = steps[place].inputs
    return place is not None and steps[place].kind in (*PRODUCTS, "Convolution")


def _is_vector(parameter: Parameter | None) -> bool:
    return parameter is not None and len(parameter.shape) == 1


def _is_table(table: Parameter | None, step: Step) -> bool:
    return (
        table is not None and len(table.shape) == 3 and min(table.shape[1:]) > 1 and table.shape[1:] == step.shape[1:]
    )
