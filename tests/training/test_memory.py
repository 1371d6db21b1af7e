"""What a training is said to need, beside what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from shared import SHAPE, digits, pool, tiny

from ghnlib.config import Recipe
from ghnlib.training.memory import describe, saved_bytes, training_bytes
from ghnlib.training.step import MetaTrainer


def test_parts_are_what_a_training_keeps():
    ghn, recipe, networks = tiny(), Recipe(batch_size=8, meta_batch=3), pool("train", 12)[:3]
    told = training_bytes(ghn, recipe, networks, torch.empty(1, *SHAPE))
    trainer = MetaTrainer(ghn, recipe, 1)
    images, labels = next(digits().train.batches(8))
    trainer.step(networks, images, labels, seed=0)
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if v.dim()]
    kept = [*ghn.parameters(), *(p.grad for p in ghn.parameters() if p.grad is not None), *states]
    assert sum(t.numel() * 4 for t in kept) == pytest.approx(told["hypernetwork"], rel=0.2)  # some have no gradient
    nets = [architecture.build(device="cpu").train() for architecture in networks]
    activations = [saved_bytes(lambda net=net: F.cross_entropy(net(images), labels)) for net in nets]
    own = [sum(p.numel() * 4 for p in net.parameters()) for net in nets]
    assert told["network"] == pytest.approx(max(a - b for a, b in zip(activations, own)), rel=0.02)
    assert told["predictions"] > 2 * sum(own)
    larger = training_bytes(ghn, Recipe(batch_size=16, meta_batch=3), networks, torch.empty(1, *SHAPE))
    assert larger["network"] > 1.9 * told["network"] and larger["predictions"] == told["predictions"]


def test_each_storage_counts_once():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 400
    assert saved_bytes(lambda: (x * 2).exp().sum()) == 400


def test_a_line_tells_the_sum_and_the_parts():
    assert describe({"a": 2**30, "b": 2**29}) == "memory: about 1.50 GiB (a 1.00, b 0.50)"
