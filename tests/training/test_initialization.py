"""Every initialisation of the registry by its definition."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from shared import digits, pool, tiny
from torch import nn

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.graphs.nodes import Role
from ghnlib.training.initialization import INITIALIZATIONS, Sources, initialize, shuffle
from ghnlib.training.learned_scales import (
    EVERY,
    GAMMA,
    PATIENCE,
    SMALLEST,
    grad_cosine,
    gradinit,
    learn_scales,
    loss_of,
    nio,
)


@cache
def hypernetwork():
    return tiny(hid=16)


def architectures():
    return tuple(a for a in pool(size=12, input_size=16) if a.norm)[:4]


def peers():
    return [architecture.graph for architecture in architectures()[1:]]


@cache
def sources():
    images = digits(image_size=16).train
    return Sources(
        0, hypernetwork(), architectures()[0].graph, peers(), images=images, held_out=images, steps=3, batch_size=24
    )


def fresh(track=True):
    torch.manual_seed(0)
    return architectures()[0].build(device="cpu", track_running_stats=track)


def made(name, **changes):
    net = fresh()
    initialize(name, net, replace(sources(), **changes))
    return dict(net.named_parameters())


def together(parameters):
    return torch.cat([p.detach().flatten() for p in parameters.values()])


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_initialisation_depends_on_its_sources_alone(name):
    values = together(made(name))
    assert values.isfinite().all()
    assert torch.equal(values, together(made(name)))
    assert torch.equal(values, together(dict(fresh().named_parameters()))) == (name == "random")
    seeded = name in ("he", "gradinit", "nio", "ghn-noise", "ghn-orth", "ghn-perturbed", "ghn-shuffled")
    assert torch.equal(values, together(made(name, seed=1))) != seeded


def test_what_cannot_be_initialised_is_said():
    with pytest.raises(ValueError, match=r"'xavier'; known: random, he"):
        made("xavier")
    with pytest.raises(ValueError, match="'ghn-mean' needs graph, peers"):
        made("ghn-mean", graph=None, peers=())


def test_he_has_its_variance_and_no_biases():
    values = made("he")
    large = [name for name, value in values.items() if value.ndim > 1 and value.numel() > 2000]
    biases = [name for name in values if name.endswith("bias")]
    assert len(large) > 3 and len(biases) > 3
    for name in large:
        assert float(values[name].detach().var()) == pytest.approx(2 / values[name][0].numel(), rel=0.2), name
    assert not any(values[name].any() for name in biases)


def test_he_leaves_layer_scales_and_tables_of_positions():
    for name, kept in (("small-convnext", "layer_scale"), ("small-swin", "relative_position_bias_table")):
        net = NamedNetwork(10, 16, name).build(device="cpu")
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        initialize("he", net, Sources(0))
        left = [torch.equal(p, before[n]) for n, p in net.named_parameters() if kept in n]
        assert left and all(left)
        assert not torch.equal(net.get_parameter("features.0.0.weight"), before["features.0.0.weight"])


def test_noise_is_small_and_orthogonal_weights_start_at_their_layer():
    plain, noisy = made("ghn"), made("ghn-noise")
    assert torch.corrcoef(torch.stack([together(plain), together(noisy)]))[0, 1] > 0.9999
    perturbed = {name: value for name, value in made("ghn-perturbed").items() if value.numel() > 1000}
    assert len(perturbed) > 3
    for name, value in perturbed.items():
        both = torch.stack([value.detach().flatten(), plain[name].detach().flatten()])
        assert torch.corrcoef(both)[0, 1] == pytest.approx(1.25**-0.5, abs=0.05), name
    weights = [name for name, value in plain.items() if value.ndim > 1]
    assert sum(not torch.equal(plain[name], noisy[name]) for name in weights) > len(weights) / 2
    all_layers, from_third = made("ghn-orth"), made("ghn-orth", orth_from=2 / len(weights))
    matrix = all_layers[weights[0]].flatten(1)
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)
    assert torch.equal(from_third[weights[0]], plain[weights[0]])
    assert not torch.equal(from_third[weights[3]], plain[weights[3]])


def test_the_mean_is_over_all_tensors_of_one_role_and_shape():
    known = Counter(n[2:4] for peer in peers() for n in peer.nodes)
    node = next(n for n in architectures()[0].graph.nodes if n.role == Role.NORM and known[n[2:4]] > 2)
    with torch.no_grad():
        values = [
            hypernetwork().predict(peer)[n.norm_bias] for peer in peers() for n in peer.nodes if n[2:4] == node[2:4]
        ]
    assert len(values) > 2
    torch.testing.assert_close(made("ghn-mean")[node.norm_bias], torch.stack(values).mean(0))


def test_a_shuffled_graph_has_the_networks_tensors_at_other_places():
    graph, shuffled = architectures()[0].graph, shuffle(architectures()[0].graph, 0)
    assert sorted(graph.nodes, key=str) == sorted(shuffled.nodes, key=str) and (graph.edges == shuffled.edges).all()
    moved = [a != b for a, b in zip(graph.nodes, shuffled.nodes)]
    assert sum(moved) > len(graph) / 2 and not moved[0] and not any(moved[-2:])
    mlp = tiny("mlp", hid=16)  # reads no edges
    torch.testing.assert_close(together(made("ghn", ghn=mlp)), together(made("ghn-shuffled", ghn=mlp)))
    assert not torch.allclose(together(made("ghn")), together(made("ghn-shuffled")))


def small_net(scale=1.0):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(72, 10))
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net


@pytest.fixture(scope="module")
def batch():
    """Images and labels."""
    return next(digits(image_size=16).train.stream(48, 0))


def test_the_objective_of_gradinit_is_the_loss_after_a_step_of_sgd(batch):
    net = small_net(0.7)
    value = gradinit(loss_of(net), dict(net.named_parameters()), *batch, eta=0.1)
    x, y = batch
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    F.cross_entropy(net(x[:32]), y[:32]).backward()
    assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm() < GAMMA
    optimizer.step()
    torch.testing.assert_close(value, (False, F.cross_entropy(net(x[16:]), y[16:])))


@pytest.mark.parametrize("objective", [gradinit, nio])
@pytest.mark.parametrize(("scale", "constrained"), [(0.7, False), (3.0, True)])
def test_learning_lowers_the_objective_or_the_norm_with_one_positive_scale_a_tensor(
    batch, objective, scale, constrained
):
    net = small_net(scale)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    norm, _ = grad_cosine(loss_of(net), dict(net.named_parameters()), *batch)
    assert bool(norm > GAMMA) == constrained
    _, value = objective(loss_of(net), dict(net.named_parameters()), *batch)
    assert learn_scales(net, objective, repeat(batch, 8), batch) == 8
    assert objective(loss_of(net), dict(net.named_parameters()), *batch)[1] < value - 0.01
    if constrained:
        assert grad_cosine(loss_of(net), dict(net.named_parameters()), *batch)[0] < norm
    for name, parameter in net.named_parameters():
        ratio = (parameter.detach() / before[name])[before[name] != 0]
        assert not len(ratio) or ratio.min() > 0.5 and torch.allclose(ratio, ratio.mean(), rtol=1e-4)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in net.named_buffers())


def test_scales_stop_at_their_lower_bound(batch):
    net = small_net()
    before = net[0].weight.detach().clone()
    small = lambda loss, parameters, x, y: (False, parameters["0.weight"].square().sum())
    learn_scales(net, small, repeat(batch, 6), batch, lr=0.5)
    torch.testing.assert_close(net[0].weight.detach(), SMALLEST * before)


def test_learning_ends_where_the_objective_converges_on_held_out_images(batch):
    """There it is least at a scale of 1.2, elsewhere ever lower."""
    net, held_out = small_net(), (batch[0][:4], batch[1][:4])
    before = net[0].weight.detach().clone()

    def objective(loss, parameters, x, y):
        ratio = parameters["0.weight"].norm() / before.norm()
        return False, 10 * (ratio - 1.2).abs() if len(x) == 4 else -ratio

    steps = learn_scales(net, objective, repeat(batch, 500), held_out)
    assert steps == 5 + EVERY * PATIENCE, "after 5 steps the scale is 1.15, after 10 it is 1.3"
    torch.testing.assert_close(net[0].weight.detach(), 1.15 * before, rtol=1e-3, atol=0)


def test_below_the_bound_of_the_norm_an_objective_is_lower_than_any_above(batch):
    """First the norm falls to the bound; the loss that counts below it is larger than that."""
    net = small_net()
    before = net[0].weight.detach().clone()

    def objective(loss, parameters, x, y):
        ratio = parameters["0.weight"].norm() / before.norm()
        return (True, ratio) if ratio > 0.9 else (False, 5 + ratio)

    assert learn_scales(net, objective, repeat(batch, 20), batch) == 20
    torch.testing.assert_close(net[0].weight.detach(), 0.4 * before, rtol=1e-2, atol=0)


def test_gradcosine_is_the_cosine_of_the_gradients_of_two_halves(batch):
    net, (x, y) = small_net(), batch
    norm, cosine = grad_cosine(loss_of(net), dict(net.named_parameters()), x, y, overlap=0.0)
    gradients = []
    for part in (slice(24), slice(24, None)):
        net.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(cosine, F.cosine_similarity(*gradients, dim=0))
    torch.testing.assert_close(norm, (gradients[0].norm() + gradients[1].norm()) / 2)
