"""Profiles at the papers' scale train as long as the papers do: epochs from steps, images a step and images."""

import pytest
from shared import params

from ghnlib.experiments.anytime.blocks import REGULARISED
from ghnlib.training.networks import SCHEDULES

IMAGES = {"cifar10": 45_000, "imagenet": 1_231_167}
"""Training images of the papers: without the last 5,000 of CIFAR-10, and without 50 of each class of ImageNet."""


def epochs(profile, steps, batch_size):
    return steps * batch_size / IMAGES[profile]


@pytest.mark.parametrize(("profile", "variant", "published", "batch_size"), [
    ("cifar10", "mlp", 300, 64), ("cifar10", "ghn1", 300, 64), ("cifar10", "ghn2", 300, 64), ("cifar10", "ghn3", 300, 64),
    ("ablations-cifar10", "ghn2-m1", 300, 64), ("ablations-cifar10", "ghn2-m1-long", 2400, 64),
    ("imagenet", "mlp", 300, 256), ("imagenet", "ghn1", 300, 256), ("imagenet", "ghn2", 150, 256),
    ("imagenet", "ghn3", 75, 128), ("ablations-imagenet", "ghn3-xl-m16", 75, 128), ("ablations-imagenet", "ghn2-retrained", 75, 128),
])  # fmt: skip
def test_hypernetworks_are_trained_for_the_papers_epochs(profile, variant, published, batch_size):
    recipe = params(profile).train.recipe_of(variant)
    assert recipe.batch_size == batch_size
    assert epochs(profile.rpartition("-")[2], recipe.steps, batch_size) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("profile", "variant", "milestones"), [
    ("cifar10", "ghn2", (200, 250)), ("imagenet", "mlp", (200, 250)), ("imagenet", "ghn2", (100, 140)),
])  # fmt: skip
def test_the_rate_falls_at_the_papers_epochs(profile, variant, milestones):
    recipe = params(profile).train.recipe_of(variant)
    found = [epochs(profile, share * recipe.steps, recipe.batch_size) for share in recipe.milestones]
    assert recipe.schedule == "multistep" and found == pytest.approx(milestones, rel=0.005)


@pytest.mark.parametrize(("profile", "variant"), [("cifar10", "ghn3"), ("imagenet", "ghn3")])
def test_the_rate_of_ghn3_rises_for_five_epochs(profile, variant):
    recipe = params(profile).train.recipe_of(variant)
    assert round(recipe.warmup * epochs(profile, recipe.steps, recipe.batch_size)) == 5


def of_cifar10():
    """What networks are trained for on CIFAR-10, name -> steps, section ``sgd``, published epochs, batch and rate."""
    found = params("cifar10")
    analysis, anytime = found.analysis, found.anytime
    plain, longer = analysis.chosen.steps
    return {
        "property ground truth": (analysis.property_steps, analysis.sgd, 50, 96, 0.025),
        "chosen by regression, plain": (plain, analysis.sgd, 50, 96, 0.025),
        "chosen by regression, longer": (longer, analysis.sgd, 600, 96, 0.025),
        "activations": (analysis.activation_steps, analysis.sgd, 50, 96, 0.025),
        "blocks, ground truth": (anytime.blocks.steps, anytime.sgd, 50, 64, 0.025),
        "blocks, chosen": (anytime.search.steps, anytime.sgd, 600, 64, 0.025),
        "anytime networks": (anytime.exits.steps, anytime.exits.sgd, 300, 64, 0.1),
        "GHN 2018": (anytime.recipe.steps, anytime.recipe, 200, 64, 1e-3),
    }


@pytest.mark.parametrize("what", of_cifar10())
def test_networks_are_trained_for_the_papers_epochs_on_cifar10(what):
    steps, settings, published, batch_size, lr = of_cifar10()[what]
    assert (settings.batch_size, settings.lr) == (batch_size, lr)
    assert epochs("cifar10", steps, settings.batch_size) == pytest.approx(published, rel=0.005)


def test_the_rate_of_anytime_networks_falls_at_epochs_150_and_225():
    schedule = SCHEDULES[params("cifar10").anytime.exits.sgd.schedule]
    assert [schedule(epoch / 300) for epoch in (0, 149, 150, 224, 225)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_chosen_blocks_have_the_drop_path_and_auxiliary_loss_of_ghn_2018():
    assert REGULARISED == {"drop_path": 0.4, "auxiliary_weight": 0.5}


def test_few_steps_of_blocks_are_the_papers():
    blocks = params("cifar10").anytime.blocks
    assert [round(share * blocks.steps) for share in blocks.shares] == pytest.approx([10, 100, 200, 1000], rel=0.02)


def test_networks_are_trained_for_an_epoch_on_imagenet():
    found = params("imagenet")
    analysis, evaluate, finetune = found.analysis, found.evaluate, found.finetune
    assert evaluate.epochs == 1 and evaluate.sgd == analysis.sgd
    assert (analysis.sgd.batch_size, analysis.sgd.lr, analysis.sgd.weight_decay) == (128, 0.1, 3e-5)
    assert epochs("imagenet", analysis.property_steps, 128) == pytest.approx(1, rel=0.005)
    assert (analysis.score, analysis.converged, analysis.noise) == ("top5", 10.0, 0.18)
    assert (finetune.budgets, finetune.batch_size, finetune.weight_decays) == ((0.1, 1.0), 128, (3e-5,))
    assert set(finetune.lrs["sgd"]) == {0.4, 0.1, 0.04, 0.01, 0.001} and "ghn2" in finetune.variants


def test_baselines_are_trained_for_50_epochs_on_cifar10():
    found = params("cifar10")
    assert (found.evaluate.epochs, found.evaluate.sgd.batch_size, found.evaluate.sgd.lr) == (50, 96, 0.025)
    assert max(found.finetune.budgets) == 50 and found.finetune.batch_size == 96
    assert epochs("cifar10", found.finetune.resnet50_steps, 96) == pytest.approx(50, rel=0.005)  # PPUDA Fig. 13
    assert (found.analysis.score, found.analysis.converged, found.analysis.noise) == ("accuracy", 95.0, 0.08)


@pytest.mark.parametrize(("profile", "per_class", "classes"), [("cifar10", 10, 100), ("imagenet", 100, 10)])
def test_transfer_is_of_300_epochs_of_1000_labels(profile, per_class, classes):
    transfer = params(profile).transfer
    assert transfer.per_class == per_class and per_class * classes == 1000
    assert transfer.steps / (1000 // transfer.batch_size) == 300 and transfer.batch_size == 96


def test_detectors_are_trained_as_published():
    detection = params("detection").transfer.detection
    settings = detection.epochs, detection.batch_size, detection.lrs, detection.test_scenes, detection.image_size
    assert settings == (10, 2, (0.005,), 50, 800) and len(detection.seeds) == 3


def test_all_rows_of_ghn3_table_2_are_fine_tuned():
    assert set(params("ablations-imagenet").finetune.variants) == {
        "ghn2-retrained", *(f"ghn3{size}{batch}" for size in ("", "-s", "-l", "-xl") for batch in ("", "-m16")),
    }  # fmt: skip
