"""What networks are called with, how their functions are called, and why a parameter has no node."""

import random
import re
import warnings
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import Net, edges, names, tiny
from torch import nn

from ghnlib import Graph
from ghnlib.graphs.recording import TraceError

SMALL = (3, 8, 8)
trace = Graph.from_module
pytestmark = pytest.mark.filterwarnings("ignore:.*are no nodes")


# --- inputs ----------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 4, 1), nn.Linear(1, 4)
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x, t):
        return self.out(F.silu(self.conv(x) + self.time(t)[:, :, None, None]))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids):
        return self.fc(self.words(ids).mean(1))


BATCH = Net(lambda m, x: m.fc(x["image"].mean((2, 3))), fc=nn.Linear(3, 2))
Pair = namedtuple("Pair", "x t")
IMAGES, TIMES, IDS = torch.randn(1, *SMALL), torch.rand(1, 1), torch.randint(10, (2, 5))


@pytest.mark.parametrize("example", [(IMAGES, TIMES), {"x": IMAGES, "t": TIMES}, Pair(IMAGES, TIMES)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_several_inputs(example, device):
    graph = trace(Denoiser().to(device), example=example)
    expected = {("input", "conv.weight"), ("input", "time.weight"), ("conv.bias", "sum"), ("time.bias", "sum")}
    assert expected < edges(graph)


@pytest.mark.parametrize("example", [IDS, (IDS,), {"ids": IDS}, IDS.int()])
def test_tokens(example):
    graph = trace(Tokens(), example=example)
    assert [name for name in names(graph) if "." in name] == ["words.weight", "fc.weight", "fc.bias"]
    assert not graph.skipped


@pytest.mark.parametrize("example", [{"image": IMAGES}, ({"image": IMAGES, "label": IDS},)])
def test_a_dictionary(example):
    assert names(trace(BATCH, example=example)) == ["input", "glob_avg", "fc.weight", "fc.bias"]
    assert IMAGES.grad is None and not IMAGES.requires_grad


def test_an_example_serves_prediction():
    found = tiny(num_classes=2).predict(Tokens(), example=IDS)
    assert found.keys() == {"words.weight", "fc.weight", "fc.bias"}


def test_a_number_is_the_side_of_an_image():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    assert names(trace(net, 32)) == names(trace(net, np.int64(32))) == names(trace(net, (3, 32, 32)))


@pytest.mark.parametrize("size", [32.0, "32", 0, -32, (3, 0, 32), (3, 32.0, 32)])
def test_impossible_shapes_are_named(size):
    with pytest.raises(ValueError, match=re.escape(f"input_shape={size!r}: (channels, height, width)")):
        trace(BATCH, size)


@pytest.mark.parametrize("net", ["resnet50", None, nn.Linear, BATCH.state_dict()])
def test_what_is_no_network_is_named(net):
    for read in (trace, tiny().predict):
        with pytest.raises(TypeError, match=f"torch.nn.Module, not a {type(net).__name__}$"):
            read(net)


@pytest.mark.filterwarnings("ignore:.*non-tuple sequence")
@pytest.mark.parametrize("net", [Denoiser(), Tokens(), BATCH])
def test_errors_say_how_to_give_other_inputs(net):
    with pytest.raises(TraceError, match="pass example=") as caught:
        trace(net, SMALL)
    assert "input_shape=(" not in str(caught.value) and "meta device" not in str(caught.value)
    with pytest.raises(TraceError, match=r"pass input_shape=\(channels.*pass example="):
        trace(net)
    with pytest.raises(TraceError, match="Check that the network runs on the example"):
        trace(net, example=torch.ones(2, 3, 4))


# --- functions called by keyword -------------------------------------------------------------------------------------

CALLS = {
    "linear": lambda m, x: F.linear(input=x, weight=m.fc.weight, bias=m.fc.bias),
    "linear, half": lambda m, x: F.linear(x, bias=m.fc.bias, weight=m.fc.weight),
    "gelu": lambda m, x: F.gelu(input=m.fc(x), approximate="tanh"),
    "dropout": lambda m, x: F.dropout(input=m.fc(x), p=0.1),
    "relu": lambda m, x: F.relu(input=m.fc(x), inplace=True),
    "norm": lambda m, x: m.fc(F.layer_norm(input=x, normalized_shape=(4,))),
    "groups": lambda m, x: m.fc(F.group_norm(input=x, num_groups=2, weight=None)),
    "batch": lambda m, x: m.fc(F.batch_norm(input=x, running_mean=None, running_var=None, training=True)),
    "attention": lambda m, x: F.scaled_dot_product_attention(query=m.fc(x), key=m.fc(x), value=m.fc(x)),
}


@pytest.mark.parametrize("call", CALLS)
def test_functions_may_be_called_by_keyword(call):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*repeatedly")
        found = names(trace(Net(CALLS[call], fc=nn.Linear(4, 4)), (4,)))
    assert [name for name in found if "." in name] == ["fc.weight", "fc.bias"]


# --- recurrent layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_chains_of_weights_and_biases(kind, gates):
    net = Net(lambda m, x: m.fc(m.rnn(x)[0].mean(1)), rnn=kind(4, 6, batch_first=True), fc=nn.Linear(6, 2))
    graph = trace(net, (5, 4))
    chain = [f"rnn.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert names(graph) == ["input", *chain, "glob_avg", "fc.weight", "fc.bias"]
    assert [node.shape for node in graph.nodes[1:3]] == [(6 * gates, 4), (6 * gates, 6)]
    assert not graph.skipped


@pytest.mark.parametrize("biased", [True, False])
def test_projected_states_are_one_weight_more_whatever_the_length(biased):
    rnn = nn.LSTM(4, 6, batch_first=True, proj_size=3, bias=biased)
    graphs = [trace(Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=rnn, fc=nn.Linear(3, 2)), (length, 4))
              for length in (2, 9)]  # fmt: skip
    weights = [f"rnn.weight_{part}_l0" for part in ("ih", "hh", "hr")]
    assert [name for name in names(graphs[0]) if "weight" in name] == [*weights, "fc.weight"] and not graphs[0].skipped
    assert names(graphs[0]) == names(graphs[1]) and edges(graphs[0]) == edges(graphs[1])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_the_chain_of_a_layer_however_often_they_run(kind):
    def forward(m, x):
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.fc(state[0] if isinstance(state, tuple) else state)

    with pytest.warns(UserWarning, match="repeatedly"):
        graph = trace(Net(forward, cell=kind(4, 6), fc=nn.Linear(6, 2)), (5, 4))
    chain = [f"cell.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert names(graph) == ["input", *chain, "fc.weight", "fc.bias"] and not graph.skipped


def test_directions_of_recurrent_layers_are_branches_and_layers_a_chain():
    rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, bias=False)
    graph = trace(Net(lambda m, x: m.fc(m.rnn(x)[1][0][-1]), rnn=rnn, fc=nn.Linear(6, 2)), (5, 4))
    first, back = (f"rnn.weight_ih_l0{suffix}" for suffix in ("", "_reverse"))
    assert {("input", first), ("input", back)} < edges(graph) and not graph.skipped
    concat = {names(graph)[a] for a, b in graph.edges.tolist() if names(graph)[b] == "concat"}
    assert concat >= {"rnn.weight_hh_l0", "rnn.weight_hh_l0_reverse"}


def test_released_hypernetworks_do_not_know_recurrent_layers():
    net = Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=nn.GRU(4, 6), fc=nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"rnn\.weight_ih_l0: unsupported layer GRU.*not predicted"):
        graph = trace(net, (5, 4), "ghn3")
    assert graph.skipped["rnn.bias_hh_l0"] == "unsupported layer GRU"


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_what_autograd_does_not_follow_is_not_called_unused():
    def forward(m, x):
        with torch.no_grad():
            frozen = m.frozen(x)
        return m.head(frozen + m.detached(x).detach() + (x * m.data.weight.data.sum()))

    layers = {name: nn.Linear(4, 4) for name in ("frozen", "detached", "data", "unused", "head")}
    skipped = trace(Net(forward, **layers), (4,)).skipped
    assert "no_grad" in skipped["frozen.weight"] and "no_grad" in skipped["frozen.bias"]
    assert "detached" in skipped["detached.weight"] and "detached" in skipped["data.weight"]
    assert {skipped[name] for name in ("unused.weight", "unused.bias", "data.bias")} == {"not used in the forward pass"}


def test_branches_that_values_decide_are_not_called_unused():
    net = Net(lambda m, x: m.yes(x) if x.sum() > -1e9 else m.no(x), yes=nn.Linear(4, 2), no=nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="needs values"):
        skipped = trace(net, (4,)).skipped
    reason = "not used in the forward pass of a random input, by whose values it decides"
    assert skipped == dict.fromkeys(("no.weight", "no.bias"), reason)


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_the_other_mode_are_not_called_unused(training):
    layers = {"train_only": nn.Linear(4, 2), "eval_only": nn.Linear(4, 2)}
    net = Net(lambda m, x: m.train_only(x) if m.training else m.eval_only(x), **layers)
    skipped = trace(net.train(training), (4,)).skipped
    other, call = ("eval_only", "eval") if training else ("train_only", "train")
    assert skipped.keys() == {f"{other}.weight", f"{other}.bias"}
    assert f"net.{call}() before" in skipped[f"{other}.weight"]
    assert net.training is training


def test_layers_that_training_skips_at_random_are_traced_in_evaluation_mode():
    def forward(m, x):
        for name in "abcdef":
            if not (m.training and torch.rand(()) < 0.5):
                x = x + m.get_submodule(name)(x)
        return x

    net = Net(forward, **{name: nn.Linear(4, 4) for name in "abcdef"})
    graphs = []
    for seed in range(3):
        torch.manual_seed(seed)
        graphs.append(trace(net, (4,)))
    assert net.training and not any(graph.skipped for graph in graphs)
    assert names(graphs[0]) == names(graphs[1]) == names(graphs[2]) == names(trace(net.eval(), (4,)))


def test_random_choices_of_a_forward_pass_are_always_the_same():
    net = Net(
        lambda m, x: m.get_submodule(random.choice("abcdefgh"))(x), **{name: nn.Linear(4, 4) for name in "abcdefgh"}
    )
    assert len({tuple(names(trace(net, (4,)))) for _ in range(8)}) == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.ModuleDict({"net": net})])
def test_a_dictionary_is_bound_to_the_forward_that_names_its_arguments(wrap):
    inner = Net(lambda m, batch: m.fc(batch["image"]), fc=nn.Linear(4, 2))
    net = wrap(inner)
    if isinstance(net, nn.ModuleDict):
        net.forward = lambda *args, **options: net["net"](*args, **options)
    assert [name.rpartition("fc.")[2] for name in names(trace(net, example={"image": torch.zeros(2, 4)}))] == [
        "input", "weight", "bias"
    ]  # fmt: skip


@dataclass(slots=True)
class Result:
    loss: object
    logits: torch.Tensor


def test_results_in_slots_are_outputs():
    graph = trace(Net(lambda m, x: Result(None, m.fc(x)), fc=nn.Linear(4, 2)), (4,))
    assert names(graph) == ["input", "fc.weight", "fc.bias"]


def test_types_and_shapes_of_parameters_are_no_use():
    net = Net(
        lambda m, x: m.fc(x.to(m.unused.weight.dtype).reshape(-1, m.unused.weight.shape[1])),
        fc=nn.Linear(4, 2), unused=nn.Linear(4, 4),
    )  # fmt: skip
    assert set(trace(net, (4,)).skipped.values()) == {"not used in the forward pass"}


def test_dynamically_quantised_layers_are_seen_through_and_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(net, {"1": torch.ao.quantization.default_dynamic_qconfig})
    with pytest.warns(UserWarning, match=r"1\.weight: quantised"):
        graph = trace(quantised, (4,))
    assert names(graph) == ["input", "0.weight", "0.bias", "3.weight", "3.bias"]
    assert graph.skipped == dict.fromkeys(("1.weight", "1.bias"), "quantised: its weights are packed")
