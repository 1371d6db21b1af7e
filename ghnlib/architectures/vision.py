"""Networks that people use: torchvision's classifiers behind the interface of ``Architecture``, and any network by its
importable name.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ghnlib.architectures.architecture import Buildable
from ghnlib.architectures.plan import IMAGENET_FORM
from ghnlib.data.images import DataError
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import CLASS_ROLES


def keep_resolution(net: nn.Module) -> None:
    """Make a torchvision network fit for images of 32 pixels, in place, before it is traced (GHN-3, CIFAR).

    First convolutions of ResNets and DenseNets become their central 3x3 positions; the first convolution (of MobileNets
    those of five blocks) has stride 1, the first max pooling (of VGG those of ten layers) is gone. Others stay.
    """
    from torchvision import models  # takes seconds, and only torchvision's networks need it

    strided: list[nn.Module] = []
    match net:
        case models.ResNet():
            net.conv1, net.maxpool = _central(net.conv1), nn.Identity()
        case models.DenseNet():
            net.features.conv0, net.features.pool0 = _central(net.features.conv0), nn.Identity()
        case models.VGG():
            for i in (i for i, layer in enumerate(net.features[:10]) if isinstance(layer, nn.MaxPool2d)):
                net.features[i] = nn.Identity()
        case models.AlexNet():
            strided, net.features[2] = [net.features[0]], nn.Identity()
        case models.ShuffleNetV2():
            strided, net.maxpool = [net.conv1], nn.Identity()
        case models.GoogLeNet():
            strided, net.maxpool1 = [net.conv1], nn.Identity()
        case models.MobileNetV2() | models.MobileNetV3():
            strided = [net.features[:5]]
        case models.MNASNet():
            strided = [net.layers[0]]
        case models.ConvNeXt():
            strided = [net.features[0]]
    for layer in (layer for part in strided for layer in part.modules() if isinstance(layer, nn.Conv2d)):
        layer.stride = (1, 1)


def _central(conv: nn.Conv2d) -> nn.Conv2d:
    """A 7x7 convolution cut to its central 3x3 positions, stride 1."""
    cut = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    cut.weight = nn.Parameter(conv.weight.detach()[:, :, 2:5, 2:5].clone())
    return cut


SMALL_FAMILIES = ("small-resnet", "small-convnext", "small-swin")
"""Small networks of torchvision's families, for images of 16 pixels and more."""


def _small(family: str, num_classes: int) -> nn.Module:
    from torchvision.models import convnext, resnet, swin_transformer

    if family == "small-convnext":
        stages = convnext.CNBlockConfig(32, 64, 2), convnext.CNBlockConfig(64, None, 2)
        return convnext.ConvNeXt(stages, num_classes=num_classes)
    if family == "small-swin":
        sizes = {"patch_size": [2, 2], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
        return swin_transformer.SwinTransformer(**sizes, stochastic_depth_prob=0.0, num_classes=num_classes)
    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes)
    net.maxpool = nn.Identity()
    return net


def _own(name: str, input_size: int) -> Callable[..., nn.Module]:
    """The function that "module:function" names; the side of the images goes to its argument ``image_size``."""
    module, _, function = name.partition(":")
    make = getattr(importlib.import_module(module), function)
    sized = "image_size" in inspect.signature(make).parameters
    return partial(make, image_size=input_size) if sized else make


def _maker(name: str, input_size: int) -> Callable[..., nn.Module]:
    if ":" in name:
        return _own(name, input_size)
    if name in SMALL_FAMILIES:
        return partial(_small, name)
    from torchvision import models  # takes seconds, and only this needs it

    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # minutes of drawing
    return partial(models.get_model, name, **slow)


@dataclass(frozen=True)
class NamedNetwork(Buildable):
    """A classifier of torchvision by name, one of ``SMALL_FAMILIES``, or what a "module:function" makes, called with
    ``num_classes`` and, if it has such an argument, ``image_size``; behind the interface of ``Architecture``.

    For images below 64 pixels those of torchvision ``keep_resolution``.
    """

    num_classes: int = 10
    input_size: int = 32
    name: str = "resnet50"

    @cached_property
    def graph(self) -> Graph:
        """The traced graph."""
        return Graph.from_module(self.build().eval(), (3, self.input_size, self.input_size))

    def build(self, num_classes=None, input_size=None, device="meta", track_running_stats=False, auxiliary=False,
              drop_path=0.0) -> nn.Module:  # fmt: skip
        """As ``Architecture.build``. Raises ValueError for an unknown name, an auxiliary head or drop path, TypeError
        for what is no network."""
        if auxiliary or drop_path:
            raise ValueError(f"{self.name} has no auxiliary head and no drop path")
        size = input_size or self.input_size
        name = self.name.removeprefix("torchvision.models.")
        make = partial(_maker(name, size), num_classes=num_classes or self.num_classes)
        device = torch.device(device or "cpu")
        try:
            with device:
                net = make()
        except RuntimeError:  # on meta, of a constructor that reads values as RegNet's does
            if device.type != "meta":
                raise
            with torch.random.fork_rng(devices=[]):
                net = without_weights(make).to(device)
        if not isinstance(net, nn.Module):
            raise TypeError(f"{name} returns a {type(net).__name__}, not a torch.nn.Module")
        if size < IMAGENET_FORM and ":" not in name and name not in SMALL_FAMILIES:
            with device:
                keep_resolution(net)
        if not track_running_stats:
            stop_tracking(net)
        net.expected_input_sz = size
        return net


def stop_tracking(net: nn.Module) -> None:
    """Make batch norms use the statistics of the batch in every mode."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def without_skips(net: nn.Module) -> nn.Module:
    """A ResNet of torchvision whose bottlenecks become chains of their own layers, in place (PPUDA Table 10)."""
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for i, b in enumerate(list(stage)):
            stage[i] = nn.Sequential(b.conv1, b.bn1, b.relu, b.conv2, b.bn2, b.relu, b.conv3, b.bn3, b.relu)
    return net


def own_networks(names: Sequence[str], num_classes: int, input_size: int) -> list[NamedNetwork]:
    """Networks to train a hypernetwork on, by the names that ``NamedNetwork`` takes; traced.

    Raises:
        DataError: a name is unknown or cannot be imported, what it stands for is no module or cannot be traced, or has
            no classification layer for so many classes.
    """
    networks = [NamedNetwork(num_classes, input_size, name) for name in names]
    for network in networks:
        if reason := _why_not(network):
            raise DataError(f"deepnets.extra or evaluate.unseen: {network.name} cannot be trained on: {reason}")
    return networks


def _why_not(network: NamedNetwork) -> str:
    try:
        graph = network.graph
    except Exception as error:  # whatever their code raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    classes = {node.shape[0] for node in graph.nodes if node.role in CLASS_ROLES}
    if classes != {network.num_classes}:
        return f"its output comes from no classification layer for {network.num_classes} classes"
    return ""


def build_to_run(architecture, device: torch.device) -> nn.Module:
    """The network of an ``Architecture`` (or the like), to be called with predicted parameters: without memory for its
    own, unless it has buffers, or parameters that are not predicted; these are the same at each call."""
    net = architecture.build(device="meta")
    if isinstance(architecture, NamedNetwork) and (architecture.graph.skipped or any(True for _ in net.buffers())):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = architecture.build(device="cpu").to(device)
    return net


NEWER = ("maxvit_t", "regnet_y_128gf", "swin_v2_b", "swin_v2_s", "swin_v2_t", "vit_h_14")
"""torchvision's classifiers that are not among the 74 of the PyTorch split (GHN-3 section 5.1)."""


def torchvision_classifiers() -> list[str]:
    """Importable names of torchvision's classifiers: the PyTorch split and ``NEWER``."""
    from torchvision import models  # takes seconds

    return [f"torchvision.models.{name}" for name in models.list_models(module=models)]


class WeightsOnMeta(TorchFunctionMode):
    """Builds networks without weights; what their constructors compute (RegNet's widths) stays on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """What a function makes, without memory for weights where that works."""
    try:
        with WeightsOnMeta():
            return make()
    except RuntimeError:  # a constructor that runs a part of the network
        return make()


class UnknownNetwork(ValueError):
    """Nothing that can be imported has the name of a network."""


def network_by_name(name: str, num_classes: int, with_weights: bool = False) -> nn.Module:
    """Call an importable function or class that makes a network, without memory for weights where that works, or with.

    Raises:
        UnknownNetwork: nothing has this name, or its module cannot be imported.
    """
    module, _, function = name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        text = f"no network {name!r} ({error}): give an importable name such as torchvision.models.resnet50"
        raise UnknownNetwork(text) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return (
            make(num_classes=num_classes) if with_weights else without_weights(partial(make, num_classes=num_classes))
        )
