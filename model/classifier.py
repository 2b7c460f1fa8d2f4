"""The classifier, a backbone with a linear layer on top, and its copy, the virtual model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from utils import plugins
from utils.config.schema import Named


class Classifier(nn.Module):
    """`linear(backbone(x))`; its state_dict keys are those of the authors' checkpoints."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(int(backbone.feature_dim), num_classes)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, D)."""
        out: Tensor = self.backbone(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, C)."""
        out: Tensor = self.linear(self.features(x))
        return out


class Features(nn.Module):
    """A classifier without its linear layer: returns features (B, D). It shares the weights of the classifier."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, D)."""
        return self.classifier.features(x)


def build_classifier(network: Named, num_classes: int, seed: int) -> Classifier:
    """Build the configured network; the same seed gives the authors' initial weights.

    The state of torch's global generator of the CPU does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_classifier(network, num_classes)


def new_classifier(network: Named, num_classes: int) -> Classifier:
    """Build a network with weights from torch's global generator. Attacks that train a network receive this function."""
    return Classifier(plugins.load("model.networks", network.name).build(network.settings), num_classes)


def virtual_copy(model: Classifier) -> tuple[Classifier, list[nn.Parameter]]:
    """Return the virtual model and the parameters that it trains (paper section 3.2.3).

    It is a copy of the model, weights and BN statistics. Only the last parts of the backbone and the linear layer are
    trained. The other layers need no gradient, but stay in train mode, so that their BN statistics are updated.
    """
    virtual = copy.deepcopy(model).requires_grad_(False)
    last = [virtual.backbone.get_submodule(name) for name in virtual.backbone.last_parts]  # type: ignore[union-attr]
    trained = [p for part in (*last, virtual.linear) for p in part.requires_grad_(True).parameters()]
    return virtual, trained


@torch.no_grad()
def copy_values(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights and buffers of `source` to `target`, in place."""
    values, copies = ([*module.parameters(), *module.buffers()] for module in (source, target))
    for copied, value in zip(copies, values, strict=True):
        copied.copy_(value)
