"""A run's folders: made, locked, moved aside, never deleted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from utils import config
from utils import run as run_module
from utils.config import Config
from utils.errors import UserError
from utils.run import Run, locate, open_run


def load(tiny: Path, *overrides: str) -> Config:
    """The tiny configuration with overrides."""
    return config.load(tiny, overrides)


def enter(tiny: Path, *overrides: str, fresh: bool = False) -> tuple[Run, list[str]]:
    """Open a run and let go of it again; return it with what was said."""
    said: list[str] = []
    run, lock = open_run(load(tiny, *overrides), tiny, fresh, said.append)
    lock.close()
    return run, said


def fill(run: Run, mark: str) -> list[bytes]:
    """Leave what a run leaves, every file with contents of its own; return those contents."""
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
    """Every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_has_its_folders_and_its_settings(tiny: Path, tmp_path: Path) -> None:
    """A run keeps the YAML word for word and the resolved settings, in the folders that the YAML names."""
    run, said = enter(tiny, "num_epochs=3")
    assert run.saved == tmp_path / "saved_data" / "tiny" and run.log == run.saved / "log" and run.log.is_dir()
    assert run.checkpoints == tmp_path / "storage" / "tiny" / "checkpoint" and run.checkpoints.is_dir()
    assert (run.saved / "tiny.yaml").read_bytes() == tiny.read_bytes()
    resolved = yaml.safe_load((run.saved / "config.yaml").read_text())
    assert resolved["num_epochs"] == 3 and resolved["global"]["epsilon"] == 0.5 and resolved["run"] == "tiny"
    assert config.load(run.saved / "config.yaml") == load(tiny, "num_epochs=3")
    assert said == []


def test_looking_a_run_up_makes_nothing(tiny: Path, tmp_path: Path) -> None:
    """Where a run lies can be asked without leaving a trace: testing a checkpoint changes no run."""
    locate(load(tiny))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


def test_the_kept_yaml_can_be_given_again(tiny: Path) -> None:
    """The run's own copy of the YAML and its config.yaml may be given as --config without being damaged."""
    run, _ = enter(tiny)
    before = everything(run.saved)
    for name in ("tiny.yaml", "config.yaml"):
        c = config.load(run.saved / name, ["run=tiny"])
        open_run(c, run.saved / name, False, print)[1].close()
        after = everything(run.saved)
        assert after[Path("tiny.yaml")] == before[Path("tiny.yaml")]
        assert yaml.safe_load(after[Path("config.yaml")]) == yaml.safe_load(before[Path("config.yaml")])


def test_going_on_changes_nothing_of_a_run(tiny: Path) -> None:
    """Opening a run without `--resume False` leaves all that is there."""
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
    """`--resume False`, twice in the same second too, keeps every file of every earlier run, and says where."""
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
    told = said[0]
    assert "moved aside" in told and sum(str(folder) in told.split() for folder in folders) == 2
    for folder in folders:
        marks = {b.split()[0] for p, b in everything(folder).items() if b in contents}
        assert len(marks) == 1, "an earlier run is kept in one piece, apart from the others"


def test_starting_over_the_first_time_says_nothing(tiny: Path, tmp_path: Path) -> None:
    """Where there is no earlier run there is nothing to move."""
    _, said = enter(tiny, fresh=True)
    assert said == [] and not list(tmp_path.rglob("*earlier*"))


def test_starting_over_forgets_the_poisoned_images_of_a_run_that_never_trained(tiny: Path) -> None:
    """A run that ended before its first epoch leaves poison_idx.npy alone: `--resume False` moves that aside too."""
    for name in ("poison_idx.npy", "set.json"):
        run, _ = enter(tiny)
        (run.saved / name).write_bytes(b"old " + name.encode())
        enter(tiny, fresh=True)
        assert not (run.saved / name).exists()
        assert b"old " + name.encode() in everything(run.saved.parent).values()


def test_a_run_does_not_touch_the_runs_below_it(tiny: Path, tmp_path: Path) -> None:
    """Starting run `a` over leaves run `a/b` as it is, and the other way round."""
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
    """A plain file where a run's folder should be is told in one line with the path and the setting."""
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError) as caught:
        enter(tiny, f"{which}={tmp_path}/plain")
    assert f"{tmp_path}/plain" in str(caught.value) and which in str(caught.value) and "\n" not in str(caught.value)


HOLD = """
import sys, time
from pathlib import Path
from utils.run import Run, take
saved = Path(sys.argv[1])
lock = take(Run("tiny", saved, saved))
print("taken", flush=True)
time.sleep(60)
"""


def test_a_run_is_written_by_one_process(tiny: Path) -> None:
    """A second process is refused in one line that names the first; after a kill -9 the run is free at once."""
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


def test_a_checkpoint_is_named_or_given_by_path(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume NAME` means the run's own file even if one of that name lies here; a path means the file it leads to."""
    run, _ = enter(tiny)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latest_model.pt").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.pt").write_bytes(b"")
    assert run.checkpoint("latest_model.pt") == run.checkpoints / "latest_model.pt"
    assert run.checkpoint("other/x.pt").resolve() == tmp_path / "other" / "x.pt"
    assert run.checkpoint(str(tmp_path / "other" / "x.pt")) == tmp_path / "other" / "x.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run.checkpoint("~/other/x.pt") == tmp_path / "other" / "x.pt"
