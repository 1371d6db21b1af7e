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
TRANSPOSED = ("T", "Transpose", "Permute")


def known_by_use(step: Step, sources: Sequence[Step | None], lone: Sequence[Parameter | None]) -> dict[int, Parameter]:
    """The parameters among a function's inputs, by place, in the roles in which it takes them: a layer's weight and
    bias, or a (1, tokens, channels) table that is added to data.

    Args:
        sources: the steps that made the inputs; None: constants.
        lone: for each input the one parameter that it is, or is computed from, without data; None: it is not so.
    """
    if step.kind == "Add":
        tables = ((i, _unknown(step, i, sources, lone)) for i in range(len(lone)))
        return {i: table._replace(op="pos_enc", role=Role.POSITION) for i, table in tables if _is_table(table, step)}
    use = USES.get(step.kind)
    weight = _unknown(step, use.weight, sources, lone) if use else None
    if weight is None or len(weight.shape) != AXES[use.role] or getattr(step.function, "_saved_transposed", False):
        return {}
    op = use.op
    if use.role is Role.CONV:
        op = conv_op(step.function._saved_groups, step.function._saved_dilation)
    known = {use.weight: weight._replace(op=op, role=use.role)}
    bias = _unknown(step, use.bias, sources, lone)
    if bias and use.role is not Role.NORM:
        known[use.bias] = bias._replace(op="bias", role=Role.BIAS)
    elif bias and bias.shape == weight.shape:
        known[use.weight] = known[use.weight]._replace(norm_bias=bias.name)
    return known


def _is_table(table: Parameter | None, step: Step) -> bool:
    return (
        table is not None and len(table.shape) == 3 and min(table.shape[1:]) > 1 and table.shape[1:] == step.shape[1:]
    )


def _unknown(
    step: Step, slot: int, sources: Sequence[Step | None], lone: Sequence[Parameter | None]
) -> Parameter | None:
    """The parameter of an unsupported layer behind an input that has its shape, transposed in a matrix product."""
    parameter = lone[slot] if slot < len(lone) else None
    if parameter is None or not parameter.reason.startswith("unsupported"):
        return None
    product = step.kind in ("Addmm", "Mm") and slot == USES[step.kind].weight
    if product and sources[slot].kind not in TRANSPOSED:
        return None
    shape = sources[slot].shape[::-1] if product else sources[slot].shape
    return parameter if shape == parameter.shape else None
