"""Placement of the images: runs from device, host memory and disk are equal bit for bit, and large tables are not copied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, logged
from PIL import Image
from training import train_here

from data import loading
from data.datasets import shapes
from data.io import placement
from data.io.placement import choose_placement
from data.io.tables import table_of_array
from data.poisoning import build_attack, poison_training_set
from data.sets import ImageSet, Mapped, RawData, to_set
from utils import config
from utils.errors import UserError
from utils.kinds import POISONED
from utils.run import locate

CPU = torch.device("cpu")
PLACEMENTS = ("device", "host", "disk")


def train(tiny: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], np.ndarray]:
    """Train the tiny run in this process; return its metrics without times, its last weights and poisoned images."""
    settings = config.load(tiny, overrides)
    run = train_here(settings, tiny, "False")
    rows = [json.loads(line) for line in (run.log / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    saved = torch.load(locate(settings).checkpoint("latest_model.pt"), weights_only=True)
    return rows, saved["model_state_dict"], np.load(run.saved / "poison_idx.npy")


def assert_same_run(one: Any, other: Any) -> None:
    """Compare metrics, weights and poisoned images bit for bit."""
    assert one[0] == other[0] and len(one[0]) == 6
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert np.array_equal(one[2], other[2])


def write_folder(root: Path, raw: RawData) -> RawData:
    """Write a data set as a tree of PNGs; return it in the order of that tree: by class, then by number."""
    for part, images, labels in (("train", raw.train_images, raw.train_labels), ("test", raw.test_images, raw.test_labels)):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / f"{label} {raw.class_names[label]}" / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, compress_level=1)
    train, test = np.argsort(raw.train_labels, kind="stable"), np.argsort(raw.test_labels, kind="stable")
    return RawData(
        raw.train_images[train], raw.train_labels[train], raw.test_images[test], raw.test_labels[test], raw.class_names
    )


def test_image_files_train_like_arrays_in_each_placement(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All three stages on PNGs give the poisoned images, losses, pools and weights of the run on arrays, in each placement."""
    ordered = write_folder(tmp_path / "images", shapes.load(shapes.Settings(200, 43), None, False))
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "load", lambda *_: ordered)
        direct = train(tiny, "run=direct")
    for place in PLACEMENTS:
        folder = ("dataset=folder", f"dataset_dir={tmp_path / 'images'}", f"data.placement={place}", f"run={place}")
        assert_same_run(train(tiny, *folder), direct)


def test_arrays_train_equally_from_host_and_disk(tiny: Path) -> None:
    """With placement `disk` a data set of arrays is written into a table; the run is the same bit for bit in each placement."""
    resident, *others = (train(tiny, f"data.placement={place}", f"run={place}") for place in PLACEMENTS)
    for other in others:
        assert_same_run(other, resident)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_images_are_fetched_by_index(tmp_path: Path, place: str) -> None:
    """Any index, with repetitions, empty or a slice, gives its images as contiguous (B, 3, H, W), also from a part of a set."""
    images = np.random.default_rng(0).integers(0, 256, (30, 7, 5, 3), np.uint8)
    table = table_of_array(images, (), tmp_path, "train").images if place == "disk" else images
    image_set = to_set(table, np.arange(30) % 4, place).to(CPU)
    assert image_set.images.shape == (30, 3, 7, 5) and len(image_set) == 30
    for index in ([3, 29, 3, 0], [], [11]):
        found = image_set.fetch(torch.tensor(index, dtype=torch.int64))
        assert found.dtype == torch.uint8 and found.shape == (len(index), 3, 7, 5) and found.is_contiguous()
        for image, i in zip(found, index, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), images[i])
    for rows in (slice(4, 9), slice(25, 99), slice(None)):
        assert torch.equal(image_set.fetch(rows), torch.from_numpy(images[rows]).permute(0, 3, 1, 2))
        part = image_set.part(rows)
        assert torch.equal(part.fetch(torch.tensor([2, 0])), image_set.fetch(rows)[[2, 0]])
        assert part.labels.tolist() == (np.arange(30) % 4)[rows].tolist()


@pytest.mark.parametrize("place", PLACEMENTS)
def test_poisoning_does_not_change_the_raw_images(tiny: Path, tmp_path: Path, place: str) -> None:
    """In each placement the raw images are still clean after the training set has been poisoned."""
    write_folder(tmp_path / "images", shapes.load(shapes.Settings(60, 20), None, False))
    settings = config.load(
        tiny, ["dataset=folder", f"dataset_dir={tmp_path / 'images'}", "backdoor.poison_ratio=0.5", "defense=none"]
    )
    raw = loading.load_raw(settings)
    before = np.array(raw.train_images)
    poisoned = poison_training_set(settings, raw, build_attack(settings, raw), tmp_path, place)
    assert np.array_equal(raw.train_images, before)
    changed = (poisoned.to_set(place).fetch(slice(None)).permute(0, 2, 3, 1).numpy() != before).any((1, 2, 3))
    assert changed.any() and np.array_equal(changed, poisoned.flags == POISONED)


def test_only_resident_images_move_to_the_device() -> None:
    """`to` always moves labels, but images only with placement `device`: a large table is never copied to the device."""
    images = np.zeros((4, 6, 6, 3), np.uint8)
    meta = torch.device("meta")
    for place in PLACEMENTS:
        moved = to_set(images, np.zeros(4), place).to(meta)
        assert moved.labels.device == meta
        assert (moved.images.device == meta) == (place == "device") == moved.resident


# -- The choice --------------------------------------------------------------------------------------------------------


def choose(wanted: str, train: int, test: int, free: float, mapped: bool = True, processes: int = 1) -> tuple[str, str]:
    """Choose for tables of given sizes and free memory, both in units of 300 bytes; return the placement and the log line."""
    patch = pytest.MonkeyPatch()
    patch.setattr(placement, "available_memory", lambda: 300.0 * free)
    tables = [np.zeros((n, 10, 10, 3), np.uint8).view(Mapped if mapped else np.ndarray) for n in (train, test)]
    try:
        with logged() as said:
            chosen = choose_placement(wanted, tables[0], [tables[1]] * 2, CPU, processes)
    finally:
        patch.undo()
    (line,) = said
    return chosen, line


@pytest.mark.parametrize(
    ("train", "test", "free", "processes", "wanted"),
    [
        (6, 2, 20, 1, "device"),
        (6, 2, 19, 1, "disk"),
        (6, 2, 40, 2, "device"),
        (6, 2, 39, 2, "disk"),
        (1, 0, float("inf"), 1, "device"),
    ],
)
def test_auto_chooses_by_size(train: int, test: int, free: float, processes: int, wanted: str) -> None:
    """On the CPU images stay in memory if they fill at most half of the memory that is free for each process; else on disk."""
    assert choose("auto", train, test, free, processes=processes)[0] == wanted


def test_auto_on_a_gpu_goes_from_device_to_host_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that fill more than half of the free device memory are kept in host memory, or on disk if that is too small."""
    gpu, table = torch.device("cuda", 0), np.zeros((10, 10, 10, 3), np.uint8).view(Mapped)
    for device_free, host_free, wanted in ((6000, 0, "device"), (5999, 6000, "host"), (5999, 5999, "disk")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=device_free: (free, 10**6))
        monkeypatch.setattr(placement, "available_memory", lambda free=host_free: float(free))
        with logged() as said:
            assert choose_placement("auto", table, [], gpu, 1) == wanted
        assert len(said) == 1 and "cuda:0" in said[0]


@pytest.mark.parametrize("wanted", PLACEMENTS)
def test_an_explicit_placement_is_used_and_logged(wanted: str) -> None:
    """An explicit placement is used whatever memory is free; the log line states count, size, setting and placement."""
    chosen, line = choose(wanted, 6, 2, 10)
    assert chosen == wanted
    assert f"data.placement: {wanted}" in line and "6 training and 4 test images of 10 x 10 pixels" in line
    assert {"device": "on cpu", "host": "host memory", "disk": "on disk"}[wanted] in line


def test_arrays_without_a_table_are_not_placed_on_disk() -> None:
    """Arrays that are not in a mapped table stay in host memory, whatever the setting."""
    assert choose("disk", 6, 2, 10, mapped=False)[0] == "host"
    assert choose("auto", 6, 2, 10, mapped=False)[0] == "host"


def test_a_device_that_is_too_small_is_refused() -> None:
    """`data.placement: device` with too little free memory is an error with both sizes, before anything is copied."""
    with pytest.raises(UserError, match=r"data.placement: device: the images need 0.00 GB, but cpu has 0.00 GB free"):
        choose("device", 6, 2, 9)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is the smaller of the system's and the container's, whose page cache counts as free."""
    monkeypatch.setattr(placement, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(placement, "CGROUP", tmp_path)
    assert placement.available_memory() == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:      50 kB\n")
    assert placement.available_memory() == 50 * 1024
    (tmp_path / "memory.max").write_text("40960\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 9000\ninactive_file 20000\n")
    assert placement.available_memory() == 40960 - 30000 + 20000
    (tmp_path / "memory.max").write_text("max\n")
    assert placement.available_memory() == 50 * 1024


# -- Memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, {repository!r})
from data.sources import prepare
from utils import config
settings = config.load({yaml!r}, ["data.placement={place}"])

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

prepare(settings, Path({warm!r}))  # makes the table and loads the libraries
import gc; gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = memory("VmRSS")
data = prepare(settings, Path({folder!r}))
gc.collect()
fetched = [data.train.fetch(torch.arange(i, i + 16)) for i in (0, 100, 40)]
print(memory("VmRSS") - before, memory("VmHWM") - before, memory("RssAnon"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports the peak of a process")
def test_memory_grows_by_one_table_at_most(tiny: Path, tmp_path: Path) -> None:
    """Loading and poisoning images of 224 px needs at most one table and the test sets with placement `host`, and no table with
    `disk`."""
    count, tests = 400, 20
    rng = np.random.default_rng(0)
    for part, total in (("train", count), ("test", tests)):
        for i in range(total):
            path = tmp_path / "images" / part / f"{i % 10}" / f"{i:04d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)).save(path)
    table, test_table = (n * 224 * 224 * 3 for n in (count, tests))
    raw = yaml.safe_load(tiny.read_text()) | {"dataset": "folder", "dataset_dir": str(tmp_path / "images")}
    tiny.write_text(yaml.safe_dump(raw, sort_keys=False))
    growth = {}
    for place in PLACEMENTS:
        code = MEASURE.format(
            repository=str(REPOSITORY), yaml=str(tiny), place=place, warm=str(tmp_path / "w"), folder=str(tmp_path / "f")
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        growth[place] = [int(word) for word in done.stdout.split()[-3:]]
    slack = 12 << 20
    poisoned = 3 * 0.12 * table  # the poisoned images: before, after and in the table
    assert growth["disk"][1] < poisoned + 3 * test_table + slack
    assert growth["host"][1] < table + poisoned + 3 * test_table + slack
    assert growth["host"][0] > 0.8 * table  # the table is in memory


def test_an_image_set_has_images_labels_and_placement_only() -> None:
    """An image set has no field that the defender must not see."""
    assert list(ImageSet.__dataclass_fields__) == ["images", "labels", "placement"]


def test_the_data_set_is_recognized_by_the_path() -> None:
    """Without `dataset:` the last name in the path that stands for a data set determines it, as in the authors' code."""
    for name, wanted in (
        ("./dataset/cifar-10-batches-py", "cifar10"), ("/x/CIFAR", "cifar10"), ("/x/cifar100", "cifar100"),
        ("/x/cifar-100-python", "cifar100"), ("./dataset/gtsrb", "gtsrb"), ("/cifar/GTSRB/", "gtsrb"),
        ("/x/imagenet30", "folder"), ("/x/VGGFace2_subset", "folder"), ("/gtsrb/cifar-10-batches-py", "cifar10"),
    ):  # fmt: skip
        assert loading.name_of_folder(name) == wanted
    with pytest.raises(UserError, match="not recognized"):
        loading.name_of_folder("/x/images")
