"""The networks, one file each: `Settings` (the schema of its YAML section) and `build(settings)`.

`build` returns a backbone: a module that maps (B, 3, H, W) to features (B, D), with `feature_dim` (D) and `last_parts`,
the names of its submodules that the virtual model trains, together with the linear layer. `finish` of model/backbone.py
sets both. No network has pretrained weights.
"""

from types import ModuleType
from typing import Any

import torch

from utils.errors import UserError, one_line


def check(network: ModuleType, settings: Any) -> None:
    """Refuse settings from which the network cannot be built; called when the YAML is read."""
    with torch.device("meta"):  # no memory, no random number; 60 ms
        try:
            network.build(settings)
        except RuntimeError as error:  # of torch: sizes that no tensor can have
            name = network.__name__.rpartition(".")[2]
            raise UserError(f"{name}: cannot be built ({one_line(error)}): lower its width") from None
