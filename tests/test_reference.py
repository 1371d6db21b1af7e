"""Predictions from checkpoints in the official formats, against values computed with the official code.

The files are not part of the repository: the tests look for them in $GHNLIB_REFERENCE and are skipped without it.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from ghnlib import GHN
from ghnlib.checkpoints import our_name

REFERENCE = Path(os.environ.get("GHNLIB_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
CASES = sorted(path.name[: -len(".json.gz")] for path in REFERENCE.glob("predictions/*__*.json.gz"))
PREDICTIONS = [case for case in CASES if not case.startswith("grad_") and "10classes" not in case]

pytestmark = pytest.mark.skipif(not CASES, reason="no reference values: set GHNLIB_REFERENCE to their folder")


def read(name):
    return json.loads(gzip.decompress((REFERENCE / "predictions" / f"{name}.json.gz").read_bytes()))


def load(name):
    return GHN.from_pretrained(REFERENCE / "checkpoints" / f"{name.removesuffix('.via_ppuda')}.pt")


def network(name, classes):
    # Skips the slow initialisers: only names, shapes and structure matter.
    with torch.device("meta"):
        return getattr(torchvision.models, name)(num_classes=classes).eval()


def assert_agrees(predicted, expected):
    """Norm and deviation to 1e-5 relative; mean and single values to 1e-5 of the root mean square."""
    assert list(predicted.shape) == expected["shape"]
    values = predicted.double().flatten().numpy()
    rms = expected["l2"] / len(values) ** 0.5
    np.testing.assert_allclose(np.linalg.norm(values), expected["l2"], rtol=1e-5)
    np.testing.assert_allclose(values.std(), expected["std"], rtol=1e-5, atol=1e-6 * rms)
    np.testing.assert_allclose(values.mean(), expected["mean"], atol=1e-5 * rms)
    np.testing.assert_allclose(values[:8], expected["first8"], atol=1e-5 * rms)
    np.testing.assert_allclose(values[-4:], expected["last4"], atol=1e-5 * rms)


def assert_same_prediction(predicted, reference):
    expected = {entry["name"]: entry for entry in reference["params"]}
    assert set(predicted) == set(expected)
    for name, entry in expected.items():
        if not name.endswith("pos_embedding"):  # its class-token row is random in the official code
            assert_agrees(predicted[name], entry)


@pytest.mark.parametrize("case", PREDICTIONS)
@torch.no_grad()
def test_predictions_agree(case):
    hypernetwork, model = case.split("__")
    ghn = load(hypernetwork)
    assert ghn.config.convention == ("ppuda" if "via_ppuda" in case else "ghn3")
    assert_same_prediction(ghn.predict(network(model, ghn.config.num_classes)), read(case))


@pytest.mark.parametrize(
    ("case", "class_layers"), [("resnet18_10classes", True), ("resnet18_10classes_noclass", False)]
)
@torch.no_grad()
def test_other_class_counts_agree(case, class_layers):
    ghn = load("ghn3_tiny_imagenet")
    predicted = ghn.predict(network("resnet18", 10), predict_class_layers=class_layers)
    assert_same_prediction(predicted, read(f"tiny_imagenet__{case}"))


@pytest.mark.parametrize("hub_file", ["ghn3_tiny_imagenet", "ghn2_in_ghn3_tiny"])
def test_hub_files_hold_the_same_hypernetwork(hub_file):
    overrides = {"heads": 2} if "ghn3_tiny" in hub_file.removeprefix("ghn2_in_") and "imagenet" in hub_file else {}
    ghn = GHN.from_pretrained(REFERENCE / "checkpoints" / f"{hub_file}.hf.joblib", **overrides)
    assert ghn.config.convention == "ghn3"
    if "imagenet" in hub_file:
        torch.testing.assert_close(ghn.state_dict(), load("ghn3_tiny_imagenet").state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["grad_tiny_imagenet__resnet18", "grad_ghn2_tiny__resnet18"])
def test_gradients_agree(case):
    reference = read(case)
    ghn = load({"grad_tiny_imagenet__resnet18": "ghn3_tiny_imagenet"}.get(case, "ghn2_tiny"))
    predicted = ghn.predict(network("resnet18", ghn.config.num_classes))
    objective = 0
    for p in predicted.values():
        weights = torch.sin(0.37 * torch.arange(1, p.numel() + 1, dtype=torch.float64)).float()
        objective = objective + (p.flatten() * weights).mean()
    objective.backward()
    assert objective.item() == pytest.approx(reference["loss"], rel=1e-5)
    gradients = {name: p.grad for name, p in ghn.named_parameters() if p.grad is not None}
    expected = {our_name(entry["name"]): entry for entry in reference["params"]}
    assert set(gradients) == set(expected) - {our_name(name) for name in reference["no_grad"]}
    for name, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(expected[name]["l2"], rel=3e-4, abs=1e-8), name
        first = gradient.flatten()[:8].tolist()
        assert first == pytest.approx(
            expected[name]["first8"], rel=1e-3, abs=1e-8 + 2e-3 * float(gradient.abs().max())
        ), name
