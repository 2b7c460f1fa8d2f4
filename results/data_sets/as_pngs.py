"""Compares CIFAR-10 as 60,000 PNG files, `train/<class>/*` and `test/<class>/*`, with CIFAR-10 in its original files.

    python -m results.data_sets.as_pngs --cifar10 dataset/cifar-10-batches-py --folder /tmp/pngs

Fails unless both give the same images, labels, poisoned indices and split losses of the untrained network of
config/cifar10_study.yaml, for every `data.placement`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ASD
from data.datasets import cifar10
from data.loading import load_raw
from data.poisoning import build_attack, poison_training_set
from data.sets import RawData
from engine.context import build_context, build_state
from utils import config
from utils.kinds import POISONED
from utils.runtime.machine import Machine

ROOT = Path(__file__).resolve().parents[2]


def write(raw: RawData, folder: Path) -> RawData:
    """Write the PNG files; return the data set in their order: by class name, then by number."""
    names = sorted(raw.class_names)
    parts: dict[str, Any] = {}
    for part, images, labels in (("train", raw.train_images, raw.train_labels), ("test", raw.test_images, raw.test_labels)):
        order = np.concatenate([np.flatnonzero(labels == raw.class_names.index(name)) for name in names])
        for i in order:
            path = folder / part / raw.class_names[labels[i]] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(images[i]).save(path)
        renumbered = np.array([names.index(raw.class_names[label]) for label in labels[order]])
        parts |= {f"{part}_images": images[order], f"{part}_labels": renumbered}
    return replace(raw, **parts, class_names=tuple(names))


def main() -> None:
    """Write and read the files, poison both data sets, compare them and the split losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    wanted = write(cifar10.load(cifar10.Settings(), args.cifar10, False), args.folder)
    overrides = ["dataset=folder", f"dataset_dir={args.folder}", f"saved_dir={args.folder}/saved"]
    c = config.load(ROOT / "config/cifar10_study.yaml", overrides)
    found = load_raw(c)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
    print("60,000 images and labels are equal", flush=True)
    machine, results = Machine(torch.device("cpu")), []
    for raw, placement in ((wanted, "device"), (found, "device"), (found, "host"), (found, "disk")):
        with tempfile.TemporaryDirectory() as folder:
            part = poison_training_set(c, raw, build_attack(c, raw), Path(folder), placement)
        train_set = part.to_set(placement)
        model = build_state(c, machine, len(part)).model
        losses = ASD.split_losses(build_context(c, machine, train_set), 0, model)
        results.append((torch.from_numpy(part.flags), losses))
        assert all(torch.equal(a, b) for a, b in zip(results[-1], results[0], strict=True)), placement
        print(f"{placement}: {(part.flags == POISONED).sum()} poisoned, split losses equal", flush=True)


if __name__ == "__main__":
    main()
