"""`backdoor: null`: runs on data of unknown origin with given seed samples, from the folder to the suspects."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, run_script
from PIL import Image
from training import train_here

from data import poisoning, seeds, sets, sources
from data.datasets import shapes
from data.sources import prepare
from utils import compare, config
from utils.errors import UserError

CLASSES, EACH, SEEDS = ("disc", "ring", "square"), 20, 3
SMALL: dict[str, Any] = {
    "num_classes": 3,
    "backdoor": None,
    "num_epochs": 3,
    "semi": TINY["semi"] | {"mixmatch": {"train_iteration": 2}},  # type: ignore[operator]
    "global": {"epoch_first": 1, "epoch_second": 2, "epoch_third": 3, "t": 1, "n": 1},
}


def write_tree(root: Path, test: bool) -> None:
    """Write drawn shapes as image files, `train/<class>/0007.png`, optionally with a test folder."""
    images, labels = shapes.draw(600, 10.0, np.random.default_rng(0))
    for part, first in (("train", 0), *((("test", EACH),) if test else ())):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i, at in enumerate(np.flatnonzero(labels == label)[first : first + EACH]):
                Image.fromarray(images[at]).save(folder / f"{i:04d}.png")


def plan(folder: Path, **changes: Any) -> Path:
    """Write the YAML of a tiny run on the tree in `folder`, with a list of seed samples."""
    (folder / "seeds.txt").write_text(
        "# known to be clean\n\n" + "".join(f"{name}/{i:04d}.png\n" for name in CLASSES for i in range(SEEDS))
    )
    raw = TINY | SMALL | {
        "dataset": "folder", "dataset_dir": str(folder / "tree"), "seed_samples": str(folder / "seeds.txt"),
        "saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage"),
    } | changes  # fmt: skip
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def train(path: Path, resume: str = "") -> Path:
    """Run ASD in this process; return the run's folder."""
    plan = config.load(path)
    return train_here(plan, path, resume).saved


def run_test_py(*arguments: object) -> str:
    """Run test.py's main function in this process, on the CPU; return what it printed."""
    spec = importlib.util.spec_from_file_location("repository_test", REPOSITORY / "test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["test.py", "--gpu", "cpu", *map(str, arguments)])
        module.main()
    return said.getvalue()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ASD.py on a tree with a test folder; the tests only read it."""
    folder = tmp_path_factory.mktemp("own")
    write_tree(folder / "tree", test=True)
    result = run_script("ASD.py", "--config", plan(folder), "--gpu", "cpu")
    assert result.returncode == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout)
    return folder


# -- A whole run -------------------------------------------------------------------------------------------------------


def test_a_run_of_unknown_truth_reports_nothing_about_poisoned_images(own: Path) -> None:
    """Log, metrics and plots show accuracy and losses, but no success rate, no number of poisoned images and no purity."""
    said = (own / "said.txt").read_text()
    lines = [line for line in said.splitlines() if re.match(r"epoch +\d/3 ", line)]
    assert len(lines) == 3 and all("ACC" in line and "clean pool" in line for line in lines)
    for word in ("ASR", "poisoned", "triggered", "AUROC", "None", "nan"):
        assert word not in said, word
    log = own / "saved" / "own" / "log"
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["attack_success_rate"] is None and row["poisoned_in_clean_pool"] is None
        assert row["clean_accuracy"] * EACH * 3 == pytest.approx(round(row["clean_accuracy"] * EACH * 3))
    assert not {"purity.png", "triggered.png"} & {path.name for path in log.iterdir()}
    assert {"accuracy.png", "split_class-aware.png", "split_meta-split.png"} <= {path.name for path in log.iterdir()}
    assert {"poison_idx.npy", "suspects.json"}.isdisjoint(path.name for path in log.parent.iterdir())


def test_tensorboard_of_such_a_run_has_no_truth(own: Path) -> None:
    """TensorBoard shows one histogram of all losses and nothing about an attack."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(own / "saved" / "own" / "log" / "tensorboard")).Reload()  # type: ignore[no-untyped-call]
    tags = board.Tags()
    assert tags["histograms"] == ["split_loss/all"]
    assert "clean_accuracy" in tags["scalars"] and not [tag for tag in tags["scalars"] if "attack" in tag or "poison" in tag]
    assert not [tag for tag in tags["images"] if "poisoned" in tag]


def test_suspects_are_all_images_by_name(own: Path) -> None:
    """suspects.csv has every training image once, with the class of its folder, ranked by a score in 0..1; the model's label
    and the epochs in the clean pool agree with the checkpoint."""
    with open(own / "saved" / "own" / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == [f"{name}/{i:04d}.png" for name in CLASSES for i in range(EACH)]
    assert all(row["label"] == row["name"].partition("/")[0] and row["model_label"] in CLASSES for row in rows)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[0] <= 1 and scores[-1] >= 0
    for row in rows:
        outside = 1 - int(row["epochs_in_clean_pool"]) / (1 + max(int(other["epochs_in_clean_pool"]) for other in rows))
        assert (float(row["score"]) > 0.5 * outside - 1e-6) == (row["label"] != row["model_label"]), row
    saved = torch.load(own / "storage" / "own" / "checkpoint" / "latest_model.pt", weights_only=True)
    epochs = {f"{CLASSES[i // EACH]}/{i % EACH:04d}.png": n for i, n in enumerate(saved["epochs_in_clean_pool"].tolist())}
    assert {row["name"]: int(row["epochs_in_clean_pool"]) for row in rows} == epochs
    run_test_py("--config", own / "own.yaml", "--images", own / "tree" / "train")
    with open(own / "saved" / "own" / "log" / "labels.csv", newline="") as file:
        labeled = {row["path"]: (row["label"], row["confidence"]) for row in csv.DictReader(file)}
    assert {row["name"]: (row["model_label"], row["confidence"]) for row in rows} == labeled


def test_the_sheet_of_suspects_opens(own: Path) -> None:
    """suspects.png is an image file that is not blank."""
    with Image.open(own / "saved" / "own" / "suspects.png") as sheet:
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 50


def test_test_py_reports_accuracy_only(own: Path) -> None:
    """test.py prints and saves the ACC on the user's test folder, and no success rate."""
    said = run_test_py("--config", own / "own.yaml")
    assert "ACC" in said and "ASR" not in said
    kept = json.loads((own / "saved" / "own" / "log" / "test.json").read_text())
    assert kept["clean_total"] == 3 * EACH and kept["attack_success_rate"] is None and kept["clean_as_target"] is None


def test_test_py_refuses_other_classes(own: Path, tmp_path: Path) -> None:
    """Classes are numbered by their folders: if one is renamed or missing, all others have other numbers than in training."""
    shutil.copytree(own / "tree", tmp_path / "tree")
    data = ("--config", own / "own.yaml", "--set", f"dataset_dir={tmp_path / 'tree'}", "--set", f"saved_dir={tmp_path}")
    latest = own / "storage/own/checkpoint/latest_model.pt"
    assert "ACC" in run_test_py(*data, "--resume", latest)
    first = sorted(CLASSES)[0]
    for part in ("train", "test"):
        (tmp_path / "tree" / part / first).rename(tmp_path / "tree" / part / "zz")
    with pytest.raises(UserError, match=f"has other classes than the checkpoint: class 0 was '{first}', is ") as caught:
        run_test_py(*data, "--resume", latest)
    assert "\n" not in str(caught.value)


def test_runs_of_unknown_truth_can_be_compared(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In the table of the comparison, unknown values are `unknown`; the others are plotted."""
    monkeypatch.setattr(sys, "argv", ["compare", str(own / "saved" / "own"), "--plot", str(tmp_path / "c.png")])
    compare.main()
    row = capsys.readouterr().out.splitlines()[2]
    assert re.search(r"own +asd +\d+\.\d\d % +unknown +unknown +no undefended run +unknown of 30", row), row
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_without_a_test_folder_the_last_model_is_the_result(tmp_path: Path, said: list[str]) -> None:
    """A run on a tree without test/ has no accuracy and no best_model.pt, which the log states, and test.py is refused with a
    remedy. The same command on the finished run writes missing suspects again, but does not change existing ones."""
    write_tree(tmp_path / "tree", test=False)
    path = plan(tmp_path)
    saved = train(path)
    assert any("no best_model.pt" in line for line in said) and not any("ACC" in line or "None" in line for line in said)
    assert [p.name for p in (tmp_path / "storage" / "own" / "checkpoint").iterdir()] == ["latest_model.pt"]
    assert not (saved / "log" / "accuracy.png").exists()
    with pytest.raises(UserError, match=r"no test images.*--images"):
        run_test_py("--config", path)

    first = (saved / "suspects.csv").read_bytes()
    (saved / "suspects.csv").unlink()
    train(path)
    assert (saved / "suspects.csv").read_bytes() == first
    (saved / "suspects.csv").write_text("mine\n")
    train(path)
    assert (saved / "suspects.csv").read_text() == "mine\n"


def test_an_attack_needs_test_images(tmp_path: Path) -> None:
    """An attack on a tree without test/ is an error that names both remedies."""
    write_tree(tmp_path / "tree", test=False)
    path = plan(tmp_path, backdoor={"badnets": {}, "target_label": 1})
    with pytest.raises(UserError, match=r"no test images.*backdoor: null"):
        train(path)


def test_no_ground_truth_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of unknown truth creates no GroundTruth, draws no poisoned images and builds no attack."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("ground truth")

    write_tree(tmp_path / "tree", test=True)
    monkeypatch.setattr(sets.GroundTruth, "__init__", refuse)
    monkeypatch.setattr(poisoning, "poison_index", refuse)
    monkeypatch.setattr(sources, "build_attack", refuse)
    monkeypatch.setattr(seeds, "draw_seed_samples", refuse)
    saved = train(plan(tmp_path))
    assert (saved / "suspects.csv").exists()


def test_an_undefended_run_of_unknown_truth(tmp_path: Path) -> None:
    """`defense: none` needs no seed samples and ranks nothing."""
    write_tree(tmp_path / "tree", test=True)
    saved = train(plan(tmp_path, defense="none", seed_samples=None, num_epochs=1))
    assert (saved / "log" / "metrics.jsonl").exists() and not (saved / "suspects.csv").exists()


def test_given_seed_samples_can_be_used_with_an_attack(tmp_path: Path) -> None:
    """With an attack, given seed samples replace the drawn ones, and suspects.json has counts and five measures of each score,
    which agree with poison_idx.npy."""
    write_tree(tmp_path / "tree", test=True)
    path = plan(tmp_path, backdoor={"badnets": {}, "target_label": 1, "poison_ratio": 0.2})
    saved = train(path)
    index = np.load(saved / "poison_idx.npy")
    found = json.loads((saved / "suspects.json").read_text())
    assert found["counts"] == {"images": 60, "poisoned": int(index.sum()), "cover": 0}
    names = {"auroc", "precision_at_true_count", "recall_at_true_count", "precision_of_first_100", "average_precision"}
    for measures in found["measures"].values():
        assert set(measures) == names and all(0 <= value <= 1 for value in measures.values())
    with open(saved / "suspects.csv", newline="") as file:
        scores = {row["name"]: float(row["score"]) for row in csv.DictReader(file)}
    poisoned = {f"{CLASSES[i // EACH]}/{i % EACH:04d}.png" for i in np.flatnonzero(index)}
    pairs = [(scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]) for a in poisoned for b in scores.keys() - poisoned]
    assert found["measures"]["score"]["auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=0.002)  # the CSV is rounded
    assert (saved / "seed_samples.txt").read_text().splitlines() == [f"{n}/{i:04d}.png" for n in CLASSES for i in range(SEEDS)]


# -- Seed samples ------------------------------------------------------------------------------------------------------

NAMES = ("cat/a.png", "cat/b.png", "dog/a.png", "dog/c d.png", "\u00e9l\u00e9phant/\u00fc.png")
LABELS = np.array([0, 0, 1, 1, 2])
KNOWN = ("cat", "dog", "\u00e9l\u00e9phant")


def listed(path: Path, text: str, names: tuple[str, ...] = NAMES) -> list[int]:
    """Return the images that a list with that text names."""
    path.write_text(text, encoding="utf-8")
    return list(seeds.read_seed_samples(path, names, LABELS, KNOWN, 3))


def test_a_list_names_one_image_per_line(tmp_path: Path) -> None:
    """Blank lines, comments, spaces at the ends, a byte order mark, `./` and Windows' backslashes are ignored."""
    text = "\ufeff# mine\n\n  dog/c d.png \n./cat/b.png\r\n\t# more\n\u00e9l\u00e9phant\\\u00fc.png\n"
    assert listed(tmp_path / "s.txt", text) == [1, 3, 4]


def test_images_without_names_are_given_by_number(tmp_path: Path) -> None:
    """If the data set has no file names, a line is the number of an image."""
    assert listed(tmp_path / "s.txt", "4\n0\n2\n", ("0", "1", "2", "3", "4")) == [0, 2, 4]


def put(folder: Path, *names: str) -> Path:
    """Create empty files with these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_has_one_sub_folder_per_class(tmp_path: Path) -> None:
    """Files in class folders stand for the training images of that name or number; hidden files are ignored."""
    folder = put(tmp_path / "named", "cat/b.png", "dog/a.png", "\u00e9l\u00e9phant/\u00fc.png", "cat/.DS_Store", ".git/x")
    assert list(seeds.read_seed_samples(folder, NAMES, LABELS, KNOWN, 3)) == [1, 2, 4]
    folder = put(tmp_path / "numbered", "cat/1.png", "1/3.jpg", "\u00e9l\u00e9phant/4.png")
    assert list(seeds.read_seed_samples(folder, tuple("01234"), LABELS, KNOWN, 3)) == [1, 3, 4]


REST = "dog/a.png\n\u00e9l\u00e9phant/\u00fc.png\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat/a.pgn\n" + REST, ("s.txt: line 1: cat/a.pgn", "did you mean cat/a.png?")),
        ("b.png\n" + REST, ("line 1: b.png", "did you mean cat/b.png?")),
        ("# x\ntrain/cat/b.png\n" + REST, ("line 2: train/cat/b.png", "did you mean cat/b.png?")),
        ("\x1b[31mzzzz\n", ("\\x1b", "names look like cat/a.png")),
        ("cat/a.png\ncat/a.png\n" + REST, ("line 2: cat/a.png: named twice", "line 1", "keep one")),
        ("cat/a.png\n" + REST.splitlines()[0], ("no image of class 2 (\u00e9l\u00e9phant)", "at least one")),
        ("", ("no image of class 0 (cat)",)),
    ],
)
def test_an_error_in_a_list_is_one_line(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    """An unknown name (with the most similar one), a repeated name and a class without seed samples are one line with file,
    line and remedy."""
    with pytest.raises(UserError) as caught:
        listed(tmp_path / "s.txt", text)
    line = str(caught.value)
    assert "\n" not in line and "\x1b" not in line
    for part in expected:
        assert part in line


ODD = ("#ant/a.png", "#ant/ b.png", " bee/a.png", "bee/a.png", "d\\og/a.png", "e\u0301t/u\u0308.png")
ODD_LABELS = np.array([0, 0, 1, 2, 3, 4])


def listed_odd(path: Path, lines: str) -> list[int]:
    """Return the images that a list names in a data set with unusual names."""
    path.write_text(lines, encoding="utf-8")
    return list(seeds.read_seed_samples(path, ODD, ODD_LABELS, ("#ant", " bee", "bee", "d\\og", "e\u0301t"), 5))


def test_every_possible_file_name_can_be_listed(tmp_path: Path) -> None:
    """Names that begin with # or a space, contain a backslash, or have another Unicode form than on the disk are found; a
    comment that does not begin like a class folder is a comment."""
    text = "# chosen by hand\n#ant/a.png\n./#ant/ b.png\n bee/a.png\nbee/a.png\nd\\og/a.png\n\u00e9t/\u00fc.png\n"
    assert listed_odd(tmp_path / "s.txt", text) == [0, 1, 2, 3, 4, 5]
    assert listed_odd(tmp_path / "t.txt", text.replace("#ant/a.png", "##ant/a.png")) == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"line 2: #ant/c\.png"):
        listed_odd(tmp_path / "s.txt", text.replace("#ant/a.png", "#ant/c.png"))


def test_a_folder_of_copies_may_have_the_other_unicode_form(tmp_path: Path) -> None:
    """Copies whose names are decomposed, as on a Mac, stand for the same images, by name and by number."""
    folder = put(tmp_path / "s", "cat/a.png", "dog/a.png", "e\u0301le\u0301phant/u\u0308.png")
    assert list(seeds.read_seed_samples(folder, NAMES, LABELS, KNOWN, 3)) == [0, 2, 4]
    folder = put(tmp_path / "t", "cat/0.png", "dog/2.png", "e\u0301le\u0301phant/4.png")
    assert list(seeds.read_seed_samples(folder, tuple("01234"), LABELS, KNOWN, 3)) == [0, 2, 4]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_list_may_have_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    """The encodings that PowerShell's > and Windows' editors write can be read."""
    mark = "\ufeff" if encoding.endswith("e") else ""
    (tmp_path / "s.txt").write_bytes((mark + "cat/a.png\r\n" + REST).encode(encoding))
    assert list(seeds.read_seed_samples(tmp_path / "s.txt", NAMES, LABELS, KNOWN, 3)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (REST.encode("latin-1"), "line 2: .*save the list as UTF-8"),
        (("cat/a.png\n" + REST).encode("utf-16-le"), "save it as UTF-8"),
        (("cat/a.png\n" + REST).encode("utf-16") + b"x", "UTF-16"),
    ],
)
def test_another_encoding_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """A list in an encoding that cannot be read is an error that names the right encoding."""
    (tmp_path / "s.txt").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        seeds.read_seed_samples(tmp_path / "s.txt", NAMES, LABELS, KNOWN, 3)


def test_a_list_can_have_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """If file names are Latin-1, a list in Latin-1 matches them; a misspelled name is not reported as a wrong encoding."""
    names = ("cat/a.png", os.fsdecode(b"b\xe9e/a.png"))
    (tmp_path / "s.txt").write_bytes(b"cat/a.png\nb\xe9e/a.png\n")
    assert list(seeds.read_seed_samples(tmp_path / "s.txt", names, np.array([0, 1]), ("cat", "b"), 2)) == [0, 1]
    (tmp_path / "s.txt").write_bytes(b"cat/a.png\nb\xe9e/b.png\n")
    with pytest.raises(UserError, match="did you mean"):
        seeds.read_seed_samples(tmp_path / "s.txt", names, np.array([0, 1]), ("cat", "b"), 2)


def test_a_list_that_is_a_named_pipe_is_refused(tmp_path: Path) -> None:
    """A named pipe is one line instead of an endless wait."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"seed_samples: .*is a named pipe"):
        seeds.read_seed_samples(tmp_path / "pipe", NAMES, LABELS, KNOWN, 3)


def test_the_error_for_an_unknown_number_has_the_range(tmp_path: Path) -> None:
    """For a number outside the set, or a name in a set without names, the error states the range of numbers."""
    for entry in ("5", "-1", "cat/a.png"):
        with pytest.raises(UserError, match=r"line 1: .*0 to 4"):
            listed(tmp_path / "s.txt", f"{entry}\n", tuple("01234"))


@pytest.mark.parametrize(
    ("files", "numbered", "expected"),
    [
        (("a.png",), False, "not in a class folder"),
        (("cat/zz.png",), False, "cat/zz.png: the training set has no image of that name"),
        (("dog/0.png",), True, "image 0 is of class 0 (cat)"),
        (("cat/1.png", "cat/1.jpg"), True, "named twice"),
        (("cat/a.png", "dog/a.png"), False, "no image of class 2"),
    ],
)
def test_an_error_in_a_folder_is_one_line(tmp_path: Path, files: tuple[str, ...], numbered: bool, expected: str) -> None:
    """A file outside a class folder, an unknown file, a file in the folder of another class and a class without files are one
    line each."""
    with pytest.raises(UserError) as caught:
        seeds.read_seed_samples(put(tmp_path / "s", *files), tuple("01234") if numbered else NAMES, LABELS, KNOWN, 3)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    """A missing list is one line with its path and the remedy."""
    with pytest.raises(UserError, match=r"seed_samples: .*none\.txt: cannot be read \(No such file"):
        seeds.read_seed_samples(tmp_path / "none.txt", NAMES, LABELS, KNOWN, 3)


def test_a_copy_must_be_the_training_image(tmp_path: Path) -> None:
    """A folder of seed samples has copies. One with other pixels, e.g. the original of an image that was altered, would make an
    altered image a trusted one: it is refused, as is a file that is no image."""
    write_tree(tmp_path / "tree", test=False)
    for name in CLASSES:
        for i in range(SEEDS):
            (tmp_path / "clean" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"tree/train/{name}/{i:04d}.png", tmp_path / "clean" / name)
    settings = config.load(plan(tmp_path, seed_samples=str(tmp_path / "clean")))
    data = prepare(settings, tmp_path / "run")
    assert len(seeds.choose_seed_samples(settings, data, tmp_path / "run")) == len(CLASSES) * SEEDS
    odd = tmp_path / "clean" / CLASSES[0] / "0000.png"
    pixels = np.array(Image.open(odd))
    pixels[0, 0] ^= 1
    for spoil in (lambda: Image.fromarray(pixels).save(odd), lambda: odd.write_text("no image")):
        spoil()
        with pytest.raises(UserError, match=r"0000\.png: is not the training image .*remove this file"):
            seeds.choose_seed_samples(settings, data, tmp_path / "run")


def test_a_class_without_training_images_is_an_error(tmp_path: Path) -> None:
    """If num_classes is larger than the number of classes in the data, the error says so and does not ask for a seed sample."""
    (tmp_path / "s.txt").write_text("cat/a.png\n" + REST)
    with pytest.raises(UserError, match="num_classes: 5: the training set has no image of class 3"):
        seeds.read_seed_samples(tmp_path / "s.txt", NAMES, LABELS, KNOWN, 5)


def test_a_run_can_be_resumed_with_the_same_seed_samples_only(tmp_path: Path) -> None:
    """Saved seed samples are accepted again, and other ones are refused."""
    path = tmp_path / "run" / "seed_samples.txt"
    seeds.keep_with_run(path, ["cat/a.png", "dog/a.png"])
    seeds.keep_with_run(path, ["cat/a.png", "dog/a.png"])
    with pytest.raises(UserError, match=r"begun with other seed samples.*--resume False"):
        seeds.keep_with_run(path, ["cat/b.png", "dog/a.png"])


def test_seed_samples_are_required_if_they_cannot_be_drawn(tiny: Path) -> None:
    """backdoor: null with ASD but without seed_samples is refused before any data are read; with them seed_num may be 0."""
    with pytest.raises(UserError, match=r"seed_samples: None: .*backdoor: null"):
        config.load(tiny, ["backdoor=null"])
    assert config.load(tiny, ["backdoor=null", "seed_samples=s.txt", "global.seed_num=0"]).seed_samples == "s.txt"
    assert config.load(tiny, ["backdoor=null", "defense=none"]).backdoor is None


# -- Labels for images -------------------------------------------------------------------------------------------------


def label(own: Path, folder: Path, *arguments: object) -> tuple[str, list[list[str]]]:
    """Label a folder with the finished run; return the output and the rows of the CSV."""
    out = folder.parent / "labels.csv"
    said = run_test_py("--config", own / "own.yaml", "--images", folder, "--out", out, *arguments)
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return said, list(csv.reader(file))


def test_images_of_any_kind_are_labeled(own: Path, tmp_path: Path) -> None:
    """Every image below a folder, of any format, mode and size, gets a row with its three most likely labels; files that are
    not images are named and not fatal; the run's files and the data set are not needed."""
    source = own / "tree" / "test" / "ring" / "0003.png"
    pile = tmp_path / "pile"
    (pile / "deep" / "er").mkdir(parents=True)
    with Image.open(source) as image:
        image.save(pile / "same.png")
        image.save(pile / "deep" / "same.bmp")
        image.convert("L").resize((50, 20)).save(pile / "deep" / "er" / "grey.jpg")
        image.convert("RGBA").resize((64, 64)).save(pile / "A rgba.png")
    (pile / "notes.txt").write_text("not an image")
    (pile / "broken.png").write_bytes(source.read_bytes()[:60])
    (pile / ".hidden.png").write_bytes(b"")
    said, rows = label(own, pile, "--set", f"dataset_dir={tmp_path}/nowhere")
    assert rows[0] == ["path", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3"]
    assert [row[0] for row in rows[1:]] == ["A rgba.png", "deep/er/grey.jpg", "deep/same.bmp", "same.png"]
    assert rows[3][1:] == rows[4][1:]
    for row in rows[1:]:
        shares = [float(share) for share in row[2::2]]
        assert set(row[1::2]) == set(CLASSES) and shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=2e-4)
    assert "cannot be read: notes.txt" in said and "cannot be read: broken.png" in said
    assert "2 of 4 images were resized to 32 x 32 pixels" in said and "4 images labeled, 2 unreadable" in said


def test_old_checkpoints_give_numbers(own: Path, tmp_path: Path) -> None:
    """A checkpoint without class names and image size gives numbers as labels, at the size of the training views."""
    saved = torch.load(own / "storage" / "own" / "checkpoint" / "latest_model.pt", weights_only=True)
    del saved["about"]
    torch.save(saved, tmp_path / "old.pt")
    pile = tmp_path / "pile"
    pile.mkdir()
    Image.new("RGB", (40, 40), "red").save(pile / "x.png")
    said, rows = label(own, pile, "--resume", tmp_path / "old.pt")
    assert set(rows[1][1::2]) == {"0", "1", "2"} and "1 of 1 images were resized to 32 x 32 pixels" in said


@pytest.mark.parametrize("about", [None, 3, {"class_names": [1], "image_size": [32]}, {"image_size": [0, 10**9]}])
def test_invalid_facts_in_a_checkpoint_are_ignored(about: object) -> None:
    """The facts about the data in a checkpoint are checked: anything but class names and an image size is ignored."""
    from utils import checkpoint

    assert checkpoint.about({"about": about}) == ((), None)
    valid = {"about": {"class_names": ["a", "b"], "image_size": [24, 32]}}
    assert checkpoint.about(valid) == (("a", "b"), (24, 32))


def no_folder(tmp_path: Path) -> Path:
    """A path that does not exist."""
    return tmp_path / "none"


def empty_folder(tmp_path: Path) -> Path:
    """A folder with nothing but a hidden file."""
    return put(tmp_path / "empty", ".x")


def no_images(tmp_path: Path) -> Path:
    """A folder of text files."""
    return put(tmp_path / "texts", "a.txt", "b.txt")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (no_folder, "not a folder"), (empty_folder, "contains no files"),
        (no_images, "none of 2 files is a readable image (first: a.txt"),
    ],
)  # fmt: skip
def test_a_folder_without_images_is_one_line(own: Path, tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    """--images with nothing to label is one line, and no CSV is written."""
    out = tmp_path / "labels.csv"
    with pytest.raises(UserError) as caught:
        run_test_py("--config", own / "own.yaml", "--images", make(tmp_path), "--out", out)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


def test_out_without_images_is_refused(own: Path) -> None:
    """--out without --images is an error that names --images."""
    with pytest.raises(UserError, match=r"--out x\.csv: .*--images"):
        run_test_py("--config", own / "own.yaml", "--out", "x.csv")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--images", ""), "--images: '': names no file"),
        (("--images", ".", "--out", ""), "--out: '': names no file"),
    ],
)
def test_an_empty_option_is_refused(own: Path, options: tuple[str, ...], expected: str) -> None:
    """An unset variable of the shell does not turn labeling into a test."""
    with pytest.raises(UserError, match=re.escape(expected)):
        run_test_py("--config", own / "own.yaml", *options)


@pytest.mark.parametrize("options", [(), ("--images", "nowhere")])
def test_where_results_cannot_be_written_is_found_out_first(own: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Nothing is tested or labeled whose result could not be kept."""
    (tmp_path / "file").write_text("")
    weights = own / "storage/own/checkpoint/latest_model.pt"
    with pytest.raises(UserError, match=r"file/own/log/\w+\.\w+: cannot be written"):
        run_test_py("--config", own / "own.yaml", "--resume", weights, "--set", f"saved_dir={tmp_path / 'file'}", *options)
