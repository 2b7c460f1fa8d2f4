"""How well one meta-split separates poisoned from clean images, for one model and the attack of the configuration.

    python -m results.attacks.meta_split --config config/attack_study.yaml --resume BASE.pt --set "backdoor={blend: {}}"

The model may be from a run against another attack, because at the end of stage 2 it has not learned a trigger. For 1 to
`--epochs` epochs of the virtual model, prints how much the split loss of clean and of poisoned images fell, how many poisoned
images are in the clean pool, and ACC and ASR of the virtual model.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ASD
from data.pools import class_agnostic_split, meta_split
from data.sets import ImageSet, TestSets
from data.sources import prepare
from engine.context import build_context, build_state
from engine.evaluation import evaluate
from model.classifier import new_classifier
from utils import checkpoint, config
from utils.cli import Parser, command
from utils.config import Config
from utils.machine import Machine, choose_machine


class Subject(NamedTuple):
    """The model and the data of one meta-split."""

    model: nn.Module
    train_set: ImageSet
    tests: TestSets
    poisoned: Tensor  # (N,) bool, the ground truth


def build(c: Config, base: Path, machine: Machine) -> Subject:
    """Return the configuration's poisoned set with the weights of the checkpoint `base`; nothing stays on disk."""
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(c, Path(folder), machine.device, new_classifier=new_classifier)
    assert data.ground_truth is not None
    train_set = data.train.to(machine.device)
    model = build_state(c, machine, len(train_set)).model
    checkpoint.load_weights(model, checkpoint.read(base), base)
    return Subject(model, train_set, data.tests.to(machine.device), data.ground_truth.poisoned())


def main() -> None:
    """Read the command line; compute losses, train virtual models and split."""
    parser = Parser(description="Measure one meta-split.")
    parser.add_argument("--config", default="config/attack_study.yaml")
    parser.add_argument("--resume", required=True, help="a checkpoint's path")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    c = config.load(args.config, args.set)
    machine = choose_machine(args.gpu, c.runtime.amp)
    model, train_set, tests, poisoned = build(c, Path(args.resume), machine)

    def show(what: str, pool: torch.Tensor, values: torch.Tensor) -> None:
        clean, bad = float(values[~poisoned].mean()), float(values[poisoned].mean())
        count = f"{int(poisoned[pool].sum())} of {int(poisoned.sum())} poisoned in a clean pool of {len(pool)}"
        print(f"{what}: mean of clean images {clean:.2f}, of poisoned {bad:.2f}; {count}", flush=True)

    context = build_context(c, machine, train_set)
    epoch, epsilon = c.global_.epoch_second, c.global_.epsilon
    losses = ASD.split_losses(context, epoch, "score", model)
    show("split loss", class_agnostic_split(losses, epsilon), losses)
    for epochs in range(1, args.epochs + 1):  # each from the same model, by ASD.py's own function
        longer = replace(context, config=replace(c, meta=replace(c.meta, epoch=epochs)))
        virtual = ASD.train_virtual_model(longer, epoch, model)
        virtual_losses = ASD.split_losses(context, epoch, "score virtual", virtual)
        show(f"fall after {epochs} virtual epochs", meta_split(losses, virtual_losses, epsilon), losses - virtual_losses)
        figures = evaluate(context, virtual, tests).shares
        acc, asr = figures["clean_accuracy"] or 0, figures["attack_success_rate"] or 0
        print(f"virtual model: ACC {100 * acc:.1f} %, ASR {100 * asr:.1f} %", flush=True)


if __name__ == "__main__":
    command("meta_split.py", main)
