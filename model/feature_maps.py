"""The outputs of parts of a backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.classifier import Classifier
from utils.errors import UserError


def collect_maps(classifier: Classifier, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return a dictionary into which every forward pass of the classifier puts the outputs (B, c, h, w) of these parts.

    Args:
        parts: names of submodules of the backbone, e.g. `layer4`.
    Raises:
        UserError: the backbone has no part of that name.
    """
    maps: dict[str, Tensor] = {}
    known = dict(classifier.backbone.named_modules())

    def collect(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            maps[name] = output.clone() if isinstance(output, Tensor) else output  # an in-place ReLU may follow

        known[name].register_forward_hook(hook)

    for name in parts:
        if name not in known:
            raise UserError(f"layers: {name!r}: the network has no such part: choose from {', '.join(p for p in known if p)}")
        collect(name)
    return maps
