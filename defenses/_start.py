"""Defenses that repair a trained network: the first stage trains it without a defense, or a finished run provides it."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor

from data.batches import draw_supervised
from engine.context import Context
from engine.supervised import train_supervised
from utils import checkpoint
from utils.checkpoint import State
from utils.config import Config
from utils.config.compatibility import read_config, refuse_other_data
from utils.config.stages import UNDEFENDED, Stage
from utils.draws import generator
from utils.errors import UserError
from utils.paths import is_file
from utils.run import LATEST, locate

UNDEFENDED_STAGE = "undefended"
START_HELP = "name of a finished run without a defense to start from; null: train one first, for num_epochs"


def undefended_stage(config: Config, start_run: str | None) -> Stage:
    """Return the stage that trains as `defense: none` does; without epochs where a run provides the weights."""
    plan = config.undefended
    epochs = 0 if start_run else config.num_epochs
    return Stage(UNDEFENDED_STAGE, epochs, plan.optimizer, plan.lr_scheduler, "undefended.optimizer")


def train_undefended(context: Context, state: State, epoch: int, images: Tensor | None = None) -> dict[str, float]:
    """Train one epoch of that stage, bit for bit as `defense: none` does; return its mean loss.

    Args:
        images: (n,) int64, those to train on; None: all.
    """
    config, chosen = context.config, torch.arange(len(context.train_set)) if images is None else images
    draws = draw_supervised(config.seed.seed, "undefended", epoch, len(chosen), context.train_transform).of(chosen)
    state.model.train()
    return {"loss": train_supervised(context, state, "training", draws, config.undefended.batch_size)}


def take_weights(context: Context, state: State, start_run: str) -> None:
    """Load the last weights of a finished run without a defense on the same data.

    Raises:
        UserError: there is no such run, it has a defense, is not finished, or is of another network,
            preprocessing or other data.
    """
    config = context.config
    path, key = locate(replace(config, run=start_run)).checkpoints / LATEST, f"defense.{config.defense.name}.start_run"
    if not is_file(path, key):
        raise UserError(f"{key}: {start_run}: no such run ({path} is missing): train it first, or leave the key out")
    saved = checkpoint.read(path)
    if isinstance(saved.get("config"), dict):  # the authors' checkpoints have none
        started, done = read_config(saved["config"]), saved.get("epoch", -1) + 1
        if started.defense.name != UNDEFENDED:
            raise UserError(f"{key}: {start_run}: has defense: {started.defense.name}: name a run without a defense")
        if done < started.epochs:
            raise UserError(f"{key}: {start_run}: has finished {done} of {started.epochs} epochs: resume it first")
        for part in ("train.remaining", "test.primary", "test.remaining"):
            if attrgetter(part)(started.transform) != attrgetter(part)(config.transform):
                raise UserError(
                    f"{key}: {start_run}: its transform.{part} is another one, so its network would see other numbers: give it "
                    "to both"
                )
    refuse_other_data(path, saved, state.data, whole=False)  # that run is given no clean images
    checkpoint.load_weights(state.model, saved, path)


def split_clean(given: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return two halves of the clean images (S,), drawn by the seed: one to rank or to train with, one to validate on."""
    order = torch.randperm(len(given), generator=generator(seed, "halves of the clean images", 0))
    half = len(given) // 2
    return given[order[:half]].sort().values, given[order[half:]].sort().values
