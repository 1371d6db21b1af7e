"""What is chosen about a hypernetwork and its training. Free of torch: parameters are checked before anything heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ghnlib.graph import CONVENTIONS

CHOICES = {
    "encoder": ("mlp", "gated_gnn", "graphormer"),
    "decoder": ("conv", "mlp"),
    "directions": ("both", "forward", "none", "synchronous"),
    "batching": ("aligned", "misaligned"),
    "fan": ("in", "out"),
    "window": ("centre", "corner"),
    "initialization": ("framework", "ghn3"),
    "convention": CONVENTIONS,
}


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

    encoder: str = "graphormer"
    num_classes: int = 10
    hid: int = 64
    layers: int = 3
    heads: int = 8
    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11)
    decoder: str = "conv"
    weight_norm: bool = True
    fan: str = "in"
    shape_encoding: bool = True
    virtual_edges: bool = True
    directions: str = "both"
    stacked: bool = False
    passing: bool = True
    modules: int = 1
    anytime: bool = False
    attention: bool = True
    centrality: bool = True
    input_distance: bool = True
    batching: str = "aligned"
    layernorm: bool = True
    window: str = "centre"
    initialization: str = "framework"
    convention: str = "correct"

    def __post_init__(self):
        object.__setattr__(self, "max_shape", tuple(self.max_shape))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
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


def _ghn12(**changes) -> dict:
    return {
        "encoder": "gated_gnn",
        "hid": 32,
        "layers": 1,
        "max_shape": (64, 64, 11, 11),
        "window": "corner",
        **changes,
    }


def _ghn3(hid: int, layers: int, heads: int) -> dict:
    size = {"hid": hid, "layers": layers, "heads": heads, "max_shape": (hid, hid, 16, 16), "num_classes": 1000}
    return {**size, "initialization": "ghn3"}


PRESETS: dict[str, dict] = {
    "mlp": _ghn12(encoder="mlp"),
    "ghn1": _ghn12(weight_norm=False, virtual_edges=False, layernorm=False),
    "ghn2": _ghn12(),
    "ghn3-t": _ghn3(64, 3, 8),
    "ghn3-s": _ghn3(128, 5, 16),
    "ghn3-l": _ghn3(256, 12, 16),
    "ghn3-xl": _ghn3(384, 24, 16),
}
"""GHN-1, GHN-2 and MLP for CIFAR-10 (PPUDA appendix B), GHN-3 for ImageNet (GHN-3 Table 1)."""


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
        max_nodes: meta-batches with more nodes than this share times ``meta_batch`` are passed over.
        log_every, validate_every: intervals; a checkpoint is written with every log line.
    """

    steps: int = 1000
    batch_size: int = 32
    meta_batch: int = 4
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["cosine", "cosine-epochs", "multistep"] = "cosine"
    warmup: float = 0.1
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    clip: float = 5.0
    gamma: float = 0.0
    penalty: Literal["norm", "squared"] = "norm"
    label_smoothing: float = 0.0
    dropout: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    architectures: int | None = None
    max_nodes: int = 275
    log_every: int = 50
    validate_every: int = 250

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step as a share of ``lr``.

        Raises:
            ValueError: an unknown schedule.
        """
        if self.schedule == "cosine":
            warmup = self.warmup * self.steps
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        if self.schedule == "multistep":
            return 0.1 ** sum(step >= milestone * self.steps for milestone in self.milestones)
        if self.schedule == "cosine-epochs":
            epochs = math.ceil(self.steps / steps_per_epoch)
            return self._cosine_epochs(step // steps_per_epoch, epochs, max(1, round(self.warmup * epochs)))
        raise ValueError(f"schedule={self.schedule!r} is not one of cosine, cosine-epochs, multistep")

    def _cosine_epochs(self, epoch: int, epochs: int, warmup: int) -> float:
        """GHN-3: from 1e-5 in equal steps over the warm-up epochs, then cosine; constant within an epoch."""
        if epoch < warmup - 1:
            return (1e-5 + (self.lr - 1e-5) * epoch / (warmup - 1)) / self.lr
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))))


_BOTH = {"betas": (0.9, 0.999), "clip": 5.0, "meta_batch": 8, "max_nodes": 275}
_PPUDA = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-5, "schedule": "multistep", **_BOTH}
_PPUDA |= {"steps": 300 * 703, "batch_size": 64}  # epochs of 45,000 images, rate x0.1 at 200 and 250
_GHN3 = {"optimizer": "adamw", "lr": 4e-4, "weight_decay": 1e-2, "schedule": "cosine-epochs", "warmup": 5 / 75, **_BOTH}
_GHN3 |= {"steps": 75 * 9618, "batch_size": 128, "gamma": 3e-5, "label_smoothing": 0.1}  # 1,231,167 images
_GHN3 |= {"precision": "bfloat16"}  # in place of float16 with scaled losses
RECIPES: dict[str, dict] = {
    "mlp": _PPUDA,
    "ghn1": {**_PPUDA, "meta_batch": 1},
    "ghn2": _PPUDA,
    **dict.fromkeys(("ghn3-t", "ghn3-s", "ghn3-l", "ghn3-xl"), _GHN3),
}
"""How the hypernetworks of ``PRESETS`` are trained: GHN-1, GHN-2 and MLP on CIFAR-10 (PPUDA appendix B), GHN-3 on
ImageNet (GHN-3 section 5; its m16 models with ``meta_batch`` 16). Nodes: at most 2200 in a meta-batch of 8."""


class Ablation(NamedTuple):
    """A row of a table: what it changes of a preset and its recipe, and the hypernetwork's size.

    ``parameters``: as published. ``note``: where no reading of the row gives that number, what ours is.
    """

    preset: str
    parameters: str
    ghn: dict = {}
    recipe: dict = {}
    note: str = ""

    def resolved(self) -> tuple[GHNConfig, Recipe]:
        """The whole configuration of the row."""
        return GHNConfig(**PRESETS[self.preset] | self.ghn), Recipe(**RECIPES[self.preset] | self.recipe)


_M1 = {"meta_batch": 1}
_IMAGENET = {"num_classes": 1000, "max_shape": (64, 64, 16, 16)}
_WIDE = {"num_classes": 1000, "hid": 128, "max_shape": (128, 128, 16, 16)}
_NO_TILING = {"max_shape": (512, 1024, 11, 11)}
_NO_NODES = {"centrality": False, "input_distance": False}
_NO_PENALTY = {"gamma": 0.0}
_GHN2_IMAGENET = {"steps": 150 * 4809, "batch_size": 256, "milestones": (100 / 150, 140 / 150), "label_smoothing": 0.1}
_SHARED = "34,731,312: both sweeps share their weights; with two sets it would be 34,863,536, with three 34,995,760"
ABLATIONS: dict[str, Ablation] = {
    # PPUDA Table 8, CIFAR-10; rows from the ninth on compare with "m = 1"
    "GHN-2": Ablation("ghn2", "1.6 M"),
    "1000 training architectures": Ablation("ghn2", "1.6 M", recipe={"architectures": 1000}),
    "100 training architectures": Ablation("ghn2", "1.6 M", recipe={"architectures": 100}),
    "no normalization": Ablation("ghn2", "1.6 M", {"weight_norm": False}),
    "no virtual edges": Ablation("ghn2", "1.6 M", {"virtual_edges": False}),
    "no LayerNorm": Ablation("ghn2", "1.6 M", {"layernorm": False}),
    "no GatedGNN (MLP)": Ablation("mlp", "1.6 M"),
    "m = 1, trained 8 times longer": Ablation("ghn2", "1.6 M", recipe=_M1 | {"steps": 8 * _PPUDA["steps"]}),
    "m = 1": Ablation("ghn2", "1.6 M", recipe=_M1),
    "no shape encoding": Ablation("ghn2", "1.6 M", {"shape_encoding": False}, _M1),
    "m = 1, no virtual edges": Ablation("ghn2", "1.6 M", {"virtual_edges": False}, _M1),
    "stacked GHN, no virtual edges": Ablation("ghn2", "1.6 M", {"stacked": True, "virtual_edges": False}, _M1),
    "stacked GHN": Ablation("ghn2", "1.6 M", {"stacked": True}, _M1),
    "only forward pass": Ablation("ghn2", "1.6 M", {"directions": "forward"}, _M1),
    "T = 5": Ablation("ghn2", "1.6 M", {"layers": 5}, _M1),
    "fan-out normalization": Ablation("ghn2", "1.6 M", {"fan": "out"}, _M1),
    "MLP decoder": Ablation("ghn2", "32 M", {"decoder": "mlp"}, _M1),
    "no tiling": Ablation("ghn2", "135 M", _NO_TILING, _M1),
    "no tiling, MLP decoder": Ablation("ghn2", "4.1 B", _NO_TILING | {"decoder": "mlp"}, _M1),
    "GHN-1": Ablation("ghn1", "1.6 M"),
    "GHN-1 + LayerNorm": Ablation("ghn1", "1.6 M", {"layernorm": True}),
    # GHN-3 Table 1, ImageNet
    "GHN-2, ImageNet": Ablation("ghn2", "2.3 M", _IMAGENET, _GHN3),
    "GHN-2-S": Ablation("ghn2", "35.0 M", _WIDE | {"layers": 2}, _GHN3, _SHARED),
    "GHN-3-T": Ablation("ghn3-t", "6.9 M"),
    "GHN-3-S": Ablation("ghn3-s", "35.8 M"),
    "GHN-3-L": Ablation("ghn3-l", "214.7 M"),
    "GHN-3-XL": Ablation("ghn3-xl", "654.4 M"),
    # GHN-3 Tables 5 and 10
    "GHN-3-T, gamma = 3e-5, lambda = 0.01": Ablation("ghn3-t", "6.91 M"),
    "squared penalty": Ablation("ghn3-t", "6.91 M", recipe={"penalty": "squared"}),
    "no penalty on predicted parameters": Ablation("ghn3-t", "6.91 M", recipe=_NO_PENALTY),
    "no backward embedding": Ablation("ghn3-t", "6.90 M", {"directions": "forward"}),
    "no edge embedding, self-attention": Ablation("ghn3-t", "6.88 M", {"directions": "none"}),
    "no attention (MLP)": Ablation("ghn3-t", "6.74 M", {"attention": False}),
    "gamma = 0, lambda = 0.1": Ablation("ghn3-t", "6.91 M", recipe=_NO_PENALTY | {"weight_decay": 0.1}),
    "gamma = 0, lambda = 0.3": Ablation("ghn3-t", "6.91 M", recipe=_NO_PENALTY | {"weight_decay": 0.3}),
    "gamma = 1e-4": Ablation("ghn3-t", "6.91 M", recipe={"gamma": 1e-4}),
    # GHN-3 Table 11
    "ii: GHN-2/m8, released": Ablation("ghn2", "2.32 M", _IMAGENET, _GHN2_IMAGENET),
    "iii: GHN-2/m8": Ablation("ghn2", "2.32 M", _IMAGENET, _GHN3),
    "iv: GHN-3, d = 32": Ablation("ghn3-t", "2.37 M", _IMAGENET | {"hid": 32, "layers": 1}),
    "v: no centrality": Ablation("ghn3-t", "6.89 M", {"centrality": False}),
    "vi: no input distance": Ablation("ghn3-t", "6.84 M", {"input_distance": False}),
    "vii: GHN-3-T/m8": Ablation("ghn3-t", "6.91 M"),
    "viii: no edge embeddings": Ablation("ghn3-t", "6.88 M", {"directions": "none"}),
    "ix: no edge, centrality, distance embeddings": Ablation("ghn3-t", "6.80 M", _NO_NODES | {"directions": "none"}),
    "x: GHN-2, d = 128": Ablation("ghn2", "34.73 M", _WIDE, _GHN3),
    "xi: decoder of 4d channels": Ablation("ghn3-t", "38.86 M", {"max_shape": (256, 256, 16, 16)}),
    "xii: GHN-3-S/m8": Ablation("ghn3-s", "35.81 M"),
    "xiii: GHN-3-XL/m16": Ablation("ghn3-xl", "654.37 M", recipe={"meta_batch": 16}),
    # The released code of GHN-3
    "misaligned meta-batches": Ablation("ghn3-t", "6.91 M", {"batching": "misaligned"}),
}
"""Rows of PPUDA Table 8 and GHN-3 Tables 1, 5, 10 and 11. "No tiling" is the largest tensor that gives both sizes
published for it; the wider first layers of classifiers without global pooling would still be tiled."""
