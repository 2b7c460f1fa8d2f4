"""The networks by name: sizes, shapes, weights, parts, grouped statistics, and all three stages with each."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY
from torch import Tensor, nn
from torchvision import models
from training import small as small_run
from training import train_here

from data.augment import Pipeline
from data.batches import draw_supervised
from data.sets import ImageSet
from engine import session
from engine.context import Context
from engine.supervised import train_supervised
from model.backbone import part_names
from model.batch_counters import count_at_end
from model.classifier import Classifier, build_classifier, new_classifier, virtual_copy
from model.feature_maps import collect_maps
from model.forward import forward
from model.grouped_norm import group
from model.inference import predict
from model.networks import check, vgg16_bn
from utils import config, plugins
from utils.checkpoint import State
from utils.config.schema import Named
from utils.errors import UserError
from utils.runtime.machine import Machine

FP32 = Machine(torch.device("cpu"))
BF16 = Machine(torch.device("cpu"), amp=True)
SMALL: dict[str, dict[str, Any]] = {
    "densenet121": {"growth": 4, "blocks": (2, 2, 2, 2)},
    "mobilenet_v2": {"width": 0.1},
    "preact_resnet18": {"width": 4, "blocks": 1},
    "resnet18": {"blocks": (1, 1, 1, 1)},
    "resnet18_cifar": {"width": 4, "blocks": 1},
    "resnet34": {"blocks": (1, 1, 2, 1)},
    "resnet50": {"blocks": (1, 1, 1, 1)},
    "vgg16_bn": {"width": 4, "pool": 1, "hidden": 16},
    "vit_b_16": {"image_size": 32, "patch_size": 8, "layers": 4, "heads": 2, "hidden_dim": 16, "mlp_dim": 32},
    "wide_resnet": {"depth": 10, "widen_factor": 2},
}
# With 1000 classes as torchvision documents them, or with 10 as the papers of the 32 x 32 networks do; features.
PUBLISHED = [
    ("resnet18", {}, 1000, 11_689_512, 512),
    ("resnet34", {}, 1000, 21_797_672, 512),
    ("resnet50", {}, 1000, 25_557_032, 2048),
    ("densenet121", {}, 1000, 7_978_856, 1024),
    ("vgg16_bn", {}, 1000, 138_365_992, 4096),
    ("mobilenet_v2", {}, 1000, 3_504_872, 1280),
    ("vit_b_16", {}, 1000, 86_567_656, 768),
    ("resnet18_cifar", {}, 10, 11_173_962, 512),
    ("preact_resnet18", {}, 10, 11_172_170, 512),  # published: 11.17M
    ("wide_resnet", {}, 10, 36_479_194, 640),  # 36.5M
    ("wide_resnet", {"depth": 16, "widen_factor": 1}, 10, 175_066, 64),  # 0.18M
    ("wide_resnet", {"depth": 40, "widen_factor": 4}, 10, 8_949_210, 256),  # 8.9M
]
every_network = pytest.mark.parametrize("name", sorted(SMALL))
normalized = pytest.mark.parametrize("name", sorted(SMALL.keys() - {"vit_b_16"}))


def chosen(name: str, **changes: Any) -> Named:
    """Return name and settings of a small network, as given by a YAML."""
    return Named(name, plugins.settings("model.networks", name)(**SMALL[name] | changes))


def small(name: str, seed: int = 0, classes: int = 5, **changes: Any) -> Classifier:
    """Return the small classifier in float64, with BN weights and statistics like those of a trained one."""
    model = build_classifier(chosen(name, **changes), classes, seed).double()
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.copy_(0.6 + 0.8 * torch.rand(norm.weight.shape, generator=generator))
        norm.bias.data.copy_(0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.2)
        norm.momentum = None  # the statistics become those of the forward below
    if name == "vgg16_bn":
        for part in model.backbone.modules():
            if isinstance(part, nn.Linear):
                part.weight.data.mul_(20)  # they start so near 0 that the images would not show in the logits
    if norms:
        with torch.random.fork_rng(), torch.no_grad():
            model.train()(some_images(16, seed=9))
        for norm in norms:
            norm.momentum = 0.1
    return model


def some_images(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Return random images (count, 3, side, side) float64."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_network_is_tested() -> None:
    """Every network in the folder is covered by these tests."""
    assert sorted(SMALL) == plugins.names("model.networks")
    assert set(SMALL) == {name for name, *_ in PUBLISHED}


@pytest.mark.parametrize(("name", "settings", "classes", "published", "features"), PUBLISHED)
def test_the_full_network_has_the_published_size(
    name: str, settings: dict[str, Any], classes: int, published: int, features: int
) -> None:
    """By default a network has the published number of weights: its backbone without a head, and the linear layer."""
    with torch.device("meta"):
        kind = plugins.settings("model.networks", name)(**settings)
        backbone = plugins.load("model.networks", name).build(kind)
    assert backbone.feature_dim == features
    assert sum(p.numel() for p in backbone.parameters()) == published - (features + 1) * classes


@every_network
def test_images_become_features_and_logits(name: str) -> None:
    """(B, 3, 32, 32) becomes (B, feature_dim) and (B, C); the logits are the linear layer's of the features, depend on the
    images, and every weight lies under `backbone.` or `linear.` and gets a gradient."""
    model = small(name).eval()
    images = some_images(3)
    features, logits = model.features(images), model(images)
    assert features.shape == (3, model.backbone.feature_dim)
    assert logits.shape == (3, 5)
    assert logits.std(0).min() > 1e-5
    torch.testing.assert_close(logits, features @ model.linear.weight.T + model.linear.bias)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "linear"}
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_network
def test_initial_weights_repeat_under_the_seed(name: str) -> None:
    """The same seed gives the same weights regardless of earlier draws, another seed gives others, and torch's global
    generator is not affected."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_classifier(chosen(name), 5, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = (build_classifier(chosen(name), 5, seed).state_dict() for seed in (1, 2))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not torch.equal(first["linear.weight"], other["linear.weight"])
    backbone = [key for key in first if key.startswith("backbone.") and first[key].ndim > 1 and first[key].abs().sum() > 0]
    assert all(not torch.equal(first[key], other[key]) for key in backbone)
    assert len(backbone) > 5


def torchvisions(name: str) -> Any:
    """Return torchvision's own small network with five classes."""
    kind = models.resnet
    s = SMALL[name]
    if name.startswith("resnet"):
        return models.ResNet(kind.Bottleneck if name == "resnet50" else kind.BasicBlock, list(s["blocks"]), num_classes=5)
    if name == "densenet121":
        return models.DenseNet(s["growth"], s["blocks"], 2 * s["growth"], num_classes=5)
    if name == "mobilenet_v2":
        return models.MobileNetV2(5, s["width"])
    sizes = (s["image_size"], s["patch_size"], s["layers"], s["heads"], s["hidden_dim"], s["mlp_dim"])
    return models.VisionTransformer(*sizes, num_classes=5)


HEADS = {"densenet121": "classifier", "mobilenet_v2": "classifier.1", "vit_b_16": "heads.head"}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "densenet121", "mobilenet_v2", "vit_b_16"])
def test_torchvisions_networks_are_torchvisions(name: str) -> None:
    """With the backbone's weights under their own names and the linear layer's under those of the head, torchvision's
    network gives the same logits; no key is missing or left over."""
    model = small(name).eval()
    head = HEADS.get(name, "fc")
    renamed = {
        key.removeprefix("backbone.") if key.startswith("backbone.") else key.replace("linear", head): tensor
        for key, tensor in model.state_dict().items()
    }
    theirs = torchvisions(name).double().eval()
    theirs.load_state_dict(renamed)
    images = some_images(2)
    torch.testing.assert_close(model(images), theirs(images))


def slow_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Normalize by the stored statistics, by the formula."""
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, shift = (weights[f"{name}.{key}"][None, :, None, None] for key in keys)
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def slow_preact(weights: dict[str, Tensor], x: Tensor, plan: list[tuple[str, int, bool]]) -> Tensor:
    """Run a pre-activation network from a dictionary of weights; the plan has (block, stride, projection)."""
    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for block, stride, projection in plan:
        active = slow_norm(weights, f"{block}.bn1", x).clamp(min=0)
        inner = F.conv2d(active, weights[f"{block}.conv1.weight"], stride=stride, padding=1)
        inner = F.conv2d(slow_norm(weights, f"{block}.bn2", inner).clamp(min=0), weights[f"{block}.conv2.weight"], padding=1)
        beside = F.conv2d(active, weights[f"{block}.shortcut.0.weight"], stride=stride) if projection else x
        x = inner + beside
    x = slow_norm(weights, "bn", x).clamp(min=0) if "bn.weight" in weights else x
    return x.mean((2, 3))


@pytest.mark.parametrize(
    ("name", "settings", "plan"),
    [
        (
            "preact_resnet18",
            {"width": 2, "blocks": 2},
            [(f"layer{s}.{b}", 2 if s > 1 and b == 0 else 1, s > 1 and b == 0) for s in (1, 2, 3, 4) for b in (0, 1)],
        ),
        (
            "preact_resnet18",
            {"width": 2, "blocks": 1, "final_norm": False},
            [(f"layer{s}.0", 2 if s > 1 else 1, s > 1) for s in (1, 2, 3, 4)],
        ),
        (
            "wide_resnet",
            {"depth": 16, "widen_factor": 1},
            [(f"layer{s}.{b}", 2 if s > 1 and b == 0 else 1, s > 1 and b == 0) for s in (1, 2, 3) for b in (0, 1)],
        ),
        (
            "wide_resnet",
            {"depth": 10, "widen_factor": 2, "dropout": 0.5},
            [("layer1.0", 1, True), ("layer2.0", 2, True), ("layer3.0", 2, True)],
        ),
    ],
)
def test_pre_activation_networks_are_those_of_their_papers(
    name: str, settings: dict[str, Any], plan: list[tuple[str, int, bool]]
) -> None:
    """Normalization and relu before each convolution, a projection from the activated input where the shape changes, the
    input itself elsewhere, a last normalization and relu unless there shall be none; no weight is left over."""
    model = small(name, **settings).eval()
    weights = {key.removeprefix("backbone."): tensor for key, tensor in model.state_dict().items()}
    torch.testing.assert_close(model.features(some_images(2)), slow_preact(weights, some_images(2), plan))
    convolutions = sum(2 + projection for _, _, projection in plan) + 1
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    last = settings.get("final_norm", True)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 2 * len(plan) + last
    assert ("bn" in model.backbone.last_parts) == last


@pytest.mark.parametrize(
    "build",
    [lambda s: torch.linspace(0, 1, 4)[2].item(), lambda s: torch.ones(3).numpy(), lambda s: torch.ones(3).nonzero().tolist()],
)
def test_a_network_may_read_values_of_tensors_when_it_is_built(build: Any) -> None:
    """A network that cannot be tried without memory, because it reads values of tensors, is accepted untried."""
    check(cast(ModuleType, SimpleNamespace(__name__="model.networks.mine", build=build)), Named("reads", id(build)))


def test_a_network_is_tried_once_for_the_same_settings() -> None:
    """Settings from which a network cannot be built are refused each time; those that passed are not tried again, also when
    other settings were; an error of the network's own code is not taken for one of its settings."""
    tried = []

    def build(width: int) -> Tensor:
        tried.append(width)
        return torch.empty(width) if width else cast(Any, torch.empty)(width, object())

    network = cast(ModuleType, SimpleNamespace(__name__="model.networks.tried_once", build=build))
    for width in (5, 5, 6, 5):
        check(network, width)
    assert tried == [5, 6]
    for _ in range(2):
        with pytest.raises(UserError, match=r"^tried_once: cannot be built .*lower its width$"):
            check(network, -1)
    with pytest.raises(TypeError):
        check(network, 0)


def test_vgg_is_torchvisions() -> None:
    """The full VGG-16 has torchvision's names and shapes but for the last linear layer."""
    with torch.device("meta"):
        backbone = plugins.load("model.networks", "vgg16_bn").build(plugins.settings("model.networks", "vgg16_bn")())
        theirs = models.vgg16_bn()
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if not key.startswith("classifier.6.")}
    assert {key: tensor.shape for key, tensor in backbone.state_dict().items()} == shapes


@pytest.mark.parametrize(("side", "pool"), [(32, 1), (32, 7), (64, 2)])
def test_vgg_is_the_network_of_the_paper(side: int, pool: int) -> None:
    """Thirteen convolutions with normalization and relu, a halving after 2, 4, 7, 10 and 13, two hidden layers."""
    model = small("vgg16_bn", pool=pool).eval()
    weights = {key.removeprefix("backbone."): tensor for key, tensor in model.state_dict().items()}
    x, at = some_images(2, side), 0
    for convolutions in (2, 2, 3, 3, 3):
        for _ in range(convolutions):
            x = F.conv2d(x, weights[f"features.{at}.weight"], weights[f"features.{at}.bias"], padding=1)
            x = slow_norm(weights, f"features.{at + 1}", x).clamp(min=0)
            at += 3
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        at += 1
    n = x.shape[2]
    if n >= pool:
        x = x.unfold(2, n // pool, n // pool).unfold(3, n // pool, n // pool).mean((4, 5))
    else:
        x = x.expand(-1, -1, pool, pool)
    x = x.reshape(2, -1)
    for layer in ("classifier.0", "classifier.3"):
        x = (x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]).clamp(min=0)
    torch.testing.assert_close(model.features(some_images(2, side)), x)


@pytest.mark.parametrize("name", ["vgg16_bn", "preact_resnet18", "wide_resnet"])
def test_convolutions_start_with_he_s_deviation(name: str) -> None:
    """The convolutions of the networks written here start as normal numbers of variance 2 / (outputs a weight leads to)."""
    model = build_classifier(chosen(name, **{"width": 16} if name != "wide_resnet" else {}), 5, seed=0)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        weight = convolution.weight
        expected = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
        assert weight.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * weight.numel()))
        assert abs(weight.mean().item()) < 6 * expected / math.sqrt(weight.numel())


@every_network
def test_large_images_work(name: str) -> None:
    """224 x 224 images give features of the same number."""
    model = build_classifier(chosen(name, **{"image_size": 224, "patch_size": 16} if name == "vit_b_16" else {}), 5, 0).eval()
    with torch.no_grad():
        assert model(some_images(1, 224).float()).shape == (1, 5)


# The virtual model's parts.

LAST = {
    "densenet121": ("features.transition2.", "features.denseblock3.", "features.transition3.", "features.denseblock4.",
                    "features.norm5."),
    "mobilenet_v2": tuple(f"features.{i}." for i in range(7, 19)),
    "preact_resnet18": ("layer3.", "layer4.", "bn."),
    "resnet18": ("layer3.", "layer4."),
    "resnet18_cifar": ("layer3.", "layer4."),
    "resnet34": ("layer3.", "layer4."),
    "resnet50": ("layer3.", "layer4."),
    "vgg16_bn": (*(f"features.{i}." for i in range(24, 44)), "classifier."),
    "vit_b_16": ("encoder.layers.encoder_layer_2.", "encoder.layers.encoder_layer_3.", "encoder.ln."),
    "wide_resnet": ("layer2.", "layer3.", "bn."),
}  # fmt: skip


def train_a_step(model: Classifier) -> tuple[Classifier, set[str], set[str], set[str]]:
    """Return the virtual model after a step, the names of what got a gradient, of the weights and of the statistics that
    moved."""
    virtual, trained = virtual_copy(model)
    assert len(trained) == len(set(trained))  # a weight given twice would move twice
    virtual.train()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    virtual(some_images(4)).square().sum().backward()
    optimizer.step()
    got = {name for name, p in virtual.named_parameters() if p.grad is not None}
    before, after = model.state_dict(), virtual.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    statistics = {name for name, _ in virtual.named_buffers()}
    return virtual, got, moved - statistics, moved & statistics


@every_network
def test_virtual_model_trains_the_last_parts(name: str) -> None:
    """By default the virtual model learns in the network's last parts and the linear layer and nowhere else; the frozen rest
    gets no gradient, and the BN statistics move everywhere."""
    model = small(name)
    before = copy.deepcopy(model.state_dict())
    virtual, got, weights, statistics = train_a_step(model)
    last = tuple(f"backbone.{part}" for part in LAST[name])
    expected = {key for key, _ in model.named_parameters() if key.startswith((*last, "linear."))}
    assert got == expected
    assert weights == expected
    assert len([key for key in expected if key.startswith("backbone.")]) >= 3
    assert any(not key.startswith((*last, "linear.")) for key, _ in model.named_parameters())
    assert statistics == {key for key, _ in virtual.named_buffers()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@every_network
def test_every_part_can_be_chosen(name: str) -> None:
    """`last_parts` may name any parts, also twice: their weights and the linear layer's get a gradient and no others; all of
    them are the whole network, an empty list is the linear layer alone."""
    plain = build_classifier(chosen(name), 5, seed=0)
    parts, names, linear = (
        list(part_names(plain.backbone)),
        dict(plain.named_parameters()).keys(),
        {"linear.weight", "linear.bias"},
    )
    for chosen_parts in ((), (parts[0], parts[0]), (parts[-1], parts[len(parts) // 2]), tuple(parts)):
        model = build_classifier(chosen(name, last_parts=chosen_parts), 5, seed=0).double()
        got = train_a_step(model)[1]
        assert got - linear == {k for k in names if k.startswith(tuple(f"backbone.{part}." for part in chosen_parts))}
        assert got > linear or (got == linear and not chosen_parts)
    assert names - got == ({"backbone.class_token", "backbone.encoder.pos_embedding"} if name == "vit_b_16" else set())


def loads(*overrides: str) -> config.Config:
    """Load a configuration with overrides."""
    return config.load(Path(__file__).parents[1] / "config" / "baseline_asd.yaml", list(overrides))


@every_network
def test_a_part_that_does_not_exist_is_refused(name: str) -> None:
    """A misspelt part is refused with the configuration, before any data are loaded, in one line with all legal names."""
    with pytest.raises(UserError) as caught:
        loads(f"network={{{name}: {{last_parts: [layre4]}}}}")
    line = str(caught.value)
    assert "\n" not in line
    assert f"network.{name}.last_parts: 'layre4'" in line
    assert all(part.rstrip(".") in line for part in LAST[name][-3:] if part not in ("features.42.", "features.43."))
    assert ("did you mean layer4?" in line) == ("layer4." in LAST[name])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["network={wide_resnet: {depth: 27}}"], "network.wide_resnet.depth: 27: must be 6 n + 4"),
        (["network={resnet34: {blocks: [3, 4, 6]}}"], "network.resnet34.blocks: [3, 4, 6]: give four numbers"),
        (["network={densenet121: {blocks: []}}"], "network.densenet121.blocks: []: give four numbers"),
        (["network={vit_b_16: {image_size: 30}}"], "network.vit_b_16.patch_size: 16: must divide image_size (30)"),
        (["network={vit_b_16: {heads: 7}}"], "network.vit_b_16.heads: 7: must divide hidden_dim (768)"),
        (["network={resnet18: {last_parts: layer4}}"], "network.resnet18.last_parts: 'layer4': give a list, e.g. [layer4]"),
        (["network={resnet50: {num_classes: 7}}"], "network.resnet50.num_classes: 7: num_classes is 10"),
        (["network=resnet18", "network.resnet18.last_parts=[x]"], "--set network.resnet18.last_parts: network.resnet18.last"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], expected: str) -> None:
    """Sizes that a network cannot have are refused with the configuration, in one line with the key and the remedy."""
    with pytest.raises(UserError) as caught:
        loads(*overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_come_from_the_yaml() -> None:
    """`last_parts` of the YAML reaches the network, in a form that a resolved configuration keeps."""
    settings = loads("network={vit_b_16: {image_size: 32, patch_size: 4, layers: 1, last_parts: [encoder.ln]}}")
    assert settings.network.settings.last_parts == ("encoder.ln",)
    assert yaml.safe_load(config.to_yaml(settings))["network"]["vit_b_16"]["last_parts"] == ["encoder.ln"]
    assert build_classifier(settings.network, 10, 0).backbone.last_parts == ("encoder.ln",)


@pytest.mark.parametrize(
    ("name", "settings", "height", "width", "expected"),
    [
        ("densenet121", {}, 28, 28, "32 x 32 pixels, the images have 28 x 28"),
        ("vgg16_bn", {}, 32, 31, "32 x 32 pixels, the images have 32 x 31"),
        ("vit_b_16", {}, 28, 28, "image_size: 32: the images are 28 x 28"),
        ("vit_b_16", {}, 32, 40, "image_size: 32: the images are 32 x 40"),
        ("vit_b_16", {"image_size": 224, "patch_size": 16}, 32, 32, "image_size: 224: the images are 32 x 32"),
    ],
)
def test_images_of_a_wrong_size_are_refused(
    name: str, settings: dict[str, Any], height: int, width: int, expected: str
) -> None:
    """Images that a network cannot take are refused in one line with their size, the setting and a remedy, also by a copy."""
    model = copy.deepcopy(small(name, **settings))
    with pytest.raises(UserError) as caught:
        model(torch.zeros(2, 3, height, width, dtype=torch.float64))
    assert expected in str(caught.value)
    assert f"network: {name}" in str(caught.value) or f"network.{name}." in str(caught.value)
    assert "\n" not in str(caught.value)


# Inference, merged forwards, precision, dropout.


@every_network
def test_scores_are_those_of_the_plain_network(name: str) -> None:
    """`predict` gives the logits of the network in eval mode, dropout off, image by image."""
    model = small(name).train()
    logits = predict(model, [some_images(4)[:3], some_images(4)[3:]], FP32)
    plain = copy.deepcopy(model).eval()
    expected = torch.cat([plain(image[None]) for image in some_images(4)])
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@normalized
def test_merged_forwards_are_separate_forwards(name: str) -> None:
    """One forward of three batches with grouped statistics gives the logits, gradients and running statistics of three."""
    still = {"dropout": 0.0} if name in ("vgg16_bn", "mobilenet_v2") else {}
    separate, merged = small(name, **still).train(), group(small(name, **still)).train()
    batches = list(some_images(9).split(3))
    expected = [separate(batch) for batch in batches]
    logits = forward(merged, batches, FP32)
    for own, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-7, atol=1e-8)
    (torch.cat(logits) ** 2).sum().backward()
    (torch.cat(expected) ** 2).sum().backward()
    other = separate.state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-7, atol=1e-9)
    for (key, one), two in zip(merged.named_parameters(), separate.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7 * (1 + two.grad.abs().max().item()), msg=key)


@every_network
@pytest.mark.parametrize("merged", [False, True])
def test_bf16_with_channels_last_is_the_same_network(name: str, merged: bool) -> None:
    """Under bf16 with channels last the logits of a training forward are off by at most four times what rounding the weights
    alone does, statistics stay float32, and every gradient is finite."""
    still = {"dropout": 0.0} if name in ("vgg16_bn", "mobilenet_v2") else {}
    plain = small(name, **still).float().train()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    if merged:
        group(model)
    images = some_images(16).float()
    logits = torch.cat(forward(model, images.split(8), BF16)).float()
    expected = torch.cat([plain(part) for part in images.split(8)])
    rounded = copy.deepcopy(plain)
    for p in rounded.parameters():
        p.data = p.data.bfloat16().float()
    near = torch.cat([rounded(part) for part in images.split(8)])
    assert 0 < (logits - expected).square().mean() < 4**2 * (near - expected).square().mean()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v2", "vit_b_16", "wide_resnet"])
def test_dropout_follows_the_global_seed(name: str) -> None:
    """In training the dropped units depend only on torch's seed, so a resumed epoch drops the same; with dropout 0 nothing
    is drawn."""
    model = small(name, dropout=0.4).train()
    model.backbone.requires_grad_(False)

    def logits(seed: int, model: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = model(some_images(4))
        return out

    assert torch.equal(logits(1, model), logits(1, model))
    assert not torch.equal(logits(1, model), logits(2, model))
    still = small(name, dropout=0.0).train()
    assert torch.equal(logits(1, still), logits(2, still))


@normalized
@pytest.mark.parametrize("grouped", [False, True])
def test_batches_are_counted_at_the_end(name: str, grouped: bool) -> None:
    """With BN's batch counters updated only at the end, statistics and counters are the same bit for bit; after an error
    the counters are unchanged."""
    model = small(name, **({"dropout": 0.0} if name == "mobilenet_v2" else {})).train()
    plain, counters = copy.deepcopy(model), [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    if grouped:
        group(model), group(plain)
    at_end = copy.deepcopy(model)

    def passes(network: Classifier) -> None:
        with torch.no_grad():
            for seed in range(2):
                forward(network, some_images(6, seed=seed).split(2), FP32)  # 3 batches in 3 passes, grouped in one

    passes(plain)
    with count_at_end(at_end, 6):
        passes(at_end)
        assert not any(key in at_end.state_dict() for key in counters)
    expected = plain.state_dict()
    assert list(at_end.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in at_end.state_dict().items())
    before = copy.deepcopy(at_end.state_dict())
    with pytest.raises(KeyboardInterrupt), count_at_end(at_end, 3):
        raise KeyboardInterrupt
    assert counters and all(torch.equal(at_end.state_dict()[key], before[key]) for key in counters)


def test_a_mean_over_all_batches_counts_them_itself() -> None:
    """Without momentum, running statistics are means over all batches, and every pass reads the counter."""
    images = [torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    norm = nn.BatchNorm2d(2, momentum=None)
    with count_at_end(norm, 3):
        for batch in images:
            norm(batch)
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 3
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean((0, 2, 3)) for batch in images]).mean(0))


# All three stages.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the runs."""
    yield tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_single_image_left_over_is_trained_on(name: str) -> None:
    """33 images in batches of 32: BN after a 1 x 1 map could not normalize a single remaining image."""
    model = build_classifier(Named(name, plugins.settings("model.networks", name)(**SMALL[name])), 10, 0)
    train_set = ImageSet(torch.randint(0, 256, (33, 3, 32, 32), dtype=torch.uint8), torch.arange(33) % 10)
    to_tensor = Named("to_tensor", plugins.settings("data.transforms", "to_tensor")())
    augment = Pipeline((), (to_tensor,), 32, 32)
    state = State(model.train(), torch.optim.SGD(model.parameters(), lr=0.01), scheduler=None)
    settings = config.Config(network=chosen(name), backdoor=config.Backdoor(Named("badnets", None)))
    context = Context(settings, FP32, train_set, augment, augment)
    draws = draw_supervised(0, "test", 0, 33, augment)
    assert math.isfinite(train_supervised(context, state, "test", draws, 32))


@every_network
def test_all_three_stages_run(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run through class-aware, class-agnostic and meta-split ends with finite losses and moved weights, under the names of
    the same network built anew."""
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL[name].items()}
    raw = TINY | {
        "saved_dir": str(runs / "saved"),
        "storage_dir": str(runs / "storage"),
        "dataset": {"shapes": {"train_size": 60, "test_size": 20}},
        "network": {name: settings},
        "num_epochs": 3,
        "loader": {"batch_size": 32},
        "semi": TINY["semi"] | {"loader": {"batch_size": 4}, "mixmatch": {"train_iteration": 2}},  # type: ignore[operator]
        "global": {"epoch_first": 1, "epoch_second": 2, "epoch_third": 3, "seed_num": 1, "t": 1, "n": 1},
    }
    path = runs / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    loaded = config.load(path)
    states: list[State] = []
    monkeypatch.setattr(session, "Report", lambda *args: MagicMock())  # pictures and checkpoints take longer than the run
    monkeypatch.setattr(session, "save", lambda config, state, *_: states.append(state))
    monkeypatch.setattr(session, "collect_evidence", lambda *_: None)
    train_here(loaded, path, "False")
    rows, weights = states[-1].history, states[-1].model.state_dict()
    assert [row["stage"] for row in rows] == ["class-aware", "class-agnostic", "meta-split"]
    assert all(math.isfinite(row["loss"]) for row in rows)
    model = build_classifier(loaded.network, 10, loaded.seed.seed)
    fresh = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    assert all(not torch.equal(weights[key], fresh[key]) for key, p in model.named_parameters() if p.ndim > 1)


@pytest.mark.parametrize("size", [1, 2, 7, 9])
def test_vgg_pools_as_torch_does(size: int) -> None:
    """Maps of one pixel and of 7 x 7, from images of 32 and 224 px, need no pooling; values and gradients are the same."""
    maps = torch.randn(2, 3, size, size, requires_grad=True)
    found, expected = vgg16_bn.adaptive_pool(maps, 7), nn.functional.adaptive_avg_pool2d(maps, 7)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), maps)[0] for out in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-5)
    assert ("AdaptiveAvgPool2D" in type(found.grad_fn).__name__) == (size not in (1, 7))


@pytest.mark.parametrize(
    ("defense", "settings"),
    [
        ("none", ["transform.train.primary.random_crop.size=24"]),
        ("asd", ["transform.pre={resize: {size: 40}}"]),  # the train transform crops to 32, the eval transform does not
        ("dbd", ["defense.dbd.simclr_transform.random_resize_crop.size=24"]),
    ],
)
def test_images_that_the_network_cannot_take_are_refused_at_the_start(
    tmp_path: Path, defense: str, settings: list[str]
) -> None:
    """The sizes of all views are tried before anything is trained: those of training, of evaluation and of a defense."""
    vit = "network={vit_b_16: {image_size: 32, patch_size: 8, hidden_dim: 16, heads: 2, layers: 2, mlp_dim: 16}}"
    plan, path = small_run(tmp_path, defense, vit, *settings)
    with pytest.raises(UserError, match=r"network\.vit_b_16\.image_size: 32: the images are"):
        train_here(plan, path)
    assert not list(tmp_path.rglob("*.pt"))


def test_maps_are_the_outputs_of_the_parts() -> None:
    """What follows a part may change its output in place, as torchvision's ReLU does; the map is what the part returned."""
    network = new_classifier(Named("resnet18", plugins.settings("model.networks", "resnet18")()), 4).eval()
    maps = collect_maps(network, ["bn1"])
    network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert 0.2 < (maps["bn1"] < 0).float().mean() < 0.8
