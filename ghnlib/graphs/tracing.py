"""From any network to its graph: the functions that one forward pass recorded, reduced to primitives.

Every recorded function is visited once, inputs before outputs. It either becomes a node, or hands on the nodes that
produced its inputs, which contracts reshapes, activations and all else that has no primitive.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import networkx as nx
from torch import Tensor, nn

from ghnlib.graphs.classifier import Classifiers
from ghnlib.graphs.nodes import Node, Role
from ghnlib.graphs.parameters import CONVENTIONS, Convention, Parameter, out_of_reach, parameters_of
from ghnlib.graphs.parametrized import parts_in
from ghnlib.graphs.recording import ACCUMULATE, Recording, Step, record
from ghnlib.graphs.uses import USES, known_by_use
from ghnlib.graphs.vocabulary import check
from ghnlib.graphs.wrappers import is_a, wrapped


def trace(
    net: nn.Module,
    input_shape: int | tuple[int, ...] | None,
    convention: str,
    example: Any,
    no_grad: bool,
    primitives: Sequence[str],
) -> tuple[list[Node], list[tuple[int, int]], dict[str, str]]:
    """Arguments of ``Graph``; see ``Graph.from_module``. A network that needs the values of tensors is run with them,
    one that the released code of a convention fails on has its correct graph: with a warning.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; it must be one of {', '.join(CONVENTIONS)}")
    check(primitives)
    if not isinstance(net, nn.Module):
        raise TypeError(f"a network is a torch.nn.Module, not a {type(net).__name__}")
    rules = CONVENTIONS[convention]._replace(primitives=tuple(primitives))
    recording = record(net, input_shape, rules.first_output, example, no_grad)
    reduction = Reduction(recording, rules)
    problem = out_of_reach(convention, net, reduction.nodes, reduction.wiring)
    if problem:
        text = f"{type(net).__name__}: the released code of {convention} {problem}; this is the correct graph"
        warnings.warn(text, stacklevel=3)
        correct = CONVENTIONS["correct"]
        if rules.first_output:
            recording = record(net, input_shape, correct.first_output, example, no_grad)
        reduction = Reduction(recording, correct)
    return reduction.traced(parts_in(net), rules.flags_by_position)


class Value(NamedTuple):
    """What flows out of a step. ``nodes``: its producers after contraction; data have some, constants and parameters
    none. ``pending``: parameters that have not met data yet. ``softmax``, ``pooled``: the attention map or global
    pooling it comes from (0: none; node 0 is the input).
    """

    nodes: frozenset[int] = frozenset()
    pending: tuple[Parameter, ...] = ()
    softmax: int = 0
    pooled: int = 0


CONSTANT = Value()
IMAGE = Value(frozenset({0}))
OUTPUT = -1  # stands for the network's output while nodes are contracted

MASKING = {"MaskedFill", "Where", "Add", "Baddbmm"}
"""Functions by which scores are masked before a softmax; a constant is the mask."""
POOLS = {"MaxPool2DWithIndices": "max_pool", "AvgPool2D": "avg_pool"}
POOLS |= {kind.replace("2D", "3D"): op for kind, op in POOLS.items()}
MERGES = {"Add": "sum", "Addcmul": "sum", "Cat": "concat"}


class Reduction:
    """The growing graph. ``wiring``: its edges, between indices of ``nodes``; ``keys[i]``: place of node i in the
    forward pass; ``dropped``: nodes to contract at the end, because what they turn out to be is known only later.
    """

    def __init__(self, recording: Recording, rules: Convention):
        self.recording, self.rules = recording, rules
        known = dict(parameters_of(recording.network, rules))
        self.parameters = {id(tensor): parameter for tensor, parameter in known.items()}
        self.nodes: list[Node] = []
        self.keys: list[int] = []
        self.wiring = nx.DiGraph()
        self.node_of: dict[str, int] = {}
        self.seen: set[str] = set()
        self.repeated: set[str] = set()
        self.dropped: set[int] = set()
        self.values: list[Value] = []
        self.met: dict[int, tuple[Parameter, ...]] = {}
        self.leaves = {id(leaf) for leaf in recording.inputs}
        self.add(Node("input"), frozenset(), -1)
        for step in recording.steps:
            self.values.append(self.visit(step))
        self.wiring.add_node(OUTPUT)
        self.wire(self.values[recording.outputs[0]].nodes, OUTPUT)
        for node in self.dropped:
            self.wiring.add_edges_from(list(product(self.wiring.pred[node], self.wiring.succ[node])))
            self.wiring.remove_node(node)
        self.final = self.parents(OUTPUT)
        self.wiring.remove_node(OUTPUT)
        if rules.pool_first and is_a(recording.network, "SqueezeNet"):
            self.pool_before_classifier()
        loose = [i for i, senders in self.wiring.in_degree if i and not senders]
        tables = {i for i in loose if self.nodes[i].op == "pos_enc" or self.nodes[i].role is Role.EMBEDDING}
        self.wiring.add_edges_from((0, i) for i in loose if i not in tables)

    # --- growing

    def visit(self, step: Step) -> Value:
        if step.kind == ACCUMULATE:
            return self.leaf(step.function.variable)
        inputs = [CONSTANT if i is None else self.values[i] for i in step.inputs]
        if not self.rules.flags_by_position:
            inputs = self.known_by_use(step, inputs)
        data = [value for value in inputs if value.nodes]
        pending = tuple(dict.fromkeys(p for value in inputs for p in value.pending))
        if not data and not _applies_layer(step.kind, inputs):
            return Value(pending=pending)
        value = HANDLERS.get(step.kind, Reduction.pass_on)(self, step, data)
        if not pending:
            return value
        self.met[len(self.values)] = pending
        return value._replace(nodes=self.consume(pending, value.nodes, step.function._sequence_nr()))

    def leaf(self, tensor: Tensor) -> Value:
        if id(tensor) in self.leaves:
            return IMAGE
        parameter = self.parameters.get(id(tensor))
        if parameter is None:
            return CONSTANT
        self.seen.add(parameter.name)
        if parameter.role is Role.EMBEDDING:  # of tokens, or of positions alone: data too
            read = IMAGE.nodes if id(tensor) in self.recording.looked_up else frozenset()
            return Value(self.consume((parameter,), read, 0))
        return self.value_of(parameter)

    def known_by_use(self, step: Step, inputs: list[Value]) -> list[Value]:
        """The inputs of a function, with parameters of unsupported layers in the roles in which it takes them."""
        lone = [value.pending[0] if not value.nodes and len(value.pending) == 1 else None for value in inputs]
        if step.kind == "Add" and not any(value.nodes for value in inputs):  # a sum of tables
            return inputs
        known = known_by_use(step, self.recording.steps, lone)
        return [self.value_of(known[i]) if i in known else value for i, value in enumerate(inputs)]

    def value_of(self, parameter: Parameter) -> Value:
        """Positional encodings are data, into which nothing flows; others wait for data."""
        if parameter.op == "pos_enc":
            return Value(self.consume((parameter,), frozenset(), 0))
        return Value(pending=(parameter,))

    def add(self, node: Node, parents: frozenset[int], order: int) -> frozenset[int]:
        self.nodes.append(node)
        self.keys.append(order)
        self.wiring.add_node(len(self.nodes) - 1)
        self.wire(parents, len(self.nodes) - 1)
        return frozenset({len(self.nodes) - 1})

    def wire(self, parents: frozenset[int], node: int) -> None:
        for parent in parents:
            self.wiring.add_edge(parent, node)

    def parents(self, node: int) -> set[int]:
        return set(self.wiring.pred[node])

    def leads_to(self, node: int, values: frozenset[int]) -> bool:
        return any(nx.has_path(self.wiring, node, value) for value in values)

    def consume(self, pending: tuple[Parameter, ...], producers: frozenset[int], order: int) -> frozenset[int]:
        """Chain the parameters that meet data here: weights, then biases."""
        for parameter in sorted(pending, key=lambda p: p.role is Role.BIAS):
            if not parameter.op:
                continue
            node = self.node_of.get(parameter.name)
            if node is None:
                name, shape, op, role, norm_bias, *_ = parameter
                producers = self.add(Node(op, name, shape, role, norm_bias), producers, order)
                (self.node_of[parameter.name],) = producers
            elif self.leads_to(node, producers):
                self.repeated.add(parameter.name)
            else:
                self.wire(producers, node)
                producers = frozenset({node})
        return producers

    # --- one method per kind of step; ``data``: the inputs that are not constants or parameters

    def pass_on(self, step: Step, data: list[Value]) -> Value:
        """Contraction. A pooled vector stays one while it is a vector; an attention map until it meets other data.
        Maps that meet, as ConViT's of contents and of positions, are one map: the last node of them.
        """
        pooled = max((value.pooled for value in data), default=0)
        if pooled and step.kind not in ("Expand", "Repeat") and not step.is_vector:
            pooled = 0
        if len(data) == 1:
            return data[0] if data[0].pooled == pooled else data[0]._replace(pooled=pooled)
        if data and all(value.softmax for value in data):
            *others, last = sorted(data, key=lambda value: value.softmax)
            if self.flow_into(last.softmax, _producers(others) - last.nodes):
                return last._replace(pooled=pooled)
        return Value(_producers(data), pooled=pooled)

    def flow_into(self, node: int, values: frozenset[int]) -> bool:
        """Make values parents of an attention map's node; False if they depend on it."""
        if self.leads_to(node, values):
            return False
        self.wire(values, node)
        return True

    def merge(self, step: Step, data: list[Value]) -> Value:
        value = self.pass_on(step, data)
        if len(data) < 2 or len(value.nodes) < 2:
            return value
        return value._replace(nodes=self.operation(step, MERGES[step.kind], value.nodes))

    def operation(self, step: Step, op: str, parents: frozenset[int], shape: tuple[int, ...] | None = None):
        return self.add(Node(op, shape=shape), parents, step.function._sequence_nr())

    def pool(self, step: Step, data: list[Value]) -> Value:
        if "3D" in step.kind and "conv3d" not in self.rules.primitives:
            return self.pass_on(step, data)
        shape = (1, 1, *(tuple(step.function._saved_kernel_size) or (3, 3)))
        return Value(self.operation(step, POOLS[step.kind], data[0].nodes, shape))

    def global_pool(self, step: Step, data: list[Value]) -> Value:
        nodes = self.operation(step, "glob_avg", _producers(data))
        return Value(nodes, pooled=max(nodes))

    def mean(self, step: Step, data: list[Value]) -> Value:
        if not step.is_spatial_mean:
            return self.pass_on(step, data)
        value = self.global_pool(step, data)
        if self.rules.pool_by_keepdim and not step.function._saved_keepdim:
            self.dropped.add(value.pooled)
        return value

    def softmax(self, step: Step, data: list[Value]) -> Value:
        before = self.recording.steps[step.inputs[0]]
        masked = before.kind in MASKING and (before.kind == "MaskedFill" or None in before.inputs)
        nodes = self.operation(step, self.attention_op(masked), _producers(data))
        self.dropped |= nodes  # until a matrix product applies the map
        return Value(nodes, softmax=max(nodes))

    def fused_attention(self, step: Step, data: list[Value]) -> Value:
        masked = getattr(step.function, "_saved_is_causal", False)
        return Value(self.operation(step, self.attention_op(masked), _producers(data)))

    def attention_op(self, masked: bool) -> str:
        return "masked_msa" if masked and "masked_msa" in self.rules.primitives else "msa"

    def matmul(self, step: Step, data: list[Value]) -> Value:
        """An attention map times values: the values flow into the map's node, and only that flows on."""
        if len(data) != 2 or data[0].softmax == data[1].softmax:
            return self.pass_on(step, data)
        content, attention = sorted(data, key=lambda value: value.softmax)
        if not self.flow_into(attention.softmax, content.nodes):
            return self.pass_on(step, data)
        self.dropped.discard(attention.softmax)
        return Value(attention.nodes)

    def multiply(self, step: Step, data: list[Value]) -> Value:
        """x (B, C, H, W) times a vector over channels that depends on a spatial mean of x: squeeze-and-excitation."""
        if len(data) != 2 or bool(data[0].pooled) == bool(data[1].pooled) or not self.is_gate_seen(step):
            return self.pass_on(step, data)
        x, gate = sorted(data, key=lambda value: value.pooled)
        if not x.nodes & self.parents(gate.pooled):
            return self.pass_on(step, data)
        if not self.rules.pool_by_keepdim:
            self.dropped.add(gate.pooled)
        return Value(self.operation(step, "cse", _producers(data)))

    def is_gate_seen(self, step: Step) -> bool:
        """The released PPUDA code looks for a hard activation two steps before the product: a reshape lies between."""
        if not self.rules.hard_gate:
            return True
        steps = self.recording.steps
        (gate,) = (i for i in step.inputs if self.values[i].pooled)
        reshaped = gate
        while steps[reshaped].kind in ("View", "Unsqueeze", "Slice", "Expand"):
            reshaped = steps[reshaped].inputs[0]
        return reshaped != gate and steps[reshaped].kind.startswith("Hard")

    # --- finishing

    def pool_before_classifier(self) -> None:
        chain, features = [], self.final
        while len(chain) < 3 and len(features) == 1:
            chain += features
            features = self.parents(chain[-1])
        if [self.nodes[i].op for i in chain] != ["glob_avg", "bias", "conv"]:
            return  # its classifier was replaced
        pool, bias, weight = chain
        self.wiring.remove_edges_from([(bias, pool), *product(features, [weight])])
        self.wiring.add_edges_from([(pool, weight), *product(features, [pool])])

    def traced(
        self, parts: dict[str, str], flags_by_position: bool
    ) -> tuple[list[Node], list[tuple[int, int]], dict[str, str]]:
        """``parts``: parameters that others are computed from -> name of what is computed; ``flags_by_position``: see
        ``Convention``, of the hypernetwork that reads the graph."""
        skipped = self.skipped()
        self.warn(skipped)
        classifier = self.classifier()
        order = self.order(classifier)
        position = {node: i for i, node in enumerate(order)}
        edges = sorted((position[source], position[target]) for source, target in self.wiring.edges)
        nodes = [self.nodes[i] for i in order]
        classes = [position[i] for i in classifier]
        if flags_by_position:  # released hypernetworks know it as last nodes that are called weight and bias
            ends = enumerate((".weight", ".bias"), len(nodes) - 2)
            classes = [i for i, part in ends if i in classes and part in nodes[i].name]
        for i in classes:
            role = Role.CLASS_BIAS if nodes[i].role is Role.BIAS else Role.CLASS_WEIGHT
            nodes[i] = nodes[i]._replace(role=role)
        for part, whole in parts.items():
            skipped[part] = skipped.get(whole, f"part of {whole}, which was not written")
        return nodes, edges, {name: why for name, why in skipped.items() if name not in parts.values()}

    def warn(self, skipped: dict[str, str]) -> None:
        title = type(self.recording.network).__name__
        if self.repeated:
            which = ", ".join(sorted(self.repeated))
            warnings.warn(f"{title} applies {which} repeatedly: one node, at the first use", stacklevel=5)
        tied = [f"{p.name} = {p.aliases[0]}" for p in self.parameters.values() if p.aliases]
        if tied:
            which = ", ".join(tied[:3])
            warnings.warn(f"{title} ties {len(tied)} weights ({which}...): one node, the first name", stacklevel=5)
        lost = [f"{name}: {why}" for name, why in skipped.items() if re.search("unsupported|quantised", why)]
        if lost:
            which = "; ".join(lost[:3]) + ("; ..." if len(lost) > 3 else "")
            text = f"{title}: {len(lost)} parameters are no nodes ({which}). They are not predicted"
            warnings.warn(f"{text}, and the others are as if their layers were not there", stacklevel=5)

    def classifier(self) -> list[int]:
        """The nodes of the class layer: of the first output that has one, but of one that it leads to, as features
        lead to logits. timm's backbones say that they have no classes.
        """
        if any(getattr(module, "num_classes", None) == 0 for module in wrapped(self.recording.network)):
            return []
        finder = Classifiers(self.recording.steps, [bool(value.nodes) for value in self.values], self.met)
        found: list[int] = []
        for end in self.recording.outputs:
            nodes = [self.node_of[parameter.name] for parameter in finder.behind(end)]
            if nodes and (not found or found[0] != nodes[0] and self.leads_to(found[-1], frozenset(nodes[:1]))):
                found = nodes
        return found

    def order(self, classifier: list[int]) -> list[int]:
        """Topological order by forward execution; a classifier that nothing follows comes last."""
        for i, senders in self.wiring.in_degree:
            if i and not senders:  # a positional encoding stands where it is first used
                self.keys[i] = min((self.keys[child] for child in self.wiring.succ[i]), default=self.keys[i])
        late = set(classifier) if classifier and not self.wiring.succ[classifier[-1]] else set()
        return list(nx.lexicographical_topological_sort(self.wiring, key=lambda i: (i in late, self.keys[i])))

    def skipped(self) -> dict[str, str]:
        predicted = set(self.node_of) | {self.nodes[i].norm_bias for i in self.node_of.values()}
        result = {}
        for key, parameter in self.parameters.items():
            if parameter.name not in predicted:
                used = parameter.name in self.seen
                why = parameter.reason or "meets no data that come from the input"
                result[parameter.name] = why if used else self.recording.why_unseen(key, self.rules.first_output)
            result |= dict.fromkeys(parameter.aliases, f"tied to {parameter.name}")
        return result


def _producers(data: list[Value]) -> frozenset[int]:
    return frozenset().union(*(value.nodes for value in data))


def _applies_layer(kind: str, inputs: list[Value]) -> bool:
    """A layer on a constant, such as coordinates: its weight meets no data."""
    slot = USES[kind].weight if kind in USES else len(inputs)
    return slot < len(inputs) and _has_node(inputs[slot]) and not _has_node(inputs[slot - 1])


def _has_node(value: Value) -> bool:
    return any(parameter.op for parameter in value.pending)


HANDLERS: dict[str, Callable[[Reduction, Step, list[Value]], Value]] = {
    **dict.fromkeys(MERGES, Reduction.merge),
    **dict.fromkeys(POOLS, Reduction.pool),
    **dict.fromkeys(("Softmax", "SafeSoftmax"), Reduction.softmax),
    **dict.fromkeys(("Bmm", "Mm"), Reduction.matmul),
    "AdaptiveAvgPool2D": Reduction.global_pool,
    "Attention": Reduction.fused_attention,
    "Mean": Reduction.mean,
    "Mul": Reduction.multiply,
}
