"""Conversion of weights for other programs: the network as a BackdoorBench record stores it."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from model.classifier import build_classifier
from utils import checkpoint, plugins
from utils.config import Config
from utils.config.compatibility import read_config, refuse_other_set
from utils.config.stages import UNDEFENDED
from utils.errors import UserError
from utils.paths import is_file, user_path

logger = logging.getLogger(__name__)
PACKAGE = "model.networks"


def exchanged_weights(config: Config, given: str | None) -> tuple[str, dict[str, Tensor]]:
    """Return BackdoorBench's name of the configured network, and its weights by BackdoorBench's names, in its order.

    Args:
        given: a checkpoint of a run without a defense on the same poisoned set; None: fresh weights, and a warning.
    Raises:
        UserError: BackdoorBench has no such network, or the checkpoint is of another one, of a run with a defense, or of
            another poisoned set.
    """
    network = config.network
    named = getattr(plugins.load(PACKAGE, network.name), "backdoorbench", lambda settings: None)(network.settings)
    if named is None:
        examples = " or ".join(plugins.declared(PACKAGE, "BACKDOORBENCH").values())
        raise UserError(f"network: {network.name}: BackdoorBench has no such network: set network to {examples}")
    name, head = named
    model = build_classifier(network, config.num_classes, config.seed.seed)
    if given is None:
        logger.warning(
            "warning: --weights not given: the record contains untrained weights, so only defenses that train from scratch "
            "(ABL, DBD, NAB, D-ST) are meaningful"
        )
    else:
        path: Path = user_path(given, "--weights")
        if not is_file(path, "--weights"):
            raise UserError(f"--weights {given}: no such file: give a checkpoint of a run with defense: none")
        saved = checkpoint.read(path)
        if isinstance(saved.get("config"), dict):
            written = read_config(saved["config"])
            if (found := written.defense.name) != UNDEFENDED:
                raise UserError(f"--weights {given}: has defense: {found}: give a checkpoint of a run with defense: none")
            if written.poisoned_already == config.poisoned_already:  # a set and its origin have other settings
                refuse_other_set(f"--weights {given}", written, config)
        checkpoint.load_weights(model, saved, path)
    weights = {key.removeprefix("backbone."): tensor for key, tensor in model.state_dict().items()}
    return name, {f"{head}{key.removeprefix('linear')}" if key.startswith("linear.") else key: t for key, t in weights.items()}
