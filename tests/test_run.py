"""The folders of a run: created, locked, moved aside, never deleted."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, logged, run_script
from training import train_here

from engine.session import Session
from utils import checkpoint, config, files
from utils import run as run_module
from utils.config import Config
from utils.errors import UserError
from utils.run import Run, locate, make_ready, open_run
from utils.runtime.machine import Machine


def load(tiny: Path, *overrides: str) -> Config:
    """Return the tiny configuration with overrides."""
    return config.load(tiny, overrides)


def enter(tiny: Path, *overrides: str, fresh: bool = False) -> tuple[Run, list[str]]:
    """Open and close a run; return it with the lines it has logged."""
    settings = load(tiny, *overrides)
    run = locate(settings, tiny)
    with logged() as said, open_run(run, settings, fresh):
        return run, said


def fill(run: Run, mark: str) -> list[bytes]:
    """Write the files that a run leaves, each with its own contents; return those contents."""
    places = [
        run.saved / "poison_idx.npy",
        run.log / "metrics.jsonl",
        run.log / "tensorboard" / "events",
        run.checkpoints / "latest_model.pt",
        run.checkpoints / "best_model.pt",
        run.checkpoints / "epoch_3.pt",
    ]
    contents = []
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        contents.append(f"{mark} {place.name}".encode())
        place.write_bytes(contents[-1])
    return contents


def everything(folder: Path) -> dict[Path, bytes]:
    """Return the contents of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_has_its_folders_and_its_settings(tiny: Path, tmp_path: Path) -> None:
    """A run has an exact copy of the YAML and the resolved settings, in the folders that the YAML gives."""
    run, said = enter(tiny, "num_epochs=3")
    assert run.saved == tmp_path / "saved_data" / "tiny" and run.log == run.saved / "log" and run.log.is_dir()
    assert run.checkpoints == tmp_path / "storage" / "tiny" / "checkpoint" and run.checkpoints.is_dir()
    assert (run.saved / "tiny.yaml").read_bytes() == tiny.read_bytes()
    resolved = yaml.safe_load((run.saved / "config.yaml").read_text())
    assert resolved["num_epochs"] == 3 and resolved["global"]["epsilon"] == 0.5 and resolved["run"] == "tiny"
    assert config.load(run.saved / "config.yaml") == load(tiny, "num_epochs=3")
    assert said == []


def test_locating_a_run_creates_no_files(tiny: Path, tmp_path: Path) -> None:
    """Locating a run creates nothing: testing a checkpoint does not change the run."""
    locate(load(tiny))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


def test_the_kept_yaml_can_be_given_again(tiny: Path) -> None:
    """The run's copy of the YAML and its config.yaml can be passed as --config without being damaged."""
    run, _ = enter(tiny)
    before = everything(run.saved)
    for name in ("tiny.yaml", "config.yaml"):
        c = config.load(run.saved / name, ["run=tiny"])
        with open_run(locate(c, run.saved / name), c, False):
            pass
        after = everything(run.saved)
        assert after[Path("tiny.yaml")] == before[Path("tiny.yaml")]
        assert yaml.safe_load(after[Path("config.yaml")]) == yaml.safe_load(before[Path("config.yaml")])


def test_opening_a_run_changes_nothing(tiny: Path) -> None:
    """Opening a run without `--resume False` changes none of its files."""
    run, _ = enter(tiny)
    fill(run, "first")
    before = everything(run.saved), everything(run.checkpoints)
    _, said = enter(tiny)
    assert (everything(run.saved), everything(run.checkpoints)) == before
    assert said == []


@pytest.mark.parametrize("one_folder", [False, True])
def test_starting_over_moves_earlier_runs_aside(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_folder: bool
) -> None:
    """`--resume False`, even twice in the same second, keeps every file of every earlier run, and logs where."""
    monkeypatch.setattr(run_module.time, "strftime", lambda form: "earlier-20240102-030405")
    overrides = [f"saved_dir={tmp_path}/both", f"storage_dir={tmp_path}/both"] if one_folder else []
    contents: list[bytes] = []
    for mark in ("first", "second", "third"):
        run, said = enter(tiny, *overrides, fresh=True)
        assert not list(run.checkpoints.iterdir()) and not list(run.log.iterdir())
        assert not (run.saved / "poison_idx.npy").exists()
        assert (run.saved / "config.yaml").exists() and (run.saved / "tiny.yaml").exists()
        assert len(said) == (mark != "first")
        contents += fill(run, mark)
    files = everything(tmp_path)
    assert sorted(b for b in files.values() if b in contents) == sorted(contents)
    folders = {p for p in tmp_path.rglob("tiny.earlier-20240102-030405*") if p.is_dir()}
    assert len(folders) == 4
    line = said[0]
    assert "moved to" in line and sum(str(folder) in line.split() for folder in folders) == 2
    for folder in folders:
        marks = {b.split()[0] for p, b in everything(folder).items() if b in contents}
        assert len(marks) == 1, "an earlier run is kept in one piece, apart from the others"


def test_starting_over_with_the_yaml_of_the_run(tiny: Path) -> None:
    """`--config` may name the copy of the YAML in the run's folder: it stays, and a copy goes with the earlier run."""
    run, _ = enter(tiny)
    fill(run, "first")
    text = (run.saved / "tiny.yaml").read_bytes()
    enter(run.saved / "tiny.yaml", fresh=True)
    (saved,) = run.saved.parent.glob("tiny.earlier-*")
    assert (run.saved / "tiny.yaml").read_bytes() == (saved / "tiny.yaml").read_bytes() == text


def test_starting_over_with_a_foreign_config_yaml(tiny: Path, tmp_path: Path) -> None:
    """A YAML with the name of the run's own file, from another folder, and YAMLs of other names go with the earlier run."""
    foreign = tmp_path / "published" / "config.yaml"
    foreign.parent.mkdir()
    foreign.write_bytes(tiny.read_bytes())
    for number in (1, 2):
        settings = load(foreign, "run=r")
        run = locate(settings, foreign)
        with open_run(run, settings, True):
            pass
        fill(run, f"number {number}")
        (run.saved / "other.yaml").write_text(f"number: {number}")
    settings = load(foreign, "run=r")
    with open_run(run, settings, True):
        pass
    assert not (run.saved / "other.yaml").exists() and not list(run.checkpoints.iterdir())
    assert len(list(run.saved.parent.glob("r.earlier-*"))) == 2 == len(list(run.checkpoints.parents[1].glob("r.earlier-*")))


def test_an_interrupted_move_leaves_nothing_to_resume_from(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume False` moves the checkpoints first: if it is killed after them, the next command starts over as well."""
    run, _ = enter(tiny)
    fill(run, "first")
    move, moved = shutil.move, list[str]()

    def one(item: str, place: str) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(str(move(item, place)))

    monkeypatch.setattr(run_module.shutil, "move", one)
    with pytest.raises(KeyboardInterrupt):
        enter(tiny, fresh=True)
    assert not (run.checkpoints / "latest_model.pt").exists()


def test_a_copied_run_has_what_its_links_point_to(finished: Path, tmp_path: Path) -> None:
    """A run is copied before it goes back, also where its checkpoint is a link to another disk."""
    run, elsewhere = locate(load(finished)), tmp_path / "disk" / "latest.pt"
    elsewhere.parent.mkdir()
    latest = run.checkpoints / "latest_model.pt"
    shutil.move(latest, elsewhere)
    latest.symlink_to(elsewhere)
    before = latest.read_bytes()
    train(finished, "num_epochs=3", resume="best_model.pt")
    (storage,) = (tmp_path / "storage").glob("tiny.earlier-*")
    assert (storage / "checkpoint" / "latest_model.pt").read_bytes() == before
    assert checkpoint.epochs(latest) == 3


def test_a_new_run_from_the_last_checkpoint_of_another_has_it(finished: Path) -> None:
    """If nothing is left to train, the new run still has the checkpoint that its results are of."""
    source = locate(load(finished)).checkpoints / "latest_model.pt"
    other = train(finished, "run=other", resume=str(source))
    assert checkpoint.epochs(other.checkpoints / "latest_model.pt") == 6


def test_a_run_cannot_be_made_shorter(finished: Path) -> None:
    """A checkpoint with more epochs than the configuration is refused, and what to do is said."""
    with pytest.raises(UserError, match=r"has 6 epochs.*only 4"):
        train(finished, "num_epochs=4")


def test_a_missing_checkpoint_leaves_no_new_run(tiny: Path, tmp_path: Path) -> None:
    """`--resume` with the name of no checkpoint is refused before any folder is made."""
    done = run_script("ASD.py", "--config", tiny, "--gpu", "cpu", "--set", "run=typo", "--resume", "none.pt")
    assert done.returncode == 2 and "none.pt: no such checkpoint" in done.stderr
    assert not list(tmp_path.rglob("typo"))


def test_starting_over_the_first_time_says_nothing(tiny: Path, tmp_path: Path) -> None:
    """Without an earlier run nothing is moved or logged."""
    _, said = enter(tiny, fresh=True)
    assert said == [] and not list(tmp_path.rglob("*earlier*"))


def test_starting_over_forgets_the_poisoned_images_of_a_run_that_never_trained(tiny: Path) -> None:
    """`--resume False` also moves poison_idx.npy of a run that ended before its first epoch."""
    for name in ("poison_idx.npy", "set.json"):
        run, _ = enter(tiny)
        (run.saved / name).write_bytes(b"old " + name.encode())
        enter(tiny, fresh=True)
        assert not (run.saved / name).exists()
        assert b"old " + name.encode() in everything(run.saved.parent).values()


def test_a_run_that_never_trained_is_moved_aside_if_its_settings_change(tiny: Path) -> None:
    """Its poisoned images may be those of another attack. With the same settings, or others that change nothing, they stay."""
    run, _ = enter(tiny)
    index = run.saved / "poison_idx.npy"
    index.write_bytes(b"drawn")
    for override in ("num_epochs=5", "evidence=true", "data.placement=host"):
        _, said = enter(tiny, override)
        assert index.read_bytes() == b"drawn" and said == []
    for override in ("backdoor.poison_mode=exact", "seed.seed=8", "backdoor={lookalike: {}}"):
        index.write_bytes(b"drawn " + override.encode())
        _, said = enter(tiny, override)
        assert not index.exists() and "the earlier run was moved to" in said[-1]
        assert b"drawn " + override.encode() in everything(run.saved.parent).values()


def test_a_run_does_not_touch_the_runs_below_it(tiny: Path, tmp_path: Path) -> None:
    """Starting run `a` over does not change run `a/b`, and vice versa."""
    for first, second in (("a", "a/b"), ("c/d", "c")):
        outer, _ = enter(tiny, f"run={first}")
        inner, _ = enter(tiny, f"run={second}")
        fill(outer, first)
        fill(inner, second)
        before = everything(inner.saved / "log"), everything(inner.checkpoints), (inner.saved / "poison_idx.npy").read_bytes()
        enter(tiny, f"run={first}", fresh=True)
        after = everything(inner.saved / "log"), everything(inner.checkpoints), (inner.saved / "poison_idx.npy").read_bytes()
        assert before == after
        assert not list(outer.checkpoints.iterdir())


@pytest.mark.parametrize("which", ["saved_dir", "storage_dir"])
def test_a_folder_that_cannot_be_made(tiny: Path, tmp_path: Path, which: str) -> None:
    """If a regular file is in the way of a run's folder, one line has the path and the setting."""
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError) as caught:
        enter(tiny, f"{which}={tmp_path}/plain")
    assert f"{tmp_path}/plain" in str(caught.value) and which in str(caught.value) and "\n" not in str(caught.value)


HOLD = """
import sys, time
from pathlib import Path
from utils.run import Run, lock_run
saved = Path(sys.argv[1])
with lock_run(Run("tiny", saved, saved)):
    print("taken", flush=True)
    time.sleep(60)
"""


def test_a_run_of_two_saved_dirs_is_written_by_one_process(tiny: Path, tmp_path: Path) -> None:
    """The checkpoints are locked as well: another saved_dir does not make it another run."""
    settings = load(tiny)
    with open_run(locate(settings, tiny), settings, False), pytest.raises(UserError, match="is writing this run"):
        enter(tiny, f"saved_dir={tmp_path}/second", fresh=True)


def test_a_run_is_written_by_one_process(tiny: Path) -> None:
    """A second process is refused in one line that names the first; after kill -9 the run is unlocked at once."""
    run, _ = enter(tiny)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.saved)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        fill(run, "first")
        before = everything(run.saved), everything(run.checkpoints)
        for fresh in (False, True):
            with pytest.raises(UserError) as caught:
                enter(tiny, fresh=fresh)
            line = str(caught.value)
            assert str(run.saved) in line and str(holder.pid) in line and "run=NAME" in line and "\n" not in line
        assert (everything(run.saved), everything(run.checkpoints)) == before
        enter(tiny, "run=another")
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        deadline = time.monotonic() + 10
        while True:
            try:
                enter(tiny)
                break
            except UserError:
                assert time.monotonic() < deadline
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_lock_does_not_stop_a_run(tiny: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """If locks are not supported, the run starts after a line with the reason."""
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(files.fcntl, "flock", fail)
        _, said = enter(tiny)
        assert len(said) == 2, "one line for each folder"
        assert all(os.strerror(number) in line and "is writing" not in line and "\n" not in line for line in said)
        patch.setattr(files, "fcntl", None)  # a system without such locks
        assert len(enter(tiny)[1]) == 2
    assert enter(tiny)[1] == []


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_lock_is_reported(tiny: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Both error codes for a held lock are reported as a second writer; another run name works, as advised."""
    flock = files.fcntl.flock

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"is writing this run.*run=NAME"):
        patch.setattr(files.fcntl, "flock", fail)
        enter(tiny)
    assert files.fcntl.flock is flock
    enter(tiny, "run=NAME")


def test_a_checkpoint_is_named_or_given_by_path(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume NAME` means the run's own checkpoint if it exists, otherwise a file in the working directory; a path,
    including `./NAME`, means that file."""
    run, _ = enter(tiny)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "latest_model.pt", tmp_path / "other" / "x.pt"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    assert run.checkpoint("latest_model.pt").samefile(tmp_path / "latest_model.pt")
    (run.checkpoints / "latest_model.pt").write_bytes(b"")
    (run.checkpoints / "sub").mkdir()
    (run.checkpoints / "sub" / "y.pt").write_bytes(b"")
    assert run.checkpoint("latest_model.pt") == run.checkpoints / "latest_model.pt"
    assert run.checkpoint("./latest_model.pt").samefile(tmp_path / "latest_model.pt")
    assert run.checkpoint("other/x.pt").samefile(tmp_path / "other" / "x.pt")
    assert run.checkpoint(str(tmp_path / "other" / "x.pt")) == tmp_path / "other" / "x.pt"
    assert run.checkpoint("sub/y.pt") == run.checkpoints / "sub" / "y.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run.checkpoint("~/other/x.pt") == tmp_path / "other" / "x.pt"


@pytest.mark.parametrize("name", ["nope.pt", "a/b/nope.pt", "/nowhere/nope.pt", "./nope.pt", "false"])
def test_a_missing_checkpoint_is_answered_with_those_of_the_run(tiny: Path, name: str) -> None:
    """The error shows the missing name as given, and the names that it lists work."""
    run, _ = enter(tiny)
    with pytest.raises(UserError, match=r"no such checkpoint") as caught:
        run.checkpoint(name)
    assert str(caught.value).startswith(f"--resume {name}: ") and ("train first" in str(caught.value)) == (name != "false")
    names = ("best_model.pt", "latest_model.pt")
    for there in names:
        (run.checkpoints / there).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run.checkpoint(name)
    line = str(caught.value)
    assert line.startswith(f"--resume {name}: ") and "\n" not in line
    if name == "false":
        assert "did you mean False" in line
    else:
        assert all(there in line and run.checkpoint(there).is_file() for there in names)


# -- Going back to an earlier checkpoint -------------------------------------------------------------------------------


def train(tiny: Path, *overrides: str, resume: str = "") -> Run:
    """Train in this process as ASD.py does; return the run."""
    return train_here(load(tiny, *overrides), tiny, resume)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six epochs with its best epoch second; the tests use copies."""
    folder = tmp_path_factory.mktemp("six")
    path = write_yaml(folder)
    run = train(path, "num_epochs=2")
    saved = torch.load(run.checkpoints / "latest_model.pt", weights_only=True)
    for name in ("best_model.pt", "latest_model.pt"):
        (run.checkpoints / name).unlink(missing_ok=True)
        torch.save(saved | {"best_acc": 1.0, "best_epoch": 2}, run.checkpoints / name)
    train(path)
    return folder


@pytest.fixture
def finished(six: Path, tmp_path: Path) -> Path:
    """The YAML of a copy of that run."""
    for name in ("saved_data", "storage"):
        shutil.copytree(six / name, tmp_path / name)
    return write_yaml(tmp_path)


def write_yaml(folder: Path) -> Path:
    """Write the tiny configuration with its folders in this one."""
    path = folder / "tiny.yaml"
    raw = TINY | {"saved_dir": f"{folder}/saved_data", "storage_dir": f"{folder}/storage"}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def rows(folder: Path) -> list[int]:
    """Return the epochs in a run's metrics.jsonl."""
    return [json.loads(line)["epoch"] for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def test_going_back_keeps_what_was_there(finished: Path, tmp_path: Path, said: list[str]) -> None:
    """`--resume best_model.pt` on a run with later epochs first copies the run and logs where to; training then resumes and
    reproduces the same epochs."""
    run = locate(load(finished))
    before, weights = everything(run.saved), everything(run.checkpoints)
    train(finished, "num_epochs=4", resume="best_model.pt")
    (line,) = [line for line in said if ".earlier-" in line]
    assert "from epoch 6 to epoch 2" in line
    (saved,), (storage,) = ([*(tmp_path / name).glob("tiny.earlier-*")] for name in ("saved_data", "storage"))
    assert str(saved) in line and str(storage) in line
    kept = everything(saved)
    assert kept == {name: content for name, content in before.items() if name != Path(".lock")}
    assert everything(storage / "checkpoint") == weights
    assert yaml.safe_load(kept[Path("config.yaml")])["num_epochs"] == 6
    assert yaml.safe_load((run.saved / "config.yaml").read_text())["num_epochs"] == 4
    assert rows(run.saved) == [0, 1, 2, 3] and rows(saved) == [0, 1, 2, 3, 4, 5]
    assert checkpoint.epochs(run.checkpoints / "latest_model.pt") == 4
    assert checkpoint.epochs(run.checkpoints / "best_model.pt") == 2
    assert not (run.log / "split_meta-split.png").exists() and (run.log / "split_class-agnostic.png").exists()
    then, now = (
        checkpoint.read(storage / "checkpoint" / "latest_model.pt"),
        checkpoint.read(run.checkpoints / "latest_model.pt"),
    )
    for one, other in zip(then["history"][:4], now["history"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    for name in ("suspects.csv", "evidence.npz"):
        assert (run.saved / name).read_bytes() != kept[Path(name)]

    train(finished)  # the usual command goes on from there and ends where the first run did
    again = checkpoint.read(run.checkpoints / "latest_model.pt")
    assert all(torch.equal(tensor, again["model_state_dict"][name]) for name, tensor in then["model_state_dict"].items())
    assert len(list((tmp_path / "saved_data").glob("tiny.earlier-*"))) == 1


def test_nothing_to_do_changes_nothing(finished: Path, tmp_path: Path, said: list[str]) -> None:
    """An earlier checkpoint that already has all requested epochs leaves the run unchanged."""
    run = locate(load(finished))
    before = everything(tmp_path)
    train(finished, "num_epochs=2", resume="best_model.pt")
    assert any("nothing to do" in line and "has 6" in line for line in said)
    after = everything(tmp_path)
    lock = (run.saved / ".lock").relative_to(tmp_path)
    assert {k: v for k, v in after.items() if k != lock} == {k: v for k, v in before.items() if k != lock}


def test_a_command_that_trains_nothing_leaves_the_settings_of_the_run(finished: Path) -> None:
    """config.yaml says how the run was trained, whatever later commands allow themselves."""
    run = locate(load(finished))
    before = (run.saved / "config.yaml").read_bytes(), (run.log / "report.html").read_bytes()
    train(finished, "runtime.amp=true", "sync_bn=true")
    assert ((run.saved / "config.yaml").read_bytes(), (run.log / "report.html").read_bytes()) == before


LONGER = ("num_epochs=8", "global.epoch_third=8")


def test_an_extended_run_has_the_results_of_its_last_epoch(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is trained on and killed before its results are written has none of the shorter run in the end."""
    run = locate(load(finished))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "conclude", lambda _: sys.exit(9))
        with pytest.raises(SystemExit):
            train(finished, *LONGER)
    assert rows(run.saved) == [*range(8)]
    train(finished, *LONGER, "evidence=false")
    assert json.loads((run.log / "confusion.json").read_text())["epoch"] == 7
    with open(run.saved / "suspects.csv", newline="") as file:
        assert max(int(row["epochs_in_clean_pool"]) for row in csv.DictReader(file)) == 8
    assert not (run.saved / "evidence.npz").exists(), "that of epoch 6"


def test_a_checkpoint_of_another_run_costs_no_results(finished: Path, tmp_path: Path) -> None:
    """A run that goes on from another run's checkpoint is copied first; if there is nothing to train, nothing changes."""
    run, foreign = locate(load(finished)), tmp_path / "foreign.pt"
    other = train(finished, "run=other", "num_epochs=7", "global.epoch_third=8")
    shutil.move(other.checkpoints / "latest_model.pt", foreign)
    before = everything(run.log), everything(run.checkpoints)
    train(finished, "num_epochs=7", "global.epoch_third=8", resume=str(foreign))
    assert (everything(run.log), everything(run.checkpoints)) == before
    train(finished, *LONGER, resume=str(foreign))
    (saved,), (storage,) = ([*(tmp_path / name).glob("tiny.earlier-*")] for name in ("saved_data", "storage"))
    assert everything(storage / "checkpoint") == before[1] and rows(saved) == [*range(6)] and rows(run.saved) == [*range(8)]
    now = checkpoint.read(run.checkpoints / "latest_model.pt")
    best = checkpoint.epochs(run.checkpoints / "best_model.pt")
    assert best in (0, now["best_epoch"]), "not the one of the earlier run"


def test_a_refused_command_leaves_the_settings_of_the_run(finished: Path, tmp_path: Path) -> None:
    """Settings that the checkpoint refuses are not written into config.yaml."""
    run = locate(load(finished))
    before = everything(run.saved), everything(run.checkpoints)
    with pytest.raises(UserError, match=r"global\.epsilon"):
        train(finished, "global.epsilon=0.4", "num_epochs=4", resume="best_model.pt")
    after = everything(run.saved), everything(run.checkpoints)
    for there, now in zip(before, after, strict=True):
        there.pop(Path(".lock"), None), now.pop(Path(".lock"), None)
        assert there == now


def test_going_back_where_the_latest_checkpoint_is_damaged(finished: Path, tmp_path: Path) -> None:
    """The error for a damaged latest_model.pt suggests another checkpoint, which works; the damaged one is kept."""
    run = locate(load(finished))
    (run.checkpoints / "latest_model.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"use another one: best_model\.pt"):
        train(finished, "num_epochs=3")
    train(finished, "num_epochs=3", resume="best_model.pt")
    assert checkpoint.epochs(run.checkpoints / "latest_model.pt") == 3
    (storage,) = (tmp_path / "storage").glob("tiny.earlier-*")
    assert (storage / "checkpoint" / "latest_model.pt").read_bytes() == b"half"


def test_a_best_model_of_a_later_epoch_does_not_stay(finished: Path, tmp_path: Path) -> None:
    """A run that goes back behind its best epoch has no best_model.pt of an epoch that it has not trained yet."""
    run = locate(load(finished))
    shutil.copy(run.checkpoints / "best_model.pt", tmp_path / "early.pt")
    shutil.copy(run.checkpoints / "latest_model.pt", run.checkpoints / "best_model.pt")
    train(finished, "num_epochs=3", resume=str(tmp_path / "early.pt"))
    assert checkpoint.epochs(run.checkpoints / "best_model.pt") == 2
    assert checkpoint.epochs(run.checkpoints / "latest_model.pt") == 3


def test_a_copy_that_does_not_fit_on_the_disk_leaves_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk becomes full while the run is copied, one line reports it, and the run is unchanged."""
    run = locate(load(finished))
    before = everything(run.saved / "log"), everything(run.checkpoints)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"free some space"):
        patch.setattr(shutil, "copy2", full)
        train(finished, "num_epochs=4", resume="best_model.pt")
    assert (everything(run.saved / "log"), everything(run.checkpoints)) == before
    assert not list(tmp_path.rglob("*.earlier-*"))


def test_a_run_that_begins_from_another_ones_checkpoint_has_a_best_model(finished: Path) -> None:
    """Until a better epoch comes, it is the checkpoint that the run began from; the log and the file agree."""
    first = locate(load(finished))
    other = train(
        finished, "run=other", "num_epochs=7", "global.epoch_third=7", resume=str(first.checkpoints / "latest_model.pt")
    )
    best, saved = (checkpoint.read(other.checkpoints / name) for name in ("best_model.pt", "latest_model.pt"))
    assert saved["best_epoch"] == best["epoch"] + 1
    assert saved["best_acc"] == next(row["clean_accuracy"] for row in saved["history"] if row["epoch"] == best["epoch"])


def test_all_processes_decide_alike_on_a_checkpoint_of_another_run(finished: Path) -> None:
    """Rank 0 puts a finished checkpoint into the new run only once the other ranks have seen the folder without it."""
    settings = load(finished, "run=other")
    run, loaded = locate(settings), locate(load(finished)).checkpoints / "latest_model.pt"
    run.log.mkdir(parents=True)
    run.checkpoints.mkdir(parents=True)
    state = SimpleNamespace(epoch=6, best_epoch=0)
    answers = []

    class First(Machine):
        """Rank 0, which waits until the other rank has decided."""

        def barrier(self) -> None:
            """Let the other rank decide."""
            other = SimpleNamespace(rank=1, barrier=lambda: None)
            answers.append(make_ready(run, settings, loaded, state, other))

    answers.append(make_ready(run, settings, loaded, state, First(torch.device("cpu"))))
    assert answers == [True, True] and (run.checkpoints / "latest_model.pt").exists()
