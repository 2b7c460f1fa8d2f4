"""Which settings decide how many poisoned images a meta-split lets into the clean pool?

    python -m results.study.what_decides --config CONFIG.yaml --base BASE.pt --name mature --out ROWS.jsonl [--set K=V ...]

For each attack: computes the split losses of a base model that has not learned the trigger, trains the virtual model on the
poisoned set, computes its losses and splits. Appends one JSON row for each (name, attack, seed) that is not yet in the file.
`README.md` has the commands of the committed rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ASD
from data.pools import meta_split
from data.sets import ImageSet, TestSets
from data.sources import prepare
from engine.context import build_context, build_state
from engine.evaluation import evaluate
from model.classifier import new_classifier
from utils import checkpoint, config
from utils.cli import Parser, command
from utils.config import Config
from utils.runtime.machine import Machine, choose_machine


def main() -> None:
    """Read the command line; measure the missing rows."""
    parser = Parser(
        prog="python -m results.study.what_decides", description="One meta-split from a base model, for each attack."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--base", required=True, type=Path, help="checkpoint of the base model")
    parser.add_argument("--name", required=True, help="name of the setting that is measured")
    parser.add_argument("--out", required=True, type=Path, help="rows are appended to this file")
    parser.add_argument("--attacks", default="badnets,blend,wanet", help="names, separated by commas")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    for attack in args.attacks.split(","):
        c = config.load(args.config, [*args.set, f"backdoor={{{attack}: {{}}}}"])
        done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
        if any((row["name"], row["attack"], row["seed"]) == (args.name, attack, c.seed.seed) for row in done):
            continue
        row = {"name": args.name, "attack": attack, "seed": c.seed.seed} | measure(c, args.base, args.gpu)
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


class Subject(NamedTuple):
    """The model and the data of one meta-split."""

    model: nn.Module
    train_set: ImageSet
    tests: TestSets
    poisoned: Tensor  # (N,) bool, the ground truth


def build(c: Config, base: Path, machine: Machine) -> Subject:
    """Return the configuration's poisoned set with the weights of the checkpoint `base`; nothing stays on disk."""
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(c, Path(folder), machine, new_classifier)
    assert data.ground_truth is not None
    train_set = data.train.to(machine.device)
    model = build_state(c, machine, len(train_set)).model
    checkpoint.load_weights(model, checkpoint.read(base), base)
    return Subject(model, train_set, data.tests.to(machine.device), data.ground_truth.poisoned())


def measure(c: Config, base: Path, gpu: str) -> dict[str, Any]:
    """Return one row: the settings of the virtual model, and the result of its split."""
    machine = choose_machine(gpu, c.runtime.amp)
    model, train_set, tests, poisoned = build(c, base, machine)
    started, epoch = time.monotonic(), c.global_.epoch_second
    context = build_context(c, machine, train_set)
    losses = ASD.split_losses(context, epoch, model)
    virtual = ASD.train_virtual_model(context, epoch, model)
    virtual_losses = ASD.split_losses(context, epoch, virtual, virtual=True)
    pool, fall = meta_split(losses, virtual_losses, c.global_.epsilon), losses - virtual_losses
    return {
        "poisoned": int(poisoned.sum()),
        "pool": len(pool),
        "poisoned_in_pool": int(poisoned[pool].sum()),
        "by_chance": round(len(pool) * float(poisoned.float().mean())),
        "fall_of_clean": float(fall[~poisoned].mean()),
        "fall_of_poisoned": float(fall[poisoned].mean()),
        "base": evaluate(context, model, tests).shares,
        "virtual": evaluate(context, virtual, tests).shares,
        "network": {c.network.name: {k: getattr(c.network.settings, k) for k in ("width", "blocks", "last_parts")}},
        "meta": {"lr": c.meta.optimizer.settings.lr, "epoch": c.meta.epoch},
        "seconds": round(time.monotonic() - started),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    command("what_decides.py", main)
