"""Folding of batch normalization: speed, never another function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.classifier import build_classifier
from model.folding import conv_bn_pairs, fold
from model.networks.resnet18_cifar import Settings
from utils.schema import Named


def trained_statistics(model: nn.Module) -> nn.Module:
    """Give every batch normalization weights and statistics that are not those of a fresh one."""
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    return model


def test_a_folded_network_is_the_same_function() -> None:
    """In float64 the folded ResNet agrees with the unfolded one, has no BN left, and the model itself is untouched."""
    model = trained_statistics(build_classifier(Named("resnet18_cifar", Settings(width=4)), 10, seed=0)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    folded = fold(model.train(), images[:1])
    expected = build_classifier(Named("resnet18_cifar", Settings(width=4)), 10, seed=0).double()
    expected.load_state_dict(before)
    assert torch.allclose(folded(images), expected.eval()(images), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_all_twenty_pairs_of_a_resnet_18_are_found() -> None:
    """ResNet-18 has 17 convolutions on its way and 3 on its shortcuts, each followed by its own normalization."""
    model = build_classifier(Named("resnet18_cifar", Settings(width=2)), 10, seed=0)
    pairs = conv_bn_pairs(model.eval(), torch.zeros(1, 3, 32, 32))
    assert len(pairs) == len(set(pairs)) == 20
    assert ("backbone.layer2.0.shortcut.0", "backbone.layer2.0.shortcut.1") in pairs


class Twice(nn.Module):
    """Uses a convolution's output in its normalization and beside it: folding would change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y) + 3 * y
        return out


def test_a_network_that_cannot_be_folded_is_left_as_it_is() -> None:
    """Where folding would change the outputs, scoring uses the plain network."""
    model = trained_statistics(Twice())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(fold(model, images[:1])(images), model.eval()(images))


class Awkward(nn.Module):
    """One convolution that may be folded, `good`; the others' outputs also go elsewhere, or are changed on the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.good, self.good_bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good_bn(self.good(x)).relu()
        y = self.conv(x)
        if self.kind == "beside":
            return self.bn(y) + y * 1e-4  # too little for a comparison of outputs to see
        if self.kind == "residual in place":
            y += x
        elif self.kind == "relu in place":
            y = nn.functional.relu(y, inplace=True)
        elif self.kind == "convolution twice":
            y = self.conv(y)
        elif self.kind == "normalization twice":
            y = self.bn(y)
        elif self.kind == "concatenated":
            y = torch.cat([y, y[:, :0]], 1)
        out: Tensor = self.bn(y)
        return out


@pytest.mark.parametrize(
    "kind",
    ["beside", "residual in place", "relu in place", "convolution twice", "normalization twice", "concatenated"],
)
def test_what_may_not_be_folded_does_not_keep_the_rest_from_it(kind: str) -> None:
    """A convolution whose output is read beside its normalization or changed before it (in place too), or that is used twice,
    stays as it is to the last digit, and the others are folded all the same."""
    model = trained_statistics(Awkward(kind)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert conv_bn_pairs(model.eval(), images[:1]) == [("good", "good_bn")]
    assert torch.allclose(fold(model, images[:1])(images), model(images), rtol=1e-12, atol=1e-12)


def test_watching_leaves_no_trace() -> None:
    """Finding the pairs leaves no hook, no gradient and no mark on the model or the images, inside `no_grad` or not."""
    model = trained_statistics(Awkward("")).eval().requires_grad_(False)
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert conv_bn_pairs(model, image) == [("good", "good_bn"), ("conv", "bn")]
    assert not image.requires_grad and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
