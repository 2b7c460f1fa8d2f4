"""`evidence.npz`: features, probabilities and labels of the training images, for tools that look for wrong labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import logged
from training import train_here

from data.sources import prepare
from model.classifier import build_classifier
from utils import config

SHORT = ("num_epochs=1", "semi.mixmatch.train_iteration=2", "global.epoch_first=1", "global.epoch_second=1")


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that any program may read."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("defense", ["asd", "none"])
def test_the_arrays_are_those_of_the_final_model(tiny: Path, tmp_path: Path, defense: str) -> None:
    """Row i has the penultimate features and the softmax of training image i, without augmentation, and its label."""
    settings = config.load(tiny, [*SHORT, f"defense={defense}"])
    run = train_here(settings, tiny)
    held = arrays(run.saved / "evidence.npz")
    kinds = {name: (str(array.dtype), array.shape) for name, array in held.items()}
    assert kinds == {
        "features": ("float32", (200, 16)), "pred_probs": ("float32", (200, 10)),
        "labels": ("int64", (200,)), "index": ("int64", (200,)),
    }  # fmt: skip
    data = prepare(settings, tmp_path / "again")
    assert held["index"].tolist() == list(range(200))
    assert held["labels"].tolist() == data.train.labels.tolist()
    assert data.ground_truth is not None
    assert held["labels"].tolist() != data.ground_truth.original_labels.tolist()  # those that are carried
    saved = torch.load(run.checkpoints / "latest_model.pt", weights_only=True)
    model = build_classifier(settings.network, 10, 0).eval()
    model.load_state_dict(saved["model_state_dict"])
    normalize = next(step.settings for step in settings.transform.test.remaining if step.name == "normalize")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (normalize.mean, normalize.std))
    with torch.no_grad():
        for i in range(0, 200, 23):
            view = ((data.train.images[i].float() / 255 - mean) / std)[None]
            assert np.allclose(held["features"][i], model.features(view)[0], atol=1e-4)
            assert np.allclose(held["pred_probs"][i], model(view)[0].softmax(0), atol=1e-5)
    assert np.allclose(held["pred_probs"].sum(1), 1, atol=1e-6)
    if defense == "asd":
        with open(run.saved / "suspects.csv", newline="") as file:
            listed = {int(row["name"]): row for row in csv.DictReader(file)}
        assert listed.keys() == set(range(200))
        for i, row in listed.items():
            probabilities, label = held["pred_probs"][i].astype(float), int(held["labels"][i])
            wrong = sum(p * math.log(1e4) for c, p in enumerate(probabilities) if c != label)
            assert float(row["split_loss"]) == pytest.approx(0.1 * -math.log(probabilities[label]) + 1.0 * wrong, rel=1e-3)
            assert row["label"] == data.class_names[label]
            assert row["model_label"] == data.class_names[int(probabilities.argmax())]
            assert float(row["confidence"]) == pytest.approx(probabilities.max(), abs=1e-4)


def test_it_can_be_left_out_and_added_later(tiny: Path) -> None:
    """`evidence: false` writes no file; the same command with it on the finished run adds the file and trains nothing."""
    run = train_here(config.load(tiny, [*SHORT, "evidence=false"]), tiny)
    assert not (run.saved / "evidence.npz").exists()
    before = (run.checkpoints / "latest_model.pt").read_bytes()
    with logged() as said:
        train_here(config.load(tiny, SHORT), tiny)
    assert any("nothing to do" in line for line in said) and any("evidence.npz" in line for line in said)
    assert len(arrays(run.saved / "evidence.npz")["features"]) == 200
    assert (run.checkpoints / "latest_model.pt").read_bytes() == before
    written = (run.saved / "evidence.npz").stat().st_mtime_ns
    train_here(config.load(tiny, SHORT), tiny)
    assert (run.saved / "evidence.npz").stat().st_mtime_ns == written
