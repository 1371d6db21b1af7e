"""The one-shot model: parameters that architectures share, which rank them (GHN 2018 Table 3; Bender et al. 2018)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import ImageSet, mix
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.training.networks import TrainingRecipe

ONE_SHOT, CEILING = "one-shot", "ground truth, second seed"
"""In rankings: this model, and the networks trained again, with which no ranking can agree better."""


def train_one_shot(
    architectures: Sequence[Architecture], images: ImageSet, recipe: TrainingRecipe, seed: int
) -> dict[tuple[str, torch.Size], Tensor]:
    """Parameters that all architectures share, each belonging to its name and shape. Each step of SGD (momentum, cosine
    schedule) trains those of one architecture drawn at random; of the recipe: steps, rate, images."""
    torch.manual_seed(seed)
    chosen = np.random.default_rng(seed).integers(len(architectures), size=recipe.steps)
    shared: dict[tuple[str, torch.Size], nn.Parameter] = {}
    networks: dict[int, nn.Module] = {}
    for index in np.unique(chosen):
        networks[index] = net = architectures[index].build(device="cpu").to(images.device).train()
        for name, parameter in net.named_parameters():
            shared.setdefault((name, parameter.shape), parameter)
        net.to("meta")  # of its parameters only those that are shared stay
    optimizer = torch.optim.SGD(shared.values(), recipe.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    for index, (x, y) in zip(chosen, images.stream(recipe.batch_size, seed, augment=recipe.augment)):
        net = networks[index]
        own = {name: shared[name, parameter.shape] for name, parameter in net.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(functional_call(net, own, (x,)), y).backward()
        norm = nn.utils.clip_grad_norm_(own.values(), 5.0)
        if norm.isfinite():  # one architecture that overflows must not spoil what the others share
            optimizer.step()
        schedule.step()
    return {key: parameter.detach() for key, parameter in shared.items()}


def one_shot_scores(
    shared: Mapping[tuple[str, torch.Size], Tensor], architectures: Sequence[Architecture], images: ImageSet, seed: int,
    score: str = "accuracy",
) -> pd.DataFrame:  # fmt: skip
    """One row a network: ``accuracy`` (percent, or another ``score`` of ``top_accuracies``) with the shared parameters,
    batch norm with statistics of the batch; ``shared``, the share of its parameter values that they provide (the others
    are random)."""
    rows = []
    for i, architecture in enumerate(architectures):
        torch.manual_seed(mix(seed, i))
        net = architecture.build(device="cpu").to(images.device)
        own = {name: shared[name, p.shape] for name, p in net.named_parameters() if (name, p.shape) in shared}
        known = sum(p.numel() for p in own.values()) / architecture.num_params
        rows.append({"accuracy": top_accuracies(net, images, parameters=own)[score], "shared": known})
    return pd.DataFrame(rows)
