"""The class layer of a network: the one that produces the logits, found backwards from the output."""

from collections.abc import Mapping, Sequence
from functools import cache

from ghnlib.graphs.nodes import Role
from ghnlib.graphs.parameters import Parameter
from ghnlib.graphs.recording import ACCUMULATE, Step

ELEMENTWISE = {"Add", "Sub", "Mul", "Div"}
POOLINGS = {"Mean", "AdaptiveAvgPool2D", "AvgPool2D"}
ACTIVATIONS = {
    "Activation", "HardActivation", "Relu", "Gelu", "Silu", "Mish", "Elu", "Celu", "LeakyRelu", "PreluKernel",
    "Softplus", "Threshold", "Hardtanh", "Hardswish", "Hardsigmoid", "Tanh",
}  # fmt: skip
"""Of hidden layers; probabilities are made by others. Before a pooling they leave scores, as in SqueezeNet."""


class Classifiers:
    """The class layers of one forward pass.

    Args:
        steps: of the recording.
        carries: of each step whether data flow out of it, not constants or parameters alone.
        met: place of a step -> the parameters that meet data there.
    """

    def __init__(self, steps: Sequence[Step], carries: Sequence[bool], met: Mapping[int, tuple[Parameter, ...]]):
        self.steps, self.carries, self.met = steps, carries, met
        self.behind = cache(self._behind)  # sums of sums are followed once

    def _behind(self, place: int, pooled: bool = False) -> list[Parameter]:
        """The weight, and the bias if any, that produce what flows out of a step; of all classifiers that are added,
        as in distillation. Empty if no linear layer or 1x1 convolution produces it, or an activation follows.
        ``pooled``: whether a pooling follows.
        """
        biases: list[Parameter] = []
        while self.steps[place].kind != ACCUMULATE:
            step, here = self.steps[place], self.met.get(place, ())
            biases = [parameter for parameter in here if parameter.role is Role.BIAS] + biases
            weights = [parameter for parameter in here if parameter.op and parameter.role is not Role.BIAS]
            if weights:
                return weights + biases if all(_is_classifier(step, weight) for weight in weights) else []
            unknown = any(not parameter.op for parameter in here) and step.kind not in ELEMENTWISE
            if unknown or (step.kind in ACTIVATIONS and not pooled):
                return []
            pooled = pooled or step.kind in POOLINGS
            ways = [i for i in step.inputs if i is not None and self.carries[i]]
            if len(ways) != 1:
                parts = [self.behind(way, pooled) for way in ways] if step.kind in ("Add", "Stack") else []
                return list(dict.fromkeys(sum(parts, []) + biases)) if parts and all(parts) else []
            (place,) = ways
        return []


def _is_classifier(step: Step, weight: Parameter) -> bool:
    linear = weight.role in (Role.CONV, Role.LINEAR) and step.kind != "Recurrent"
    is_out_by_in = weight.shape[0] in step.shape
    return linear and is_out_by_in and all(side == 1 for side in weight.shape[2:])
