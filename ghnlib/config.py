"""What is chosen about a hypernetwork and its training. Free of torch: parameters are checked before anything heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class GHNConfig:
    """A hypernetwork's architecture. ``PRESETS`` names those of the papers.

    Attributes:
        encoder: "mlp", "gated_gnn" (GHN-1, GHN-2) or "graphormer" (GHN-3).
        num_classes: classes of the networks whose classifiers are predicted.
        hid: hidden size d.
        layers: Graphormer layers, or forward-backward sweeps T of the gated GNN.
        heads: attention heads of the Graphormer.
        max_shape: largest tensor decoded (out, in, S, S); larger ones are tiled.
        decoder: of tensors with two or more axes, "conv" or "mlp" (PPUDA Table 8).
        weight_norm: normalisation of predicted parameters, of weights by their ``fan``, "in" or "out".
        shape_encoding: shapes of the parameters as features of nodes.
        virtual_edges: distances up to 50 instead of one-hop edges only.
        directions: "both", "forward" or "none": sweeps of the gated GNN (which needs one), or edge embeddings of the
            Graphormer; "synchronous": in place of each pair of sweeps one step of all nodes at once (GHN 2018 Fig. 5).
        stacked: the gated GNN takes one cell of the network after the other (GHN 2018), see ``GatedGNN``.
        passing, modules: of the stacked GNN, whether a cell hears of the one before, and how many sets of weights the
            cells take in turn; 1: they share them (GHN 2018 Table 4).
        anytime: scale and exits as features of nodes, bottlenecks decoded from the states at both ends of their edge
            (GHN 2018 section 3.2); only anytime networks have these.
        attention: False puts an MLP in place of the Graphormer's layers; its node embeddings stay.
        centrality, input_distance: which node embeddings the Graphormer adds.
        batching: "misaligned" reads the states of a meta-batch as the released code of GHN-3, see ``Graphormer``.
        layernorm: LayerNorm on node states before decoding.
        window: where kernels are cut from the decoded S x S map, "centre" (GHN-3) or "corner" (GHN-1, GHN-2).
        initialization: before training, "framework" (GHN-1, GHN-2) or "ghn3" (small last layers and embeddings).
        convention: which graphs it reads: "correct", "ghn3" or "ppuda" (as the released hypernetworks expect).

    Raises:
        ValueError: an impossible value; the message names it and what is allowed.
    """

    encoder: Literal["mlp", "gated_gnn", "graphormer"] = "graphormer"
    num_classes: Positive = 10
    hid: Positive = 64
    layers: Positive = 3
    heads: Positive = 8
    max_shape: tuple[Positive, Positive, Positive, Positive] = (64, 64, 11, 11)
    decoder: Literal["conv", "mlp"] = "conv"
    weight_norm: bool = True
    fan: Literal["in", "out"] = "in"
    shape_encoding: bool = True
    virtual_edges: bool = True
    directions: Literal["both", "forward", "none", "synchronous"] = "both"
    stacked: bool = False
    passing: bool = True
    modules: Positive = 1
    anytime: bool = False
    attention: bool = True
    centrality: bool = True
    input_distance: bool = True
    batching: Literal["aligned", "misaligned"] = "aligned"
    layernorm: bool = True
    window: Literal["centre", "corner"] = "centre"
    initialization: Literal["framework", "ghn3"] = "framework"
    convention: Literal["correct", "ghn3", "ppuda"] = "correct"

    def __post_init__(self):
        object.__setattr__(self, "max_shape", tuple(self.max_shape))
        for name, hint in get_type_hints(GHNConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(hint))}")
        for name in ("num_classes", "hid", "layers", "heads", "modules"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if len(self.max_shape) != 4 or min(self.max_shape) < 1 or self.max_shape[2] != self.max_shape[3]:
            raise ValueError(f"max_shape={self.max_shape} must be (out, in, S, S) with positive sizes")
        if self.hid % 4:
            raise ValueError(f"hid={self.hid} must be a multiple of 4: four shape embeddings share it")
        if self.directions == {"gated_gnn": "none", "graphormer": "synchronous"}.get(self.encoder):
            raise ValueError(f"directions={self.directions!r} is not for the {self.encoder}: both or forward is")
        if self.encoder == "graphormer" and self.hid % self.heads:
            raise ValueError(f"hid={self.hid} must be a multiple of heads={self.heads}")

    @property
    def cutoff(self) -> int:
        """Largest distance of a virtual edge."""
        return 50 if self.virtual_edges else 1


_GHN2 = {"encoder": "gated_gnn", "hid": 32, "layers": 1, "max_shape": (64, 64, 11, 11), "window": "corner"}


def _ghn3(hid: int, layers: int, heads: int) -> dict:
    size = {"hid": hid, "layers": layers, "heads": heads, "max_shape": (hid, hid, 16, 16), "num_classes": 1000}
    return {**size, "initialization": "ghn3"}


_PLAIN = {"weight_norm": False, "virtual_edges": False, "layernorm": False}
PRESETS: dict[str, dict] = {
    "ghn": _GHN2 | _PLAIN | {"max_shape": (64, 64, 7, 7), "shape_encoding": False, "decoder": "mlp"},
    "mlp": _GHN2 | {"encoder": "mlp"},
    "ghn1": _GHN2 | _PLAIN,
    "ghn2": _GHN2,
    "ghn3-t": _ghn3(64, 3, 8),
    "ghn3-s": _ghn3(128, 5, 16),
    "ghn3-l": _ghn3(256, 12, 16),
    "ghn3-xl": _ghn3(384, 24, 16),
}
"""The GHN of 2018 (here with one sweep, not its T = 5), GHN-1, GHN-2 and MLP for CIFAR-10 (PPUDA appendix B), GHN-3 for
ImageNet (GHN-3 Table 1)."""


@dataclass(frozen=True)
class Recipe:
    """How a hypernetwork is trained. Lengths are in steps.

    Attributes:
        steps: parameter updates.
        batch_size: images a step, the same for all networks of the meta-batch.
        meta_batch: networks a step.
        optimizer: "adam" (weight decay coupled) or "adamw" (decoupled).
        lr, betas, weight_decay: of the optimiser.
        schedule: "cosine" (linear warm-up, then cosine to 0, each step), "cosine-epochs" (GHN-3: the same in whole
            epochs) or "multistep" (PPUDA: x0.1 at the milestones).
        warmup: share of the steps ("cosine") or epochs ("cosine-epochs") with rising learning rate.
        milestones: shares of the steps at which "multistep" divides the rate by 10.
        clip: largest norm of the gradient.
        gamma: weight of the penalty on predicted parameters (GHN-3 eq. 10).
        penalty: "norm" (sum of the tensors' norms) or "squared" (of their squares, GHN-3 Table 5).
        label_smoothing: of the cross-entropy.
        dropout: whether the networks' own dropout is active.
        precision: of the networks' arithmetic; parameters, loss and the hypernetwork stay in float32.
        architectures: how many of the training architectures are used, the first ones; None: all.
        widths: how wide training architectures are at the papers' scale, "narrow" (PPUDA) or "wide" (GHN-3, ImageNet).
        max_nodes: meta-batches with more nodes than this times ``meta_batch``, or 8 if that is more, are passed over.
        log_every, validate_every: intervals; a checkpoint is written with every log line.
    """

    steps: Positive = 1000
    batch_size: Positive = 32
    meta_batch: Positive = 4
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Rate = 2e-3
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    schedule: Literal["cosine", "cosine-epochs", "multistep"] = "cosine"
    warmup: NonNegative = 0.1
    milestones: tuple[Share, ...] = (2 / 3, 5 / 6)
    clip: Rate = 5.0
    gamma: NonNegative = 0.0
    penalty: Literal["norm", "squared"] = "norm"
    label_smoothing: BelowOne = 0.0
    dropout: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    architectures: Positive | None = None
    widths: Literal["narrow", "wide"] = "narrow"
    max_nodes: Positive = 275
    log_every: Positive = 50
    validate_every: Positive = 250

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step as a share of ``lr``."""
        if self.schedule == "multistep":
            return 0.1 ** sum(step >= milestone * self.steps for milestone in self.milestones)
        if self.schedule == "cosine-epochs":
            epochs = math.ceil(self.steps / steps_per_epoch)
            return self._cosine_epochs(step // steps_per_epoch, epochs, max(1, round(self.warmup * epochs)))
        warmup = self.warmup * self.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def _cosine_epochs(self, epoch: int, epochs: int, warmup: int) -> float:
        """GHN-3: from 1e-5 in equal steps over the warm-up epochs, then cosine; constant within an epoch."""
        if epoch < warmup - 1:
            return (1e-5 + (self.lr - 1e-5) * epoch / (warmup - 1)) / self.lr
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))))


class Ablation(NamedTuple):
    """A row of a table: what it changes of a variant in profiles/, and the hypernetwork's size.

    ``profile``, ``variant``: whose recipe (PPUDA appendix B on CIFAR-10, GHN-3 section 5 on ImageNet) and architecture
    it starts from. ``parameters``: as published. ``changes``: as under ``train.variants``. ``note``: where no reading
    of the row gives that number, what ours is.
    """

    profile: str
    variant: str
    parameters: str
    changes: dict = {}
    note: str = ""


def _ppuda(variant: str, parameters: str = "1.6 M", **changes) -> Ablation:
    return Ablation("cifar10", variant, parameters, changes)


def _m1(parameters: str = "1.6 M", **changes) -> Ablation:
    return _ppuda("ghn2", parameters, meta_batch=1, **changes)


def _imagenet(parameters: str, **changes) -> Ablation:
    return Ablation("imagenet", "ghn3", parameters, changes)


_GHN2_IMAGENET = _GHN2 | {"max_shape": (64, 64, 16, 16), "initialization": "framework"}
_WIDE = _GHN2_IMAGENET | {"hid": 128, "max_shape": (128, 128, 16, 16)}
_NO_TILING = (512, 1024, 11, 11)
_SHARED = "34,731,312: both sweeps share their weights; with two sets it would be 34,863,536, with three 34,995,760"
ABLATIONS: dict[str, Ablation] = {
    # PPUDA Table 8, CIFAR-10; rows from the ninth on compare with "m = 1"
    "GHN-2": _ppuda("ghn2"),
    "1000 training architectures": _ppuda("ghn2", architectures=1000),
    "100 training architectures": _ppuda("ghn2", architectures=100),
    "no normalization": _ppuda("ghn2", weight_norm=False),
    "no virtual edges": _ppuda("ghn2", virtual_edges=False),
    "no LayerNorm": _ppuda("ghn2", layernorm=False),
    "no GatedGNN (MLP)": _ppuda("mlp"),
    "m = 1, trained 8 times longer": _m1(steps=8 * 300 * 703),
    "m = 1": _m1(),
    "no shape encoding": _m1(shape_encoding=False),
    "m = 1, no virtual edges": _m1(virtual_edges=False),
    "stacked GHN, no virtual edges": _m1(stacked=True, virtual_edges=False),
    "stacked GHN": _m1(stacked=True),
    "only forward pass": _m1(directions="forward"),
    "T = 5": _m1(layers=5),
    "fan-out normalization": _m1(fan="out"),
    "MLP decoder": _m1("32 M", decoder="mlp"),
    "no tiling": _m1("135 M", max_shape=_NO_TILING),
    "no tiling, MLP decoder": _m1("4.1 B", max_shape=_NO_TILING, decoder="mlp"),
    "GHN-1": _ppuda("ghn1"),
    "GHN-1 + LayerNorm": _ppuda("ghn1", layernorm=True),
    # GHN-3 Tables 1 and 11 (i to xiii), ImageNet
    "ii: GHN-2/m8, released": Ablation("imagenet", "ghn2", "2.32 M"),
    "iii: GHN-2/m8": _imagenet("2.32 M", **_GHN2_IMAGENET),
    "iv: GHN-3, d = 32": _imagenet("2.37 M", hid=32, layers=1),
    "v: no centrality": _imagenet("6.89 M", centrality=False),
    "vi: no input distance": _imagenet("6.84 M", input_distance=False),
    "vii: GHN-3-T/m8": _imagenet("6.91 M"),
    "viii: no edge embeddings": _imagenet("6.88 M", directions="none"),
    "ix: no edge, centrality, distance embeddings": _imagenet(
        "6.80 M", directions="none", centrality=False, input_distance=False
    ),
    "x: GHN-2, d = 128": _imagenet("34.73 M", **_WIDE),
    "xi: decoder of 4d channels": _imagenet("38.86 M", max_shape=(256, 256, 16, 16)),
    "xii: GHN-3-S/m8": _imagenet("35.81 M", **PRESETS["ghn3-s"]),
    "xiii: GHN-3-XL/m16": _imagenet("654.37 M", **PRESETS["ghn3-xl"], meta_batch=16),
    "GHN-2-S": Ablation("imagenet", "ghn3", "35.0 M", _WIDE | {"layers": 2}, _SHARED),
    "GHN-3-L": _imagenet("214.7 M", **PRESETS["ghn3-l"]),
    # GHN-3 Tables 5 and 10, beside vii (gamma = 3e-5, lambda = 0.01) and viii (self-attention without edges)
    "squared penalty": _imagenet("6.91 M", penalty="squared"),
    "no penalty on predicted parameters": _imagenet("6.91 M", gamma=0.0),
    "no backward embedding": _imagenet("6.90 M", directions="forward"),
    "no attention (MLP)": _imagenet("6.74 M", attention=False),
    "gamma = 0, lambda = 0.1": _imagenet("6.91 M", gamma=0.0, weight_decay=0.1),
    "gamma = 0, lambda = 0.3": _imagenet("6.91 M", gamma=0.0, weight_decay=0.3),
    "gamma = 1e-4": _imagenet("6.91 M", gamma=1e-4),
    # The released code of GHN-3
    "misaligned meta-batches": _imagenet("6.91 M", batching="misaligned"),
}
"""Rows of PPUDA Table 8 and GHN-3 Tables 1, 5, 10 and 11, equal ones once. "No tiling" is the largest tensor that gives
both sizes published for it; the wider first layers of classifiers without global pooling would still be tiled."""
