"""Exported poisoned sets: writing, reading, training on one, and errors in the files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, logged, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training import train_here

import data.attacks
from data import contact_sheet, loading, poison
from data.datasets import shapes
from data.poisoned_sets import export
from data.poisoned_sets.folder import read_set
from data.sets import no_network
from data.sources import prepare, prepare_tests
from utils import config, files
from utils.config import Config
from utils.errors import UserError

FILES = ("train.npz", "clean_test.npz", "backdoor_test.npz")
ARRAYS = ("images", "labels", "original_labels", "flags", "indices")
COLORS = {(4, 4): (180, 249, 112), (4, 5): (155, 50, 126), (5, 4): (234, 82, 68), (5, 5): (187, 201, 219)}

TOY = """
from dataclasses import dataclass
import numpy as np
from data.attack import AttackBase

@dataclass(frozen=True)
class Settings:
    strength: int = 9
    cover_ratio: float = 1.5

class Attack(AttackBase):
    clean_label = {clean_label}

    def __init__(self, settings, context):
        self.strength, self.cover_ratio = settings.strength, settings.cover_ratio

    def apply(self, images, index, split):
        out = images.copy()
        out[:, :3, :3] = (images[:, :3, :3] // 2 + self.strength + index[:, None, None, None] % 50).astype(np.uint8)
        return out

    def cover(self, images, index):
        return np.roll(images, 1, axis=1)
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more attacks with cover images: `tinted`, and `tinted_inside`, which is clean-label."""
    folder = tmp_path / "attacks"
    folder.mkdir()
    (folder / "tinted.py").write_text(TOY.format(clean_label=False))
    (folder / "tinted_inside.py").write_text(TOY.format(clean_label=True))
    monkeypatch.setattr(data.attacks, "__path__", [*data.attacks.__path__, str(folder)])
    for name in ("tinted", "tinted_inside"):
        monkeypatch.delitem(sys.modules, f"data.attacks.{name}", raising=False)


def plan(tiny: Path, attack: str) -> Path:
    """Write a YAML with that attack next to the tiny one."""
    raw = yaml.safe_load(tiny.read_text())
    raw["backdoor"] = {"poison_ratio": 0.1, "target_label": 3, attack: {"cover_ratio": 1.5} if attack == "wanet" else {}}
    path = tiny.parent / f"{attack}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def write(path: Path, out: Path, *overrides: str) -> tuple[Path, list[str]]:
    """Write the set of a YAML; return its folder and the log lines."""
    with logged() as said:
        export.export(config.load(path, overrides), out, torch.device("cpu"))
    return out, said


def stored(tiny: Path, folder: Path, *overrides: str, **changes: Any) -> Config:
    """The tiny configuration on a set's folder."""
    raw = yaml.safe_load(tiny.read_text()) | {"dataset": "poisoned_set", "dataset_dir": str(folder), "backdoor": None}
    path = tiny.parent / f"on_{folder.name}.yaml"
    path.write_text(yaml.safe_dump(raw | changes, sort_keys=False))
    return config.load(path, overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    with np.load(folder / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def refused(work: Callable[[], object], *parts: str) -> str:
    """Return the error of `work`, one line with all the given parts."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line


# -- Writing -----------------------------------------------------------------------------------------------------------


def test_the_files_hold_the_poisoned_set(tiny: Path, tmp_path: Path) -> None:
    """Read by another program, the files contain the images, labels and ground truth that follow from the paper's rules."""
    out, _ = write(tiny, tmp_path / "set")
    raw = shapes.load(shapes.Settings(200, 43), None, False)
    assert sorted(contents(out)) == sorted([*FILES, "set.json", "contact_sheet.png"])
    train, clean, backdoor = (arrays(out, name) for name in FILES)
    rng = random.Random(7)
    flags = []
    for label in raw.train_labels:
        drawn = rng.random() < 0.1
        flags.append(int(drawn and label != 3))
    assert 0 < sum(flags) < 60
    assert train["flags"].tolist() == flags
    for i, flag in enumerate(flags):
        expected = raw.train_images[i].copy()
        for at, color in COLORS.items() if flag else ():
            expected[at] = color
        assert np.array_equal(train["images"][i], expected)
        assert train["labels"][i] == (3 if flag else raw.train_labels[i])
    assert train["original_labels"].tolist() == raw.train_labels.tolist()
    assert train["indices"].tolist() == list(range(200))

    assert np.array_equal(clean["images"], raw.test_images)
    assert clean["labels"].tolist() == clean["original_labels"].tolist() == raw.test_labels.tolist()
    assert clean["indices"].tolist() == list(range(43)) and not clean["flags"].any()

    others = [i for i, label in enumerate(raw.test_labels) if label != 3]
    assert backdoor["indices"].tolist() == others and backdoor["flags"].tolist() == [1] * len(others)
    assert backdoor["labels"].tolist() == [3] * len(others)
    assert backdoor["original_labels"].tolist() == [raw.test_labels[i] for i in others]
    for image, i in zip(backdoor["images"], others, strict=True):
        expected = raw.test_images[i].copy()
        for at, color in COLORS.items():
            expected[at] = color
        assert np.array_equal(image, expected)
    for name in FILES:
        kinds = {key: str(array.dtype) for key, array in arrays(out, name).items()}
        assert kinds == dict(zip(ARRAYS, ("uint8", "int64", "int64", "uint8", "int64"), strict=True))


def test_set_json_has_settings_counts_and_checksums(tiny: Path, tmp_path: Path) -> None:
    """set.json has every setting that determines the set, the counts of each kind, and the SHA-256 of each array's bytes."""
    out, _ = write(tiny, tmp_path / "set", "transform.pre.resize.size=32")
    described = json.loads((out / "set.json").read_text())
    head = (described["format"], described["version"], described["seed"], described["num_classes"])
    assert head == ("poisoned set", 2, 7, 10)
    assert described["backdoor"] == {
        "badnets": {"trigger_path": None, "pattern": None},
        "poison_ratio": 0.1,
        "target_label": 3,
        "target_shift": None,
        "poison_mode": "bernoulli",
    }
    assert described["dataset"] == {"shapes": {"train_size": 200, "test_size": 43, "noise": 22.0, "seed": 0}}
    assert described["transform_pre"] == {"resize": {"size": 32}}
    assert described["class_names"] == list(shapes.CLASSES)
    for name in FILES:
        held = arrays(out, name)
        kinds = dict(zip(("clean", "poisoned", "cover"), np.bincount(held["flags"], minlength=3).tolist(), strict=True))
        assert described["counts"][name.removesuffix(".npz")] == kinds
        for key, array in held.items():
            entry = described["files"][name][key]
            assert entry["sha256"] == hashlib.sha256(array.tobytes()).hexdigest()
            assert (entry["dtype"], entry["shape"]) == (str(array.dtype), list(array.shape))


@pytest.mark.parametrize("attack", ["badnets", "tinted", "tinted_inside"])
def test_equal_settings_give_equal_bytes(tiny: Path, tmp_path: Path, toys: None, attack: str) -> None:
    """If a set is made twice, all its files are equal byte for byte; another seed poisons other images."""
    path = plan(tiny, attack)
    one, two, other = (write(path, tmp_path / name, *more)[0] for name, *more in (["a"], ["b"], ["c", "seed.seed=8"]))
    assert contents(one) == contents(two)
    assert not np.array_equal(arrays(one, "train.npz")["flags"], arrays(other, "train.npz")["flags"])


def test_cover_images_are_flagged_and_keep_their_label(tiny: Path, tmp_path: Path, toys: None) -> None:
    """There are int(1.5 * number of poisoned images) cover images, altered by the attack's `cover`, with their own labels."""
    out, _ = write(plan(tiny, "tinted"), tmp_path / "set")
    train, raw = arrays(out, "train.npz"), shapes.load(shapes.Settings(200, 43), None, False)
    cover = np.flatnonzero(train["flags"] == 2)
    assert len(cover) == int(1.5 * (train["flags"] == 1).sum()) > 0
    for i in cover:
        assert np.array_equal(train["images"][i], np.roll(raw.train_images[i], 1, axis=0))
        assert train["labels"][i] == train["original_labels"][i] == raw.train_labels[i]


def test_a_clean_label_set_has_a_test_set_of_the_other_classes(tiny: Path, tmp_path: Path, toys: None) -> None:
    """With a clean-label attack, which poisons the target class, the backdoor test set still has the other classes only."""
    out, _ = write(plan(tiny, "tinted_inside"), tmp_path / "set")
    train, backdoor = arrays(out, "train.npz"), arrays(out, "backdoor_test.npz")
    assert (train["original_labels"][train["flags"] == 1] == 3).all() and (train["flags"] == 1).any()
    assert np.array_equal(train["labels"], train["original_labels"])
    raw = shapes.load(shapes.Settings(200, 43), None, False)
    assert backdoor["indices"].tolist() == [i for i in range(43) if raw.test_labels[i] != 3]
    assert (backdoor["labels"] == 3).all()


def test_the_contact_sheet_shows_what_the_attack_does(tiny: Path, tmp_path: Path, toys: None) -> None:
    """In each of three groups (training, test and cover images) there are rows of original images, altered images and ten times
    their difference, with each pixel enlarged to a square."""
    out, _ = write(plan(tiny, "tinted"), tmp_path / "set")
    raw = shapes.load(shapes.Settings(200, 43), None, False)
    train, backdoor = arrays(out, "train.npz"), arrays(out, "backdoor_test.npz")
    with Image.open(out / "contact_sheet.png") as file:
        sheet = np.asarray(file.convert("RGB"))
    side, gap, line, left = 96, contact_sheet.GAP, contact_sheet.LINE, contact_sheet.MARGIN
    block = 3 * line + 3 * (side + gap)
    groups = (("train", 1, raw.train_images), ("test", 1, raw.test_images), ("train", 2, raw.train_images))
    for g, (which, flag, originals) in enumerate(groups):
        part = train if which == "train" else backdoor
        at = np.flatnonzero(part["flags"] == flag)
        at = [at[k * len(at) // 10] for k in range(10)]
        for column, i in enumerate(at):
            before, after = originals[part["indices"][i]].astype(int), part["images"][i].astype(int)
            assert (before != after).any()
            for r, image in enumerate((before, after, np.minimum(10 * abs(after - before), 255))):
                y, x = gap + g * block + 2 * line + r * (side + gap), left + column * (side + gap)
                cell = sheet[y : y + side, x : x + side]
                for dy in range(3):
                    assert np.array_equal(cell[dy::3, (2 * dy) % 3 :: 3], image)
    assert sheet.shape[0] < 3 * block + 2 * gap + 1
    assert len(np.unique(sheet[:, : left - gap])) > 1  # the rows have names


def test_a_sheet_of_large_images_fits_a_screen(tmp_path: Path) -> None:
    """Images of 224 pixels are not enlarged, with few per row; class names in any alphabet and of any length are allowed."""
    before = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), dtype=np.uint8)
    group = contact_sheet.Group("a title", "triggered", before, before, ["7: " + "鳥" * 90] * 6)
    contact_sheet.draw_contact_sheet(tmp_path / "sheet.png", [group])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 1400 and sheet.height < 900
        x, y = contact_sheet.MARGIN, contact_sheet.GAP + 2 * contact_sheet.LINE
        assert np.array_equal(np.asarray(sheet)[y : y + 224, x : x + 224], before[0])


# -- The folder --------------------------------------------------------------------------------------------------------


def test_an_existing_set_is_not_changed(tiny: Path, tmp_path: Path) -> None:
    """The same command again verifies the set and keeps it; with other settings, the error asks for another name."""
    out, _ = write(tiny, tmp_path / "set")
    before = contents(out)
    _, said = write(tiny, out, f"saved_dir={tmp_path}/elsewhere", "num_epochs=3", "global.epsilon=0.4")
    assert len(said) == 1 and "same settings" in said[0] and str(out) in said[0]
    others = ("backdoor.poison_ratio=0.2", "seed.seed=8", "data.train_limit=150", "backdoor.badnets.pattern=corner3x3")
    for other in (*others, "dataset.shapes.noise=1.0", "transform.pre.resize.size=16", "backdoor.poison_mode=exact"):
        refused(lambda other=other: write(tiny, out, other), f"--out {out}", "not empty", "another name")
    assert contents(out) == before
    (out / "train.npz").write_bytes(before["train.npz"][:-9])
    refused(lambda: write(tiny, out), "train.npz", "another name")


def draw_trigger(path: Path, level: int) -> None:
    """Write an image with one grey pixel, the rest black."""
    image = Image.new("RGB", (32, 32))
    image.putpixel((3, 3), (level, level, level))
    image.save(path)


def test_a_set_of_other_data_is_not_taken_for_the_same(tiny: Path, tmp_path: Path) -> None:
    """With equal settings a set is another one if an image of the data set or the trigger's file has other contents; data that
    moved are the same, and a set of an earlier version, which has no digest of its data, is verified by its settings."""
    rng = np.random.default_rng(0)
    tree, trigger = tmp_path / "tree", tmp_path / "trigger.png"
    for i in range(24):
        path = tree / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(1, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    draw_trigger(trigger, 255)
    attack = f"backdoor={{badnets: {{trigger_path: {trigger}}}, poison_ratio: 0.5, target_label: 1}}"
    options = ("dataset=folder", f"dataset_dir={tree}", "num_classes=2", "network.resnet18_cifar.num_classes=null", attack)
    out, _ = write(tiny, tmp_path / "set", *options)
    before = contents(out)
    shutil.copytree(tree, tmp_path / "moved")
    _, said = write(tiny, out, *options, f"dataset_dir={tmp_path / 'moved'}")
    assert "same settings" in said[-1]
    for path in (trigger, tree / "train/a/0.png"):
        kept = path.read_bytes()
        draw_trigger(path, 9)
        refused(lambda: write(tiny, out, *options), f"--out {out}", "same settings and data", "another name")
        path.write_bytes(kept)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(trigger)
    assert contents(out) == before
    with_keys(inputs=None)(out)
    assert "same settings" in write(tiny, out, *options)[1][-1]


def test_a_folder_with_other_contents_is_not_changed(tiny: Path, tmp_path: Path) -> None:
    """Nothing is written into a folder with other contents; an empty folder is used, and missing parents are created."""
    full, empty, plain = tmp_path / "full", tmp_path / "empty", tmp_path / "plain"
    for folder in (full, empty):
        folder.mkdir()
    (full / "letter.txt").write_text("dear")
    plain.write_text("a file")
    refused(lambda: write(tiny, full), f"--out {full}", "not empty", "another name")
    refused(lambda: write(tiny, plain), f"--out {plain}", "another name")
    refused(lambda: write(tiny, plain / "below"), "plain")
    assert contents(full) == {"letter.txt": b"dear"}
    assert contents(write(tiny, empty)[0]) == contents(write(tiny, tmp_path / "no" / "such" / "folder")[0])


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack may train networks for hours: where its set cannot be written is found out before."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "make", None)
    with pytest.raises(UserError, match=r"--out .*/file/set: cannot be written"):
        export.export(config.load(tiny), tmp_path / "file" / "set", torch.device("cpu"))


def test_a_set_is_written_whole_or_not_at_all(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted export leaves no files and can be repeated; leftovers of a killed one are removed."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "draw_contact_sheet", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tiny, tmp_path / "sets" / "one")
    assert list((tmp_path / "sets").iterdir()) == []
    killed = tmp_path / "sets" / f".one.{files.boot()}-0123456789ab.part"
    killed.mkdir()
    (killed / "train.npz").write_bytes(b"half")
    write(tiny, tmp_path / "sets" / "one")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["one"]


# -- Training on a set ---------------------------------------------------------------------------------------------------


def train(plan: Config, yaml_path: Path) -> dict[str, Any]:
    """Train in this process; return the last checkpoint."""
    run = train_here(plan, yaml_path, "False")
    loaded: dict[str, Any] = torch.load(run.checkpoints / "latest_model.pt", weights_only=True)
    loaded["index"] = torch.from_numpy(np.load(run.saved / "poison_idx.npy"))
    loaded["lines"] = (run.log / "asd.log").read_text()
    loaded["plots"] = {path.name for path in run.log.glob("*.png")}
    return loaded


@pytest.mark.parametrize(
    ("attack", "defense"), [("badnets", "asd"), ("wanet", "asd"), ("tinted_inside", "asd"), ("tinted", "none")]
)
def test_a_set_trains_bit_for_bit_as_its_yaml_does(tiny: Path, tmp_path: Path, toys: None, attack: str, defense: str) -> None:
    """Losses, pools, ACC, ASR and weights of a run on the exported set equal those of a run that poisons the data itself."""
    path, short = plan(tiny, attack), ("num_epochs=3", "global.epoch_first=1", "global.epoch_second=2")
    out, _ = write(path, tmp_path / "set")
    one = train(config.load(path, [*short, f"defense={defense}"]), path)
    two = train(stored(tiny, out, *short, f"defense={defense}"), tmp_path / "on_set.yaml")
    for state in (one, two):
        for row in state["history"]:
            del row["seconds"]
    assert one["history"] == two["history"] and len(one["history"]) == 3
    assert torch.equal(one["clean_pool"], two["clean_pool"]) and torch.equal(one["index"], two["index"])
    assert torch.equal(one["epochs_in_clean_pool"], two["epochs_in_clean_pool"])
    for name, tensor in one["model_state_dict"].items():
        assert torch.equal(tensor, two["model_state_dict"][name]), name
    assert one["plots"] == two["plots"] and "triggered.png" in one["plots"]
    assert f"attack {attack}, target class 3" in two["lines"]

    flags = torch.from_numpy(arrays(out, "train.npz")["flags"])
    counts = torch.bincount(flags, minlength=3).tolist()
    cover = f", {counts[2]} cover)" if counts[2] else ")"
    for state in (one, two):
        assert f"training images 200 ({counts[1]} poisoned{cover}, test images 43" in state["lines"]
    last = one["history"][-1]
    assert ("cover_in_clean_pool" in last) == (attack != "badnets")
    if defense == "asd":
        inside = flags[one["clean_pool"]].tolist()
        assert last["poisoned_in_clean_pool"] == inside.count(1)
        assert last.get("cover_in_clean_pool", 0) == inside.count(2)
        expected = f"clean pool 100 ({inside.count(1)} poisoned" + (f", {inside.count(2)} cover)" if counts[2] else ")")
        assert expected in one["lines"]


def test_test_py_has_the_same_test_sets(tiny: Path, tmp_path: Path, toys: None) -> None:
    """From the folder a checkpoint is tested on the same images and labels as from the YAML, and no run folder is written."""
    path = plan(tiny, "tinted")
    out, _ = write(path, tmp_path / "set")
    one, two = prepare_tests(config.load(path))[0], prepare_tests(stored(tiny, out))[0]
    assert one.backdoor is not None and two.backdoor is not None
    for a, b in ((one.clean, two.clean), (one.backdoor, two.backdoor)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not (tmp_path / "saved_data" / "on_set").exists()


def test_limits_apply_to_a_set_as_to_raw_data(tiny: Path, tmp_path: Path) -> None:
    """`data.train_limit` and `data.test_limit` keep the images that come from the first raw images, in all three parts."""
    out, _ = write(tiny, tmp_path / "set")
    limits = ("data.train_limit=120", "data.test_limit=21")
    one = prepare(config.load(tiny, limits), tmp_path / "one")
    two = prepare(stored(tiny, out, *limits), tmp_path / "two")
    assert (len(two.train), len(two.tests.clean)) == (120, 21)
    assert one.tests.backdoor is not None and two.tests.backdoor is not None
    assert torch.equal(one.train.images, two.train.images) and torch.equal(one.train.labels, two.train.labels)
    assert one.ground_truth is not None and two.ground_truth is not None
    assert torch.equal(one.ground_truth.flags, two.ground_truth.flags)
    assert torch.equal(one.tests.backdoor.images, two.tests.backdoor.images)


def test_the_examples_of_a_run_have_a_caption(tiny: Path, tmp_path: Path, toys: None) -> None:
    """The caption of the triggered examples states whether they are relabeled, of the target class, or test images."""
    captions = {
        attack: prepare(config.load(plan(tiny, attack)), tmp_path / attack).caption for attack in ("tinted", "tinted_inside")
    }
    assert captions["tinted"] == "tinted: poisoned training images, labeled 3 (frame)"
    assert captions["tinted_inside"] == "tinted_inside: poisoned training images of class 3 (frame), their labels unchanged"
    out, _ = write(plan(tiny, "tinted"), tmp_path / "set")
    data = prepare(stored(tiny, out), tmp_path / "run")
    assert data.caption == "tinted: triggered test images, labeled 3 (frame)"
    raw, backdoor = shapes.load(shapes.Settings(200, 43), None, False), arrays(out, "backdoor_test.npz")
    for k in range(data.examples.shape[1]):
        assert np.array_equal(data.examples[0, k], raw.test_images[backdoor["indices"][k]])
        assert np.array_equal(data.examples[1, k], backdoor["images"][k])


def test_a_run_can_be_resumed_with_the_same_set_only(tiny: Path, tmp_path: Path) -> None:
    """A run saves set.json and poison_idx.npy, accepts the same set in any folder, and refuses another set."""
    first, second = (write(tiny, tmp_path / name, o)[0] for name, o in (("a", "run=a"), ("b", "backdoor.poison_ratio=0.2")))
    run = tmp_path / "run"
    prepare(stored(tiny, first), run)
    before = contents(run)
    assert before["set.json"] == (first / "set.json").read_bytes()
    flags = arrays(first, "train.npz")["flags"]
    assert np.load(run / "poison_idx.npy").tolist() == [float(flag == 1) for flag in flags]
    shutil.copytree(first, tmp_path / "copy")
    prepare(stored(tiny, tmp_path / "copy"), run)
    refused(lambda: prepare(stored(tiny, second), run), str(second), "--set run=NAME", "--resume False")
    prepare(config.load(tiny), tmp_path / "raw")
    refused(lambda: prepare(stored(tiny, first), tmp_path / "raw"), "begun with other data")
    assert contents(run) == before and "set.json" not in contents(tmp_path / "raw")


# -- Invalid sets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid set, which tests copy and never change."""
    folder = tmp_path_factory.mktemp("good")
    raw = TINY | {"dataset": {"shapes": {"train_size": 40, "test_size": 20}}, "saved_dir": str(folder / "saved")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return write(folder / "tiny.yaml", folder / "set")[0]


def reseal(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change arrays and write checksums and counts to match, as a forger would."""
    held = arrays(folder, name)
    change(held)
    np.savez(folder / name, **held)  # type: ignore[arg-type]
    described = json.loads((folder / "set.json").read_text())
    for key, array in held.items():
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        described["files"][name][key] = {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}
    kinds = np.bincount(held["flags"], minlength=3)[:3].tolist()
    described["counts"][name.removesuffix(".npz")] = dict(zip(("clean", "poisoned", "cover"), kinds, strict=True))
    (folder / "set.json").write_text(json.dumps(described))


def with_keys(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes keys of set.json; None removes one."""

    def damage(folder: Path) -> None:
        contents = json.loads((folder / "set.json").read_text())
        for key, value in changes.items():
            contents.pop(key)
            if value is not None:
                contents[key] = value
        (folder / "set.json").write_text(json.dumps(contents))

    return damage


def add(folder: Path, **more: Any) -> None:
    """Add keys to set.json."""
    path = folder / "set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def entry(name: str, key: str, at: Any, value: Any) -> Callable[[Path], None]:
    """Return a function that sets an entry of an array and updates the checksums."""

    def change(held: dict[str, np.ndarray]) -> None:
        held[key][at] = value

    return lambda folder: reseal(folder, name, change)


def whole(name: str, key: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Return a function that replaces an array and updates the checksums."""
    return lambda folder: reseal(folder, name, lambda held: held.update({key: make(held[key])}))


def unsealed(name: str, key: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Return a function that replaces an array without changing set.json."""

    def damage(folder: Path) -> None:
        held = arrays(folder, name)
        np.savez(folder / name, **(held | {key: make(held[key])}))  # type: ignore[arg-type]

    return damage


def swap(folder: Path) -> None:
    """Replace the backdoor test set by the clean test set."""
    shutil.copy(folder / "clean_test.npz", folder / "backdoor_test.npz")


def append(path: Path) -> None:
    """Add a member that is not an array."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", b"hello")


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    **{f"no {name}": (lambda folder, n=name: (folder / n).unlink(), (name, "no such file")) for name in (*FILES, "set.json")},
    "a pixel": (unsealed("train.npz", "images", lambda a: a ^ np.uint8(1)), ("train.npz", "images", "SHA-256")),
    "a label": (unsealed("clean_test.npz", "labels", lambda a: (a + 1) % 10), ("clean_test.npz", "labels", "SHA-256")),
    "a flag": (unsealed("train.npz", "flags", lambda a: 0 * a), ("train.npz", "flags", "SHA-256")),
    "another shape": (unsealed("train.npz", "images", lambda a: a.reshape(-1, 16, 64, 3)), ("train.npz", "shape")),
    "another type": (unsealed("train.npz", "flags", lambda a: a.astype(np.int8)), ("train.npz", "flags is int8")),
    "files swapped": (swap, ("backdoor_test.npz", "SHA-256")),
    "empty file": (lambda folder: (folder / "train.npz").write_bytes(b""), ("train.npz", "not a file of arrays")),
    "text": (lambda folder: (folder / "train.npz").write_text("hello"), ("train.npz", "not a file of arrays")),
    "a lone array": (lambda folder: np.save((folder / "train.npz").open("wb"), np.ones(3)), ("train.npz", "not a file of")),
    "objects": (unsealed("train.npz", "flags", lambda a: a.astype(object)), ("train.npz", "not a file of arrays")),
    "one array more": (unsealed("train.npz", "images", lambda a: a), ()),  # replaced below
    "no JSON": (lambda folder: (folder / "set.json").write_text("{"), ("set.json", "JSON")),
    "no object": (lambda folder: (folder / "set.json").write_text("[1]"), ("set.json", "does not describe a poisoned set")),
    "deep": (lambda folder: (folder / "set.json").write_text("[" * 99999), ("set.json", "JSON")),
    "bytes": (lambda folder: (folder / "set.json").write_bytes(b"\xff\xfe"), ("set.json", "JSON")),
    "no class": (with_keys(class_names=[]), ("set.json", "class_names")),
    "numbers for classes": (with_keys(class_names=[*range(10)]), ("set.json", "class_names")),
    "an empty name": (with_keys(class_names=["", *map(str, range(9))]), ("set.json", "class_names")),
    "one name twice": (with_keys(class_names=["x\ud800"] * 10), ("set.json", "class_names", "occurs twice")),
    "no data set": (with_keys(dataset={}), ("set.json", "dataset")),
    "two data sets": (with_keys(dataset={"shapes": {}, "folder": {}}), ("set.json", "dataset")),
    "too many classes": (with_keys(num_classes=10**30), ("set.json", "num_classes")),
    "a target that is no class": (
        with_keys(backdoor={"a": {}, "poison_ratio": 0.1, "target_label": 10, "target_shift": None, "poison_mode": "exact"}),
        ("set.json", "target_label", "0..9"),
    ),
    "a shift of nothing": (
        with_keys(backdoor={"a": {}, "poison_ratio": 0.1, "target_label": None, "target_shift": 0, "poison_mode": "exact"}),
        ("set.json", "target_shift", "1..9"),
    ),
    "a text for a number of images": (lambda folder: add(folder, left_out="x"), ("set.json", "left_out")),
    "another format": (with_keys(format="a cake"), ("set.json", "does not describe a poisoned set")),
    "a later version": (with_keys(version=3), ("set.json", "version 3")),
    "no seed": (with_keys(seed=None), ("set.json", "seed", "missing")),
    "a text for a number": (with_keys(num_classes="ten"), ("set.json", "num_classes", "wrong type")),
    "no attack": (
        with_keys(backdoor={"poison_ratio": 0.1, "target_label": 3, "poison_mode": "exact"}),
        ("set.json", "one attack"),
    ),
    "wrong counts": (with_keys(counts={}), ("set.json", "counts")),
    "no files": (with_keys(files={}), ("train.npz", "must describe")),
    "a text for a limit": (with_keys(data={"train_limit": "x"}), ("set.json", "data", "number of images")),
    "another limit": (with_keys(data={"train_limit": None, "valid_limit": 3}), ("set.json", "data", "only train_limit")),
    "a text for a file": (with_keys(files=dict.fromkeys(FILES, "x")), ("train.npz", "must describe")),
    "bytes for an array": (lambda folder: append(folder / "train.npz"), ("train.npz", "not a file of arrays", "'more'")),
    "files of nothing": (with_keys(files={"train.npz": dict.fromkeys(ARRAYS)}), ("train.npz", "SHA-256")),
    "few classes": (with_keys(num_classes=9), ("labels", "there are 9 classes")),
    "another target": (
        with_keys(backdoor={"a": {}, "poison_ratio": 0.1, "target_label": 2, "target_shift": None, "poison_mode": "exact"}),
        ("train.npz", "do not carry class 2"),
    ),
    "forged flag": (entry("train.npz", "flags", 0, 7), ("train.npz", "flags", "2 cover")),
    "forged label": (entry("train.npz", "labels", 1, 99), ("train.npz", "labels", "classes")),
    "a negative label": (entry("train.npz", "original_labels", 1, -1), ("train.npz", "labels", "classes")),
    "relabeled though clean": (whole("clean_test.npz", "labels", lambda a: (a + 1) % 10), ("clean_test.npz", "labels")),
    "poisoned clean test": (
        lambda folder: [entry("clean_test.npz", key, 0, v)(folder) for key, v in (("flags", 1), ("labels", 3))],
        ("clean_test.npz", "not clean"),
    ),
    "target in the backdoor test set": (
        entry("backdoor_test.npz", "original_labels", 0, 3),
        ("backdoor_test.npz", "target class"),
    ),
    "a clean image in the backdoor test set": (
        lambda folder: [entry("backdoor_test.npz", key, 0, v)(folder) for key, v in (("flags", 0), ("original_labels", 3))],
        ("backdoor_test.npz", "without the trigger"),
    ),
    "indices fall": (whole("train.npz", "indices", lambda a: a[::-1]), ("train.npz", "indices", "ascend")),
    "a negative index": (entry("train.npz", "indices", 0, -1), ("train.npz", "indices", "ascend")),
    "original classes exchanged": (
        whole("backdoor_test.npz", "original_labels", lambda a: np.where(a == 0, 1, np.where(a == 1, 0, a))),
        ("backdoor_test.npz", "original_labels", "clean_test.npz"),
    ),
    "an unknown test image": (entry("backdoor_test.npz", "indices", -1, 99), ("backdoor_test.npz", "not in clean_test.npz")),
    "fewer labels": (whole("train.npz", "labels", lambda a: a[:-1]), ("train.npz", "one entry for each")),
    "grey": (whole("train.npz", "images", lambda a: a[..., 0]), ("train.npz", "(n, H, W, 3)")),
    "two sizes": (whole("clean_test.npz", "images", lambda a: a[:, :16]), ("images", "one size")),
    "a number for a list": (whole("train.npz", "images", lambda a: a[0, 0, 0, 0]), ("train.npz", "(n, H, W, 3)")),
}


def one_more(folder: Path) -> None:
    """Add an array that the format does not have."""
    np.savez(folder / "train.npz", **arrays(folder, "train.npz"), more=np.zeros(3))  # type: ignore[arg-type]


DAMAGES["one array more"] = one_more, ("train.npz", "more")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_forged_set_is_refused(good: Path, tmp_path: Path, damage: str) -> None:
    """Missing, damaged, forged or other files are one line with the file, the reason and the remedy."""
    folder = tmp_path / "set"
    shutil.copytree(good, folder)
    do, parts = DAMAGES[damage]
    do(folder)
    refused(lambda: read_set(folder), str(folder), "data.poison", *parts)


@settings(deadline=None, max_examples=120)
@given(name=st.sampled_from(FILES), at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_no_changed_byte_goes_unnoticed(
    good: Path, name: str, at: float, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whichever byte of an array file is changed, the set is refused in one line, or its arrays are unchanged."""
    folder = tmp_path_factory.getbasetemp() / "changed"
    if not folder.exists():
        shutil.copytree(good, folder)
    content = bytearray((good / name).read_bytes())
    content[int(at * len(content))] = value
    (folder / name).write_bytes(content)
    try:
        read_set(folder)
    except UserError as error:
        assert str(folder / name) in str(error) and "\n" not in str(error)
    else:
        before, after = arrays(good, name), arrays(folder, name)
        assert all(np.array_equal(before[key], after[key]) for key in ARRAYS)
    finally:
        shutil.copy(good / name, folder / name)


@pytest.mark.parametrize("odd", ["a\u200cb", "\u6771\u3000\u4eac", "a\tb", "caf\u00e9\n"])
def test_a_set_with_unusual_class_names_is_read_again(good: Path, tmp_path: Path, odd: str) -> None:
    """Names of class folders may have characters that are not printed, as joiners in Persian or wide spaces."""
    folder = tmp_path / "set"
    shutil.copytree(good, folder)
    with_keys(class_names=[odd, *map(str, range(1, 10))])(folder)
    assert read_set(folder).class_names[0] == odd


def test_a_smaller_limit_of_the_set_is_kept(tiny: Path, tmp_path: Path) -> None:
    """A set of the first 50 images that is converted with a limit of 100 still has 50, and says so."""
    first, _ = write(tiny, tmp_path / "first", "data.train_limit=50")
    on = ("dataset={poisoned_set: {}}", f"dataset_dir={first}", "backdoor=null")
    for limit, expected in ((100, 50), (30, 30)):
        out, _ = write(tiny, tmp_path / f"to{limit}", *on, f"data.train_limit={limit}")
        described = json.loads((out / "set.json").read_text())
        assert described["data"]["train_limit"] == expected
        assert sum(described["counts"]["train"].values()) == expected


class Bait:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_malicious_set_runs_no_code(good: Path, tmp_path: Path) -> None:
    """A file with a pickle inside is refused, and the code in it does not run."""
    folder, trace = tmp_path / "set", tmp_path / "code ran"
    shutil.copytree(good, folder)
    bait = np.empty(1, object)
    bait[0] = Bait(trace)
    np.savez(folder / "train.npz", **(arrays(good, "train.npz") | {"images": bait}))  # type: ignore[arg-type]
    refused(lambda: read_set(folder), "train.npz")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("backdoor={badnets: {}, poison_ratio: 0.2, target_label: 3}", ("backdoor.poison_ratio: 0.2", "has 0.1")),
        ("backdoor={badnets: {}, poison_ratio: 0.1, target_label: 2}", ("backdoor.target_label: 2", "has 3")),
        ("backdoor={badnets: {}, poison_ratio: 0.1, poison_mode: exact}", ("backdoor.poison_mode: exact", "has bernoulli")),
        ("backdoor={badnets: {pattern: corner3x3}, poison_ratio: 0.1}", ("backdoor.badnets.pattern: corner3x3", "has None")),
        ("num_classes=11", ("num_classes: 11", "has 10", "leave the key out")),
        ("transform.pre.resize.size=16", ("transform.pre: resize", "none")),
    ],
)
def test_a_yaml_that_contradicts_the_set_is_refused(tiny: Path, good: Path, override: str, parts: tuple[str, ...]) -> None:
    """If the YAML and set.json differ, one line names the key, both values, the file and the remedy."""
    refused(lambda: prepare(stored(tiny, good, override), tiny.parent / "run"), *parts, str(good / "set.json"))


def test_another_attack_in_the_yaml_is_refused(tiny: Path, good: Path, toys: None) -> None:
    """A set of BadNets cannot be used as one of another attack; naming the same attack and settings is allowed."""
    other = stored(tiny, good, "backdoor={tinted: {}, poison_ratio: 0.1}")
    refused(lambda: prepare(other, tiny.parent / "run"), "tinted", "poisoned by badnets", "backdoor: null")
    prepare(stored(tiny, good, "backdoor={badnets: {}, poison_ratio: 0.1}"), tiny.parent / "run")


def test_the_same_pre_transform_is_not_applied_again(tiny: Path, tmp_path: Path) -> None:
    """A set made with a pre-transform is used unchanged, whether the YAML names the same pre-transform or none."""
    out, _ = write(tiny, tmp_path / "set", "transform.pre.resize.size=16")
    for n, override in enumerate((["transform.pre.resize.size=16"], [])):
        data = prepare(stored(tiny, out, *override), tmp_path / str(n))
        assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), arrays(out, "train.npz")["images"])
    wrong = stored(tiny, out, "transform.pre.resize.size=8")
    refused(lambda: prepare(wrong, tmp_path / "run"), "transform.pre: resize", "16")


def test_errors_about_poisoned_sets(tiny: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poisoned set is not poisoned again, must be named as such, and must exist; without an attack nothing is exported."""
    refused(lambda: loading.load_raw(stored(tiny, good)), "poisoned already")
    refused(lambda: write(tmp_path / "on_set.yaml", tmp_path / "new", "backdoor={badnets: {}, poison_ratio: 0.1}"), "already")
    refused(lambda: prepare(stored(tiny, good, "dataset_dir=null"), tmp_path), "dataset_dir", "missing")
    refused(lambda: prepare(stored(tiny, tmp_path / "nowhere"), tmp_path), "nowhere", "set.json", "no such file")
    unnamed = config.load(tiny, ["dataset=null", f"dataset_dir={good}"])
    refused(lambda: prepare(unnamed, tmp_path), "add `dataset: poisoned_set`")
    options = [
        "poison",
        "--config",
        str(tiny),
        "--out",
        str(tmp_path / "new"),
        "--set",
        "backdoor=null",
        "--set",
        "defense=none",
    ]
    monkeypatch.setattr(sys, "argv", options)
    refused(lambda: poison.main(no_network), "backdoor", "no attack")
    assert not (tmp_path / "new").exists()


def test_a_set_is_copied_as_it_is(tiny: Path, good: Path, tmp_path: Path) -> None:
    """Without an attack in the YAML a stored set is written again with equal arrays and settings; limits cut it."""
    export.export(stored(tiny, good), tmp_path / "copy", torch.device("cpu"))
    for name in FILES:
        one, two = arrays(good, name), arrays(tmp_path / "copy", name)
        assert all(np.array_equal(one[key], two[key]) for key in ARRAYS)
    assert json.loads((good / "set.json").read_text()) == json.loads((tmp_path / "copy" / "set.json").read_text())
    export.export(stored(tiny, good, "data.train_limit=25"), tmp_path / "part", torch.device("cpu"))
    said = json.loads((tmp_path / "part" / "set.json").read_text())
    assert said["data"] == {"train_limit": 25, "test_limit": None} and "inputs" not in said
    assert np.array_equal(arrays(tmp_path / "part", "train.npz")["images"], arrays(good, "train.npz")["images"][:25])


def test_a_set_of_version_1_is_copied_into_one_of_this_version(tiny: Path, good: Path, tmp_path: Path) -> None:
    """A set from before all-to-all labels is read, and written again as a set that is read."""
    shutil.copytree(good, tmp_path / "old")
    described = json.loads((good / "set.json").read_text())
    described.pop("inputs")
    described["backdoor"].pop("target_shift")
    (tmp_path / "old" / "set.json").write_text(json.dumps(described | {"version": 1}))
    export.export(stored(tiny, tmp_path / "old"), tmp_path / "new", torch.device("cpu"))
    old, new = read_set(tmp_path / "old"), read_set(tmp_path / "new")
    assert new.backdoor == old.backdoor and new.backdoor.target_shift is None
    assert json.loads(new.description)["backdoor"] == json.loads((good / "set.json").read_text())["backdoor"]


def test_the_commands_work_together(tiny: Path, tmp_path: Path) -> None:
    """A set that `python -m data.poison` writes works with ASD.py and test.py; a damaged set is one line."""
    out = tmp_path / "set"
    command = [sys.executable, "-m", "data.poison", "--config", str(tiny), "--gpu", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [*command, *map(str, arguments)]
        return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)

    result = call("--out", out)
    assert result.returncode == 0 and str(out) in result.stdout, result.stderr
    options = ("--config", tiny, "--gpu", "cpu", "--set", "dataset=poisoned_set", "--set", f"dataset_dir={out}")
    options = (*options, "--set", "backdoor=null", "--set", "num_epochs=1", "--set", "semi.mixmatch.train_iteration=1")
    for script in ("ASD.py", "test.py"):
        result = run_script(script, *options)
        assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "saved_data" / "tiny" / "log" / "test.json").read_text())
    (row,) = (tmp_path / "saved_data" / "tiny" / "log" / "metrics.jsonl").read_text().splitlines()
    assert kept["attack_success_rate"] == json.loads(row)["attack_success_rate"] and kept["backdoor_total"] == 39
    content = bytearray((out / "backdoor_test.npz").read_bytes())
    content[5000] ^= 1
    (out / "backdoor_test.npz").write_bytes(content)
    for result in (run_script("ASD.py", *options), call("--out", out)):
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert "backdoor_test.npz" in result.stderr
