"""One update of a hypernetwork: few operator calls, one wait for the device."""

import runpy

import pytest
import torch
from shared import ROOT, digits, pool, tiny

from ghnlib.config import Recipe
from ghnlib.hypernetwork.quantising import quantised
from ghnlib.training.loop import train_ghn
from ghnlib.training.step import MetaTrainer

counted = runpy.run_path(str(ROOT / "benchmarks" / "counting.py"))["counted"]
CALLS = {"mlp": 4600, "gated_gnn": 9000, "graphormer": 5350}
"""Operator calls of a step with five small networks, at most."""


@pytest.mark.parametrize("encoder", CALLS)
def test_a_step_waits_once_and_calls_few_operators(encoder):
    trainer, networks = MetaTrainer(tiny(encoder), Recipe(meta_batch=5, gamma=3e-5), 1), pool("train", 12)[:5]
    images, labels = next(digits().train.batches(8))
    trainer.step(networks, images, labels, seed=0)
    with counted() as counts:
        trainer.step(networks, images, labels, seed=1)
    assert counts["waits"] == 1
    assert CALLS[encoder] / 2 < counts["calls"] <= CALLS[encoder] and counts["launches"] < counts["calls"]


@pytest.mark.parametrize("encoder", CALLS)
def test_predictions_on_another_device_wait_for_no_copy(encoder):
    ghn = tiny(encoder).to("meta")
    with counted() as counts:
        for prediction in ghn([architecture.graph for architecture in pool("train", 12)[:3]]):
            assert all(value.device.type == "meta" for value in prediction.values())
    assert counts["waits"] == 0 < counts["launches"]


def half_precision(scale=65536.0, **changes):
    trainer = MetaTrainer(tiny(), Recipe(meta_batch=2, precision="float16", gamma=1e-3, **changes), 1)
    trainer.scaler = trainer.parts["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def take_step(trainer):
    return trainer.step(pool("train", 12)[:2], *next(digits().train.batches(8)), seed=0)


def test_the_scale_of_losses_changes_neither_gradient_nor_penalty():
    low, high = (half_precision(scale, dropout=False, clip=1e9) for scale in (256.0, 2048.0))
    assert take_step(low) == pytest.approx(take_step(high), rel=1e-3)
    gradients = [torch.cat([p.grad.flatten() for p in t.ghn.parameters() if p.grad is not None]) for t in (low, high)]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9999


def test_an_overflow_skips_the_update_halves_the_scale_and_counts_no_network():
    trainer = half_precision(2.0**60)
    before = [p.detach().clone() for p in trainer.ghn.parameters()]
    found = take_step(trainer)
    assert (found["overflow"], found["skipped"], trainer.scaler.get_scale()) == (1, 0, 2.0**59)
    assert all(map(torch.equal, before, trainer.ghn.parameters())) and found["loss"] > 0
    trainer = half_precision(1024.0)
    assert take_step(trainer)["overflow"] == 0 and not all(map(torch.equal, before, trainer.ghn.parameters()))


def test_the_scale_does_not_fall_below_that_of_ghn3():
    trainer = half_precision(1500.0)
    run = trainer._run_child
    trainer._run_child = lambda *a: (run(*a)[0], [g * float("inf") for g in run(*a)[1]])
    assert (take_step(trainer)["overflow"], trainer.scaler.get_scale()) == (1, 1024.0)


@pytest.mark.parametrize("networks", [1, 2])
def test_a_step_without_any_finite_network_keeps_the_scale_and_the_weights(networks):
    trainer = half_precision()
    before = [p.detach().clone() for p in trainer.ghn.parameters()]
    images, labels = next(digits().train.batches(8))
    for _ in range(2):
        found = trainer.step(pool("train", 12)[:networks], images * float("nan"), labels, seed=0)
        assert (found["overflow"], found["skipped"], trainer.scaler.get_scale()) == (0, networks, 65536.0)
    assert all(map(torch.equal, before, trainer.ghn.parameters()))
    assert take_step(trainer)["skipped"] == 0


def test_gradients_that_no_scale_saves_count_as_dropped_networks():
    trainer = half_precision(1.0)
    run = trainer._run_child
    trainer._run_child = lambda *a: (run(*a)[0], [g * float("inf") for g in run(*a)[1]])
    found = take_step(trainer)
    assert (found["overflow"], found["skipped"]) == (0, 2)


def test_classification_layers_stay_in_float32():
    trainer, network = half_precision(), pool("train", 12)[0]
    seen, build = [], trainer._build

    def watched(architecture):
        net = build(architecture)
        for module in net.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(lambda module, _, out: seen.append((type(module).__name__, out.dtype)))
        return net

    trainer._network = watched
    trainer.step([network], *next(digits().train.batches(8)), seed=0)
    assert seen[0] == ("Conv2d", torch.float16) and seen[-1] == ("Linear", torch.float32)


def test_the_scale_is_part_of_the_checkpoint():
    first, second = half_precision(2.0**60), half_precision()
    take_step(first)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 2.0**59
    assert "scaler" not in MetaTrainer(tiny(), Recipe(), 1).state_dict()


@pytest.mark.parametrize("allowed", [True, False])
def test_rounded_products_are_for_recipes_that_ask_for_them(tmp_path, allowed):
    recipe = Recipe(steps=1, batch_size=8, meta_batch=2, tf32=allowed)
    train_ghn(tiny(), pool("train", 12), digits().train, recipe, tmp_path, 0)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed


def test_what_waits_is_counted():
    with counted() as counts:
        values = torch.zeros(2)
        for wait in (values.tolist, values[0].item, lambda: bool(values[0] == 0), lambda: float(values[1])):
            wait()
        values.to("meta")
        values.to("meta", non_blocking=True)
    assert counts["waits"] == 5


def test_networks_of_few_bits_are_trained_straight_through():
    exact, rounded = (MetaTrainer(tiny(), Recipe(meta_batch=1, dropout=False, bits=bits), 1) for bits in (None, 3))
    (architecture,), (images, labels) = pool("train", 12)[:1], next(digits().train.batches(8))
    (parameters,) = exact.ghn([architecture.graph])
    leaves = {name: v.detach().requires_grad_() for name, v in quantised(parameters, 3).items()}
    (loss, *_), expected = exact._run_child(architecture, leaves, images, labels, 0)
    (found, *_), gradients = rounded._run_child(architecture, parameters, images, labels, 0)
    assert found == loss != exact._run_child(architecture, parameters, images, labels, 0)[0][0]
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other)
