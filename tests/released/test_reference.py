"""Predictions from checkpoints in the official formats, against values computed with the official code."""

import gzip
import json

import pytest
import torch
import torchvision

from ghnlib import GHN
from ghnlib.released.checkpoints import our_name

pytestmark = pytest.mark.reference
MODELS = ("mobilenet_v3_small", "resnet18", "squeezenet1_1", "vgg11_bn")
PREDICTIONS = [
    *((f"{ghn}_tiny.via_ppuda", model) for ghn in ("ghn1", "ghn2", "mlp") for model in MODELS),
    *((f"ghn3_tiny_{data}", model) for data in ("cifar10", "imagenet") for model in (*MODELS, "vit_b_16")),
]


@pytest.fixture
def read(reference):
    """The function from a case to its values."""
    return lambda case: json.loads(gzip.decompress((reference / "predictions" / f"{case}.json.gz").read_bytes()))


@pytest.fixture
def load(reference):
    """The function from a file's name, and changes of its configuration, to the hypernetwork."""
    return lambda file, **changes: GHN.from_pretrained(reference / "checkpoints" / file, **changes)


def network(name, classes):
    # Skips the slow initialisers: only names, shapes and structure matter.
    with torch.device("meta"):
        return getattr(torchvision.models, name)(num_classes=classes).eval()


def assert_agrees(predicted, expected):
    """Norm and deviation to 1e-5 relative; mean and single values to 1e-5 of the root mean square."""
    assert list(predicted.shape) == expected["shape"]
    values, count = predicted.flatten(), predicted.numel()
    norm, mean = float(torch.linalg.vector_norm(values, dtype=torch.float64)), float(values.mean(dtype=torch.float64))
    rms = expected["l2"] / count**0.5
    assert norm == pytest.approx(expected["l2"], rel=1e-5)
    assert max(0, norm**2 / count - mean**2) ** 0.5 == pytest.approx(expected["std"], rel=1e-5, abs=1e-6 * rms)
    assert mean == pytest.approx(expected["mean"], abs=1e-5 * rms)
    assert values[:8].tolist() == pytest.approx(expected["first8"], abs=1e-5 * rms)
    assert values[-4:].tolist() == pytest.approx(expected["last4"], abs=1e-5 * rms)


def assert_same_prediction(predicted, reference):
    expected = {entry["name"]: entry for entry in reference["params"]}
    assert set(predicted) == set(expected)
    for name, entry in expected.items():
        if not name.endswith("pos_embedding"):  # its class-token row is random in the official code
            assert_agrees(predicted[name], entry)


@pytest.mark.parametrize(("hypernetwork", "model"), PREDICTIONS)
@torch.no_grad()
def test_predictions_agree(load, read, hypernetwork, model):
    ghn = load(f"{hypernetwork.removesuffix('.via_ppuda')}.pt")
    assert ghn.config.convention == ("ppuda" if "via_ppuda" in hypernetwork else "ghn3")
    assert_same_prediction(ghn.predict(network(model, ghn.config.num_classes)), read(f"{hypernetwork}__{model}"))


@pytest.mark.parametrize(
    ("case", "class_layers"), [("resnet18_10classes", True), ("resnet18_10classes_noclass", False)]
)
@torch.no_grad()
def test_other_class_counts_agree(load, read, case, class_layers):
    ghn = load("ghn3_tiny_imagenet.pt")
    predicted = ghn.predict(network("resnet18", 10), predict_class_layers=class_layers)
    assert_same_prediction(predicted, read(f"tiny_imagenet__{case}"))


def test_hub_files_hold_the_same_hypernetwork(load):
    hub = load("ghn3_tiny_imagenet.hf.joblib", heads=2)
    assert hub.config == load("ghn3_tiny_imagenet.pt").config
    torch.testing.assert_close(hub.state_dict(), load("ghn3_tiny_imagenet.pt").state_dict(), rtol=0, atol=0)


def test_a_hub_file_of_ghn2_is_one(load):
    config = load("ghn2_in_ghn3_tiny.hf.joblib").config
    assert (config.encoder, config.window, config.convention) == ("gated_gnn", "corner", "ghn3")


@pytest.mark.parametrize(
    ("file", "case"), [("ghn3_tiny_imagenet.pt", "grad_tiny_imagenet"), ("ghn2_tiny.pt", "grad_ghn2_tiny")]
)
def test_gradients_agree(load, read, file, case):
    ghn, values = load(file), read(f"{case}__resnet18")
    predicted = ghn.predict(network("resnet18", ghn.config.num_classes))
    objective = 0
    for p in predicted.values():
        weights = torch.sin(0.37 * torch.arange(1, p.numel() + 1, dtype=torch.float64)).float()
        objective = objective + (p.flatten() * weights).mean()
    objective.backward()
    assert objective.item() == pytest.approx(values["loss"], rel=1e-5)
    gradients = {name: p.grad for name, p in ghn.named_parameters() if p.grad is not None}
    expected = {our_name(entry["name"]): entry for entry in values["params"]}
    assert set(gradients) == set(expected) - {our_name(name) for name in values["no_grad"]}
    for name, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(expected[name]["l2"], rel=3e-4, abs=1e-8), name
        first = gradient.flatten()[:8].tolist()
        assert first == pytest.approx(
            expected[name]["first8"], rel=1e-3, abs=1e-8 + 2e-3 * float(gradient.abs().max())
        ), name
