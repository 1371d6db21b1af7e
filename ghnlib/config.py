"""What is chosen about a hypernetwork and its training. Free of torch: parameters are checked before anything heavy."""

import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ghnlib.bounds import Batch, BelowOne, Bits, Classes, Depth, FromList, Kernel, NonNegative, Positive, Share, Width

CHECKED = ConfigDict(strict=True, extra="forbid")
MOST_PRIMITIVES = 100


@dataclass(frozen=True, config=CHECKED)
class GHNConfig:
    """A hypernetwork's architecture. ``PRESETS`` names those of the papers.

    Attributes:
        encoder: "mlp", "gated_gnn" (GHN-1, GHN-2) or "graphormer" (GHN-3).
        num_classes: classes of the networks whose classifiers are predicted.
        hid: hidden size d.
        layers: Graphormer layers, or forward-backward sweeps T of the gated GNN.
        heads: attention heads of the Graphormer.
        max_shape: largest tensor decoded (out, in, S, S); larger ones are tiled.
        decoder: of tensors with two or more axes, "conv" or "mlp" (PPUDA Table 8), or "lowrank": of all, products of
            two factors (LoGAH), see ``LowRankDecoder``.
        rank: of these factors.
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
        initialization: before training, "framework" (GHN-1, GHN-2), "ghn3" (small last layers and embeddings), or
            "identity": decoded matrices begin near the identity, so that a channel means the same in all networks.
        convention: which graphs it reads: "correct", "ghn3" or "ppuda" (as the released hypernetworks expect).
        primitives: beyond the papers' vocabulary, in the order of their embeddings; names that
            ``ghnlib.graphs.vocabulary`` has registered.

    Raises:
        ValueError: a value of another type, or an impossible one; the message names it and what is allowed.
    """

    encoder: Literal["mlp", "gated_gnn", "graphormer"] = "graphormer"
    num_classes: Classes = 10
    hid: Width = 64
    layers: Depth = 3
    heads: Width = 8
    max_shape: Annotated[tuple[Width, Width, Kernel, Kernel], FromList] = (64, 64, 11, 11)
    decoder: Literal["conv", "mlp", "lowrank"] = "conv"
    rank: Annotated[int, Field(ge=2, le=1024)] = 32
    weight_norm: bool = True
    fan: Literal["in", "out"] = "in"
    shape_encoding: bool = True
    virtual_edges: bool = True
    directions: Literal["both", "forward", "none", "synchronous"] = "both"
    stacked: bool = False
    passing: bool = True
    modules: Depth = 1
    anytime: bool = False
    attention: bool = True
    centrality: bool = True
    input_distance: bool = True
    batching: Literal["aligned", "misaligned"] = "aligned"
    layernorm: bool = True
    window: Literal["centre", "corner"] = "centre"
    initialization: Literal["framework", "ghn3", "identity"] = "framework"
    convention: Literal["correct", "ghn3", "ppuda"] = "correct"
    primitives: Annotated[tuple[str, ...], FromList, Field(max_length=MOST_PRIMITIVES)] = ()

    def __post_init__(self):
        if self.max_shape[2] != self.max_shape[3]:
            raise ValueError(f"max_shape={self.max_shape} must be (out, in, S, S)")
        if self.hid % 4:
            raise ValueError(f"hid={self.hid} must be a multiple of 4: four shape embeddings share it")
        if self.directions == {"gated_gnn": "none", "graphormer": "synchronous"}.get(self.encoder):
            raise ValueError(f"directions={self.directions!r} is not for the {self.encoder}: both or forward is")
        if len(set(self.primitives)) < len(self.primitives):
            raise ValueError(f"primitives={self.primitives} names one twice")
        if self.primitives and self.convention != "correct":
            raise ValueError(f"primitives are for convention='correct', {self.convention!r} has those of the papers")
        if self.encoder == "graphormer" and self.hid % self.heads:
            raise ValueError(f"hid={self.hid} must be a multiple of heads={self.heads}")
        if self.decoder == "lowrank":
            self._check_low_rank()

    def _check_low_rank(self) -> None:
        if self.initialization == "identity":
            raise ValueError("initialization='identity' is not for decoder='lowrank', whose products have no full rank "
                             "to begin with: framework or ghn3 is")  # fmt: skip
        longest = max(self.max_shape[:2]) * self.max_shape[2]
        if self.num_classes > longest:
            raise ValueError(f"num_classes={self.num_classes} is more than the {longest} rows that decoder='lowrank' "
                             f"has with max_shape={self.max_shape}: raise max_shape")  # fmt: skip

    @property
    def cutoff(self) -> int:
        """Largest distance of a virtual edge."""
        return 50 if self.virtual_edges else 1


_GHN2 = {"encoder": "gated_gnn", "hid": 32, "layers": 1, "max_shape": (64, 64, 11, 11), "window": "corner"}


def _ghn3(hid: int, layers: int, heads: int) -> dict:
    size = {"hid": hid, "layers": layers, "heads": heads, "max_shape": (hid, hid, 16, 16), "num_classes": 1000}
    return {**size, "initialization": "ghn3"}


_PLAIN = {"weight_norm": False, "virtual_edges": False, "layernorm": False}
_VANILLA = {"max_shape": (64, 64, 7, 7), "shape_encoding": False, "decoder": "mlp", "layers": 5, "stacked": True}
PRESETS: dict[str, dict] = {
    "ghn": _GHN2 | _PLAIN | _VANILLA,
    "mlp": _GHN2 | {"encoder": "mlp"},
    "ghn1": _GHN2 | _PLAIN,
    "ghn2": _GHN2,
    "ghn3-t": _ghn3(64, 3, 8),
    "ghn3-s": _ghn3(128, 5, 16),
    "ghn3-l": _ghn3(256, 12, 16),
    "ghn3-xl": _ghn3(384, 24, 16),
}
"""The GHN of 2018 (one GNN for all blocks, T = 5 forward-backward sweeps, as in the section ``anytime``), GHN-1, GHN-2
and MLP for CIFAR-10 (PPUDA appendix B), GHN-3 for ImageNet (GHN-3 Table 1)."""


@dataclass(frozen=True, config=CHECKED)
class Recipe:
    """How a hypernetwork is trained. Lengths are in steps.

    Attributes:
        steps: parameter updates.
        batch_size: images a step, the same for all networks of the meta-batch.
        meta_batch: networks a step.
        optimizer: "adam" (weight decay coupled) or "adamw" (decoupled).
        lr, betas, weight_decay: of the optimiser.
        schedule: "cosine" (linear warm-up, then cosine to 0, each step), "cosine-epochs" (GHN-3: the same in whole
            epochs) or "multistep" (PPUDA: x0.1 at the milestones; GHN 2018: x0.5 at 1/2 and 3/4).
        warmup: share of the steps ("cosine") or epochs ("cosine-epochs") with rising learning rate.
        milestones, decay: shares of the steps at which "multistep" multiplies the rate, and by what.
        clip: largest norm of the gradient.
        gamma: weight of the penalty on predicted parameters (GHN-3 eq. 10).
        penalty: "norm" (sum of the tensors' norms) or "squared" (of their squares, GHN-3 Table 5).
        label_smoothing: of the cross-entropy.
        dropout: whether the networks' own dropout is active.
        precision: of the networks' arithmetic; parameters, loss and the hypernetwork stay in float32. With "float16"
            classification layers do too, and losses are scaled so that small gradients are not lost (the papers').
        bits: that the networks' weights are rounded to in training, see ``quantised``; None: they are not.
        tf32: whether GPUs may round the factors of float32 products to 11 bits, several times as fast.
        architectures: how many of the training architectures are used, the first ones; None: all.
        extra_share: probability that a network of a meta-batch is one of one's own (``deepnets.extra``) instead of the
            architecture drawn.
        widths: how wide training architectures are at the papers' scale, "narrow" (PPUDA) or "wide" (GHN-3, ImageNet).
        max_nodes: meta-batches with more nodes than this times ``meta_batch``, or 8 if that is more, are passed over.
        log_every, validate_every: intervals; a validation has a log line, a checkpoint is written with every line.
    """

    steps: Annotated[int, Field(gt=0, le=10**8)] = 1000
    batch_size: Batch = 32
    meta_batch: Annotated[int, Field(gt=0, le=4096)] = 4
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0, le=1e3)] = 2e-3
    betas: Annotated[tuple[BelowOne, BelowOne], FromList] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    schedule: Literal["cosine", "cosine-epochs", "multistep"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    milestones: Annotated[tuple[Share, ...], FromList, Field(max_length=100)] = (2 / 3, 5 / 6)
    decay: Share = 0.1
    clip: Annotated[float, Field(gt=0, le=1e12)] = 5.0
    gamma: NonNegative = 0.0
    penalty: Literal["norm", "squared"] = "norm"
    label_smoothing: BelowOne = 0.0
    dropout: bool = True
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    bits: Bits | None = None
    tf32: bool = False
    architectures: Positive | None = None
    extra_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    widths: Literal["narrow", "wide"] = "narrow"
    max_nodes: Annotated[int, Field(gt=0, le=10**6)] = 275
    log_every: Annotated[int, Field(gt=0, le=10**8)] = 50
    validate_every: Annotated[int, Field(gt=0, le=10**8)] = 250

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step as a share of ``lr``."""
        if self.schedule == "multistep":
            return self.decay ** sum(step >= milestone * self.steps for milestone in self.milestones)
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
