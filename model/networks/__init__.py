"""The networks, one file each: `Settings` (the schema of its YAML section) and `build(settings)`.

`build` returns a backbone: a module that maps (B, 3, H, W) to features (B, D), with `feature_dim` (D) and `last_parts`,
the names of its submodules that the virtual model trains, together with the linear layer. `finish` of model/backbone.py
sets both. No network has pretrained weights.
"""

from types import ModuleType
from typing import Any

import torch

from utils.errors import UserError, one_line

DECLARED = ("Settings", "build")
BUILT: set[tuple[str, str]] = set()  # networks and settings that passed `check`: a sweep reads hundreds of YAMLs


def check(network: ModuleType, settings: Any) -> None:
    """Refuse settings from which the network cannot be built; called when the YAML is read."""
    key = network.__name__, repr(settings)
    if key in BUILT:
        return
    with torch.device("meta"):  # no memory, no random number; 60 ms
        try:
            network.build(settings)
        except (RuntimeError, TypeError) as error:
            if "meta" in str(error):  # the network reads values of tensors, which have none here
                return
            if isinstance(error, TypeError):
                raise
            name = network.__name__.rpartition(".")[2]  # torch refuses sizes that no tensor can have
            raise UserError(f"{name}: cannot be built ({one_line(error)}): lower its width") from None
    BUILT.add(key)
