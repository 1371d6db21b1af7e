"""Small things that tests of several rooms use; data are made when first asked for."""

from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ghnlib import GHN, DeepNets, GHNConfig, Graph
from ghnlib.data.sources import load_images
from ghnlib.hypernetwork.encoders import truncated_distances
from ghnlib.params_file import read_merged, read_yaml, validate

ROOT = Path(__file__).parent.parent
SHAPE = (3, 16, 16)
JOB = {
    "data": {"source": "digits", "root": None, "image_size": 16, "val_share": 0.2, "test_share": 0.2, "test_per_class": None,
             "shift": 1, "flip": False, "download": False, "resident_gib": 2.0},
    "deepnets": {"scale": "small", "path": None, "train_pool": 12, "val": 3, "test": 1, "ood": 1}, "seed": 0, "training_seed": 0, "classes": None,
    "ghn": {"hid": 16, "layers": 1, "heads": 2, "max_shape": [16, 16, 11, 11]},
    "recipe": {"steps": 6, "batch_size": 8, "meta_batch": 2, "log_every": 2, "validate_every": 6, "optimizer": "adamw"},
}  # fmt: skip
"""Values of a job of training, but for its folder."""


@cache
def digits(**options):
    """Splits of the embedded digits."""
    return load_images("digits", **options)


@cache
def pool(split="val", size=3, space="small", **options):
    """The first architectures of a split."""
    return tuple(DeepNets(split, space=space, size=size, **options))


@cache
def params(profile=None):
    """Typed parameters of a profile."""
    raw = read_merged(ROOT / "params.yaml", ROOT / "profiles" / f"{profile}.yaml") if profile else None
    return validate(raw or read_yaml(ROOT / "params.yaml"))


def tiny(encoder="graphormer", **changes):
    torch.manual_seed(0)
    window = "centre" if encoder == "graphormer" else "corner"
    values = {"hid": 16, "layers": 2 if encoder == "graphormer" else 1, "heads": 2, "max_shape": (16, 16, 11, 11)}
    return GHN(GHNConfig(**{"encoder": encoder, "window": window, **values, **changes}))


class Residual(nn.Module):
    def __init__(self, width=8, blocks=2, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(blocks)
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


class Reading(nn.Module):
    """A network whose constructor reads its weights."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        self.head = nn.Linear(144, num_classes)
        self.scale = self.head.weight.abs().max().item()

    def forward(self, x):
        return self.head(self.body(x))


class Net(nn.Module):
    """Layers given by name, a forward given as a function of the module and its arguments."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.compute(self, x)


def swept(encoder, x, graph, directions=("forward", "backward"), message=None):
    """The sweeps of a gated GNN written node by node; ``message``: to the inputs in the forward sweep."""
    h, distances = list(x), truncated_distances(graph, encoder.config.cutoff)
    for direction in directions:
        forward = direction == "forward"
        d = distances if forward else distances.T
        for v in range(len(graph)) if forward else reversed(range(len(graph))):
            m = torch.zeros_like(h[v])
            if forward and message is not None and not (d[:, v] == 1).any():
                m = m + message
            for u in range(len(graph)):
                if d[u, v] == 1:
                    m = m + encoder.mlp(h[u])
                if d[u, v] > 0 and encoder.mlp_ve is not None:
                    m = m + encoder.mlp_ve(h[u]) / d[u, v]
            h[v] = encoder.gru(m[None], h[v][None])[0]
    return torch.stack(h)


def names(graph):
    """In topological order; operations by their primitive."""
    return [node.name or node.op for node in graph.nodes]


def edges(graph):
    """Pairs of such names."""
    return {(names(graph)[a], names(graph)[b]) for a, b in graph.edges.tolist()}


def structure(graph):
    """Nodes and edges in a form that does not depend on the order of the nodes: each is told by its history."""
    labels = []
    sources = [[] for _ in graph.nodes]
    for source, target in graph.edges.tolist():
        sources[target].append(source)
    for node, before in zip(graph.nodes, sources, strict=True):
        labels.append(hash((tuple(node), tuple(sorted(labels[s] for s in before)))))
    return Counter(labels), Counter((labels[s], labels[t]) for s, t in graph.edges.tolist())


def assert_composed_is_traced(arch):
    """That the graph of an architecture is the traced one of its network."""
    composed, traced = arch.graph, Graph.from_module(arch.build())
    assert [n.op for n in composed.nodes[-2:]] == [n.op for n in traced.nodes[-2:]]
    assert Counter(composed.nodes) == Counter(traced.nodes)
    assert structure(composed) == structure(traced)
    assert set(composed.skipped) == set(traced.skipped)


def file_number(path):
    """None where there is no file, as of a checkpoint between the two renames of a save."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino


def last_checkpoint(folder):
    """Of a training that was killed, perhaps between the two renames of a save."""
    path = folder / "checkpoint.pt"
    return torch.load(path if path.exists() else folder / "checkpoint.previous.pt")
