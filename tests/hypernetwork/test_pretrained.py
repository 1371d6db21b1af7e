"""The hypernetworks that come with the package."""

import pytest
from shared import digits, params, tiny

from ghnlib import GHN
from ghnlib.deepnets.dataset import architectures_of
from ghnlib.measuring.accuracy import evaluate_predictions
from ghnlib.pipeline.pretrained import LARGEST
from ghnlib.released.checkpoints import PRETRAINED, pretrained_names


@pytest.mark.parametrize("name", pretrained_names())
def test_each_is_small_and_has_a_card_that_loads_it(name):
    files = {path.name: path.stat().st_size for path in (PRETRAINED / name).iterdir()}
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] < LARGEST * 1.1
    assert f'GHN.from_pretrained("{name}")' in (PRETRAINED / name / "README.md").read_text()
    assert GHN.from_pretrained(name).norm.weight.dtype.itemsize == 4


def test_digits_classifies_with_architectures_that_no_training_saw():
    images, unseen = digits(image_size=8), architectures_of(params().deepnets, "test", 8, 10, seed=1234, size=8)
    found = evaluate_predictions(GHN.from_pretrained("digits"), list(unseen), images.test)
    assert found["accuracy"].fillna(0).mean() > 70  # 83 to 89 % in its card


def test_a_folder_with_such_a_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of images, say
    assert GHN.from_pretrained("digits").config.hid == 32
    ghn = tiny(hid=16)
    ghn.save_pretrained(tmp_path / "digits")
    assert GHN.from_pretrained("digits").config == ghn.config
