"""What runs is what is traced: hooks, replaced forwards, attributes of parameters; and never the caller's network."""

import copyreg
from contextvars import ContextVar
from functools import partial
from threading import Lock, RLock
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shared import Net, names
from torch import nn

from ghnlib import Graph
from ghnlib.graphs.recording import TraceError

SMALL = (3, 8, 8)
trace = Graph.from_module
CALLS: list[str] = []
GLOBAL: dict[str, object] = {}


def net_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *layers, nn.Flatten(), nn.Linear(4 * 64, 2))


PLAIN = names(trace(net_of(), SMALL))


def untouched(net: nn.Module) -> bool:
    return net[1].num_batches_tracked == 0 and net[1].running_mean.eq(0).all() and net[1].weight.grad is None


def replaced_by_closure(net):
    old = net.forward
    net.forward = lambda x: {"logits": old(x)}


def replaced_by_global(net):
    GLOBAL["old"] = net.forward
    net.forward = lambda x: GLOBAL["old"](x)


def replaced_by_method(net):
    net.forward = type(net).forward.__get__(net)


def replaced_twice(net):
    def logged(function):
        def run(*args, depth=[0], **kwargs):  # noqa: B006
            depth[0] += 1
            return function(*args, **kwargs)

        return run

    net.forward = logged(logged(net.forward))
    net[0].forward = logged(net[0].forward)


def replaced_by_compiled(net):
    net.forward = torch.compile(net.forward)


@pytest.mark.parametrize("replace", [
    replaced_by_closure, replaced_by_global, replaced_by_method, replaced_twice, replaced_by_compiled, nn.Module.compile,
])  # fmt: skip
def test_a_forward_replaced_on_the_instance_is_traced_on_the_copy(replace):
    net = net_of().train()
    replace(net)
    assert names(trace(net, SMALL)) == PLAIN
    assert untouched(net)


def test_a_compiled_network_is_traced_as_it_was_written():
    net = net_of()
    assert names(trace(torch.compile(net), SMALL)) == ["input", *(f"_orig_mod.{name}" for name in PLAIN[1:])]
    assert untouched(net)


def test_hooks_that_change_inputs_and_outputs_are_honoured():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    net[0].extra, net[0].scale = nn.Conv2d(3, 3, 1), nn.Conv2d(4, 4, 1)
    net[0].register_forward_pre_hook(lambda module, args: (module.extra(args[0]),))
    net[0].register_forward_hook(lambda module, args, out: out + module.scale(out))
    layers = [f"{layer}.{part}" for layer in ("0.extra", "0", "0.scale") for part in ("weight", "bias")]
    assert names(trace(net, SMALL)) == ["input", *layers, "sum", "1.weight", "1.bias"]


def test_a_hook_that_computes_a_weight_is_honoured():
    net = Net(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1, bias=False), shift=nn.Linear(4, 4))
    net.conv.register_forward_hook(lambda module, args, out: net.shift(out.mean((2, 3))))
    assert names(trace(net, SMALL)) == ["input", "conv.weight", "glob_avg", "shift.weight", "shift.bias"]


@pytest.mark.parametrize("kept", ["closure", "global"])
def test_what_hooks_write_does_not_reach_the_caller(kept):
    seen: list[str] = []

    def to_closure(*_):
        seen.append("closure")

    def to_global(*_):
        CALLS.append("global")

    net = net_of()
    net[0].register_forward_hook(to_closure if kept == "closure" else to_global)
    assert names(trace(net, SMALL)) == PLAIN
    assert not seen and not CALLS
    net(torch.randn(2, *SMALL))
    assert [*seen, *CALLS] == [kept]
    CALLS.clear()


def test_hooks_that_read_values_run_with_values():
    means: dict[str, float] = {}
    net = net_of()
    net[0].register_forward_hook(lambda module, args, out: means.update(mean=out.mean().item()))
    with pytest.warns(UserWarning, match="needs values"):
        graph = trace(net, SMALL)
    assert names(graph) == PLAIN and not means and untouched(net)


def test_what_a_hook_cannot_share_is_named():
    class Locked:
        def __init__(self):
            self.numbers = (i for i in range(3))

        def __call__(self, *_):
            next(self.numbers)

        method = __call__

    numbers = Locked().numbers
    hooks = {"<lambda>": lambda *_: next(numbers), "Locked": Locked(), "__call__": Locked().method,
             "partial": partial(next, numbers)}  # fmt: skip
    for name, hook in hooks.items():
        net = net_of()
        net[1].register_forward_hook(hook)
        said = rf"module '1' \(BatchNorm2d\): its _forward_hooks \(.*{name}\).*generator.*remove"
        with pytest.raises(TraceError, match=said):
            trace(net, SMALL)


STATE = SimpleNamespace(depth=ContextVar("depth", default=0), lock=RLock(), calls=[])


def test_locks_and_context_variables_are_shared():
    def hook(module, args, out):
        with STATE.lock, module.lock:
            STATE.calls.append(STATE.depth.get())

    net = net_of()
    net[1].lock = Lock()
    net[1].register_forward_hook(hook)
    assert names(trace(net, SMALL)) == PLAIN and not STATE.calls and untouched(net)
    assert ContextVar not in copyreg.dispatch_table


def test_float_layers_that_are_made_to_be_quantised_trace():
    net = Net(lambda m, x: m.fc(m.sum.add_relu(m.a(x), m.b(x))), sum=torch.ao.nn.quantized.FloatFunctional(),
              **{name: nn.Linear(4, 4) for name in ("a", "b", "fc")})  # fmt: skip
    assert "sum" in [node.op for node in trace(net, (4,)).nodes]


class Reaching:
    """Something that finds the caller's network where no copy can follow."""

    networks: list[nn.Module] = []  # noqa: RUF012


def test_a_forward_that_runs_the_callers_network_is_an_error():
    net = Net(lambda m, x: Reaching.networks[0].inner(x), inner=net_of())
    Reaching.networks.append(net)
    with pytest.raises(TraceError, match=r"Net.*runs the network itself.*inner\.0\.weight"):
        trace(net, SMALL)
    assert untouched(net.inner)
    Reaching.networks.clear()


def test_attributes_of_parameters_are_kept():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.fc.weight.scale = torch.ones(1)
            self.fc.weight.owner = self

        def forward(self, x):
            assert self.fc.weight.owner is self
            return nn.functional.linear(x, self.fc.weight * self.fc.weight.scale, self.fc.bias)

    assert names(trace(Scaled(), (4,))) == ["input", "fc.weight", "fc.bias"]


def test_modules_within_modules_do_not_exhaust_recursion():
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(3, 3, 1), inner

        def forward(self, x):
            return self.inner(self.conv(x))

    net = nn.Identity()
    for _ in range(200):
        net = Block(net)
    assert len(trace(net, SMALL)) == 401


def test_networks_of_inference_mode_trace():
    with torch.inference_mode():
        net = net_of()
    assert names(trace(net, SMALL)) == PLAIN


def test_sharded_networks_are_errors_with_a_remedy(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        net = fully_shard(net_of(), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(TraceError, match=r"sharded.*before"):
            trace(net, SMALL)
    finally:
        dist.destroy_process_group()


def test_synchronised_batch_norm_needs_no_process_group(tmp_path):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net_of()).train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for convention in ("correct", "ghn3", "ppuda"):
            graph, plain = trace(net, SMALL, convention), trace(net_of(), SMALL, convention)
            assert graph.nodes == plain.nodes and graph.edges.tolist() == plain.edges.tolist()
    finally:
        dist.destroy_process_group()
    assert type(net[1]) is nn.SyncBatchNorm
