"""The shipped YAMLs: their data sets and networks, in all three stages on small data in the authors' layout."""

from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, REPOSITORY, run_script
from PIL import Image

from data.augment import Pipeline
from utils import config

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
# Three epochs of few steps, one of each stage.
SHORT = (
    "num_epochs=3", "global.epoch_first=1", "global.epoch_second=2", "global.epoch_third=3", "global.seed_num=1",
    "global.t=1", "global.n=1", "loader.batch_size=16", "semi.mixmatch.train_iteration=1", "backdoor.poison_ratio=0.1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The data set of a YAML, and the settings that make its run short."""

    write: Callable[[Path], int]  # writes the data set and returns how many training images it has
    overrides: tuple[str, ...]
    named: bool  # images have file names


def image(label: int, i: int, width: int, height: int) -> Image.Image:
    """An image with the grey level of its class, with noise."""
    rng = np.random.default_rng(1000 * label + i)
    return Image.fromarray((5 * label + rng.integers(0, 40, (height, width, 3))).astype(np.uint8))


def write_gtsrb(folder: Path) -> int:
    """43 classes of 3 to 5 signs of several sizes in the official layout."""
    count = 0
    for label in range(43):
        place, rows = folder / f"GTSRB/Final_Training/Images/{label:05d}", [HEADER]
        place.mkdir(parents=True)
        for i in range(3 + label % 3):
            width, height = 20 + label, 60 - label
            image(label, i, width, height).save(place / f"00000_{i:05d}.ppm")
            rows.append(f"00000_{i:05d}.ppm;{width};{height};5;6;15;16;{label}")
            count += 1
        (place / f"GT-{label:05d}.csv").write_text("\r\n".join(rows) + "\r\n")
    place, rows = folder / "GTSRB/Final_Test/Images", [HEADER]
    place.mkdir(parents=True)
    for label in range(43):
        image(label, 9, 31, 33).save(place / f"{label:05d}.ppm")
        rows.append(f"{label:05d}.ppm;31;33;5;6;15;16;{label}")
    (place / "GT-final_test.csv").write_text("\r\n".join(rows) + "\r\n")
    return count


def write_cifar(folder: Path, classes: int, key: str, parts: dict[str, int]) -> None:
    """Write pickles; `parts` gives the number of images of each class in each of them."""
    folder.mkdir(parents=True)
    for part, each in parts.items():
        labels = [label for label in range(classes) for _ in range(each)]
        rows = [np.asarray(image(label, i, 32, 32)).transpose(2, 0, 1).reshape(-1) for i, label in enumerate(labels)]
        (folder / part).write_bytes(pickle.dumps({"data": np.stack(rows), key: labels}, protocol=2))


def write_cifar10(folder: Path) -> int:
    """The five batches and the test batch."""
    write_cifar(folder / "cifar-10-batches-py", 10, "labels", {f"data_batch_{i}": 2 for i in range(1, 6)} | {"test_batch": 2})
    return 100


def write_cifar100(folder: Path) -> int:
    """`train`, `test` and `meta`."""
    write_cifar(folder / "cifar-100-python", 100, "fine_labels", {"train": 4, "test": 1})
    meta = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (folder / "cifar-100-python/meta").write_bytes(pickle.dumps(meta, protocol=2))
    return 400


def write_images(folder: Path) -> int:
    """Five classes with eight training and two test images of several sizes, in landscape and portrait format."""
    for part, each in (("train", 8), ("val", 2)):
        for label in range(5):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for i in range(each):
                image(label, i, 300 - 40 * (i % 3), 230 + 30 * (i % 2)).save(place / f"{i}.{('jpg', 'png')[i % 2]}")
    return 40


def write_tiny_imagenet(folder: Path) -> int:
    """200 classes of three training images and one validation image in the original layout; some are grey."""
    wnids = [f"n{7 * k:08d}" for k in range(200)]
    (folder / "val/images").mkdir(parents=True)
    for label, wnid in enumerate(wnids):
        place = folder / "train" / wnid / "images"
        place.mkdir(parents=True)
        (place.parent / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            image(label % 40, i, 64, 64).convert("RGB" if i else "L").save(place / f"{wnid}_{i}.JPEG")
        image(label % 40, 9, 64, 64).save(folder / f"val/images/val_{label}.JPEG")
    lines = [f"val_{label}.JPEG\t{wnid}\t0\t0\t63\t63\n" for label, wnid in enumerate(wnids)]
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return 600


def write_own(folder: Path) -> int:
    """The same images with a list of clean ones."""
    count = write_images(folder)
    (folder / "clean.txt").write_text("".join(f"n{label:08d}/{i}.{('jpg', 'png')[i]}\n" for label in range(5) for i in (0, 1)))
    return count


FIVE = ("num_classes=5", "split.criterion.sce.num_classes=5", "semi.mixmatch.num_classes=5", "semi.loader.batch_size=4")
NARROW = ("network.resnet18_cifar.width=2", "network.resnet18_cifar.blocks=1", "semi.loader.batch_size=8")
CASES = {
    "baseline_asd": Case(write_cifar10, NARROW, False),
    "wanet_cover": Case(write_cifar10, NARROW, False),
    "gtsrb": Case(write_gtsrb, (*NARROW, "semi.loader.batch_size=16"), True),
    "cifar100": Case(write_cifar100, NARROW, False),
    "tiny_imagenet": Case(write_tiny_imagenet, (*NARROW, "semi.loader.batch_size=32"), True),
    "imagenet30": Case(write_images, (*FIVE, "network.resnet18.blocks=[1, 1, 1, 1]"), True),
    "vggface2_30": Case(write_images, (*FIVE, "network.densenet121={blocks: [1, 1, 1, 1], growth: 4}"), True),
    "own_data": Case(write_own, (*FIVE, *NARROW[:2]), True),
}


@pytest.mark.parametrize("name", CASES)
def test_all_three_stages_run_as_the_yaml_says(name: str, tmp_path: Path) -> None:
    """The run has finite metrics in each stage, ranks all images by name, and writes a checkpoint that test.py reads."""
    case = CASES[name]
    data = tmp_path / "cifar-like" if name in ("baseline_asd", "wanet_cover") else tmp_path / "data"
    count = case.write(data)
    overrides = [f"saved_dir={tmp_path / 'saved'}", f"storage_dir={tmp_path / 'storage'}", f"dataset_dir={data}"]
    overrides += [
        o for o in (*SHORT, *case.overrides) if not (name == "own_data" and o.startswith(("backdoor", "global.seed")))
    ]
    if name == "own_data":
        overrides += [f"seed_samples={data / 'clean.txt'}"]
    arguments = ["--config", f"config/{name}.yaml", "--gpu", "cpu", *(x for o in overrides for x in ("--set", o))]
    result = run_script("ASD.py", *arguments)
    assert result.returncode == 0, result.stderr
    saved = tmp_path / "saved" / name
    rows = [json.loads(line) for line in (saved / "log/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["class-aware", "class-agnostic", "meta-split"]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "loss_x", "loss_u", "clean_accuracy"))
    assert [row["clean_pool_size"] for row in rows[1:]] == [count // 2] * 2
    known = name != "own_data"  # without ground truth these values are null
    assert all((row[key] is not None) == known for row in rows for key in ("attack_success_rate", "poisoned_in_clean_pool"))
    with open(saved / "suspects.csv", newline="") as file:
        ranked = list(csv.DictReader(file))
    assert len(ranked) == count
    if case.named:
        for row in ranked[:5]:  # Tiny-ImageNet has a folder `images` between class and file, which is no part of the name
            label, file = row["name"].rsplit("/", 1)
            assert any(path.is_file() for inside in ("", "images/") for path in data.rglob(f"{label}/{inside}{file}"))
    checkpoint = torch.load(tmp_path / "storage" / name / "checkpoint/latest_model.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    tested = run_script("test.py", *arguments)
    assert tested.returncode == 0, tested.stderr
    last = json.loads((saved / "log/test.json").read_text())
    assert last["clean_accuracy"] == rows[-1]["clean_accuracy"]


@pytest.mark.parametrize("name", [path.relative_to(REPOSITORY).as_posix() for path in CONFIGS])
def test_the_augmentation_becomes_part_of_a_cuda_graph(name: str) -> None:
    """At the YAML's image size no view waits for the host, and a captured graph gives the same views for new draws as a CPU."""
    fake_cuda = pytest.importorskip("fake_cuda")
    transform = config.load(REPOSITORY / name).transform
    shown = Image.new("RGB", (32, 32))
    for item in transform.pre:
        shown = item.settings.apply(shown, None)
    augment = Pipeline(transform.train.primary, transform.train.remaining, shown.height, shown.width)
    images = torch.randint(
        0, 256, (4, 3, shown.height, shown.width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    tables = [augment.draw(4, torch.Generator().manual_seed(i)) for i in range(2)]
    with fake_cuda.pretended_cuda() as device:
        x, first, second = (t.to(fake_cuda.CUDA) for t in (images, *tables))
        augment(x, first)  # keeps its constants on the device
        device.uploads.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            views = augment(x, first)
        assert not device.reads and not device.uploads
        first.copy_(second)
        graph.replay()
        captured = views.cpu()
    assert torch.equal(captured, augment(images, tables[1]))
    assert not torch.equal(captured, augment(images, tables[0]))
