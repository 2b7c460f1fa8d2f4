"""Paths given by users: any problem is reported in one line. Also names of classes and images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from data import seeds
from data.attacks import refool
from data.datasets import cifar10, cifar100, folder, gtsrb, poisoned_set
from data.io.image_file import read_named
from data.loading import name_of_folder
from utils import cli, config, paths
from utils.config.schema import Named
from utils.config.settings import Backdoor
from utils.errors import UserError
from utils.names import Names, class_text
from utils.reporting.report import Report, Subject
from utils.run import Run, locate

NOBODY = "~nobody-of-this-name/x"


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_path_is_refused(name: str) -> None:
    """It is that of a shell variable that is not set, and would mean the current folder."""
    with pytest.raises(UserError, match=r"saved_dir: '\s*': names no file or folder"):
        paths.user_path(name, "saved_dir")


def test_a_tilde_is_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` is the user's home folder; that of an unknown user is refused, unless a file or folder has that very name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert paths.user_path("~/a", "k") == tmp_path / "a" and paths.user_path("a/~b", "k") == Path("a/~b")
    with pytest.raises(UserError, match=r"k: ~nobody-of-this-name/x: .*\./~nobody"):
        paths.user_path(NOBODY, "k")
    assert paths.user_path(f"./{NOBODY}", "k") == Path(NOBODY)  # the remedy
    (tmp_path / NOBODY).parent.mkdir()
    assert paths.user_path(NOBODY, "k") == Path(NOBODY)


def test_an_unknown_home_folder_is_one_line_wherever_a_path_is_named(tiny: Path) -> None:
    """For every setting and option with a path, the error names it."""
    settings = config.load(tiny, [])
    empty = SimpleNamespace(train=SimpleNamespace(labels=()), names=None, class_names=())
    calls = {
        "dataset_dir": [
            *(lambda m=m: m.load(m.Settings(), NOBODY, False) for m in (folder, gtsrb, cifar10, cifar100, poisoned_set)),
            lambda: name_of_folder(NOBODY),
        ],
        "seed_samples": [
            lambda: seeds.choose_seed_samples(config.load(tiny, [f"seed_samples={NOBODY}"]), empty, tiny),  # type: ignore[arg-type]
        ],
        "saved_dir": [lambda: locate(config.load(tiny, [f"saved_dir={NOBODY}"]))],
        "storage_dir": [lambda: locate(config.load(tiny, [f"storage_dir={NOBODY}"]))],
        "--resume": [lambda: locate(settings).checkpoint(NOBODY)],
        "backdoor.badnets.trigger_path": [lambda: read_named(NOBODY, "backdoor.badnets.trigger_path")],
        "backdoor.refool.reflections": [lambda: refool.read_reflections(NOBODY, 1, 8, 8)],
    }
    for key, many in calls.items():
        for call in many:
            with pytest.raises(UserError, match=f"^{key}: {NOBODY}: "):
                call()


@pytest.mark.parametrize("command", [["-m", "data.poison", "--out", NOBODY], ["ASD.py", "--set", f"data.cache_dir={NOBODY}"]])
def test_an_unknown_home_folder_ends_a_program_in_one_line(command: list[str]) -> None:
    """The exit code is 2, and there is no traceback."""
    common = ["--config", "config/demo.yaml", "--gpu", "cpu"]
    done = subprocess.run([sys.executable, *command, *common], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and NOBODY in done.stderr and done.stderr.count("\n") == 1


LOCKED = """
import json, sys
from pathlib import Path
import numpy as np
from data import seeds
from data.io import tables
from data.attacks import refool
from data.datasets import cifar10, cifar100, folder, gtsrb, poisoned_set
from data.loading import name_of_folder
from data.io.image_file import read_named
from data.unlabeled import ImageFiles
from utils import checkpoint
from utils.config import Config
from utils.config.layers import read_with_base
from utils.run import Run
locked, linked, yaml = (Path(p) for p in sys.argv[1:])
run = Run("x", Path("saved"), Path("storage"))
listed = lambda root, **k: tables.to_raw(folder.load(folder.Settings(**k), str(root), False), (), linked / "c", False)
pictures = ImageFiles(linked / "train" / "a", (), (5, 5))
calls = {
    **{m.__name__: lambda m=m: m.load(m.Settings(), f"{locked}/x", False)
       for m in (folder, gtsrb, cifar10, cifar100, poisoned_set)},
    "name": lambda: name_of_folder(f"{locked}/x"),
    "seeds": lambda: seeds.read_seed_samples(locked / "s.txt", ("a",), np.zeros(1, np.int64), ("a",), 1),
    "trigger": lambda: read_named(f"{locked}/x.png", "trigger_path"),
    "reflections": lambda: refool.read_reflections(str(locked / "x"), 1, 8, 8),
    "images": lambda: ImageFiles(locked / "x", (), (5, 5)),
    "resume": lambda: run.checkpoint(f"{locked}/x.pt"),
    "read": lambda: checkpoint.read(locked / "x.pt"),
    "base": lambda: read_with_base(yaml, Config),
    "link": lambda: listed(linked),
    "skipped": lambda: listed(linked, skip_unreadable=True).names,
    "label": lambda: (len(list(pictures.batches(9))), pictures.unreadable),
    "class": lambda: listed(linked / "classes"),
}
found = {}
for name, call in calls.items():
    try:
        found[name] = ["", call()]
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Return the error of each reader for a path in an inaccessible folder; root needs setpriv for that."""
    base = tmp_path_factory.mktemp("locked")
    closed, linked = base / "closed", base / "linked"
    closed.mkdir()
    Image.new("RGB", (5, 5)).save(closed / "x.png")
    (linked / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(linked / "train" / "a" / "0.png")
    (linked / "train" / "a" / "1.png").symlink_to(closed / "x.png")
    (linked / "classes" / "train").mkdir(parents=True)
    (linked / "classes" / "train" / "a").symlink_to(closed / "a")
    (base / "x.yaml").write_text("base: closed/y.yaml\n")
    command = [sys.executable, "-c", LOCKED, str(closed), str(linked), str(base / "x.yaml")]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may enter every folder, and there is no setpriv to change that")
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    closed.chmod(0)
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    finally:
        closed.chmod(0o700)
    if done.returncode and "setpriv" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_path_without_access_is_one_line_with_its_setting(locked: dict[str, list[object]]) -> None:
    """For a path in an inaccessible folder, the error has the setting, the path and the reason, wherever users give paths."""
    keys = {
        "data.datasets.folder": "dataset_dir", "data.datasets.gtsrb": "dataset_dir", "data.datasets.cifar10": "dataset_dir",
        "data.datasets.cifar100": "dataset_dir", "data.datasets.poisoned_set": "set.json", "name": "dataset_dir",
        "seeds": "seed_samples", "trigger": "trigger_path", "reflections": "backdoor.refool.reflections",
        "images": "--images", "resume": "--resume", "read": "--resume", "base": "base", "class": "dataset_dir",
    }  # fmt: skip
    for name, key in keys.items():
        kind, text = locked[name]
        assert kind == "UserError" and "\n" not in str(text), (name, kind, text)
        for part in (key, "linked/classes/train/a" if name == "class" else "/closed/", "Permission denied"):
            assert part in str(text), (name, part, text)


def test_a_picture_that_links_to_a_path_without_access_is_unreadable(locked: dict[str, list[object]]) -> None:
    """Such an image is reported like any unreadable one, can be skipped, and does not prevent labeling the others."""
    kind, text = locked["link"]
    assert kind == "UserError" and "a/1.png" in str(text) and "Permission denied" in str(text)
    assert locked["skipped"] == ["", ["a/0.png"]]
    assert locked["label"] == ["", [1, [["1.png", "Permission denied"]]]]


def test_look_distinguishes_kinds(tmp_path: Path) -> None:
    """A missing path is absent, even if its name is impossible; a path that cannot be examined is a UserError."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert paths.is_file(tmp_path / "file", "k") and not paths.is_dir(tmp_path / "file", "k")
    assert paths.is_dir(tmp_path, "k") and not paths.is_file(tmp_path, "k")
    for absent in ("none", "file/below", "zero\0byte"):
        assert not paths.exists(tmp_path / absent, "k")
    for strange in ("loop", "x" * 300):
        with pytest.raises(UserError, match=r"^k: "):
            paths.exists(tmp_path / strange, "k")


def test_an_error_of_a_file_has_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any OSError with a file name becomes one line with that name and exit code 2; one without a file name is a bug and
    keeps its traceback."""
    with pytest.raises(SystemExit) as caught:
        cli.command("x.py", lambda: (tmp_path / "none").read_text())  # type: ignore[arg-type, return-value]
    said = capsys.readouterr().err
    assert caught.value.code == 2 and str(tmp_path / "none") in said and said.count("\n") == 1

    def fail() -> None:
        raise OSError("no file is named")

    with pytest.raises(OSError, match="no file is named"):
        cli.command("x.py", fail)


# -- Names -------------------------------------------------------------------------------------------------------------


def test_names_match_across_unicode_forms() -> None:
    """Names match exactly, or in the other Unicode form if only one name has it."""
    names = Names(["b\u00e9e", "e\u0301t", "x\u00e9", "xe\u0301"])
    assert names.find("be\u0301e") == "b\u00e9e" and names.find("\u00e9t") == "e\u0301t" and names.find("bee") is None
    assert names.find("x\u00e9") == "x\u00e9" and names.find("xe\u0301") == "xe\u0301"
    assert Names(["a\u030a\u0301", "\u00e5\u0301"]).find("\u01fb") is None  # either could be meant


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("ant", "bee", "cat"), "2 (cat)"),
        (("0", "1", "10"), "2 (folder 10)"),
        (("a", "b"), "2"),
        (("a", "b", "x\n\x1b[2J"), "2 ('x\\n\\x1b[2J')"),
        (("a", "b", os.fsdecode(b"b\xe9e")), "2 ('b\\udce9e')"),
    ],
)
def test_a_class_is_shown_with_its_name(names: tuple[str, ...], text: str) -> None:
    """A class is shown by number and name; numeric names are marked, and no name can break the line."""
    assert class_text(2, names) == text


def test_the_report_names_the_target_class(tiny: Path, tmp_path: Path) -> None:
    """The first line of the log and the titles of the plots have the name and the number of the target class."""
    settings = config.load(tiny, [])
    (tmp_path / "run" / "log").mkdir(parents=True)
    run, backdoor = Run("r", tmp_path / "run", tmp_path), Backdoor(Named("badnets", None), target_label=2)
    report = Report(run, settings, Subject(backdoor, ("0", "1", "10"), None, None, np.zeros((2, 0)), ""), 0)
    report.close()
    assert "target class 2 (folder 10)" in report.attack and "target class 2 (folder 10)" in report.title
