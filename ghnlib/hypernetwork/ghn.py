"""The graph hypernetwork: one model, every paper a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ghnlib.config import GHNConfig
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import CLASS_ROLES, Node, Role
from ghnlib.graphs.parametrized import parts_in
from ghnlib.graphs.recording import NO_GRAD, TraceError
from ghnlib.graphs.vocabulary import check
from ghnlib.hypernetwork.decoders import ConvDecoder, MLPDecoder, VectorDecoder, shaped, slice_of, tile, weight_scale
from ghnlib.hypernetwork.embedding import NodeEmbedding
from ghnlib.hypernetwork.encoders import MLP, Graphormer
from ghnlib.hypernetwork.gatedgnn import GatedGNN
from ghnlib.hypernetwork.lowrank import LowRankDecoder
from ghnlib.hypernetwork.pretrained import load_pretrained
from ghnlib.hypernetwork.writing import InitializationReport, Patterns, Prediction, protected, write

NO_WAY_BACK = "part of {}, whose parametrization has no right_inverse that could write it"
IDENTITY = 3.0
"""Weight of the identity at the start of a training with ``initialization: identity``; other decoded values have a
deviation of about 0.1."""
VECTORS = (Role.NORM, Role.BIAS, Role.CLASS_BIAS, Role.SLOPE)
ClassLayers = bool | Literal["resize"] | None
"""Whether classification layers are predicted, see ``GHN.predict``."""
ENCODERS = {"mlp": lambda config: MLP(config.hid), "gated_gnn": GatedGNN, "graphormer": Graphormer}
DECODERS = {"conv": ConvDecoder, "mlp": MLPDecoder}


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Predictions do not depend on the precision that a caller chose for networks."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def indices_on_cpu() -> Iterator[None]:
    """Whatever device a caller chose for new tensors, as in ``with torch.device("meta")``: the way from the CPU to the
    hypernetwork is written out."""
    if torch.get_default_device().type == "cpu":  # the context slows every function of torch down
        yield
        return
    with torch.device("cpu"):
        yield


class GHN(nn.Module, PyTorchModelHubMixin, library_name="ghnlib", repo_url="ghnlib"):
    """A graph hypernetwork: graphs in, parameters of the networks out.

    ``state = norm(encoder(embedding(nodes)))``, then one decoder for weights and one for vectors.
    """

    def __init__(self, config: GHNConfig | Mapping, **overrides):
        """config: a GHNConfig or its fields; overrides: fields that replace those of ``config``. Raises ValueError for
        an impossible configuration, or a primitive that is not registered."""
        super().__init__()
        fields_ = {**(asdict(config) if isinstance(config, GHNConfig) else config), **overrides}
        _check_names(fields_)
        self.config = c = GHNConfig(**fields_)
        check(c.primitives)
        self._hub_mixin_config = asdict(c)  # what save_pretrained writes to config.json
        self.embedding = NodeEmbedding(c.hid, c.num_classes, c.max_shape[2], c.shape_encoding, c.anytime, c.primitives)
        self.encoder: nn.Module = ENCODERS[c.encoder](c)
        self.norm = nn.LayerNorm(c.hid) if c.layernorm else nn.Identity()
        self.edge = nn.Linear(2 * c.hid, c.hid) if c.anytime else None
        if c.decoder == "lowrank":  # vectors too
            self.weight_decoder = LowRankDecoder(c.hid, c.max_shape, c.num_classes, c.rank)
            self.vector_decoder = None
        else:
            self.weight_decoder = DECODERS[c.decoder](c.hid, c.max_shape, c.num_classes, c.window)
            self.vector_decoder = VectorDecoder(c.hid, max(c.max_shape[:2]), c.num_classes)
        if c.initialization == "ghn3":
            self._initialize_as_ghn3()
        elif c.initialization == "identity":
            self.weight_decoder.add_identity(IDENTITY)

    def _initialize_as_ghn3(self) -> None:
        """Small last layers and truncated-normal embeddings, as GHN-3 starts its training."""
        if self.vector_decoder is None:
            self.weight_decoder.shrink(5)
        else:
            last = "conv2" if self.config.decoder == "conv" else "fc2"
            for layer in (self.vector_decoder.fc2, getattr(self.weight_decoder, last), self.weight_decoder.class_layer):
                layer.weight.data.div_(5)
                nn.init.zeros_(layer.bias)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=module.embedding_dim**-0.5)

    @indices_on_cpu()
    def encode(self, graphs: Sequence[Graph]) -> Tensor:
        """Node states (N, d) of all graphs, one graph after the other."""
        states = self.norm(self.encoder(self.embedding(graphs), graphs))
        return states if self.edge is None else self._with_edges(states, graphs)

    def _with_edges(self, states: Tensor, graphs: Sequence[Graph]) -> Tensor:
        """(N, d): a bottleneck's own state is replaced by one of its edge, from those of the nodes at both ends."""
        rows, ends, first = [], [], 0
        for graph in graphs:
            before, after = {t: s for s, t in graph.edges.tolist()}, dict(graph.edges.tolist())
            here = [i for i, node in enumerate(graph.nodes) if node.role == Role.BOTTLENECK]
            rows += [first + i for i in here]
            ends += [(first + before[i], first + after[i]) for i in here]
            first += len(graph)
        if not rows:
            return states
        edges = self.edge(states[torch.tensor(ends)].flatten(1))  # (n, d) from (n, 2, d)
        return states.index_copy(0, torch.tensor(rows, device=states.device), edges)

    @without_autocast()
    def embed(self, networks, input_shape: int | tuple[int, ...] | None = None, *, example: Any = None) -> Tensor:
        """(B, d): each architecture as the mean of its node states (PPUDA section 5.2). Arguments as of ``predict``."""
        graphs = [self.graph_of(network, input_shape, example) for network in _as_list(networks)]
        states = self.encode(graphs).split([len(graph) for graph in graphs])
        return torch.stack([state.mean(0) for state in states])

    @without_autocast()
    def predict(
        self,
        networks: nn.Module | Graph | Iterable[nn.Module | Graph],
        input_shape: int | tuple[int, ...] | None = None,
        predict_class_layers: ClassLayers = None,
        *,
        example: Any = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Predict parameters, differentiable with respect to the hypernetwork.

        They have the device and the precision of the hypernetwork, whatever autocast is on around the call.

        Args:
            networks: a network or its graph, or a meta-batch of them.
            input_shape, example: of the networks' input; see ``Graph.from_module``.
            predict_class_layers: None: if the network has the hypernetwork's number of classes C; True or False: always
                or never. "resize" is True by the name of what it does for K other classes: class k starts with row
                k mod C, as in the released code; the report on transfer compares it with a random layer.

        Returns:
            Parameter name -> tensor; a list of such dicts for a meta-batch.

        Raises:
            ValueError: another value of ``predict_class_layers``, an impossible ``input_shape``, or a graph with a
                primitive that the hypernetwork does not know.
            TypeError: neither a network nor a graph.
            TraceError: a network cannot be traced.
        """
        graphs = [self.graph_of(network, input_shape, example) for network in _as_list(networks)]
        predictions = self(graphs, predict_class_layers)
        return predictions[0] if isinstance(networks, nn.Module | Graph) else predictions

    @indices_on_cpu()
    def forward(self, graphs: Sequence[Graph], predict_class_layers: ClassLayers = None) -> list[dict[str, Tensor]]:
        """Parameters of the networks of a meta-batch of graphs: one dict of name -> tensor each."""
        if not graphs:
            return []
        states = self.encode(graphs)
        groups: dict[tuple[Role, tuple[int, ...]], list[_Target]] = {}
        row = 0
        for index, graph in enumerate(graphs):
            with_classes = self._predicts_classes(graph, predict_class_layers)
            for node in graph.nodes:
                if node.name and (with_classes or node.role not in CLASS_ROLES) and not self._is_too_long(node):
                    groups.setdefault((node.role, node.shape), []).append(_Target(row, index, node))
                row += 1
        predictions: list[dict[str, Tensor]] = [{} for _ in graphs]
        for targets, name_of, values in self._decode(states, groups):
            for target, value in zip(targets, values.unbind()):
                if name := getattr(target.node, name_of):
                    predictions[target.index][name] = value
        return predictions

    @without_autocast()
    def initialize(
        self,
        networks: nn.Module | Iterable[nn.Module],
        input_shape: int | tuple[int, ...] | None = None,
        predict_class_layers: ClassLayers = None,
        *,
        example: Any = None,
        only: Patterns = None,
        exclude: Patterns = None,
        batch_norm: Tensor | Iterable | None = None,
    ) -> InitializationReport | list[InitializationReport]:
        """Write the prediction into a network, or each into its own; what keeps its value is reported.

        All is written or, if there is an error, nothing. Values take the device and the precision of the parameters.
        Parameters without gradients (``requires_grad=False``, ``torch.no_grad()`` in the forward pass) and rows of
        embeddings for padding keep theirs.

        Args:
            networks, input_shape, predict_class_layers, example: as of ``predict``.
            only: names of the parameters to write, as patterns: ``"layer4.*"`` or a list of such; frozen ones too,
                and those used under ``torch.no_grad()`` alone.
            exclude: patterns of names not to write, such as ``"*lora_*"``.
            batch_norm: images (n, C, H, W), or batches of them alone or with labels, to make the running statistics
                of batch norm from, as plain averages over batches; None: they stay those of the former weights.

        Returns:
            The report, or a list of them for several networks.

        Raises:
            ValueError: a pattern that no name matches, a network on the meta device, nothing but frozen parameters,
                or ``batch_norm`` without images.
            TypeError: not a network.
            TraceError: the network cannot be traced.
        """
        predictions = []
        with torch.no_grad():
            for net in _as_list(networks):
                kept = protected(net, only, exclude)
                graph = self.graph_of(net, input_shape, example)
                if only is not None and any(graph.skipped.get(name) == NO_GRAD for name in graph.skipped.keys() - kept):
                    with contextlib.suppress(TraceError):  # it writes to its parameters there: they keep their values
                        graph = self.graph_of(net, input_shape, example, no_grad=False)
                values = self.predict(graph, predict_class_layers=predict_class_layers)
                predictions.append(Prediction(net, values, self._kept(net, graph, values, kept, predict_class_layers)))
        reports = write(predictions, batch_norm)
        return reports[0] if isinstance(networks, nn.Module) else reports

    def _kept(
        self, net: nn.Module, graph: Graph, values: Mapping[str, Tensor], protected: Mapping[str, str],
        predict_class_layers: ClassLayers,
    ) -> dict[str, str]:  # fmt: skip
        """Why each parameter that is not written keeps its value; a part of a computed tensor goes by that tensor."""
        names = {name: name for name in (*dict(net.named_parameters(remove_duplicate=False)), *graph.skipped)}
        reasons = {}
        for name, whole in (names | parts_in(net)).items():
            if name in values:
                continue
            if whole in values and whole not in protected:
                reasons[name] = NO_WAY_BACK.format(whole)
            else:
                reasons[name] = self.why_skipped(name if whole in values else whole, graph, predict_class_layers)
        return reasons | dict(protected)

    def why_skipped(self, name: str, graph: Graph, predict_class_layers: ClassLayers = None) -> str:
        """The reason that a parameter of the graph's network is not predicted."""
        if any(node.name == name and self._is_too_long(node) for node in graph.nodes):
            return f"embedding of more rows than the {self._rows} that the hypernetwork can tell apart"
        classes = {node.name: node.shape[0] for node in graph.nodes if node.role in CLASS_ROLES}
        if name not in classes:
            return graph.skipped.get(name, "no node in the graph")
        if predict_class_layers is False:
            return "class layer; predict_class_layers=False"
        counts = " and ".join(map(str, sorted(set(classes.values()))))
        return f"class layer; the hypernetwork predicts {self.config.num_classes} classes, the network has {counts}"

    def graph_of(
        self, network: nn.Module | Graph, input_shape: int | tuple[int, ...] | None = None, example: Any = None,
        no_grad: bool = True,
    ) -> Graph:  # fmt: skip
        """The graph that the hypernetwork reads of a network. Arguments: see ``Graph.from_module``."""
        if isinstance(network, Graph):
            return network
        c = self.config
        options = {"example": example, "no_grad": no_grad, "primitives": c.primitives}
        return Graph.from_module(network, input_shape, c.convention, **options)

    @property
    def _rows(self) -> int:
        """Rows of an embedding that can differ; beyond them tokens would share their vectors."""
        return self.config.max_shape[0] * prod(self.config.max_shape[2:])

    def _is_too_long(self, node: Node) -> bool:
        return node.role == Role.EMBEDDING and node.shape[0] > self._rows

    def _predicts_classes(self, graph: Graph, wanted: ClassLayers) -> bool:
        if wanted not in (None, True, False, "resize"):
            raise ValueError(f"predict_class_layers={wanted!r}: None, True, False or 'resize' is possible")
        if wanted is not None:
            return bool(wanted)
        classes = [node.shape[0] for node in graph.nodes if node.role in CLASS_ROLES]
        return all(count == self.config.num_classes for count in classes)

    def _decode(self, states: Tensor, groups: dict) -> Iterator[tuple[list[_Target], str, Tensor]]:
        """Values of all tensors of one role and shape at once, and the Node field that holds their names."""
        vectors = {key: targets for key, targets in groups.items() if key[0] in VECTORS}
        weights = {key: targets for key, targets in groups.items() if key[0] not in VECTORS}
        for decode, part in (self._vectors, vectors), (self._weights, weights):
            if part:
                rows = torch.tensor([target.row for targets in part.values() for target in targets])
                rows = rows.to(states.device, non_blocking=True)
                decoded = decode(states[rows], list(part), [len(targets) for targets in part.values()])
                yield from ((part[key], name_of, values) for key, name_of, values in decoded)

    def _vectors(self, states: Tensor, keys: list, sizes: list[int]) -> Iterator[tuple[tuple, str, Tensor]]:
        """States (N, d) of the tensors with one axis -> (n, *shape) for each role and shape of ``keys``."""
        if self.vector_decoder is None:
            weight, bias = self.weight_decoder.vectors(states, max(shape[0] for _, shape in keys))
        else:
            weight, bias = self.vector_decoder(states)
        weights = 2 * torch.sigmoid(weight / 2) if self.config.weight_norm else weight
        parts = zip(keys, weights.split(sizes), bias.split(sizes), self._bounded(bias).split(sizes))
        for (role, shape), weight, raw, bias in parts:
            if role == Role.CLASS_BIAS and self.vector_decoder is None:
                bias = bias[:, : self.config.num_classes]
            elif role == Role.CLASS_BIAS:
                bias = self._bounded(self.vector_decoder.class_bias(raw))
            if role == Role.NORM:
                yield (role, shape), "name", tile(weight, shape)
            yield (role, shape), "norm_bias" if role == Role.NORM else "name", tile(bias, shape)

    def _bounded(self, bias: Tensor) -> Tensor:
        return torch.tanh(0.2 * bias) if self.config.weight_norm else bias

    def _weights(self, states: Tensor, keys: list, sizes: list[int]) -> Iterator[tuple[tuple, str, Tensor]]:
        """States (N, d) of the tensors with two or more axes -> (n, *shape) for each role and shape of ``keys``."""
        c, largest = self.config, self.weight_decoder.max_shape
        for i, values in self.weight_decoder([slice_of(*key, largest) for key in keys], states.split(sizes)):
            role, shape = keys[i]
            if c.weight_norm:  # released hypernetworks know a map of positions by its shape
                by_shape = role == Role.POSITION and len(shape) == 4 and c.convention != "correct"
                values = values * weight_scale(shape, Role.CONV if by_shape else role, c.fan)
            yield keys[i], "name", shaped(values, role, shape, c.max_shape[2])

    def for_classes(self, num_classes: int) -> GHN:
        """A hypernetwork for networks with so many classes, to be trained on: the layers that decode class layers and
        the embedding of that number begin anew, all else is copied; itself if it is for so many."""
        if num_classes == self.config.num_classes:
            return self
        weight = self.embedding.op.weight
        new = GHN(self.config, num_classes=num_classes).to(weight.device, weight.dtype)
        begin_anew = lambda name: ".class_layer." in name or name == "embedding.channel.weight"
        kept = {name: value for name, value in self.state_dict().items() if not begin_anew(name)}
        new.load_state_dict(kept, strict=False)
        if self.config.shape_encoding:
            new.embedding.take_channels(self.embedding)
        return new

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **config_overrides,
    ) -> GHN:
        """Load a hypernetwork.

        Args:
            source: the name of a hypernetwork that comes with the package ("digits", "cifar10"), a folder of
                ``save_pretrained`` or the file of weights in it, a hub repository, or an official file of PPUDA or
                GHN-3 (a path, or a released name such as "ghn3tm8.pt").
            map_location: the device that it is put on.
            revision, token, cache_dir, local_files_only, force_download: of downloads, see ``hf_hub_download``.
            config_overrides: fields of ``GHNConfig`` that replace what the file says or implies.

        Raises:
            CheckpointError: not a checkpoint, truncated, unsafe, or it does not fit the configuration.
            ValueError: an unknown or impossible configuration value.
        """
        _check_names(config_overrides)
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        return load_pretrained(cls, source, config_overrides, hub).to(map_location)


class _Target(NamedTuple):
    """A tensor to predict: its node, the node's row among the states, the network's index in the meta-batch."""

    row: int
    index: int
    node: Node


def _as_list(networks) -> list:
    several = isinstance(networks, Iterable) and not isinstance(networks, nn.Module | str | Mapping)
    return list(networks) if several else [networks]


def _check_names(overrides: Mapping) -> None:
    known = [f.name for f in fields(GHNConfig)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown configuration key {name!r}; known keys: {', '.join(known)}")
