"""Trainings that continue a trained hypernetwork."""

from dataclasses import replace

import pytest
import torch
from shared import JOB, SHAPE, Residual, tiny

from ghnlib import GHN
from ghnlib.training.checkpointing import TrainingError
from ghnlib.training.jobs import Job, architecture_of, train_job


def test_another_number_of_classes_renews_what_depends_on_it_and_keeps_the_rest():
    ghn, unlike = tiny(), torch.rand(())
    with torch.no_grad():
        for row, channels in enumerate(ghn.embedding.channels):
            ghn.embedding.channel.weight[row] = unlike + channels
    other = ghn.for_classes(5)
    assert other.config == replace(ghn.config, num_classes=5) and ghn.for_classes(10) is ghn
    anew = {name for name, value in other.state_dict().items() if not torch.equal(value, ghn.state_dict()[name])}
    assert {name.rpartition(".")[0] for name in anew} == {
        "embedding.channel", "weight_decoder.class_layer", "vector_decoder.class_layer"
    }  # fmt: skip
    for row, channels in enumerate(other.embedding.channels):
        assert (other.embedding.channel.weight[row] == unlike + channels).all() == (channels != 5)
    assert torch.equal(other.embedding.channel.weight[-1], ghn.embedding.channel.weight[-1])
    assert other.predict(Residual(classes=5), SHAPE)["fc.bias"].shape == (5,)


def job(folder, **changes):
    return Job.of(JOB | {"folder": str(folder)} | changes)


def test_a_training_starts_from_a_file_once_and_anew_if_the_file_changes(tmp_path, capsys):
    start = tiny()
    start.save_pretrained(tmp_path / "start")
    changes = {
        "start_from": str(tmp_path / "start"),
        "ghn": architecture_of(str(tmp_path / "start"), {"hid": 16}).__dict__,
    }
    still = JOB["recipe"] | {"lr": 1e-12}
    near = train_job(job(tmp_path / "still", recipe=still, **changes))
    for name, value in near.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], rtol=0, atol=1e-6)
    fewer = train_job(job(tmp_path / "fewer", recipe=still, classes=[0, 1], **changes))
    assert fewer.config.num_classes == 2 and torch.equal(
        fewer.encoder.layers[0].qkv.weight.round(decimals=4), start.encoder.layers[0].qkv.weight.round(decimals=4)
    )

    whole = train_job(job(tmp_path / "again", **changes))
    again = train_job(job(tmp_path / "again", **changes))
    assert "resuming after step 6" in capsys.readouterr().out
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    start.norm.bias.data[0] = 0.5
    start.save_pretrained(tmp_path / "start")
    train_job(job(tmp_path / "again", **changes))
    assert "starting anew" in capsys.readouterr().out


def test_the_file_decides_on_the_architecture(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert (
        architecture_of(str(tmp_path), {"hid": 16, "max_shape": (16, 16, 11, 11)})
        == GHN.from_pretrained(tmp_path).config
    )
    with pytest.raises(TrainingError, match=r"has hid=16, layers=2, the variant says hid=32, layers=3: leave that out"):
        architecture_of(str(tmp_path), {"hid": 32, "layers": 3, "heads": 2})
