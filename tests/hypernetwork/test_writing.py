"""What ``GHN.initialize`` writes into networks, what it leaves alone, and what it says about both."""

import copy

import pytest
import torch
from shared import SHAPE, Residual, tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from ghnlib.graphs.graph import Graph
from ghnlib.graphs.recording import TraceError
from ghnlib.hypernetwork.coverage import coverage
from ghnlib.hypernetwork.writing import Prediction, protected, write


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net, before):
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


@torch.no_grad()
def predicted_by(ghn, net):
    """As ``initialize`` predicts: with gradients the last digits differ."""
    return ghn.predict(net, SHAPE)


def head(*layers, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


# --- norms and their biases ------------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """Hand-written; ``bias``: whatever stands under this name."""

    def __init__(self, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.bias = bias

    def forward(self, x):
        x = x * self.weight[:, None, None]
        return x if self.bias is False else x + self.bias.view(-1, 1, 1)


class BorrowingNorm(ScaleNorm):
    def __init__(self, lender):
        nn.Module.__init__(self)
        self.weight, self.lender = nn.Parameter(torch.ones(8)), [lender]

    @property
    def bias(self):
        return self.lender[0].bias


def with_buffer():
    net = head(nn.BatchNorm2d(8))
    del net[1].bias
    net[1].register_buffer("bias", torch.zeros(8))
    return net


def with_borrowed():
    lender = nn.BatchNorm2d(8)
    return head(lender, BorrowingNorm(lender))


@pytest.mark.parametrize(("net", "parameter", "kept"), [
    (with_buffer(), "1.weight", {"1.bias": "a buffer, not a parameter"}),
    (head(ScaleNorm(False)), "1.weight", {}),
    (head(ScaleNorm(nn.Parameter(torch.zeros(1)))), "1.weight", {"1.bias": "unsupported parameter of ScaleNorm"}),
    (with_borrowed(), "2.weight", {}),
    (head(FrozenBatchNorm2d(8)), "0.weight", {f"1.{name}": "a buffer, not a parameter" for name in ("weight", "bias")}),
], ids=["buffer", "flag", "other shape", "borrowed", "all buffers"])  # fmt: skip
def test_norms_without_a_bias_of_their_own_are_written_and_the_bias_is_not_predicted(net, parameter, kept):
    ghn = tiny()
    predicted = predicted_by(ghn, net)
    assert set(predicted) == {name for name, _ in net.named_parameters()} - set(kept)
    report = ghn.initialize(net, SHAPE)
    assert report.predicted == list(predicted) and report.skipped == kept
    assert torch.equal(net.get_parameter(parameter), predicted[parameter])


def test_two_norms_with_one_bias_predict_it_once():
    net = head(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    net[2].bias = net[1].bias
    with pytest.warns(UserWarning, match="ties"):
        predicted = predicted_by(tiny(), net)
    assert "2.bias" not in predicted and "2.weight" in predicted
    with pytest.warns(UserWarning, match="ties"):
        report = tiny().initialize(net, SHAPE)
    assert report.tied == {"2.bias": "1.bias"} and report.skipped == {}
    assert torch.equal(net[2].bias, predicted["1.bias"])


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "message"), [
    ({"fc.bias": torch.ones(7)}, r"'fc.bias' has shape \(10,\), but \(7,\)"),
    ({"fc.bias": torch.ones(10, device="meta")}, "on meta is predicted; nothing was written"),
    ({"fc.gain": torch.ones(7)}, "'fc.gain' is no parameter, but"),
])  # fmt: skip
def test_a_value_that_does_not_fit_leaves_all_networks_as_they_were(wrong, message):
    nets = Residual(), Residual()
    before = [state(net) for net in nets]
    values = [{name: torch.full_like(p, 3) for name, p in net.named_parameters()} for net in nets]
    with pytest.raises(ValueError, match=message):
        write([Prediction(nets[0], values[0], {}), Prediction(nets[1], values[1] | wrong, {})])
    assert not changed(nets[0], before[0]) and not changed(nets[1], before[1])


def test_several_networks_are_written_as_one_by_one():
    ghn, nets = tiny(), [Residual(), Residual(width=24, classes=7)]
    alone = copy.deepcopy(nets)
    reports = ghn.initialize(nets, SHAPE)
    assert reports == [ghn.initialize(net, SHAPE) for net in alone]
    assert [list(report.skipped) for report in reports] == [[], ["fc.weight", "fc.bias"]]
    for net, other in zip(nets, alone):
        assert not changed(net, state(other))


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match="not into Graph"):
        tiny().initialize(Graph.from_module(Residual(), SHAPE))
    with pytest.raises(TraceError, match="has no shapes yet"):
        tiny().initialize(head(nn.LazyConv2d(8, 1)), SHAPE)


# --- what must not be overwritten ------------------------------------------------------------------------------------


def test_frozen_parameters_keep_their_values_unless_asked_for():
    ghn, net = tiny(), Residual()
    net.stem.requires_grad_(False)
    before = state(net)
    report = ghn.initialize(net, SHAPE)
    assert report.skipped == {"stem.weight": "frozen (requires_grad=False)"} and "stem.weight" not in report.predicted
    assert "stem.weight: frozen" in str(report)
    assert changed(net, before) == set(report.predicted)
    report = ghn.initialize(net, SHAPE, only="stem.*")
    assert report.predicted == ["stem.weight"] and report.skipped["fc.bias"] == "not in only"
    assert torch.equal(net.stem.weight, predicted_by(ghn, net)["stem.weight"])


def test_a_network_of_frozen_parameters_is_not_left_at_random_without_a_word():
    net = Residual().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*only='\*'"):
        tiny().initialize(net, SHAPE)
    assert len(tiny().initialize(net, SHAPE, only="*").predicted) == 11


@pytest.mark.parametrize(("options", "expected"), [
    ({"only": "fc.*"}, {"fc.weight", "fc.bias"}),
    ({"only": ["stem.weight", "*.0.bias"]}, {"stem.weight", "blocks.0.0.bias", "blocks.1.0.bias"}),
    ({"only": ("fc.*",), "exclude": "*.bias"}, {"fc.weight"}),
    ({"exclude": "*"}, set()),
])  # fmt: skip
def test_patterns_of_names_choose_what_is_written(options, expected):
    net = Residual()
    before = state(net)
    report = tiny().initialize(net, SHAPE, **options)
    assert changed(net, before) == set(report.predicted) == expected
    assert set(report.skipped) == {name for name, _ in net.named_parameters()} - expected


@pytest.mark.parametrize("keyword", ["only", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(keyword):
    net = Residual()
    before = state(net)
    with pytest.raises(ValueError, match=rf"{keyword}='block' matches no parameter .*'block\.\*'.*stem.weight"):
        tiny().initialize(net, SHAPE, **{keyword: ["fc.*", "block"]})
    assert not changed(net, before)


class Tied(nn.Module):
    """Two tokens of a vocabulary beside the image, the first of which is padding; the classifier reads the table."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.table = nn.Embedding(10, 8, padding_idx=0)
        self.fc = nn.Linear(8, 10, bias=False)
        self.fc.weight = self.table.weight

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)) + self.table(torch.arange(2, device=x.device)).mean(0))


@pytest.mark.filterwarnings("ignore:Tied ")
def test_padding_rows_keep_their_values_and_tied_names_are_reported_as_written():
    ghn, net = tiny(), Tied()
    report = ghn.initialize(net, SHAPE)
    assert report.tied == {"fc.weight": "table.weight"} and report.skipped == {}
    assert report.notes == ["table.weight: row 0 is padding and kept its values"]
    assert "fc.weight: tied to table.weight, which is predicted" in str(report)
    assert not net.table.weight[0].any()
    assert torch.equal(net.fc.weight[1:], predicted_by(ghn, net)["table.weight"][1:])


@pytest.mark.filterwarnings("ignore:Tied ")
def test_a_tensor_is_left_out_by_any_of_its_names():
    net = Tied()
    before = state(net)
    report = tiny().initialize(net, SHAPE, exclude="fc.*")
    assert changed(net, before) == {"stem.weight", "stem.bias"} and not (report.notes or report.tied)
    assert report.skipped == dict.fromkeys(["table.weight", "fc.weight"], "left out by exclude")


class Packed(torch.Tensor):
    """Stands for the packed weights of other libraries."""


@pytest.mark.parametrize(("tensor", "reason"), [
    (torch.zeros(8, 8, 1, 1, dtype=torch.int8), "holds int8, not real numbers"),
    (torch.zeros(8, 8, 1, 1).as_subclass(Packed), "packed in a Packed"),
    (torch.zeros(1).expand(8, 8, 1, 1), "expanded: its values share memory"),
])  # fmt: skip
def test_tensors_that_cannot_take_real_numbers_keep_theirs(tensor, reason):
    net = head(nn.Conv2d(8, 8, 1))
    net[1].weight = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    assert protected(net) == {"1.weight": reason}
    assert protected(net, only="*") == {"1.weight": reason}


# --- weights that are computed from parameters -----------------------------------------------------------------------

PARTS = [f"parametrizations.weight.original{i}" for i in (0, 1)]


def normalised(wrap=parametrizations.weight_norm):
    return head(wrap(nn.Conv2d(8, 8, 1)))


@pytest.mark.parametrize(("wrap", "parts"), [
    (parametrizations.weight_norm, PARTS),
    (nn.utils.weight_norm, ["weight_g", "weight_v"]),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.0), ["weight_orig"]),
    (parametrizations.spectral_norm, [PARTS[0][:-1]]),
], ids=["weight norm", "old weight norm", "pruned", "spectral norm"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_are_written_by_the_parts_they_are_computed_from(wrap, parts):
    ghn, net = tiny(), normalised(wrap).eval()
    report = ghn.initialize(net, SHAPE)
    assert not report.skipped and set(report.predicted) == {name for name, _ in net.named_parameters()}
    assert {f"1.{part}" for part in parts} < set(report.predicted)
    expected, x = predicted_by(ghn, net)["1.weight"], torch.randn(2, 8, 3, 3)
    if wrap is parametrizations.spectral_norm:
        assert torch.equal(net[1].parametrizations.weight.original, expected)
    else:
        torch.testing.assert_close(net[1](x), torch.conv2d(x, expected, net[1].bias))


@pytest.mark.parametrize(
    "options", [{"exclude": "1.weight"}, {"exclude": f"*.{PARTS[0]}"}, {"only": ["0.*", "1.bias"]}]
)
def test_a_computed_weight_is_written_whole_or_not_at_all(options):
    net = normalised()
    before = state(net)
    report = tiny().initialize(net, SHAPE, **options)
    assert not {f"1.{part}" for part in PARTS} & changed(net, before)
    assert {f"1.{part}" for part in PARTS} <= set(report.skipped) and "1.weight" not in report.skipped
    assert "0.weight" in report.predicted and changed(net, before) == set(report.predicted)


def test_a_frozen_part_keeps_the_computed_weight():
    net = normalised()
    net[1].parametrizations.weight.original0.requires_grad_(False)
    report = tiny().initialize(net, SHAPE)
    assert report.skipped == {
        f"1.{PARTS[0]}": "frozen (requires_grad=False)",
        f"1.{PARTS[1]}": "part of 1.weight, which was not written",
    }


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "wanted", "reason"), [
    (10, False, "class layer; predict_class_layers=False"),
    (7, False, "class layer; predict_class_layers=False"),
    (7, None, "class layer; the hypernetwork predicts 10 classes, the network has 7"),
])  # fmt: skip
def test_class_layers_are_kept_for_the_reason_that_is_true(classes, wanted, reason):
    report = tiny().initialize(Residual(classes=classes), SHAPE, wanted)
    assert report.skipped == dict.fromkeys(["fc.weight", "fc.bias"], reason)


def test_quantised_layers_are_reported():
    net = head(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), torch.ao.nn.quantized.dynamic.Linear(8, 8), nn.Unflatten(1, (8, 1, 1))
    )
    with pytest.warns(UserWarning, match="quantised"):
        report = tiny().initialize(net, SHAPE)
    assert report.skipped == dict.fromkeys(["3.weight", "3.bias"], "quantised: its weights are packed")
    assert set(report.predicted) == {"0.weight", "0.bias", "7.weight", "7.bias"}


def test_a_network_that_cannot_be_traced_because_it_is_quantised_is_told_so():
    net = head()
    net[0] = torch.ao.nn.quantized.Conv2d(3, 8, 1)
    with pytest.raises(TraceError, match="'0'.*quantised.*before"):
        tiny().initialize(net, SHAPE)


# --- batch norm ------------------------------------------------------------------------------------------------------


def images(n=100, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_the_report_reminds_of_running_statistics_of_the_former_weights():
    report = tiny().initialize(Residual(), SHAPE)
    (note,) = report.notes
    assert note.startswith("running statistics (in 2: blocks.0.1, ..., blocks.1.1) do not belong to the new weights")
    assert "batch_norm=images" in note and note in str(report)
    assert tiny().initialize(Residual(), SHAPE, exclude="*").notes == []
    assert tiny().initialize(Residual(), SHAPE, batch_norm=images()).notes == []


def test_layers_whose_statistics_are_not_made_anew_are_named():
    net = head(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True))
    (note,) = tiny().initialize(net, SHAPE, batch_norm=images()).notes
    assert note == "running statistics (in 1: 2) do not belong to the new weights"


@pytest.mark.parametrize("given", [
    images(), [images()[:50], images()[50:]], iter([(images()[:50], 0), (images()[50:], 1)]), images().double(),
], ids=["tensor", "list", "with labels", "other precision"])  # fmt: skip
def test_running_statistics_are_averages_over_batches_with_the_new_weights(given):
    net = Residual().eval()
    net(images())
    net.blocks[1].train()
    net.blocks[0][1].momentum = 0.3
    ghn = tiny()
    ghn.initialize(net, SHAPE, batch_norm=given)
    outputs = [net.blocks[0][0](net.stem(batch)) for batch in (images()[:50], images()[50:])]
    torch.testing.assert_close(net.blocks[0][1].running_mean, sum(x.mean((0, 2, 3)) for x in outputs) / 2)
    torch.testing.assert_close(net.blocks[0][1].running_var, sum(x.var((0, 2, 3)) for x in outputs) / 2)
    assert net.blocks[0][1].momentum == 0.3
    assert [net.training, net.blocks[0].training, net.blocks[1].training] == [False, False, True]
    assert torch.equal(net.stem.weight, predicted_by(ghn, net)["stem.weight"])


def test_patterns_are_names():
    net = Residual()
    with pytest.raises(TypeError, match="exclude is a Conv2d: it takes names"):
        tiny().initialize(net, SHAPE, exclude=net.stem)


def test_layers_without_channels_are_written():
    net = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 10))
    assert len(tiny().initialize(net, (8,)).predicted) == 4


@pytest.mark.parametrize(("given", "error", "message"), [
    (images()[:0], ValueError, "no images"), ([], ValueError, "no images"), (iter([images()]), ValueError, "iterator"),
    ([images(), images()[:, :2]], RuntimeError, "3 channels"), (images() / 0, ValueError, "not finite"),
    (images().numpy(), ValueError, "a ndarray"),
], ids=["empty", "no batch", "used up", "wrong channels", "not finite", "no tensor"])  # fmt: skip
def test_nothing_is_written_if_statistics_cannot_be_made(given, error, message):
    nets = [Residual().eval(), Residual()]
    nets[0].blocks[0][1].momentum = 0.3
    nets[1](images())
    before = [state(net) for net in nets]
    with pytest.raises(error, match=message):
        tiny().initialize(nets, SHAPE, batch_norm=given)
    assert not changed(nets[0], before[0]) and not changed(nets[1], before[1])
    assert [nets[0].blocks[0][1].momentum, nets[0].training, nets[1].training] == [0.3, False, True]


# --- networks of other kinds -----------------------------------------------------------------------------------------


def test_networks_made_in_inference_mode_are_written_to():
    with torch.inference_mode():
        net = Residual()
    ghn = tiny()
    report = ghn.initialize(net, SHAPE, batch_norm=images())
    assert not report.skipped and not report.notes
    assert torch.equal(net.fc.weight, predicted_by(ghn, net)["fc.weight"]) and net.fc.weight.is_inference()


def test_values_can_be_written_while_inference_mode_is_on_and_the_network_trains_on():
    net, expected = Residual(), predicted_by(tiny(), Residual())["fc.weight"]
    with torch.inference_mode():
        tiny().initialize(net, SHAPE, batch_norm=images())
    assert torch.equal(net.fc.weight, expected)
    net(images(4)).sum().backward()
    assert net.stem.weight.grad.isfinite().all()


def test_an_example_of_the_input_is_passed_on_to_the_graph(monkeypatch):
    graph, seen = Graph.from_module(Residual(), SHAPE), []
    monkeypatch.setattr(Graph, "from_module", lambda *rest, example=None, **_: seen.append(example) or graph)
    ghn = tiny()
    ghn.initialize(Residual(), example="a")
    ghn.predict([Residual(), Residual()], example="b")
    ghn.embed(Residual(), example="c")
    coverage(ghn, Residual(), example="d")
    assert seen == ["a", "b", "b", "c", "d"]


class Probe(nn.Module):
    """A frozen backbone as in linear probing."""

    def __init__(self, grown=False):
        super().__init__()
        self.backbone, self.head, self.grown = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 10), grown

    def forward(self, x):
        with torch.no_grad():
            if self.grown:
                self.backbone[0].weight.mul_(1.01)
            features = self.backbone(x).mean((2, 3))
        return self.head(features)


class Plain(Probe):
    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


def test_what_gets_no_gradient_is_predicted_if_it_is_named():
    ghn, net = tiny(), Probe()
    names = ["backbone.0.weight", "backbone.0.bias"]
    report = ghn.initialize(net, SHAPE)
    assert sorted(report.skipped) == sorted(names) and all("no gradient" in report.skipped[name] for name in names)
    report = ghn.initialize(net, SHAPE, only="backbone.*")
    assert sorted(report.predicted) == sorted(names)
    with torch.no_grad():
        expected = ghn.predict(Plain(), SHAPE)
    assert all(torch.equal(net.get_parameter(name), expected[name]) for name in names)
    report = ghn.initialize(Probe(grown=True), SHAPE, only=["backbone.*", "head.*"])
    assert sorted(report.skipped) == sorted(names) and all("no gradient" in report.skipped[name] for name in names)
