"""Test a checkpoint: accuracy (ACC), overall and per class, attack success rate (ASR) and robust accuracy (RA).

    python test.py --config config/baseline_asd.yaml --resume latest_model.pt --gpu 0
    python test.py --config config/baseline_asd.yaml --images DIR [--out FILE.csv]

The first form also writes its results to `log/test.json`. The second form labels all image files below a folder; it needs no
data set.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from utils.startup import begin

    begin("test.py")

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from data.augment import Pipeline
from data.sources import prepare_tests
from data.unlabeled import ImageFiles, label_table
from engine.context import build_context
from engine.evaluation import evaluate
from model.classifier import build_classifier, new_classifier
from model.inference import predict
from utils import checkpoint, config
from utils.cli import command, parse_arguments
from utils.config import Config
from utils.config.compatibility import other_tests
from utils.config.schema import as_dict, stand_ins
from utils.errors import UserError
from utils.files import check_writable, write_atomically, write_text
from utils.names import class_text
from utils.paths import is_dir, user_path
from utils.reporting import confusion
from utils.reporting.best_effort import BestEffort
from utils.reporting.plots import CONFUSIONS, plot_confusions
from utils.run import LATEST, Run, locate
from utils.runtime.machine import Machine, choose_machine, set_determinism


class Loaded(NamedTuple):
    """A checkpoint, its model in memory, and where it runs."""

    config: Config
    machine: Machine
    run: Run
    path: Path
    saved: dict[str, Any]  # the contents of the checkpoint
    model: nn.Module  # on the device


def main() -> None:
    """Load the checkpoint, then test it or label images with it."""
    args = parse_arguments("Test a checkpoint on clean and on triggered images.", None, training=False)
    if args.resume.lower() == "false":
        raise UserError(f"--resume {args.resume}: testing needs a checkpoint: name one, or leave the option out")
    images, named = (
        None if path is None else user_path(path, key) for path, key in ((args.images, "--images"), (args.out, "--out"))
    )
    if named is not None and images is None:
        raise UserError(f"--out {args.out}: only valid together with --images DIR")
    if named is not None and is_dir(named, "--out"):
        raise UserError(f"--out {args.out}: is a folder: give a file name, e.g. --out {named / 'labels.csv'}")
    settings = config.load(args.config, args.set)
    machine = choose_machine(args.gpu, settings.runtime.amp, alone=True)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    run = locate(settings)
    path = run.checkpoint(args.resume or LATEST)
    saved = checkpoint.read(path)
    model = build_classifier(settings.network, settings.num_classes, settings.seed.seed)
    checkpoint.load_weights(model, saved, path)
    out = named or run.log / ("test.json" if images is None else "labels.csv")
    check_writable(out)  # before the work
    model.to(machine.device).to(memory_format=machine.memory_format)
    print(f"{path}")
    loaded = Loaded(settings, machine, run, path, saved, model)
    if images is None:
        test(loaded)
    else:
        label(loaded, images, out)


def test(loaded: Loaded) -> None:
    """Test the model on the clean and the triggered test images; print the results and write them to `log/test.json`.

    An imperfect model gives some images the attacker's label even without a trigger. Compare the ASR with the
    fraction of such images among the clean versions of the triggered images, `clean_as_target`.
    The confusion matrices are also drawn, into `log/test_confusion.png` and `log/test_triggered_confusion.png`.
    """
    settings, machine, run = loaded.config, loaded.machine, loaded.run
    known, class_names = checkpoint.data_of(loaded.saved), checkpoint.about(loaded.saved)[0]
    others = other_tests(loaded.saved, as_dict(settings), {key for key, _, _ in stand_ins(settings)})
    note(others)  # first: to make another trigger may take hours
    tests, other_files = prepare_tests(settings, machine.device, new_classifier, known, class_names)
    note(other_files)
    tests, others = tests.to(machine.device), [*others, *other_files]
    clean, backdoor = tests.clean, tests.backdoor
    if clean is None:
        raise UserError(f"dataset_dir: {settings.dataset_dir}: no test images: add some, or label images with --images DIR")
    figures, by_class = evaluate(build_context(settings, machine, clean), loaded.model, tests)
    assert by_class is not None
    result: dict[str, Any] = {"checkpoint": str(loaded.path), "epoch": loaded.saved.get("epoch")} | figures
    result |= {"other_than_in_training": others} if others else {}
    result |= {"clean_total": len(clean), "backdoor_total": None if backdoor is None else len(backdoor)}
    shares = {name: f"{100 * share:.2f} %" for name, share in figures.items() if share is not None}
    print(f"ACC {shares['clean_accuracy']} of {len(clean)} clean test images")
    worst = min((x, c) for c, x in enumerate(confusion.per_class_accuracy(by_class.clean)) if x is not None)
    print(f"ACC of the worst class, {class_text(worst[1], class_names)}: {100 * worst[0]:.2f} %")
    if backdoor is not None:
        print(f"ASR {shares['attack_success_rate']} of {len(backdoor)} triggered test images")
        print(f"RA  {shares['robust_accuracy']} of the triggered images classified as their original class")
        print(f"without the trigger, {shares['clean_as_target']} of these images are classified as the attacker wants")
    write_text(run.log / "test.json", confusion.to_json(result | confusion.figures(by_class)))
    paths = [run.log / f"test_{file}" for file in CONFUSIONS]
    drawn = plot_confusions(BestEffort(), paths, by_class, class_names, f"{run.name}, {loaded.path.name}")
    print(f"written to {', '.join([str(run.log / 'test.json'), *(path.name for path in drawn)])}")


def note(others: list[str]) -> None:
    """Print how the tested images differ from those of the run, if they do."""
    if others:
        print(f"note: the test images are not those of the run: {'; '.join(others)}")


def label(loaded: Loaded, folder: Path, out: Path) -> None:
    """Label every image file below a folder, and write the labels to a CSV file."""
    transform, machine = loaded.config.transform, loaded.machine
    class_names, size = checkpoint.about(loaded.saved)
    # Checkpoints of earlier versions do not have the size of their training images: the train transform gives it.
    size = size or Pipeline(transform.train.primary, (), 256, 256).output_size
    images = ImageFiles(folder, [step.settings for step in transform.pre], size)
    eval_transform = Pipeline(transform.test.primary, transform.test.remaining, *size)
    no_draws = torch.zeros(loaded.config.loader.batch_size, 0, device=machine.device)
    batches = images.batches(loaded.config.loader.batch_size)
    views = (eval_transform(batch.to(machine.device), no_draws[: len(batch)]) for batch in batches)
    logits = predict(loaded.model, views, machine).cpu()  # (n, C)
    table = label_table(images.kept, logits, class_names)
    write_atomically(out, lambda file: file.write(table))
    for line in images.remarks():
        print(line)
    print(f"{len(images.kept)} images labeled, {len(images.unreadable)} unreadable: written to {out}")


if __name__ == "__main__":
    command("test.py", main)
