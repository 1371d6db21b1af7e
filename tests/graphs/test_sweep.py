"""Networks that users write, drawn at random, and the classifiers of torchvision as they were."""

import hashlib
import json
import random
import warnings
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from ghnlib import Graph
from ghnlib.architectures.vision import WeightsOnMeta
from ghnlib.graphs.parameters import CONVENTIONS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
C, SHAPE = 8, (3, 12, 12)
REASONS = ("not used in the forward pass", "no_grad", "detached", "unsupported", "layer scale")


class Residual(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.body, self.gamma = nn.Sequential(block(draw), block(draw)), nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.body(x)


class Branches(nn.Module):
    """Branches that are concatenated, one of which no gradient or no use may follow."""

    def __init__(self, draw):
        super().__init__()
        self.parts = nn.ModuleList(block(draw) for _ in range(draw.randint(2, 3)))
        self.fuse = nn.Conv2d(C * len(self.parts), C, 1)
        self.last = draw.choice(["used", "frozen", "detached", "replaced"])

    def forward(self, x):
        *outs, last = [part(x) for part in self.parts[:-1]] + [self.final(x)]
        return self.fuse(torch.cat([*outs, last], 1))

    def final(self, x):
        if self.last == "replaced":
            return x
        with torch.set_grad_enabled(self.last != "frozen"):
            out = self.parts[-1](x)
        return out.detach() if self.last == "detached" else out


class Gate(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class Attend(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(C), nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, x.shape[2:])


class Scan(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.rnn = draw.choice([nn.LSTM, nn.GRU])(C, C // 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, x.shape[2:])


class Twice(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner, self.again = block(draw), draw.random() < 0.5

    def forward(self, x):
        return self.inner(self.inner(x)) if self.again else self.inner(x)


def conv(draw) -> nn.Module:
    groups, kernel = draw.choice([1, 1, 2, C]), draw.choice([1, 3])
    layer = nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=groups, bias=draw.random() < 0.5)
    pruned = lambda m: prune.l1_unstructured(m, "weight", 0.3)
    ways = [parametrizations.weight_norm, parametrizations.spectral_norm, pruned]
    return draw.choice(ways)(layer) if draw.random() < 0.2 else layer


LEAVES = [
    conv, conv, lambda draw: nn.BatchNorm2d(C), lambda draw: nn.GroupNorm(2, C), lambda draw: nn.ReLU(inplace=False),
    lambda draw: nn.GELU(), lambda draw: nn.Dropout(), lambda draw: nn.PReLU(), lambda draw: nn.ConvTranspose2d(C, C, 1),
    lambda draw: nn.SyncBatchNorm(C), Gate, Attend, Scan,
]  # fmt: skip


def block(draw: random.Random) -> nn.Module:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(LEAVES)(draw)
    return draw.choice([Residual, Branches, Twice, lambda draw: nn.Sequential(*(block(draw) for _ in range(2)))])(draw)


class Random(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        draw = random.Random(seed)
        self.stem, self.blocks = nn.Conv2d(3, C, 3), nn.ModuleList(block(draw) for _ in range(draw.randint(1, 5)))
        self.heads = nn.ModuleList(nn.Linear(C, draw.randint(2, 5)) for _ in range(draw.randint(1, 3)))
        self.unused = nn.ModuleList(conv(draw) for _ in range(draw.randint(0, 1)))
        self.result = draw.choice(["tuple", "dict", "first and a number", "nested"])
        convs = [layer for layer in self.blocks.modules() if type(layer) is nn.Conv2d and not layer._forward_pre_hooks]
        pairs = [pair for pair in combinations(convs, 2) if pair[0].weight.shape == pair[1].weight.shape]
        if pairs and draw.random() < 0.7:
            first, second = draw.choice(pairs)
            second.weight = first.weight
        if draw.random() < 0.3:
            old = self.forward
            self.forward = lambda x: old(x)
        if draw.random() < 0.3:
            self.stem.register_forward_hook(lambda module, args, out: out * 2)

    def forward(self, x):
        x = self.stem(x)
        for each in self.blocks:
            x = each(x)
        outs = [head(x.mean((2, 3))) for head in self.heads]
        return {
            "tuple": tuple(outs), "dict": {"features": x, **{f"head{i}": out for i, out in enumerate(outs)}},
            "first and a number": (outs[0], 1.0), "nested": [outs[0], {"rest": outs[1:]}],
        }[self.result]  # fmt: skip


def tensors(result):
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (dict, list, tuple)):
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors(part)


@pytest.mark.parametrize("seed", range(200))
def test_random_networks(seed):
    torch.manual_seed(seed)
    net = Random(seed).train(seed % 2 == 0)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    graph = Graph.from_module(net, SHAPE)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for layer in net.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.eval()
    loss = sum(out.square().sum() for out in tensors(net(torch.randn(4, *SHAPE))))
    named = dict(net.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))
    predicted = {node.name for node in graph.nodes} | {node.norm_bias for node in graph.nodes}
    modules = dict(net.named_modules())
    for name, grad in grads.items():
        whole = name.split(".parametrizations.")[0] + ".weight" if ".parametrizations." in name else name
        whole, reason = whole.removesuffix("_orig"), graph.skipped.get(name, "")
        layer = modules[whole.rpartition(".")[0]]
        known = not isinstance(layer, (nn.PReLU, nn.ConvTranspose2d, Residual))
        assert (whole in predicted) == (grad is not None and known), (name, reason)
        if whole not in predicted:
            assert any(each in reason for each in REASONS) and ("not used" in reason) <= (grad is None), (name, reason)
    assert {name for name in named if "unused" in name} <= {n for n, why in graph.skipped.items() if "not used" in why}
    classes = [node.name for node in graph.nodes if node.role == "class weight"]
    assert classes == ["heads.0.weight"]
    assert all(source < target for source, target in graph.edges.tolist())


def digest(graph: Graph) -> str:
    rows = [(n.op, n.name, n.shape, str(n.role), n.norm_bias) for n in graph.nodes]
    return hashlib.sha256(repr((rows, graph.edges.tolist())).encode()).hexdigest()[:16]


KNOWN = json.loads(Path(__file__).with_name("torchvision_graphs.json").read_text())


@pytest.mark.parametrize("name", KNOWN)
def test_torchvision_classifiers_have_the_graphs_that_they_had(name):
    with WeightsOnMeta():
        net = torchvision.models.get_model(name)
    found = [
        digest(Graph.from_module(net.train(mode), convention=rules)) for mode in (False, True) for rules in CONVENTIONS
    ]
    assert hashlib.sha256(" ".join(found).encode()).hexdigest()[:16] == KNOWN[name]


def test_all_classifiers_of_torchvision_are_known():
    warnings.simplefilter("ignore")
    assert len(KNOWN) == 80 and set(KNOWN) <= set(torchvision.models.list_models(module=torchvision.models))
