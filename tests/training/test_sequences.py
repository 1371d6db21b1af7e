"""Hypernetworks for language models, trained by the loop that images have."""

import runpy

import pytest
import torch
from shared import ROOT, tiny

from ghnlib.architectures.language import LanguageModel
from ghnlib.config import Recipe
from ghnlib.data.sequences import numbers_in_words
from ghnlib.training.loop import train_ghn
from ghnlib.training.memory import training_bytes


def test_the_loop_trains_on_sequences(tmp_path):
    data = numbers_in_words(64, 8, seed=0)
    models = [LanguageModel(len(data.classes), 8, layers, width=8) for layers in (1, 2)]
    ghn = tiny(num_classes=len(data.classes), primitives=models[0].primitives)
    before = {name: value.clone() for name, value in ghn.state_dict().items()}
    history = train_ghn(ghn, models, data, Recipe(steps=4, batch_size=8, meta_batch=2, log_every=2), tmp_path, seed=0)
    assert history["step"].tolist() == [2, 4] and history["loss"].between(0, 10).all() and not history["skipped"].any()
    moved = ghn.embedding.op.weight != before["embedding.op.weight"]
    assert moved[15:].any(1).all()  # the rows of both registered primitives
    batch = next(data.batches(1))[0]
    small, large = (training_bytes(ghn, Recipe(batch_size=b), models, batch)["network"] for b in (8, 16))
    assert large > 1.5 * small > 0


@pytest.mark.slow
def test_unseen_language_models_are_predicted_better_than_guessing(tmp_path):
    """A shorter form of the example; random parameters lose about 3.2 nats, knowing frequencies alone 2.76."""
    example = runpy.run_path(str(ROOT / "examples" / "sequences.py"))
    torch.manual_seed(0)
    losses = example["compare"](0, 200, tmp_path)
    assert len(losses["predicted"]) == len(example["UNSEEN"]) and not set(example["UNSEEN"]) & set(example["SEEN"])
    assert min(losses["random"]) > 3 and max(losses["predicted"]) < 2.2
