"""The low-rank decoder: published sizes, products of two factors, their scale at the start, nothing repeated."""

import json

import pytest
import torch
import torch.nn.functional as F
from shared import SHAPE, Residual, pool, tiny
from torch import nn

from ghnlib import GHN
from ghnlib.config import GHNConfig, Recipe
from ghnlib.hypernetwork.decoders import Slice
from ghnlib.hypernetwork.lowrank import LowRankDecoder
from ghnlib.hypernetwork.pretrained import least_values
from ghnlib.released.checkpoints import CheckpointError
from ghnlib.training.memory import training_bytes


def lowrank(**changes):
    return tiny(**{"decoder": "lowrank", "rank": 8, **changes})


@pytest.mark.parametrize(("hid", "layers", "heads", "rank", "millions"), [
    (64, 3, 8, 32, 2.5), (128, 5, 16, 90, 21.4), (256, 5, 16, 128, 78.2), (256, 12, 16, 256, 289.4),
])  # fmt: skip
def test_sizes_are_those_of_logah_with_k_of_2048_channels_times_16(hid, layers, heads, rank, millions):
    shape = (2048, 2048, 16, 16)
    config = GHNConfig(
        hid=hid, layers=layers, heads=heads, max_shape=shape, num_classes=100, decoder="lowrank", rank=rank
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in GHN(config).parameters())
    assert round(count / 1e6, 1) == millions
    assert 0.9 * count < least_values(config) <= count


def test_a_weight_is_the_product_of_the_first_rows_of_both_factors():
    torch.manual_seed(0)
    decoder, state = LowRankDecoder(8, (6, 5, 4, 4), 3, rank=4), torch.randn(2, 8)
    nn.init.normal_(decoder.expand.bias)
    found = dict(decoder([Slice((3, 2), 6, 5), Slice((1, 1), 24, 5, classes=True), Slice((9, 4), 24, 1)], [state] * 3))
    a, b = decoder.expand(decoder.mlp(state).view(2, 2, 4, 4)).unbind(1)  # each (n, r, K)
    whole = a[:, :, :18].mT @ b[:, :, :10]  # (n, out * h, in * w)
    expected = whole.view(2, 6, 3, 5, 2).permute(0, 2, 4, 1, 3).flatten(1, 2)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1][:, 0], a[:, :, :3].mT @ b[:, :, :5])
    assert found[2].shape == (2, 16, 6, 1)  # kernels no larger than S, as many channels as K = 24 rows have room for
    weight, bias = decoder.vectors(state, 7)
    torch.testing.assert_close(torch.stack([weight, bias], 2), a[:, :, :7].mT @ b[:, :, :2])


@pytest.mark.parametrize(("hid", "rank"), [(16, 8), (32, 36), (64, 32)])
def test_decoded_values_start_at_the_scale_of_he_and_not_as_one_pattern(hid, rank):
    torch.manual_seed(0)
    decoder, states = LowRankDecoder(hid, (64, 64, 11, 11), 10, rank), F.layer_norm(torch.randn(200, hid), (hid,))
    with torch.no_grad():
        ((_, values),) = decoder([Slice((3, 3), 64, 64)], [states])
        squares = torch.linalg.svdvals(values[:, 0]).square()
        decoder.shrink(5)
        ((_, smaller),) = decoder([Slice((3, 3), 64, 64)], [states])
    assert 0.75 < values.std() < 1.25 and values.mean().abs() < 0.05
    assert (squares[:, 0] / squares.sum(1)).mean() < 0.7
    torch.testing.assert_close(smaller, values / 5)


def test_all_is_predicted_in_wide_networks_too_and_nothing_repeats_below_k():
    ghn, net = lowrank(), nn.Sequential(nn.Conv2d(3, 160, 1), nn.BatchNorm2d(160), nn.Flatten(), nn.Linear(160, 10))
    predicted = ghn.predict(net, (3, 1, 1))
    assert {n: p.shape for n, p in predicted.items()} == {n: p.shape for n, p in net.named_parameters()}
    for name in ("0.weight", "1.weight", "1.bias"):  # K = 16 * 11 = 176
        assert len(predicted[name].unique(dim=0)) == 160, name
    wider = ghn.predict(nn.Sequential(nn.Conv2d(3, 200, 1), nn.Flatten(), nn.Linear(200, 10)), (3, 1, 1))
    torch.testing.assert_close(wider["0.weight"][176:], wider["0.weight"][:24])


def test_all_its_parameters_learn():
    ghn = lowrank(initialization="ghn3")
    sum(p.square().sum() for p in ghn.predict(Residual(width=24), SHAPE).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ghn.parameters())
    told = training_bytes(ghn, Recipe(batch_size=4, meta_batch=1), pool("train", 2)[:1], torch.empty(1, 3, 16, 16))
    assert told["hypernetwork"] == 16 * sum(p.numel() for p in ghn.parameters())


def test_what_is_impossible_is_refused():
    with pytest.raises(ValueError, match=r"'identity' is not for decoder='lowrank'.*framework"):
        lowrank(initialization="identity")
    with pytest.raises(ValueError, match=r"num_classes=177 is more than the 176 rows"):
        lowrank(num_classes=177)
    with pytest.raises(ValueError, match=r"rank"):
        lowrank(rank=1025)


def test_it_is_saved_and_a_file_that_asks_for_another_rank_is_refused_before_memory_is(tmp_path):
    ghn, net = lowrank(), Residual(width=24)
    ghn.save_pretrained(tmp_path)
    torch.testing.assert_close(GHN.from_pretrained(tmp_path).predict(net, SHAPE), ghn.predict(net, SHAPE))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rank": 1024}))
    with pytest.raises(CheckpointError, match=r"holds [\d,]+ values, but its configuration describes at least"):
        GHN.from_pretrained(tmp_path)
