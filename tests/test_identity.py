"""The identity of a run's data: equal data are accepted wherever they are, other data are refused, and remedies work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, logged, run_script
from PIL import Image
from training import train_here

from data import digests
from data.attack import checksum
from data.loading import load_raw
from data.sets import AssetDigests, PoisonedData
from data.sources import prepare, prepare_tests
from utils import checkpoint, config, manifest
from utils.config.compatibility import refuse_other_settings
from utils.config.schema import as_dict, stand_ins
from utils.errors import UserError
from utils.manifest import Row

CLASSES, TRAIN, TEST = ("ant", "bee", "cat"), 8, 2
EPOCHS = 2
OWN: dict[str, Any] = {
    "transform": TINY["transform"] | {"train": {"primary": {}, "remaining": {"to_tensor": True}}},  # type: ignore[operator]
    "num_classes": 3, "backdoor": None, "num_epochs": EPOCHS, "dataset": "folder",
    "semi": {"loader": {"batch_size": 4}, "mixmatch": {"train_iteration": 1}},
    "network": {"resnet18_cifar": {"width": 8, "blocks": 1}},
    "global": {"epoch_first": 1, "epoch_second": 2, "epoch_third": 2, "t": 1, "n": 1},
}  # fmt: skip


def draw_set(root: Path, alter: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels, suffix: str = "png") -> Path:
    """Write `train/` and `test/` with a few images of 20 x 20 pixels in three classes, and a list of seed samples."""
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("test", TEST)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = alter(rng.integers(0, 256, (20, 20, 3), np.uint8))
                Image.fromarray(pixels).save(root / part / name / f"{i:03d}.{suffix}")
    (root / "clean.txt").write_text("".join(f"{name}/{i:03d}.{suffix}\n" for name in CLASSES for i in range(2)))
    return root


def plan(folder: Path, data: Path, **changes: Any) -> Path:
    """Write the YAML of a run in `folder` on the set in `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = TINY | OWN | {
        "dataset_dir": str(data), "seed_samples": str(data / "clean.txt"),
        "saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage"),
    } | changes  # fmt: skip
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def run(path: Path, *overrides: str, resume: str = "") -> dict[str, Any]:
    """Run ASD in this process; return the latest checkpoint."""
    settings = config.load(path, overrides)
    return checkpoint.read(train_here(settings, path, resume).checkpoint("latest_model.pt"))


def refusal(path: Path, *overrides: str, resume: str = "") -> str:
    """Return the error of a run, one line."""
    with pytest.raises(UserError) as caught:
        run(path, *overrides, resume=resume)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 800
    return line


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a YAML and a finished run; tests work on copies."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("begun")
    draw_set(folder / "set")
    run(plan(folder, folder / "set"))
    return folder


@pytest.fixture
def place(begun: Path, tmp_path: Path) -> Path:
    """A copy of that folder: its YAML names the copied set, whose files have other inodes and times than in the run."""
    shutil.copytree(begun, tmp_path / "copy")
    plan(tmp_path / "copy", tmp_path / "copy" / "set")
    return tmp_path / "copy"


# -- Other data --------------------------------------------------------------------------------------------------------


def test_an_image_that_moved_to_another_class_is_named(place: Path) -> None:
    """Relabeling an image after reading the ranking changes the data: resuming is refused with the image and both classes, and
    the run's files are not changed."""
    before = (place / "saved/own/suspects.csv").read_bytes()
    (place / "set/train/cat/007.png").rename(place / "set/train/ant/zzz.png")
    line = refusal(place / "own.yaml")
    assert "1 moved from class cat to ant (cat/007.png, now ant/zzz.png)" in line
    assert "gone" not in line and "added" not in line
    assert (place / "saved/own/suspects.csv").read_bytes() == before


def test_a_checkpoint_identifies_its_data_without_the_runs_folder(place: Path) -> None:
    """A checkpoint that is given by its path to a run of another name refuses other data as well."""
    Image.new("RGB", (20, 20)).save(place / "set/train/bee/003.png")
    path = place / "storage/own/checkpoint/latest_model.pt"
    line = refusal(place / "own.yaml", "run=other", resume=str(path))
    assert line.startswith(f"{path}: ") and "1 has other pixels (bee/003.png)" in line


def test_other_pixels_under_the_same_names_are_refused(place: Path) -> None:
    """Another folder with the same names but other pixels is other data, both in the training and in the test set."""
    other = draw_set(place / "inverted", lambda pixels: 255 - pixels)
    line = refusal(place / "own.yaml", f"dataset_dir={other}")
    assert f"{3 * TRAIN} have other pixels" in line and f"{3 * TEST} have other pixels" in line


def test_two_yamls_of_one_name_do_not_share_a_run(place: Path) -> None:
    """A second YAML with the same file name but other data is refused; it does not resume the first one's run."""
    draw_set(place / "b/set", lambda pixels: 255 - pixels)
    second = plan(place / "b", place / "b/set", saved_dir=str(place / "saved"), storage_dir=str(place / "storage"))
    assert "other data" in refusal(second)


def test_a_run_without_a_checkpoint_refuses_other_data(place: Path) -> None:
    """The files in a run's folder (poisoned indices, seed samples) belong to its data, even before the first checkpoint."""
    shutil.rmtree(place / "storage")
    (place / "set/train/cat/007.png").unlink()
    assert "1 is gone (cat/007.png)" in refusal(place / "own.yaml")


def test_the_remedies_for_other_data_work(place: Path) -> None:
    """Each remedy that the error names works: restoring the data, another name for a new run, and starting over."""
    image, aside = place / "set/train/cat/007.png", place / "aside.png"
    image.rename(aside)
    line = refusal(place / "own.yaml")
    assert "--set run=NAME" in line and "--resume False" in line
    short = ("num_epochs=1",)
    assert run(place / "own.yaml", "run=second", *short)["epoch"] == 0
    aside.rename(image)
    assert run(place / "own.yaml")["epoch"] == EPOCHS - 1
    image.unlink()
    assert run(place / "own.yaml", *short, resume="False")["epoch"] == 0


# -- Equal data --------------------------------------------------------------------------------------------------------


def test_a_run_can_be_resumed_on_moved_data(place: Path) -> None:
    """If the data set and the list of seed samples are moved, the resumed run gives the same weights as without the move."""
    longer = (f"num_epochs={EPOCHS + 1}", f"global.epoch_third={EPOCHS + 1}")
    shutil.copytree(place, place.parent / "stays")
    plan(place.parent / "stays", place.parent / "stays" / "set")
    stays = run(place.parent / "stays" / "own.yaml", *longer)
    moved = place.parent / "elsewhere"
    (place / "set").rename(moved)
    (moved / "clean.txt").rename(moved / "list.txt")
    resumed = run(place / "own.yaml", *longer, f"dataset_dir={moved}", f"seed_samples={moved / 'list.txt'}")
    assert resumed["epoch"] == EPOCHS
    for name, tensor in stays["model_state_dict"].items():
        assert torch.equal(tensor, resumed["model_state_dict"][name]), name
    assert torch.equal(stays["epochs_in_clean_pool"], resumed["epochs_in_clean_pool"])


def test_checkpoints_of_earlier_versions_can_be_resumed(place: Path) -> None:
    """A checkpoint without a manifest of its data, and without a setting that was added later, can be resumed."""
    path = place / "storage/own/checkpoint/latest_model.pt"
    saved = torch.load(path, weights_only=True)
    del saved["data"], saved["config"]["data"]["cache_dir"], saved["config"]["global"]["keep_seeds"]
    saved["config"] |= {"seed_samples": str(place / "set/clean.txt")}
    torch.save(saved, path)
    (place / "saved/own/data.csv").unlink()
    assert run(place / "own.yaml")["epoch"] == EPOCHS - 1
    assert len((place / "saved/own/data.csv").read_text().splitlines()) == 1 + 3 * (TRAIN + TEST) + 1
    assert "global.keep_seeds" in refusal(place / "own.yaml", "global.keep_seeds=true")


def test_a_damaged_manifest_is_one_line(place: Path) -> None:
    """An invalid manifest in the run's folder is refused in one line."""
    for text in ("", "part,name\n", 'part,name,class,digest\n"'):
        (place / "saved/own/data.csv").write_text(text)
        assert "damaged" in refusal(place / "own.yaml")


# -- Files that settings name ------------------------------------------------------------------------------------------


def attacked(folder: Path, data: Path, backdoor: dict[str, Any]) -> config.Config:
    """Return the settings of a run with an attack."""
    return config.load(
        plan(folder, data, backdoor={"target_label": 1, "poison_ratio": 0.5} | backdoor, seed_samples=None),
        ["global.seed_num=2"],
    )


def test_a_trigger_file_is_identified_by_its_contents(tmp_path: Path) -> None:
    """The same trigger under another name is accepted; another one is refused, and the error names the setting."""
    data, facts = draw_set(tmp_path / "set"), tmp_path / "facts"
    for name, size in (("a", 3), ("b", 3), ("c", 4)):
        pixels = np.zeros((20, 20, 3), np.uint8)
        pixels[:size, :size] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    settings = {n: attacked(tmp_path, data, {"badnets": {"trigger_path": str(tmp_path / f"{n}.png")}}) for n in "abc"}
    first = prepare(settings["a"], facts)
    manifest.keep(facts, first.manifest)
    assert prepare(settings["b"], facts).manifest == first.manifest
    with pytest.raises(UserError, match=r"backdoor\.badnets\.trigger_path has other contents"):
        prepare(settings["c"], facts)
    keys = {key for key, _, _ in stand_ins(settings["a"])}
    assert keys == {"dataset", "dataset_dir", "seed_samples", "backdoor.badnets.trigger_path"}
    saved = {"config": as_dict(settings["a"]), "data": first.manifest}
    refuse_other_settings(tmp_path, saved, as_dict(settings["b"]), keys)
    with pytest.raises(UserError, match="trigger_path"):  # without a manifest the path is compared
        refuse_other_settings(tmp_path, saved | {"data": ""}, as_dict(settings["b"]), keys)


def test_a_folder_of_reflections_is_identified_by_its_images(tmp_path: Path) -> None:
    """A copied folder is the same, whatever its name, and only image files count; a folder with another image differs."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    shutil.copytree(folder, tmp_path / "b")
    for name in (".DS_Store", "Thumbs.db", "readme.txt"):
        (tmp_path / "b" / name).write_text("x")
    known = digests.digest_of_named(str(folder), "key")
    assert digests.digest_of_named(str(tmp_path / "b"), "key") == known
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "b/1.png")
    assert digests.digest_of_named(str(tmp_path / "b"), "key") != known


@pytest.mark.parametrize(
    ("key", "attack"), [("backdoor.badnets.trigger_path", "badnets"), ("backdoor.refool.reflections", "refool")]
)
def test_a_file_that_a_setting_names_is_found_or_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, attack: str
) -> None:
    """A path that does not exist, or starts at the home folder of an unknown user, is one line with the setting and the path as
    it is written there; the remedy for the latter works, with a file or folder whose name begins with ~."""
    data = draw_set(tmp_path / "set")
    monkeypatch.chdir(tmp_path)

    def run_with(value: str) -> PoisonedData:
        return prepare(attacked(tmp_path, data, {attack: {key.rpartition(".")[2]: value}}), tmp_path / "run")

    for value, remedy in (("nowhere/x.png", f"correct {key}"), ("~nobody-of-this-name/x.png", "./~nobody-of-this-name/x.png")):
        with pytest.raises(UserError) as caught:
            run_with(value)
        line = str(caught.value)
        assert "\n" not in line and key in line and f"{value}: " in line and remedy in line, line
    path = tmp_path / "~nobody-of-this-name/x.png"
    path.parent.mkdir()
    if attack == "refool":
        path.mkdir()
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:3, :3] = 9
    Image.fromarray(pixels).save(path / "1.png" if attack == "refool" else path)
    assert key in run_with("./~nobody-of-this-name/x.png").manifest


IAB = {"mask_epochs": 1, "generator_epochs": 1, "batch_size": 10, "width": 2,
       "surrogate": {"resnet18_cifar": {"width": 2, "blocks": 1}}}  # fmt: skip


@pytest.fixture(scope="module")
def with_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run against IAB, whose networks are assets; tests work on copies."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("assets")
    backdoor = {"target_label": 1, "poison_ratio": 0.3, "iab": IAB}
    changes = {"seed_samples": None, "backdoor": backdoor, "defense": "none", "undefended": {"lr_scheduler": None}}
    run(plan(folder, draw_set(folder / "set"), **changes))
    return folder


def copied(folder: Path, place: Path) -> Path:
    """A copy of a run with its data, and the YAML of the copy."""
    shutil.copytree(folder, place)
    raw = yaml.safe_load((place / "own.yaml").read_text().replace(str(folder), str(place)))
    (place / "own.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return place / "own.yaml"


def alter_asset(place: Path) -> Path:
    """Change one weight of the stored generator, as if it had been trained on another computer."""
    (path,) = (place / "saved/assets").glob("iab_generator-*.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = next(name for name in arrays if arrays[name].dtype == np.float32)
    arrays[name] = arrays[name] + np.float32(0.5)
    weights = {name: array for name, array in arrays.items() if not name.startswith("_")}
    np.savez(path, **weights, _key=arrays["_key"], _sha256=np.array(checksum(weights)))
    return path


def test_the_manifest_names_what_an_attack_was_made_with(with_assets: Path) -> None:
    """The generator and the mask network decide what poisoned images look like."""
    files = {path.stem for path in (with_assets / "saved/assets").glob("*.npz") if "surrogate" not in path.stem}
    known = manifest.assets_of((with_assets / "saved/own/data.csv").read_text())
    assert known.keys() == files and {name.partition("-")[0] for name in files} == {"iab_generator", "iab_mask"}


@pytest.mark.parametrize("through", ["resume", "checkpoint", "test.py"])
def test_a_run_with_another_generator_is_refused(with_assets: Path, tmp_path: Path, through: str) -> None:
    """A run that is resumed, in its folder or elsewhere, and a test of its checkpoint need the trigger that it was trained
    with: another one is refused in one line."""
    path = copied(with_assets, tmp_path / "copy")
    asset, latest = alter_asset(tmp_path / "copy"), tmp_path / "copy/storage/own/checkpoint/latest_model.pt"
    if through == "test.py":
        done = run_script("test.py", "--config", path, "--gpu", "cpu")
        assert done.returncode == 2
        line = done.stderr.strip().removeprefix("test.py: error: ")
    elif through == "resume":
        line = refusal(path, "num_epochs=3")
    else:
        line = refusal(path, "num_epochs=3", "run=other", resume=str(latest))
    assert line.startswith(f"{asset}: is not the file that this run was begun with") and "restore that file" in line
    assert line.isprintable()


def test_a_lost_generator_is_made_again(with_assets: Path, tmp_path: Path) -> None:
    """On the same computer it comes out the same, and the run goes on; the log says what is happening. A run without a list of
    its assets, being of an earlier version, goes on too."""
    path = copied(with_assets, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/saved/assets")
    with logged() as said:
        assert run(path, "num_epochs=3")["epoch"] == 2
    assert any("with which this run was begun, is missing: making it again" in line for line in said)
    latest = tmp_path / "copy/storage/own/checkpoint/latest_model.pt"
    saved = checkpoint.read(latest)
    saved["data"] = "".join(line for line in saved["data"].splitlines(keepends=True) if "assets/" not in line)
    torch.save(saved, latest)
    (tmp_path / "copy/saved/own/data.csv").unlink()
    assert run(path, "num_epochs=4")["epoch"] == 3


@pytest.mark.parametrize("kind", ["file", "moved", "classes", "textures"])
def test_a_test_with_another_trigger_is_named(tmp_path: Path, kind: str) -> None:
    """What the trigger is made from is compared by content: the file that a setting names, wherever it is, and the training
    images if the trigger is made from them, but not otherwise."""
    data, trigger = draw_set(tmp_path / "set"), tmp_path / "trigger.png"
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:3, :3] = 9
    Image.fromarray(pixels).save(trigger)
    by_file = kind in ("file", "moved")
    attack = {"badnets": {"trigger_path": str(trigger)}} if by_file else {"refool": {"source": kind, "count": 3}}
    settings = attacked(tmp_path, data, attack)
    known = prepare(settings, tmp_path / "facts").manifest
    assert prepare_tests(settings, known=known)[1] == []
    if kind == "file":
        pixels[:3, :3] = 200
        Image.fromarray(pixels).save(trigger)
    elif kind == "moved":
        shutil.move(trigger, tmp_path / "other.png")
        settings = attacked(tmp_path, data, {"badnets": {"trigger_path": str(tmp_path / "other.png")}})
    else:
        Image.fromarray(pixels).save(next((data / "train").glob("*/*.png")))
    found = {"file": "backdoor.badnets.trigger_path has other contents", "classes": "of the training images 1 has other pixels"}
    (line,) = prepare_tests(settings, known=known)[1] or [""]
    assert line.startswith(found.get(kind, "")) and bool(line) == (kind in found)


def test_test_py_with_other_settings_of_an_attack_makes_another_trigger(with_assets: Path, tmp_path: Path) -> None:
    """It is legitimate, and named in the output and in test.json, for an attack that trains networks too; no asset of the run
    is said to be missing."""
    path = copied(with_assets, tmp_path / "copy")
    done = run_script("test.py", "--config", path, "--gpu", "cpu", "--set", "backdoor.iab.generator_lr=0.02")
    assert done.returncode == 0 and "missing" not in done.stderr + done.stdout, done.stderr
    assert "note: the test images are not those of the run: backdoor.iab.generator_lr: 0.02, in training" in done.stdout
    tested = json.loads((tmp_path / "copy/saved/own/log/test.json").read_text())
    assert len(tested["other_than_in_training"]) == 1


def test_assets_are_known_from_manifests_of_earlier_versions() -> None:
    """They list an asset by its name alone: that still means the run's asset."""
    digests = AssetDigests({"iab_mask": "1", "iab_generator-12ab": "2"})
    assert digests.digest("iab_mask", "iab_mask-99ff") == "1" and digests.digest("clb_images", "clb_images-99ff") is None
    assert digests.digest("iab_generator", "iab_generator-12ab") == "2"
    assert digests.digest("iab_generator", "iab_generator-34cd") is None


def test_other_poisoned_images_are_other_data(tmp_path: Path) -> None:
    """`poison_idx.npy` is part of the data of a checkpoint: other poisoned images are detected."""
    settings = attacked(tmp_path, draw_set(tmp_path / "set"), {"badnets": {"pattern": "corner3x3"}})
    first = prepare(settings, tmp_path / "facts").manifest
    index = np.load(tmp_path / "facts/poison_idx.npy")
    at, other = np.flatnonzero(index)[0], np.flatnonzero((index == 0) & (np.arange(len(index)) >= 2 * TRAIN))[0]
    index[[at, other]] = index[[other, at]]
    np.save(tmp_path / "facts/poison_idx.npy", index)
    second = prepare(settings, tmp_path / "facts").manifest
    assert manifest.differences(first, second) == ["poison_idx.npy has other contents"]


def test_the_manifest_of_images_without_names_has_their_numbers(tiny: Path) -> None:
    """Each image of an array has a row with its number, class and digest; a limit leaves out rows; equal settings give the same
    text."""
    settings = config.load(tiny)
    text = digests.manifest_of(settings, load_raw(settings))  # type: ignore[arg-type]
    assert text == digests.manifest_of(settings, load_raw(settings))
    rows = manifest.rows_of(text)
    assert [row.name for row in rows if row.part == "train"] == [str(i) for i in range(200)]
    fewer = config.load(tiny, ["data.train_limit=150"])
    assert manifest.differences(text, digests.manifest_of(fewer, load_raw(fewer))) == [
        "of the training images 50 are gone (first: 150)"
    ]


# -- Differences -------------------------------------------------------------------------------------------------------


def images(*rows: str) -> str:
    """Return a manifest of training images, each given as `name class digest`."""
    return manifest.to_text(Row("train", *row.split()) for row in rows)


BEFORE = ("a/1 a 11", "a/2 a 12", "b/1 b 21", "b/2 b 22")


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (BEFORE, []),
        (("a/1 a 11", "a/2 a 12", "b/1 b 21"), ["1 is gone (b/2)"]),
        ((*BEFORE, "c/1 c 31", "c/2 c 32"), ["2 were added (first: c/1)"]),
        (("a/1 a 11", "a/2 a 12", "a/9 a 21", "b/2 b 22"), ["1 moved from class b to a (b/1, now a/9)"]),
        (("a/1 a 22", "a/2 a 12", "b/1 b 21", "b/2 b 11"), ["2 have other pixels (first: a/1)"]),
        (("a/1 a 11", "a/3 a 12", "b/1 b 21", "b/2 b 22"), ["1 renamed (a/2, now a/3)"]),
        (("a/1 a 11", "a/2 b 12", "b/1 b 21", "b/2 b 22"), ["1 moved from class a to b (a/2, now a/2)"]),
        (("a/2 a 12", "a/1 a 11", "b/1 b 21", "b/2 b 22"), ["all are in another order"]),
        (("b/3 b 11", "a/2 a 12", "a/3 a 21", "b/2 b 22"), ["2 moved to another class (first: a/1, now b/3)"]),
        (
            ("a/1 a 11", "b/1 b 21", "b/2 b 99", "c/1 c 31"),
            ["1 is gone (a/2)", "1 was added (c/1)", "1 has other pixels (b/2)"],
        ),
    ],
)
def test_each_kind_of_change_is_named(after: tuple[str, ...], found: list[str]) -> None:
    """Removed, added, moved, renamed, altered and reordered images are reported with their number and an example."""
    expected = [f"of the training images {', '.join(found)}"] if found else []
    assert manifest.differences(images(*BEFORE), images(*after)) == expected


def test_numbered_images_are_matched_by_their_pixels() -> None:
    """A removed image shifts the numbers of all following images, but it alone is reported, even if equal images remain."""
    before = [f"{i} x {digest}" for i, digest in enumerate(("11", "12", "12", "13", "14"))]
    after = [f"{i} x {digest}" for i, digest in enumerate(("11", "12", "13", "14"))]
    assert manifest.differences(images(*before), images(*after)) == ["of the training images 1 is gone (2)"]


def test_unusual_names_survive_the_manifest() -> None:
    """Names with quotes, commas, line breaks or bytes that are not UTF-8 are read back unchanged, and cannot forge a line."""
    rows = [Row("train", name, "a", "1") for name in ('a/"b",c', "a/x\ny", "a/\udce9", "a/\r", "a/ ")]
    assert manifest.rows_of(manifest.to_text(rows)) == rows
    (line,) = manifest.differences(manifest.to_text(rows), manifest.to_text(rows[:1]))
    assert line.isprintable()


# -- Remedies in errors ------------------------------------------------------------------------------------------------


def test_a_finished_run_can_be_extended_as_the_error_says(place: Path) -> None:
    """If only the number of epochs is raised, the error names the other setting to raise; with both raised the run continues,
    and the earlier epochs are kept."""
    longer = f"num_epochs={EPOCHS + 1}"
    key = re.search(r"raise (global\.\w+)", refusal(place / "own.yaml", longer))
    assert key is not None
    saved = run(place / "own.yaml", longer, f"{key[1]}={EPOCHS + 1}")
    assert [row["stage"] for row in saved["history"]] == ["class-aware", "class-agnostic", "meta-split"]


def test_other_settings_name_remedies_that_work(place: Path) -> None:
    """A changed setting is refused before any image is decoded; with the old setting, or under another name, the command runs.
    A checkpoint that is given by its path is refused as well: a new run does not need it."""
    changed = ("semi.mixmatch.alpha=0.5", "num_epochs=1")
    shutil.rmtree(place / "saved/tables")
    line = refusal(place / "own.yaml", *changed)
    assert "semi.mixmatch.alpha" in line and "--set run=NAME" in line and "without --resume" in line
    assert not (place / "saved/tables").exists()
    old = str(place / "storage/own/checkpoint/latest_model.pt")
    assert "without --resume" in refusal(place / "own.yaml", *changed, "run=new", resume=old)
    assert run(place / "own.yaml", *changed, "run=new")["epoch"] == 0
    assert run(place / "own.yaml")["epoch"] == EPOCHS - 1


def test_the_remedies_for_a_damaged_image_work(place: Path) -> None:
    """If an image is damaged, the run continues once it is repaired, and a new run under another name can leave it out. If the
    same run leaves it out, the error names the missing image."""
    image = place / "set/train/bee/004.png"
    good = image.read_bytes()
    image.write_bytes(b"broken")
    line = refusal(place / "own.yaml")
    (skip,) = re.findall(r"--set (dataset\S+=true)", line)
    assert "--set run=NAME" in line
    assert "1 is gone (bee/004.png)" in refusal(place / "own.yaml", skip)
    assert run(place / "own.yaml", skip, "run=rest", "num_epochs=1")["epoch"] == 0
    image.write_bytes(good)
    assert run(place / "own.yaml", skip)["epoch"] == EPOCHS - 1


def test_other_seed_samples_name_remedies_that_work(place: Path) -> None:
    """Another list of seed samples is refused; the earlier list, another name for the run, and starting over work. A list that
    names the same images in another order and spelling is the same."""
    given = place / "set/clean.txt"
    before = given.read_text()
    given.write_text("# sorted by me\n" + "".join(f"./{line}\n" for line in reversed(before.splitlines())))
    assert run(place / "own.yaml")["epoch"] == EPOCHS - 1
    given.write_text(before.replace("cat/001.png", "cat/002.png"))
    line = refusal(place / "own.yaml")
    assert "--set run=NAME" in line and "--resume False" in line
    assert run(place / "own.yaml", "run=second", "num_epochs=1")["epoch"] == 0
    path = place / "storage/own/checkpoint/latest_model.pt"
    assert "seed_samples has other contents" in refusal(place / "own.yaml", "run=third", resume=str(path))
    given.write_text(before)
    assert run(place / "own.yaml")["epoch"] == EPOCHS - 1


def prepared(path: Path, *overrides: str) -> PoisonedData:
    """Return the data that a YAML gives, without a run."""
    return prepare(config.load(path, overrides), path.parent / "facts")


def test_remedies_for_settings_of_the_data_work(tmp_path: Path) -> None:
    """Errors about too few classes, an unrecognized data set, missing test images and test images of the target class only:
    with the remedy of each error, the data can be loaded."""
    path = plan(tmp_path, draw_set(tmp_path / "set"))

    def line(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            prepared(path, *overrides)
        return str(caught.value)

    assert "raise it" in line("num_classes=2")
    assert len(prepared(path, "num_classes=3").train) == 3 * TRAIN
    assert "add `dataset: NAME`" in line("dataset=null")
    assert len(prepared(path, "dataset=folder").train) == 3 * TRAIN

    attack = "backdoor={badnets: {pattern: corner3x3}, target_label: 1, poison_ratio: 0.5}"
    for name in ("ant", "cat"):
        shutil.rmtree(tmp_path / "set/test" / name)
    assert "give another class" in line(attack)
    assert prepared(path, attack, "backdoor.target_label=0").tests.backdoor is not None
    shutil.rmtree(tmp_path / "facts")
    (tmp_path / "set/test").rename(tmp_path / "aside")
    assert "backdoor: null" in line(attack)
    assert prepared(path, "backdoor=null").tests.clean is None
    (tmp_path / "aside").rename(tmp_path / "set/test")
    assert prepared(path, attack, "backdoor.target_label=0").tests.clean is not None
