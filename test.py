"""Test a checkpoint: clean accuracy (ACC) and attack success rate (ASR). Changes nothing of a run but `log/test.json`.

python test.py --config config/baseline_asd.yaml --resume latest_model.pt --gpu 0
"""

from __future__ import annotations

import json

from ASD import accuracy, build_pipelines
from data.poison import build_attack, build_test_sets, load_raw
from model.classifier import build_classifier
from utils import checkpoint, config
from utils.cli import command, parse_arguments
from utils.errors import UserError
from utils.files import write_text
from utils.machine import choose_machine, set_determinism
from utils.run import LATEST, locate


def main() -> None:
    """Load the checkpoint, test it on both sets, print and keep the figures."""
    args = parse_arguments("Test a checkpoint on clean and on triggered images.", None, training=False)
    if args.resume == "False":
        raise UserError("--resume False: there is nothing to test without a checkpoint: leave it out or name one")
    settings = config.load(args.config, args.set)
    machine = choose_machine(args.gpu, settings.runtime.amp, print)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    run = locate(settings)
    path = run.checkpoint(args.resume or LATEST)
    saved = checkpoint.read(path)
    model = build_classifier(settings.network, settings.num_classes, settings.seed.seed)
    checkpoint.load_weights(model, saved, path)
    model.to(machine.device)

    raw = load_raw(settings)
    tests = build_test_sets(settings, raw, build_attack(settings, raw, machine.device)).to(machine.device)
    _, plain = build_pipelines(settings, tests.clean)
    clean_accuracy = accuracy(settings, model, tests.clean, plain, machine)
    attack_success_rate = accuracy(settings, model, tests.backdoor, plain, machine)
    result = {
        "checkpoint": str(path),
        "epoch": saved.get("epoch"),
        "clean_accuracy": clean_accuracy,
        "attack_success_rate": attack_success_rate,
        "clean_total": len(tests.clean),
        "backdoor_total": len(tests.backdoor),
    }
    write_text(run.log / "test.json", json.dumps(result, indent=2) + "\n")
    print(f"{path}")
    print(f"ACC {100 * clean_accuracy:.2f} % of {len(tests.clean)} clean test images")
    print(f"ASR {100 * attack_success_rate:.2f} % of {len(tests.backdoor)} triggered test images of other classes")
    print(f"written to {run.log / 'test.json'}")


if __name__ == "__main__":
    command("test.py", main)
