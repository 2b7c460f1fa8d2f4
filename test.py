"""Test a checkpoint: accuracy (ACC), also of each class, attack success rate (ASR), robust accuracy (RA), into `log/test.json`.

    python test.py --config config/baseline_asd.yaml --resume latest_model.pt --gpu 0
    python test.py --config config/baseline_asd.yaml --images DIR [--out FILE.csv]

The second form labels the pictures below a folder and needs no data set.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from utils.startup import begin

    begin("test.py")

from pathlib import Path

import torch
from torch import nn

from data.augment import Pipeline
from data.sources import prepare_tests
from data.unlabeled import ImageFiles, label_table
from engine.context import build_context
from engine.evaluation import evaluate_with_confusion
from model.classifier import build_classifier, new_classifier
from model.inference import predict
from utils import checkpoint, config, confusion
from utils.cli import command, parse_arguments
from utils.config import Config
from utils.errors import UserError
from utils.files import write_atomically, write_text
from utils.machine import Machine, choose_machine, set_determinism
from utils.names import class_text
from utils.paths import is_dir, user_path
from utils.run import LATEST, Run, locate


def main() -> None:
    """Load the checkpoint, then test it or label pictures with it."""
    args = parse_arguments("Test a checkpoint on clean and on triggered images.", None, training=False)
    if args.resume.lower() == "false":
        raise UserError(f"--resume {args.resume}: there is nothing to test without a checkpoint: leave it out or name one")
    if args.out and not args.images:
        raise UserError(f"--out {args.out}: is for the labels of --images DIR: give that too, or leave it out")
    if args.out and is_dir(user_path(args.out, "--out"), "--out"):
        raise UserError(f"--out {args.out}: is a folder: give the name of a file, e.g. --out {Path(args.out) / 'labels.csv'}")
    settings = config.load(args.config, args.set)
    machine = choose_machine(args.gpu, settings.runtime.amp, alone=True)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    run = locate(settings)
    path = run.checkpoint(args.resume or LATEST)
    saved = checkpoint.read(path)
    model = build_classifier(settings.network, settings.num_classes, settings.seed.seed)
    checkpoint.load_weights(model, saved, path)
    model.to(machine.device).to(memory_format=machine.memory_format)
    print(f"{path}")
    if args.images:
        out = user_path(args.out, "--out") if args.out else run.log / "labels.csv"
        label(settings, model, *checkpoint.about(saved), user_path(args.images, "--images"), out, machine)
    else:
        result = {"checkpoint": str(path), "epoch": saved.get("epoch")}
        test(settings, model, run, result, checkpoint.about(saved)[0], machine)


def test(
    settings: Config, model: nn.Module, run: Run, result: dict[str, object], class_names: tuple[str, ...], machine: Machine
) -> None:
    """Test the model on the sets that there are; print and keep the figures beside those of `result`.

    A model that is not perfect gives some images the attacker's label without any trigger. What the ASR is to be compared
    with is that share of the clean versions of the triggered images: `clean_as_target`.
    """
    tests = prepare_tests(settings, machine.device, new_classifier=new_classifier).to(machine.device)
    clean, backdoor = tests.clean, tests.backdoor
    if clean is None:
        raise UserError(f"dataset_dir: {settings.dataset_dir}: no test images: add some, or label pictures with --images DIR")
    figures, matrix = evaluate_with_confusion(build_context(settings, machine, clean), model, tests)
    assert matrix is not None
    result |= figures | {"clean_total": len(clean), "backdoor_total": None if backdoor is None else len(backdoor)}
    shares = {name: f"{100 * share:.2f} %" for name, share in figures.items() if share is not None}
    print(f"ACC {shares['clean_accuracy']} of {len(clean)} clean test images")
    worst = min((x, c) for c, x in enumerate(confusion.per_class_accuracy(matrix)) if x is not None)
    print(f"ACC of the worst class, {class_text(worst[1], class_names)}: {100 * worst[0]:.2f} %")
    if backdoor is not None:
        print(f"ASR {shares['attack_success_rate']} of {len(backdoor)} triggered test images")
        print(f"RA  {shares['robust_accuracy']} of them get their true label in spite of the trigger")
        print(f"without the trigger {shares['clean_as_target']} of them get the attacker's label")
    write_text(run.log / "test.json", confusion.to_json(result | confusion.figures(matrix)))
    print(f"written to {run.log / 'test.json'}")


def label(
    settings: Config, model: nn.Module, class_names: tuple[str, ...], size: tuple[int, int] | None, folder: Path, out: Path,
    machine: Machine,
) -> None:  # fmt: skip
    """Label every picture below a folder, and write a CSV.

    Args:
        size: of the training images; None: what the training transform gives.
    """
    train, tests = settings.transform.train, settings.transform.test
    size = size or Pipeline(train.primary, (), 256, 256).output_size
    pictures = ImageFiles(folder, [step.settings for step in settings.transform.pre], size)
    plain = Pipeline(tests.primary, tests.remaining, *size)
    batches = pictures.batches(settings.loader.batch_size)
    views = (plain(images.to(machine.device), torch.zeros(len(images), 0, device=machine.device)) for images in batches)
    logits = predict(model, views, machine).cpu()  # (n, C)
    table = label_table(pictures.kept, logits, class_names)
    write_atomically(out, lambda file: file.write(table))
    for line in pictures.remarks():
        print(line)
    print(f"{len(pictures.kept)} pictures labeled, {len(pictures.unreadable)} cannot be read: written to {out}")


if __name__ == "__main__":
    command("test.py", main)
