"""Records of BackdoorBench: read over the clean data set, written from a poisoned set, refused where they do not fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import REPOSITORY, TINY, logged, run_script
from PIL import Image
from training import train_here

from data import poison
from data.datasets import shapes
from data.io import unpickle
from data.loading import load_raw
from data.poisoned_sets import export, record_pickle, record_read
from data.poisoned_sets.folder import read_set, write_set
from data.poisoned_sets.record_write import write_record
from data.sets import PoisonedData, no_network
from data.sources import prepare
from model.exchange import exchanged_weights
from utils import config
from utils.config import Config
from utils.config.schema import as_dict
from utils.errors import UserError

MODEL = ("preactresnet18", {"conv1.weight": torch.arange(6.0).view(2, 3), "linear.bias": torch.zeros(2)})
EIGHT = {"model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test"}
CLEAN = {"shapes": {"train_size": 300, "test_size": 43}}  # two blocks of 128 and one of 44
RAW = shapes.load(shapes.Settings(300, 43), None, False)


def load(folder: Path, name: str, *overrides: str, **changes: Any) -> Config:
    """The tiny configuration with other keys."""
    raw = TINY | {"dataset": CLEAN, "saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage")} | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load(path, overrides)


def on(folder: Path, record: Path, *overrides: str, **settings: Any) -> Config:
    """The tiny configuration on a record."""
    chosen = {"record": str(record), "attack": "badnet", "clean": CLEAN} | settings
    return load(folder, "on_record", *overrides, dataset={"backdoorbench_record": chosen}, backdoor=None)


def write(folder: Path, out: Path, attack: dict[str, Any], *overrides: str) -> Config:
    """Write the record of an attack; return the configuration."""
    settings = load(folder, "attack", *overrides, backdoor={"poison_ratio": 0.2, **attack})
    export.export(settings, out, torch.device("cpu"), write=lambda out, made: write_record(out, made, MODEL))
    return settings


def assert_same(one: PoisonedData, other: PoisonedData) -> None:
    """Compare images, labels and ground truth of all three parts."""
    assert torch.equal(one.train.images, other.train.images) and torch.equal(one.train.labels, other.train.labels)
    assert one.ground_truth is not None and other.ground_truth is not None
    assert torch.equal(one.ground_truth.flags, other.ground_truth.flags)
    assert torch.equal(one.ground_truth.original_labels, other.ground_truth.original_labels)
    assert one.tests.clean is not None and other.tests.clean is not None
    assert one.tests.backdoor is not None and other.tests.backdoor is not None
    assert one.tests.origin is not None and other.tests.origin is not None
    assert torch.equal(one.tests.clean.images, other.tests.clean.images)
    assert torch.equal(one.tests.backdoor.images, other.tests.backdoor.images)
    assert torch.equal(one.tests.backdoor.labels, other.tests.backdoor.labels)
    assert torch.equal(one.tests.origin, other.tests.origin)


def refused(work: Callable[[], object], *parts: object) -> None:
    """The error of `work` is one printable line that has all the parts."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 700
    for part in parts:
        assert str(part) in line, line


# -- Written -----------------------------------------------------------------------------------------------------------

ATTACKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "badnets": ({"target_label": 3, "badnets": {}}, {}),
    "cover images": ({"target_label": 2, "wanet": {"cover_ratio": 1.0}}, {"attack": "wanet", "unchanged": "cover"}),
    "all-to-all": ({"target_shift": 1, "badnets": {}}, {}),
    "clean-label": ({"target_label": 4, "sig": {}}, {"attack": "sig"}),
}


@pytest.mark.parametrize("which", ATTACKS)
def test_what_was_written_is_read_again(tmp_path: Path, which: str) -> None:
    """Images, labels, ground truth and test sets of a run on the record equal those of the run that poisons by itself."""
    attack, told = ATTACKS[which]
    made = prepare(write(tmp_path, tmp_path / "record/mine", attack), tmp_path / "one")
    read = prepare(on(tmp_path, tmp_path / "record/mine", **told), tmp_path / "two")
    assert_same(made, read)
    assert made.ground_truth is not None and read.backdoor is not None
    poisoned = int(made.ground_truth.poisoned().sum())
    assert poisoned > 0 and (made.ground_truth.flags == 2).any() == (which == "cover images")
    among = 300 if which != "clean-label" else (RAW.train_labels == 4).sum()
    assert read.backdoor.poison_ratio == pytest.approx(poisoned / among) and read.backdoor.poison_mode == "exact"
    assert read.backdoor.attack.name == told.get("attack", "badnet")
    assert (read.backdoor.target_label, read.backdoor.target_shift) == (attack.get("target_label"), attack.get("target_shift"))


def test_cover_images_that_are_not_in_blocks_are_noticed(tmp_path: Path) -> None:
    """A record written here has its cover images anywhere: read as one of BackdoorBench's own, it is refused with the remedy,
    instead of taking cover images of the target class for poisoned ones."""
    write(tmp_path, tmp_path / "record/mine", {"target_label": 3, "wanet": {"cover_ratio": 2.0}})
    read = on(tmp_path, tmp_path / "record/mine", attack="wanet")
    refused(lambda: prepare(read, tmp_path / "run"), "keeps its label", "set unchanged: cover")


def test_a_set_from_which_images_were_left_out_is_no_record(tmp_path: Path) -> None:
    """All later images would have other places than in BackdoorBench's copy of the data set."""
    settings = load(tmp_path, "attack", backdoor={"poison_ratio": 0.2, "badnets": {}, "target_label": 3})
    made = replace(export.make(settings, torch.device("cpu"), no_network), left_out=2)
    refused(lambda: write_record(tmp_path / "record/mine", made, MODEL), "2 images cannot be read", "repair them")
    assert not (tmp_path / "record").exists()


def test_a_converted_set_remembers_what_was_left_out(tmp_path: Path) -> None:
    """Nor is a record made of it through an exported set, in which the indices have shifted already."""
    settings = load(tmp_path, "attack", backdoor={"poison_ratio": 0.2, "badnets": {}, "target_label": 3})
    raw = replace(load_raw(settings), left_out=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_raw", lambda _: raw)
        made = export.make(settings, torch.device("cpu"), no_network)
    write_set(tmp_path / "set", made.parts, made.settings, lambda path: path.write_bytes(b""))
    on_set = {"dataset": "poisoned_set", "dataset_dir": str(tmp_path / "set"), "backdoor": None}
    converted = export.convert(load(tmp_path, "attack", **on_set))
    refused(lambda: write_record(tmp_path / "record/mine", converted, MODEL), "2 images cannot be read", "repair them")


def test_the_record_is_what_backdoorbench_loads(tmp_path: Path) -> None:
    """torch.load gives all eight keys with BackdoorBench's types; relative to its folder each path is a PNG of the altered
    image under its original label, and no clean image is there."""
    attack, _ = ATTACKS["cover images"]
    data = prepare(write(tmp_path, tmp_path / "record/mine", attack), tmp_path / "run")
    told = torch.load(tmp_path / "record/mine/attack_result.pt", weights_only=False)
    assert set(told) == EIGHT
    assert (told["model_name"], told["num_classes"], told["img_size"]) == ("preactresnet18", 10, (32, 32, 3))
    assert (told["clean_data"], told["data_path"]) == ("shapes", "./data/shapes")
    assert all(torch.equal(tensor, told["model"][name]) for name, tensor in MODEL[1].items())
    assert data.ground_truth is not None and data.tests.backdoor is not None and data.tests.origin is not None
    flags, original = data.ground_truth.flags.numpy(), data.ground_truth.original_labels.numpy()
    train, test = told["bd_train"], told["bd_test"]
    origin = data.tests.origin.numpy()
    for part, altered, count in ((train, np.flatnonzero(flags), 300), (test, origin, 43)):
        assert (part["getitem_all"], part["getitem_all_switch"]) == (True, False)
        container = part["bd_data_container"]
        assert list(container["data_dict"]) == altered.tolist() and container["save_file_format"] == ".png"
        assert part["save_folder_path"] == container["save_folder_path"]
        indicator = part["poison_indicator"]
        assert indicator.dtype == np.float64 and indicator.tolist() == [float(i in altered) for i in range(count)]
    assert train["original_index_array"].tolist() == list(range(300))
    assert test["original_index_array"].tolist() == origin.tolist()
    files = set()
    for part, images, labels in (
        (train, {i: data.train.images[i] for i in range(300)}, {i: int(data.train.labels[i]) for i in range(300)}),
        (test, dict(zip(origin, data.tests.backdoor.images, strict=True)), dict.fromkeys(origin, 2)),
    ):
        for i, item in part["bd_data_container"]["data_dict"].items():
            truth = original[i] if part is train else RAW.test_labels[i]
            assert item["other_info"] == [labels[i], truth] and all(type(x) is int for x in (i, *item["other_info"]))
            assert item["path"].startswith("./record/mine/bd_") and item["path"].endswith(f"/{truth}/{i}.png")
            files.add(tmp_path / item["path"])
            with Image.open(tmp_path / item["path"]) as picture:
                assert (picture.format, picture.mode) == ("PNG", "RGB")
                assert np.array_equal(np.asarray(picture), images[i].permute(1, 2, 0))
    assert {path for path in tmp_path.glob("record/mine/**/*") if path.is_file()} == {
        *files,
        tmp_path / "record/mine/attack_result.pt",
    }


def test_old_numpy_can_read_the_pickle(tmp_path: Path) -> None:
    """The pickle is of protocol 2 and names nothing of numpy but `numpy.array`, which every version has."""
    write(tmp_path, tmp_path / "mine", ATTACKS["badnets"][0])
    contents = record_pickle.read_member(tmp_path / "mine/attack_result.pt")
    assert contents[:2] == b"\x80\x02"
    names = [line for line in contents.split(b"\n") if b"numpy" in line]
    assert len(names) == 1 and names[0].endswith(b"cnumpy")


def test_where_a_record_cannot_be_written(tmp_path: Path) -> None:
    """A folder that is not empty is left alone, and a part of a data set makes no record, whose indices count the whole."""
    out = tmp_path / "full"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    refused(lambda: write(tmp_path, out, ATTACKS["badnets"][0]), f"--out {out}", "not empty")
    refused(lambda: write(tmp_path, tmp_path / "new", ATTACKS["badnets"][0], "data.train_limit=200"), "data.train_limit: 200")
    assert [path.name for path in out.iterdir()] == ["letter.txt"] and not (tmp_path / "new").exists()


def test_weights_fit_the_networks_of_backdoorbench(tmp_path: Path) -> None:
    """The names and their order are those of torchvision's ResNet-18 and of a pre-activation one without a last BN."""
    changes = {"backdoor": {"badnets": {}}}
    name, weights = exchanged_weights(load(tmp_path, "a", "network={resnet18: {}}", **changes), None)
    theirs = torchvision.models.resnet18(num_classes=10)
    assert name == "resnet18" and list(weights) == list(theirs.state_dict())
    theirs.load_state_dict(weights)
    plain = load(tmp_path, "b", "network={preact_resnet18: {final_norm: false}}", **changes)
    name, weights = exchanged_weights(plain, None)
    norm = [f"{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    expected = ["conv1.weight"]
    for block in (f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)):
        expected += [f"{block}.bn1.{key}" for key in norm] + [f"{block}.conv1.weight"]
        expected += [f"{block}.bn2.{key}" for key in norm] + [f"{block}.conv2.weight"]
        expected += [f"{block}.shortcut.0.weight"] if block in ("layer2.0", "layer3.0", "layer4.0") else []
    assert name == "preactresnet18" and list(weights) == [*expected, "linear.weight", "linear.bias"] and len(weights) == 102
    for other in ("{resnet18_cifar: {}}", "{preact_resnet18: {}}", "{resnet18: {blocks: [1, 1, 1, 1]}}"):
        found = load(tmp_path, "c", f"network={other}", **changes)
        refused(lambda found=found: exchanged_weights(found, None), "network", "final_norm: false")
    refused(lambda: exchanged_weights(plain, str(tmp_path / "none.pt")), "--weights", "no such file")
    saved = {f"backbone.{key}" if not key.startswith("linear") else key: tensor + 1 for key, tensor in weights.items()}
    torch.save({"model_state_dict": saved, "config": as_dict(plain)}, tmp_path / "asd.pt")
    refused(lambda: exchanged_weights(plain, str(tmp_path / "asd.pt")), "--weights", "has defense: asd")
    for other, part in (
        (load(tmp_path, "d", "network={preact_resnet18: {final_norm: false}}", backdoor={"blend": {}}), "backdoor: blend"),
        (load(tmp_path, "e", "network={preact_resnet18: {final_norm: false}}", "seed.seed=3", **changes), "seed.seed: 3"),
    ):
        undefended = as_dict(other) | {"defense": {"none": {}}}
        torch.save({"model_state_dict": saved, "config": undefended}, tmp_path / "other.pt")
        refused(lambda: exchanged_weights(plain, str(tmp_path / "other.pt")), f"other.pt: was trained with {part}")
    own = {"model_state_dict": saved, "config": as_dict(plain) | {"defense": {"none": {}}}}
    torch.save(own, tmp_path / "own.pt")
    assert exchanged_weights(plain, str(tmp_path / "own.pt"))[0] == name
    torch.save({"model_state_dict": saved}, tmp_path / "twin.pt")
    _, twin = exchanged_weights(plain, str(tmp_path / "twin.pt"))
    assert all(torch.equal(twin[key], weights[key] + 1) for key in weights)


# -- A record as BackdoorBench writes it -------------------------------------------------------------------------------


def state(rows: list[tuple[int, int, int]], count: int, test: bool) -> dict[str, Any]:
    """One part of an attack result with numpy's arrays and keys, as its data set's `retrieve_state` has it."""
    indicator = np.zeros(count)
    indicator[[i for i, _, _ in rows]] = 1
    items = {np.int64(i): {"path": f"/nowhere/{o}/{i}.png", "other_info": [carried, o]} for i, carried, o in rows}
    index = np.array([i for i, _, _ in rows]) if test else np.arange(count)
    container = {"save_folder_path": "/nowhere", "data_dict": items, "save_file_format": ".png"}
    return {
        "bd_data_container": container, "getitem_all": True, "getitem_all_switch": False, "original_index_array": index,
        "poison_indicator": indicator, "save_folder_path": "/nowhere",
    }  # fmt: skip


def triggered(images: np.ndarray) -> np.ndarray:
    """Images with a white corner."""
    out = images.copy()
    out[..., -3:, -3:, :] = 255
    return out


def theirs(folder: Path, rows: list[tuple[int, int, int]], target: int = 3) -> dict[str, Any]:
    """Write a record of such training images (index, label carried, original label); return what attack_result.pt holds."""
    test = [(i, target, int(y)) for i, y in enumerate(RAW.test_labels) if y != target]
    for part, images, of_part in (("bd_train_dataset", RAW.train_images, rows), ("bd_test_dataset", RAW.test_images, test)):
        for i, _, original in of_part:
            place = folder / part / str(original)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(triggered(images[i])).save(place / f"{i}.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    told = {
        "model_name": "preactresnet18", "num_classes": 10, "model": network.state_dict(), "data_path": "./data/cifar10",
        "img_size": (32, 32, 3), "clean_data": "cifar10", "bd_train": state(rows, 300, False), "bd_test": state(test, 43, True),
    }  # fmt: skip
    torch.save(told, folder / "attack_result.pt")
    return told


def every_fifth(target: int = 3) -> list[tuple[int, int, int]]:
    """Every fifth training image with the label of the target; among them some of the target class itself."""
    return [(i, target, int(RAW.train_labels[i])) for i in range(0, 300, 5)]


def rename(path: Path, old: bytes, new: bytes) -> None:
    """Replace a text of the pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name, contents.replace(old, new) if name.endswith("data.pkl") else contents)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_record_of_backdoorbench_is_read(tmp_path: Path, core: bytes, pickled: bool) -> None:
    """Altered images are those of the PNG files, all others those of the clean set, with either name of numpy's module; all
    altered ones are poisoned, also of the target class. Without the pickle the user names the target."""
    rows = every_fifth()
    assert any(original == 3 for _, _, original in rows)
    theirs(tmp_path / "r", rows)
    rename(tmp_path / "r/attack_result.pt", b"numpy._core", core)
    settings: dict[str, Any] = {}
    if not pickled:
        (tmp_path / "r/attack_result.pt").unlink()
        refused(lambda: prepare(on(tmp_path, tmp_path / "r"), tmp_path / "no"), "attack_result.pt", "target_label")
        settings = {"target_label": 3}
    data = prepare(on(tmp_path, tmp_path / "r", **settings), tmp_path / "run")
    expected = RAW.train_images.copy()
    expected[::5] = triggered(RAW.train_images[::5])
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1), expected)
    labels = RAW.train_labels.copy()
    labels[::5] = 3
    assert data.train.labels.tolist() == labels.tolist()
    assert data.ground_truth is not None and data.tests.backdoor is not None
    assert data.ground_truth.flags.tolist() == [int(i % 5 == 0) for i in range(300)]
    others = np.flatnonzero(RAW.test_labels != 3)
    assert np.array_equal(data.tests.backdoor.images.permute(0, 2, 3, 1), triggered(RAW.test_images[others]))
    assert data.backdoor is not None and data.backdoor.poison_ratio == 0.2


def blocks(ratio: float, target: int = 3) -> tuple[list[tuple[int, int, int]], list[int]]:
    """What WaNet's record has: poisoned images at the head of each block of 128, then as many cover images; the flags."""
    rows, flags = [], [0] * 300
    for start in range(0, 300, 128):
        block = list(range(start, min(start + 128, 300)))
        poisoned = int(ratio * len(block))
        for k, i in enumerate(block[: 2 * poisoned]):
            original = int(RAW.train_labels[i])
            rows.append((i, target if k < poisoned else original, original))
            flags[i] = 1 if k < poisoned else 2
    return rows, flags


@pytest.mark.parametrize("ratio", [0.1, 0.2])
@pytest.mark.parametrize("target", range(10))
def test_cover_images_are_identified_by_their_position_in_a_block(tmp_path: Path, ratio: float, target: int) -> None:
    """In blocks of 128, images of the target class up to the last relabeled one are poisoned and those beyond are cover images;
    in the last block the ratio decides."""
    rows, expected = blocks(ratio, target)
    told = [(i, c, o) for i, c, o in rows]
    entries = record_read.Entries(
        *(np.array(column, np.int64) for column in (*zip(*[(i, o, c) for i, c, o in told], strict=True),))
    )
    hints = record_read.Hints("inputaware", "blocks", poison_ratio=ratio)
    wanted = np.full(len(rows), target)
    flags = record_read.flags_of(entries, 300, wanted, hints, tmp_path)
    truth = [expected[i] for i, _, _ in rows]
    position = {i: i % 128 for i, _, _ in rows}
    full = [position[i] for i, c, o in rows if c != o and i < 256]
    for (i, _, original), found, real in zip(rows, flags.tolist(), truth, strict=True):
        if original == target and real == 1 and i < 256 and position[i] > max(full):
            assert found == 2  # an image of the target class after the last relabeled one: nothing tells
        else:
            assert found == real, i


def test_blocks_are_read_from_pngs_alone(tmp_path: Path) -> None:
    """With the ratio, the PNG files of WaNet are enough; with attack_result.pt the same set comes out."""
    rows, expected = blocks(0.1)
    theirs(tmp_path / "r", rows)
    one = prepare(on(tmp_path, tmp_path / "r", attack="wanet", poison_ratio=0.1), tmp_path / "one")
    (tmp_path / "r/attack_result.pt").unlink()
    told = {"attack": "wanet", "target_label": 3}
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", **told), tmp_path / "no"), "attack_result.pt", "poison_ratio")
    two = prepare(on(tmp_path, tmp_path / "r", poison_ratio=0.1, **told), tmp_path / "two")
    assert_same(one, two)
    assert two.ground_truth is not None and two.ground_truth.flags.tolist() == expected


def test_limits_and_larger_images(tmp_path: Path) -> None:
    """Limits keep the first images, and clean images are brought to the record's size as BackdoorBench does, by Pillow."""
    theirs(tmp_path / "r", every_fifth())
    cut = prepare(on(tmp_path, tmp_path / "r", "data.train_limit=95", "data.test_limit=20"), tmp_path / "cut")
    assert len(cut.train) == 95 and cut.ground_truth is not None and int(cut.ground_truth.flags.sum()) == 19
    told = torch.load(tmp_path / "r/attack_result.pt", weights_only=False)
    for file in tmp_path.glob("r/*/*/*.png"):
        with Image.open(file) as picture:
            large = picture.resize((40, 48), Image.Resampling.BILINEAR)
        large.save(file)
    torch.save(told | {"img_size": (48, 40, 3)}, tmp_path / "r/attack_result.pt")
    data = prepare(on(tmp_path, tmp_path / "r"), tmp_path / "large")
    resized = Image.fromarray(RAW.train_images[7]).resize((40, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.images[7].permute(1, 2, 0), np.asarray(resized))


def test_records_and_exported_sets_convert_into_each_other(tmp_path: Path) -> None:
    """`python -m data.poison` writes a record as arrays, and arrays as a record; nothing of the set changes."""
    theirs(tmp_path / "r", every_fifth())
    source = on(tmp_path, tmp_path / "r")
    export.export(source, tmp_path / "set", torch.device("cpu"))
    stored = read_set(tmp_path / "set")
    assert (stored.backdoor.attack.name, stored.backdoor.target_label) == ("badnet", 3)
    assert '"source": "BackdoorBench record"' in stored.description and '"seed": null' in stored.description
    with Image.open(tmp_path / "set/contact_sheet.png") as sheet:
        assert sheet.height > 100
    again = load(tmp_path, "again", dataset="poisoned_set", dataset_dir=str(tmp_path / "set"), backdoor=None)
    one, two = (prepare(settings, tmp_path / name) for settings, name in ((source, "one"), (again, "two")))
    assert_same(one, two)
    export.export(again, tmp_path / "back", torch.device("cpu"), write=lambda out, made: write_record(out, made, MODEL))
    assert_same(one, prepare(on(tmp_path, tmp_path / "back"), tmp_path / "three"))


def test_resuming_with_another_record_is_refused(tmp_path: Path) -> None:
    """A run that was begun with one record refuses another, and goes on with the same one elsewhere."""
    theirs(tmp_path / "r", every_fifth())
    prepare(on(tmp_path, tmp_path / "r"), tmp_path / "run")
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    prepare(on(tmp_path, tmp_path / "copy"), tmp_path / "run")
    theirs(tmp_path / "other", every_fifth()[1:])
    refused(lambda: prepare(on(tmp_path, tmp_path / "other"), tmp_path / "run"), "other data")


# -- Refused -----------------------------------------------------------------------------------------------------------


def told_anew(**changes: Any) -> Callable[[Path], object]:
    """Return what changes keys of attack_result.pt; a function changes the value in place."""

    def damage(folder: Path) -> None:
        told = torch.load(folder / "attack_result.pt", weights_only=False)
        for key, change in changes.items():
            if callable(change):
                change(told[key])
            else:
                told[key] = change
        torch.save(told, folder / "attack_result.pt")

    return damage


def item(key: str, value: Any) -> Callable[[Path], object]:
    """Return what replaces the training image `key` of data_dict and its PNG's name."""

    def change(part: dict[str, Any]) -> None:
        part["bd_data_container"]["data_dict"][key] = value
        grown = np.zeros(max(300, key + 1 if isinstance(key, int) else 0))[:300]
        grown[[i for i in part["bd_data_container"]["data_dict"] if isinstance(i, (int, np.integer)) and i < 300]] = 1
        part["poison_indicator"] = grown

    return told_anew(bd_train=change)


def first_triggered(change: Callable[[int, int], list[int]]) -> Callable[[Path], object]:
    """Return what changes the labels, carried and own, of the first triggered image."""

    def first(part: dict[str, Any]) -> None:
        entry = next(iter(part["bd_data_container"]["data_dict"].values()))
        entry["other_info"] = change(*entry["other_info"])

    return told_anew(bd_test=first)


def in_target(folder: Path) -> None:
    """Add a test image of the target class to the triggered ones."""
    i = int(np.flatnonzero(RAW.test_labels == 3)[0])
    (folder / "bd_test_dataset/3").mkdir()
    Image.fromarray(RAW.test_images[i]).save(folder / f"bd_test_dataset/3/{i}.png")

    def add(part: dict[str, Any]) -> None:
        part["bd_data_container"]["data_dict"][i] = {"path": "x", "other_info": [3, 3]}
        part["poison_indicator"][i] = 1

    told_anew(bd_test=add)(folder)


LABEL = int(RAW.train_labels[20])
PNG = f"bd_train_dataset/{LABEL}/20.png"


def moved(folder: Path) -> None:
    """Put an image into the folder of another label."""
    place = folder / f"bd_train_dataset/{(LABEL + 1) % 10}"
    place.mkdir(exist_ok=True)
    shutil.move(folder / PNG, place / "20.png")


def saved(image: Image.Image, format: str = "PNG") -> Callable[[Path], object]:
    """Return what replaces an image."""
    return lambda folder: image.save(folder / PNG, format=format)


SMALL = Image.new("RGB", (32, 32))
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "wrong label folder": (moved, (PNG, "not its original label")),
    "missing image": (lambda folder: (folder / PNG).unlink(), (PNG, "no such file")),
    "wrong size": (saved(SMALL.resize((32, 31))), (PNG, "32 x 31", "expected 32 x 32")),
    "huge size": (saved(Image.new("1", (20000, 20000))), (PNG, "cannot be read", "pixels")),
    "grey": (saved(SMALL.convert("L")), (PNG, "mode L", "RGB")),
    "a JPEG": (saved(SMALL, "JPEG"), (PNG, "JPEG", "PNG")),
    "no image": (lambda folder: (folder / PNG).write_text("hello"), (PNG, "cannot be read")),
    "half an image": (lambda folder: (folder / PNG).write_bytes((folder / PNG).read_bytes()[:200]), (PNG, "cannot be read")),
    "a folder": (lambda folder: [(folder / PNG).unlink(), (folder / PNG).mkdir()], (PNG, "cannot be read")),
    "index out of range": (item(300, {"path": "x", "other_info": [3, 1]}), ("bd_train", "poison_indicator")),
    "negative index": (item(-1, {"path": "x", "other_info": [3, 1]}), ("bd_train", "poison_indicator")),
    "another original label": (
        item(20, {"path": "x", "other_info": [3, (LABEL + 1) % 10]}),
        ("image 20", f"in the clean data set {LABEL}", "same order"),
    ),
    "label out of range": (item(20, {"path": "x", "other_info": [77, LABEL]}), ("image 20", "77", "0..9")),
    "two targets": (item(20, {"path": "x", "other_info": [(LABEL + 1) % 10, LABEL]}), ("neither one class",)),
    "labels of another type": (item(20, {"path": "x", "other_info": ["3", LABEL]}), ("data_dict: 20",)),
    "one label": (item(20, {"path": "x", "other_info": [3]}), ("data_dict: 20",)),
    "no labels": (item(20, {"path": "x"}), ("other_info",)),
    "a text for an index": (item("20", {"path": "x", "other_info": [3, 1]}), ("data_dict: '20'",)),
    "an unchanged image of another class": (item(20, {"path": "x", "other_info": [LABEL, LABEL]}), ("image 20", "unchanged")),
    "no class for a label": (told_anew(num_classes=10**6 + 1), ("num_classes: 1000001",)),
    "a triggered image with its own label": (
        first_triggered(lambda carried, own: [own, own]),
        ("bd_test_dataset", "do not carry class 3"),
    ),
    "a triggered image of the target class": (in_target, ("bd_test_dataset", "target class", "ASR must not count")),
    "no poisoned set": (told_anew(bd_train=None), ("bd_train: None",)),
    "of the first version": (told_anew(bd_train={"x": torch.zeros(3), "y": [1]}), ("bd_train", "first version")),
    "pickled images": (told_anew(bd_train={"x": [SMALL]}), ("first version",)),
    "another data set": (told_anew(bd_train=state(every_fifth(), 299, False)), ("299 images", "has 300")),
    "an indicator of others": (
        told_anew(bd_train=lambda part: part.update(poison_indicator=np.ones(300))),
        ("poison_indicator", "does not name"),
    ),
    "no indicator": (told_anew(bd_train=lambda part: part.update(poison_indicator=None)), ("poison_indicator: NoneType",)),
    "nothing altered": (told_anew(bd_train=state([], 300, False)), ("is empty",)),
    "no size": (told_anew(img_size=7), ("img_size: 7",)),
    "no classes": (told_anew(num_classes="ten"), ("num_classes: 'ten'",)),
    "few classes": (told_anew(num_classes=4), ("4 classes", "label 9")),
    "other classes": (told_anew(num_classes=11), ("num_classes: 10", "has 11", "attack_result.pt")),
    "no dictionary": (lambda folder: torch.save([1], folder / "attack_result.pt"), ("model_name: missing",)),
    "no zip": (lambda folder: (folder / "attack_result.pt").write_bytes(b"hello"), ("attack_result.pt", "cannot be read")),
    "an old file of torch": (
        lambda folder: torch.save({}, folder / "attack_result.pt", _use_new_zipfile_serialization=False),
        ("attack_result.pt", "cannot be read"),
    ),
    "cut short": (
        lambda folder: (p := folder / "attack_result.pt").write_bytes(p.read_bytes()[:-500]),
        ("attack_result.pt", "cannot be read"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    """A record that is damaged, of another data set or of another version is one line with the file and what is expected."""
    theirs(tmp_path / "r", every_fifth())
    do, parts = DAMAGES[damage]
    do(tmp_path / "r")
    refused(lambda: prepare(on(tmp_path, tmp_path / "r"), tmp_path / "run"), tmp_path / "r", *parts)
    assert not (tmp_path / "run" / "set.json").exists()


def test_labels_below_0_are_refused(tmp_path: Path) -> None:
    """A record whose images all carry -1 has no target class."""
    theirs(tmp_path / "r", every_fifth(-1), -1)
    refused(lambda: prepare(on(tmp_path, tmp_path / "r"), tmp_path / "run"), tmp_path / "r", "labels: -1")


PNG_DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "an index out of range": (lambda part: shutil.copy(part / f"{LABEL}/20.png", part / f"{LABEL}/300.png"), ("300", "0..299")),
    "another label": (lambda part: shutil.move(part / f"{LABEL}/20.png", part / f"{(LABEL + 1) % 10}"), ("image 20",)),
    "twice": (lambda part: shutil.copy(part / f"{LABEL}/20.png", part / f"{(LABEL + 1) % 10}"), ("20",)),
    "no number": (lambda part: (part / f"{LABEL}/x.png").write_text(""), ("x.png", "<index>.png")),
    "no label": (lambda part: (part / "cat").mkdir(), ("cat", "label")),
    "a huge number": (lambda part: (part / f"{LABEL}/{'9' * 40}.png").write_text(""), ("999", "<index>.png")),
    "empty": (lambda part: [shutil.rmtree(part), part.mkdir()], ("holds no images",)),
    "absent": (shutil.rmtree, ("no such folder",)),
}


@pytest.mark.parametrize("damage", PNG_DAMAGES)
def test_pngs_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    """The same checks hold where the PNG files are all there is."""
    theirs(tmp_path / "r", every_fifth())
    (tmp_path / "r/attack_result.pt").unlink()
    for label in range(10):
        (tmp_path / f"r/bd_train_dataset/{label}").mkdir(exist_ok=True)
    do, parts = PNG_DAMAGES[damage]
    do(tmp_path / "r/bd_train_dataset")
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", target_label=3), tmp_path / "run"), tmp_path / "r", *parts)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A missing folder, a poisoned set as the clean one, a target out of range and an odd name are one line each."""
    theirs(tmp_path / "r", every_fifth())
    refused(lambda: prepare(on(tmp_path, tmp_path / "none"), tmp_path / "run"), "record", "no such folder")
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", attack="a b"), tmp_path / "run"), "attack")
    for name in ("target_label", "target_shift", "poison_ratio", "poison_mode"):
        refused(
            lambda name=name: prepare(on(tmp_path, tmp_path / "r", attack=name), tmp_path / "run"), f"record.attack: {name}: "
        )
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", target_label=7), tmp_path / "run"), "target_label: 7", "carry class 3")
    (tmp_path / "r/attack_result.pt").unlink()
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", target_label=10), tmp_path / "run"), "target_label: 10", "0..9")
    inner = {"backdoorbench_record": {"record": str(tmp_path / "r"), "attack": "badnet", "clean": CLEAN, "target_label": 3}}
    refused(lambda: prepare(on(tmp_path, tmp_path / "r", clean=inner), tmp_path / "run"), "clean", "poisoned already")


# -- Malicious ---------------------------------------------------------------------------------------------------------


class Bait:
    """A pickle of this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def archive(path: Path, contents: bytes, copies: int = 1, compression: int = zipfile.ZIP_STORED) -> None:
    """Write an attack result of that pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as file:
        for i in range(copies):
            file.writestr(f"{'x' * (i + 1)}/data.pkl", contents)


def nested(levels: int) -> bytes:
    """A dictionary whose key is a tuple in a tuple in a tuple..."""
    return b"\x80\x02})" + b"\x85" * levels + b"K\x01s."


def asks(module: str, name: str) -> bytes:
    """A pickle that calls `module.name("1")`."""
    return f"\x80\x02c{module}\n{name}\n".encode("latin1") + b"X\x01\x00\x00\x001\x85R."


HOSTILE: dict[str, bytes] = {
    "deep tuple": nested(1_000_000),
    "deep tuple through the memo": b"\x80\x02)q\x00" + b"0h\x00\x85q\x00" * 300_000 + b"0}h\x00K\x01s.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge array": b"\x80\x02cnumpy\nndarray\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x00\x85\x85R.",
    "huge shape": pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"\x8a\x06\xff\xff\xff\xff\xff\x00\x85"),
    "objects in an array": pickle.dumps(np.array([{}], object), 2),
    "an odd type": b"\x80\x02cnumpy\ndtype\nX\x0a\x00\x00\x00V999999999\x85R.",
    "no end": b"\x80\x02(" * 10,
    "nothing": b"",
    "a call of an array": b"\x80\x02cnumpy\narray\n](NeX\x05\x00\x00\x00int64\x86R.",
    "state for a function": b"\x80\x02cnumpy\narray\n}X\x04\x00\x00\x00makeNsb.",
    "slots for a function": b"\x80\x02cnumpy\narray\nN}X\x04\x00\x00\x00makeNs\x86b.",
    "an extension": b"\x80\x02\x82\x01.",
    **{
        f"{module}.{name}": asks(module, name)
        for module, name in (
            ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "exec"),
            ("builtins", "getattr"), ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"), ("numpy", "load"),
            ("numpy", "fromfile"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_tensor"),
            ("pickle", "loads"), ("codecs", "decode"), ("_codecs", "decode"), ("argparse", "Namespace"),
            ("data.poisoned_sets.record_pickle", "Maker"), ("torch", "os.system.Storage"),
            ("torch.serialization", "os.Storage"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("which", HOSTILE)
def test_a_malicious_pickle_is_refused(tmp_path: Path, which: str) -> None:
    """Whatever the pickle requests or expands to, the result is a one-line error with the file name and no crash."""
    archive(tmp_path / "r/attack_result.pt", HOSTILE[which])
    refused(lambda: record_pickle.read_attack_result(tmp_path / "r/attack_result.pt"), "attack_result.pt")


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_record_runs_nothing(tmp_path: Path, protocol: int) -> None:
    """Code in any part of an attack result does not run, and the line says what it asked for."""
    told, trace = theirs(tmp_path / "r", every_fifth()), tmp_path / "code ran"
    for key in ("model_name", "model", "bd_train"):
        bait = pickle.dumps(
            told | {key: Bait(os.mkdir, str(trace))} if key != "model" else {"model": Bait(eval, f"open({str(trace)!r}, 'w')")},
            protocol,
        )
        archive(tmp_path / "bad/attack_result.pt", bait)
        refused(lambda: record_pickle.read_attack_result(tmp_path / "bad/attack_result.pt"), "malicious")
        assert not trace.exists()
    pickle.loads(bait)
    assert trace.exists()  # the bait works where pickles are trusted


def test_the_functions_of_the_unpickler_stay_as_they_are(tmp_path: Path) -> None:
    """A record that tries to change what the names of later records stand for fails, and the next record is read."""
    for name in ("state for a function", "slots for a function"):
        archive(tmp_path / "bad/attack_result.pt", HOSTILE[name])
        refused(lambda: record_pickle.read_attack_result(tmp_path / "bad/attack_result.pt"), "cannot be read")
    theirs(tmp_path / "r", every_fifth())
    prepare(on(tmp_path, tmp_path / "r"), tmp_path / "run")


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """A member that unpacks to more than a record needs, and several pickles or none, are refused before they are read."""
    path = tmp_path / "r/attack_result.pt"
    archive(path, b"N" * (record_pickle.LIMIT + 1), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refused(lambda: record_pickle.read_attack_result(path), "attack_result.pt", "64 MB")
    for copies in (0, 2):
        archive(path, b"\x80\x02N.", copies)
        refused(lambda: record_pickle.read_attack_result(path), f"{copies} members")
    contents = bytearray(path.read_bytes())
    archive(path, b"\x80\x02}q\x00.")
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"\x80\x02}q\x00.") + 2] ^= 1
    path.write_bytes(contents)
    refused(lambda: record_pickle.read_attack_result(path), "cannot be read")


def test_endless_operations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of many more operations than a record has is refused before anything is built."""
    monkeypatch.setattr(unpickle, "OPERATIONS", 1000)
    archive(tmp_path / "attack_result.pt", b"\x80\x02(" + b"N" * 2000 + b"l.")
    refused(lambda: record_pickle.read_attack_result(tmp_path / "attack_result.pt"), "more than 1,000 operations")


def test_a_huge_shared_string_is_refused_without_copying_it(tmp_path: Path) -> None:
    """Labels that are a text of millions of letters, shared by all images, are refused without being taken apart."""
    text = "x" * 20_000_000
    told = theirs(tmp_path / "r", every_fifth())
    for entry in told["bd_train"]["bd_data_container"]["data_dict"].values():
        entry["other_info"] = text
    torch.save(told, tmp_path / "r/attack_result.pt")
    refused(lambda: prepare(on(tmp_path, tmp_path / "r"), tmp_path / "run"), "data_dict")


# -- The commands ------------------------------------------------------------------------------------------------------


def test_a_record_trains(tmp_path: Path) -> None:
    """A run on a record ends with ACC and ASR like any other, and its log names the attack and the target class."""
    theirs(tmp_path / "r", every_fifth())
    settings = on(tmp_path, tmp_path / "r", "num_epochs=1", "defense=none", "evidence=false")
    run = train_here(settings, tmp_path / "on_record.yaml")
    (row,) = (run.log / "metrics.jsonl").read_text().splitlines()
    assert 0 <= json.loads(row)["attack_success_rate"] <= 1
    text = (run.log / "asd.log").read_text()
    assert "attack badnet, target class 3" in text and "300 (60 poisoned)" in text


def test_wrong_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that BackdoorBench does not have, and weights without a record, end before anything is poisoned."""
    load(tmp_path, "attack", backdoor={"poison_ratio": 0.2, "badnets": {}})
    options = ["poison", "--config", str(tmp_path / "attack.yaml"), "--out", str(tmp_path / "new"), "--gpu", "cpu"]
    for more, part in ((("--format", "backdoorbench"), "final_norm: false"), (("--weights", "x.pt"), "--weights x.pt")):
        monkeypatch.setattr(sys, "argv", [*options, *more])
        refused(lambda: poison.main(no_network, exchanged_weights), part)
    monkeypatch.setattr(sys, "argv", [*options, "--format", "zip"])
    refused(lambda: poison.main(no_network, exchanged_weights), "--format")
    assert not (tmp_path / "new").exists()


def test_the_commands_work_together(tmp_path: Path) -> None:
    """`python -m data.poison --format backdoorbench` writes a record, with a warning where it has no trained weights; ASD.py
    ends with one line and exit code 2 where the record would run code."""
    network = {"preact_resnet18": {"final_norm": False}}
    load(tmp_path, "attack", backdoor={"poison_ratio": 0.2, "badnets": {}}, network=network)
    out, trace = tmp_path / "record/mine", tmp_path / "code ran"
    words = (
        "-m",
        "data.poison",
        "--gpu",
        "cpu",
        "--config",
        tmp_path / "attack.yaml",
        "--out",
        out,
        "--format",
        "backdoorbench",
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "warning: --weights" in result.stdout, result.stderr
    told = torch.load(out / "attack_result.pt", weights_only=False)
    assert told["model_name"] == "preactresnet18" and len(told["model"]) == 102
    on(tmp_path, out)
    archive(out / "attack_result.pt", pickle.dumps(Bait(os.mkdir, str(trace)), 2))
    result = run_script("ASD.py", "--config", tmp_path / "on_record.yaml", "--gpu", "cpu")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert ".mkdir" in result.stderr and "attack_result.pt" in result.stderr and not trace.exists()


def test_an_unsupported_data_set_logs_a_warning(tmp_path: Path) -> None:
    """A record of a data set that BackdoorBench does not have is written, with a warning."""
    with logged() as said:
        write(tmp_path, tmp_path / "mine", ATTACKS["badnets"][0])
    assert any("shapes" in line and "cifar10" in line for line in said)
