"""Predictions for hundreds of networks: architectures of all splits of DeepNets-1M, and timm's families."""

import copy

import pytest
import torch
from shared import tiny
from torch import nn
from torch.func import functional_call

from ghnlib import DeepNets
from ghnlib.deepnets.splits import SPLITS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KNOWN = ("class token", "layer scale", "logit scale", "relative position bias", "unsupported", "not used", "no node")


@torch.no_grad()
def predicted(net: nn.Module, shape: tuple[int, int, int]) -> dict[str, str]:
    """Names of the parameters that are not predicted -> why; all others are, and ``initialize`` writes the same."""
    torch.manual_seed(0)
    ghn, images = tiny(), torch.randn(2, *shape)
    values, named = ghn.predict(net, shape, predict_class_layers=True), dict(net.named_parameters())
    assert all(value.shape == named[name].shape and value.isfinite().all() for name, value in values.items())
    other = copy.deepcopy(net)
    report = ghn.initialize(net, shape, predict_class_layers=True)
    assert {*report.predicted} == {*values} and {*report.skipped} == named.keys() - values.keys()
    assert all(torch.equal(named[name], value) for name, value in values.items())
    results = []
    for run in (lambda: functional_call(other, values, (images,)), lambda: net(images)):
        torch.manual_seed(0)
        result = run()
        results.append(result[0] if isinstance(result, (tuple, list)) else result)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)
    return report.skipped


@pytest.mark.parametrize("split", SPLITS)
def test_deepnets(split):
    dataset = DeepNets(split, seed=3, space="small")
    size = min(31, len(dataset))
    for i in range(size):
        net = dataset[i].build(num_classes=10, device="cpu")
        shape = (3, dataset[i].input_size, dataset[i].input_size)
        kept = predicted(net.train(i % 2 == 0), shape)
        assert not {name for name, why in kept.items() if "not used" not in why}, (i, kept)


def families() -> list[str]:
    """A small network of 17 of timm's modules, chosen by name: larger ones take minutes each."""
    import timm

    marks = ("atto", "nano", "pico", "femto", "tiny", "xxs", "small", "_s", "test", "18", "lite", "micro", "_b0")
    names = []
    for models in filter(None, (timm.list_models(module=module) for module in timm.list_modules())):
        place = {name: next((i for i, mark in enumerate(marks) if mark in name), len(marks)) for name in models}
        names.append(min(models, key=lambda name, place=place: (place[name], len(name), name)))
    return names[:51:3]


@pytest.mark.parametrize("name", families())
def test_timm(name):
    import timm

    net = timm.create_model(name, pretrained=False).eval()
    kept = predicted(net, net.default_cfg["input_size"])
    assert not {name: why for name, why in kept.items() if not any(known in why for known in KNOWN)}
    assert len(kept) < len(list(net.parameters())) / 2
