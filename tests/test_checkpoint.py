"""Checkpoints: complete or absent, sufficient for resuming, and unable to run code."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY
from torch import Tensor, nn

from model.classifier import build_classifier
from model.optimizer import build_optimizer, build_scheduler
from utils import checkpoint, config, files, plugins
from utils.checkpoint import State
from utils.config.compatibility import flatten, other_tests, refuse_other_settings, stage_ends
from utils.config.schema import as_dict
from utils.errors import UserError


def make_state(path: Path, overrides: tuple[str, ...] = (), steps: int = 0) -> tuple[State, dict[str, Any]]:
    """Return the state of a run of the tiny configuration after a few steps, and the configuration as it is saved."""
    path = path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    c = config.load(path, overrides)
    model = build_classifier(c.network, c.num_classes, c.seed.seed)
    optimizer = build_optimizer(c.optimizer, model.parameters())
    empty = torch.zeros(20, dtype=torch.int32)  # of a training set of 20 images
    state = State(model, optimizer, build_scheduler(c.lr_scheduler, optimizer, c.num_epochs), epochs_in_clean_pool=empty)
    if steps:
        train(state, steps)
        state.epoch = steps
        state.best_acc, state.best_epoch = 0.8125, 2
        state.history = [{"epoch": e, "clean_accuracy": 0.1 + e / 3, "clean_pool_size": None} for e in range(steps)]
        state.clean_pool = torch.tensor([3, 1, 4, 15])
        state.epochs_in_clean_pool = torch.arange(20, dtype=torch.int32)
    return state, as_dict(c)


def train(state: State, steps: int) -> None:
    """Train a few steps on noise, with the schedule."""
    for step in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        state.optimizer.zero_grad()
        nn.functional.cross_entropy(state.model.train()(images), torch.arange(4)).backward()
        state.optimizer.step()
        if state.scheduler is not None:
            state.scheduler.step()


def same(a: Any, b: Any) -> bool:
    """Return whether two trees of containers and tensors are equal bit for bit, including types."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def snapshot(state: State) -> list[Any]:
    """Return everything that a state consists of."""
    schedule = state.scheduler.state_dict() if state.scheduler else None
    parts = [state.model.state_dict(), state.optimizer.state_dict(), schedule, state.history, state.epoch, state.best_acc]
    return [*parts, state.best_epoch, state.clean_pool, state.epochs_in_clean_pool]


def save(path: Path, state: State, settings: dict[str, Any]) -> None:
    """Write the state of a finished epoch as a checkpoint."""
    checkpoint.write(path, checkpoint.contents(state, settings))


def refusal(path: Path, state: State, settings: dict[str, Any]) -> str:
    """Return the error, one line that names the file, with which loading fails."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, state, settings)
    line = str(caught.value)
    assert line.startswith(f"{path}:") and "\n" not in line
    return line


PLANS = [
    ("lr_scheduler=cosine_annealing",),
    ("optimizer={SGD: {lr: 0.1, momentum: 0.9, nesterov: true}}", "lr_scheduler={multi_step: {milestones: [1, 2]}}"),
    (),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_loaded_state_is_the_saved_one(tmp_path: Path, plan: tuple[str, ...]) -> None:
    """Weights, BN statistics, optimizer, schedule, history and pools are restored bit for bit, and training continues
    identically."""
    state, settings = make_state(tmp_path, plan, steps=2)
    save(tmp_path / "latest_model.pt", state, settings)
    fresh, _ = make_state(tmp_path, plan)
    assert not same(snapshot(fresh), snapshot(state))
    checkpoint.load(tmp_path / "latest_model.pt", fresh, settings)
    assert same(snapshot(fresh), snapshot(state))
    train(state, 2)
    train(fresh, 2)
    assert same(snapshot(fresh), snapshot(state))


def test_a_checkpoint_has_the_originals_keys(tmp_path: Path) -> None:
    """The authors' code can open a checkpoint: it has their keys, and `epoch` is the finished epoch."""
    state, settings = make_state(tmp_path, PLANS[0], steps=3)
    save(tmp_path / "a.pt", state, settings)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["epoch"] == 2 and saved["best_acc"] == 0.8125 and saved["best_epoch"] == 2
    assert saved["result"] == state.history[-1]
    assert same(dict(saved["model_state_dict"]), dict(state.model.state_dict()))
    assert {"optimizer_state_dict", "scheduler_state_dict"} <= set(saved)


@pytest.mark.parametrize(
    ("error", "raised", "remedy"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError, "free some space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), UserError, "free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), UserError, "writable"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (ValueError("odd"), ValueError, "odd"),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException, raised: type, remedy: str) -> None:
    """After a failed write the old file is unchanged, and no other file remains."""
    path = tmp_path / "latest_model.pt"
    path.write_bytes(b"old" * 1000)

    def write(file: Any) -> None:
        file.write(b"new")
        raise error

    with pytest.raises(raised) as caught:
        files.write_atomically(path, write)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)
    if raised is UserError:
        assert str(caught.value).startswith(f"{path}:")
    assert path.read_bytes() == b"old" * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    """While a file is being written, readers see the old one; missing folders are created."""
    path = tmp_path / "new" / "folder" / "a.bin"
    files.write_text(path, "old")

    def write(file: Any) -> None:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "old"
        file.write(b" and half")

    files.write_atomically(path, write)
    assert path.read_text() == "half and half"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    """A path below a regular file is refused in one line."""
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError, match="cannot be written") as caught:
        files.write_text(tmp_path / "plain" / "a.txt", "y")
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is full in the middle of a checkpoint, the earlier one still loads."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "run" / "latest_model.pt"
    save(path, state, settings)
    before = copy.deepcopy(snapshot(state))
    train(state, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left.*free some space"):
        patch.setattr(os, "fsync", full)
        save(path, state, settings)
    fresh, _ = make_state(tmp_path)
    checkpoint.load(path, fresh, settings)
    assert same(snapshot(fresh), before)
    assert [p.name for p in path.parent.iterdir()] == ["latest_model.pt"]


# -- Written in a thread ------------------------------------------------------------------------------------------------


def slow(path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make writes wait until the returned event is set, or a timeout passes."""
    go_on, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go_on.wait(seconds), fsync(descriptor))[1])
    return go_on


@pytest.mark.parametrize("plan", PLANS)
def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: tuple[str, ...]
) -> None:
    """The checkpoint has the state at the moment of saving, whatever training changes meanwhile. `save` does not wait for
    the disk, and both names exist before the epoch is reported."""
    state, settings = make_state(tmp_path, plan, steps=2)
    before, latest, best = copy.deepcopy(snapshot(state)), tmp_path / "latest_model.pt", tmp_path / "best_model.pt"
    go_on, reported = slow(tmp_path, 30, monkeypatch), []
    with checkpoint.Writer() as writer:
        writer.save(latest, state, settings, [best], lambda: reported.append((latest.exists(), best.exists())))
        train(state, 2)
        state.history.append({"epoch": 2})
        state.epochs_in_clean_pool += 1
        assert not latest.exists() and not best.exists() and reported == []
        go_on.set()
    assert reported == [(True, True)]
    assert not same(snapshot(state), before)
    for path in (latest, best):
        fresh, _ = make_state(tmp_path, plan)
        checkpoint.load(path, fresh, settings)
        assert same(snapshot(fresh), before)
    assert latest.read_bytes() == best.read_bytes()


def test_a_checkpoint_of_the_thread_has_what_a_plain_one_has(tmp_path: Path) -> None:
    """Checkpoints written by the thread and directly have the same keys, values and types, in the same order."""
    state, settings = make_state(tmp_path, PLANS[0], steps=2)
    save(tmp_path / "a.pt", state, settings)
    with checkpoint.Writer() as writer:
        writer.save(tmp_path / "b.pt", state, settings)
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert same(one, other)
    assert one["model_state_dict"]._metadata == other["model_state_dict"]._metadata


@pytest.mark.parametrize("leave", ["next save", "wait", "end", "Ctrl-C"])
def test_a_failed_write_is_raised_in_the_main_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: str) -> None:
    """If the disk is full, the main thread gets the usual error at its next step or at the end of the run. The earlier
    checkpoint is intact, and the epoch is not reported."""
    state, settings = make_state(tmp_path, steps=1)
    path, reported = tmp_path / "run" / "latest_model.pt", []
    save(path, state, settings)
    before = copy.deepcopy(snapshot(state))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left.*free some space") as caught:
        patch.setattr(os, "fsync", full)
        with checkpoint.Writer() as writer:
            train(state, 1)
            writer.save(path, state, settings, [path.with_name("best_model.pt")], lambda: reported.append(1))
            if leave == "next save":
                writer.save(path, state, settings)
            elif leave == "wait":
                writer.wait()
            elif leave == "Ctrl-C":
                raise KeyboardInterrupt
    assert str(caught.value).startswith(f"{path}:") and "\n" not in str(caught.value) and reported == []
    fresh, _ = make_state(tmp_path)
    checkpoint.load(path, fresh, settings)
    assert same(snapshot(fresh), before)
    assert [p.name for p in path.parent.iterdir()] == ["latest_model.pt"]
    with checkpoint.Writer() as writer:  # the advice followed: there is space
        writer.save(path, state, settings)
    checkpoint.load(path, fresh, settings)
    assert same(snapshot(fresh), snapshot(state))


def test_ctrl_c_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped while its checkpoint is being written completes it."""
    state, settings = make_state(tmp_path, steps=1)
    slow(tmp_path, 0.2, monkeypatch)
    with pytest.raises(KeyboardInterrupt), checkpoint.Writer() as writer:
        writer.save(tmp_path / "latest_model.pt", state, settings)
        raise KeyboardInterrupt
    fresh, _ = make_state(tmp_path)
    checkpoint.load(tmp_path / "latest_model.pt", fresh, settings)
    assert same(snapshot(fresh), snapshot(state))


KILLED = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from torch import nn
from utils import checkpoint
from utils.reporting.runlog import write_metrics

folder = Path(sys.argv[1])
model = nn.Linear(400, 400)
state = checkpoint.State(model, torch.optim.Adam(model.parameters()), None)
model(torch.randn(2, 400)).sum().backward()
with checkpoint.Writer() as writer:
    for epoch in range(100_000):
        state.optimizer.step()
        state.history = [{"epoch": epoch}]
        state.epoch = epoch + 1
        best = [folder / "best_model.pt"] if epoch % 2 == 0 else []
        writer.save(folder / "latest_model.pt", state, {}, best, lambda row=state.history: write_metrics(folder, row))
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """After kill -9 at any moment all checkpoints are complete: the best model is never older than `latest_model.pt`
    records, and `metrics.jsonl` is never ahead of it."""
    for delay in (0.0, 0.013, 0.031, 0.052):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        try:
            give_up = time.monotonic() + 60
            while not (tmp_path / "metrics.jsonl").exists():
                assert process.poll() is None and time.monotonic() < give_up
                time.sleep(0.002)
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        latest, best = (checkpoint.read(tmp_path / name)["epoch"] for name in ("latest_model.pt", "best_model.pt"))
        (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(row)["epoch"] in (latest, latest - 1)
        assert best == latest if latest % 2 == 0 else best in (latest - 1, latest + 1)
        (tmp_path / "metrics.jsonl").unlink()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from utils import checkpoint
from utils.cli import command

def main():
    model = nn.Linear(300, 300)
    state = checkpoint.State(model, torch.optim.Adam(model.parameters()), None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    checkpoint.write(Path(sys.argv[1]), checkpoint.contents(state, {}))

command("save.py", main)
"""


def test_a_size_limit_ends_in_one_line(tmp_path: Path) -> None:
    """A process that exceeds its file size limit ends with one line and exit code 2, and the old file is intact."""
    path = tmp_path / "latest_model.pt"
    path.write_bytes(b"old")
    uncovered = {key: value for key, value in os.environ.items() if "COV" not in key}  # its data file would not fit either
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        env=uncovered | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"save.py: error: {path}: " in done.stderr and "free some space" in done.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


class Shell:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Evaluated:
    """A pickle that evaluates an expression when it is loaded."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.expression,)


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize("kind", ["shell", "eval", "weights"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, kind: str, zipped: bool | None) -> None:
    """A checkpoint that contains code is refused in one line without running the code, in each of torch's formats."""
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    code = Evaluated(f"open({str(marker)!r}, 'w').close()") if kind == "eval" else Shell(f"touch '{marker}'")
    state, settings = make_state(tmp_path, steps=1)
    saved = {"epoch": 0, "model_state_dict": state.model.state_dict(), "optimizer_state_dict": code}
    if kind == "weights":
        saved["model_state_dict"] = OrderedDict(a=code)
    if zipped is None:
        path.write_bytes(pickle.dumps(saved))
        pickle.loads(path.read_bytes())
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        torch.load(path, weights_only=False)
    assert marker.exists(), "the code is live: an unguarded loader runs it"
    marker.unlink()
    line = refusal(path, state, settings)
    assert not marker.exists()
    assert "malicious" in line or zipped is None
    with pytest.raises(UserError):
        checkpoint.read(path)
    assert not marker.exists()


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint truncated at any position is refused with its name."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "cut.pt"
    save(path, state, settings)
    whole = path.read_bytes()
    for length in (
        0,
        1,
        2,
        10,
        100,
        1000,
        len(whole) // 3,
        len(whole) // 2,
        len(whole) - 1000,
        len(whole) - 20,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        assert "truncated" in refusal(path, state, settings)
    path.write_bytes(whole)
    checkpoint.load(path, state, settings)


def test_a_changed_byte_of_a_weight_is_refused(tmp_path: Path) -> None:
    """The checksums inside the file are compared: torch itself would load wrong weights without a word."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "flipped.pt"
    save(path, state, settings)
    content = bytearray(path.read_bytes())
    name, weight = next((key, w) for key, w in state.model.state_dict().items() if w.numel() > 20)
    at = content.find(weight.detach().numpy().tobytes())
    assert at > 0
    content[at + 3] ^= 0x80  # the sign of the first value
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model_state_dict"][name], weight)
    assert "truncated, or not a checkpoint" in refusal(path, state, settings)


def test_a_truncated_checkpoint_of_the_old_format_is_refused(tmp_path: Path) -> None:
    """Also one that torch wrote before its files were archives."""
    state, settings = make_state(tmp_path, steps=1)
    torch.save(
        {"epoch": 0, "model_state_dict": state.model.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    whole = (tmp_path / "old.pt").read_bytes()
    for content in (*(whole[: len(whole) * i // 20] for i in range(20)), whole[:300], b"\x80\x02X\x00"):
        (tmp_path / "cut.pt").write_bytes(content)
        assert "truncated" in refusal(tmp_path / "cut.pt", state, settings)


@pytest.mark.parametrize("content", [b"", b"hello, world\n", b"\x80\x02}", b"PK\x03\x04" + bytes(40), bytes(range(256)) * 9])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty file, a text file and a foreign binary are refused with their names."""
    state, settings = make_state(tmp_path)
    path = tmp_path / "odd.pt"
    path.write_bytes(content)
    refusal(path, state, settings)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {},
        {"epoch": 3},
        {"model_state_dict": {}},
        {"model_state_dict": None},
        {"model_state_dict": {"a": 3}},
        {"model_state_dict": [torch.zeros(2)]},
    ],
)
def test_a_file_without_weights(tmp_path: Path, content: Any) -> None:
    """A torch file without weights is not accepted as a checkpoint."""
    state, settings = make_state(tmp_path)
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    assert "model_state_dict" in refusal(path, state, settings)


@pytest.mark.parametrize("epoch", [np.int64(2), torch.tensor(2), np.float64(2), 2])
def test_the_epoch_of_a_checkpoint_is_a_whole_number(tmp_path: Path, epoch: Any) -> None:
    """Other programs save it as a scalar of numpy or torch; anything else counts as unknown."""
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "epoch": epoch}, tmp_path / "a.pt")
    assert json.dumps(checkpoint.read(tmp_path / "a.pt")["epoch"]) == "2"
    for wrong in (2.5, "2", None, torch.zeros(2), float("nan")):
        torch.save({"model_state_dict": {"a": torch.zeros(1)}, "epoch": wrong}, tmp_path / "a.pt")
        assert checkpoint.read(tmp_path / "a.pt")["epoch"] is None


def test_a_missing_checkpoint_lists_the_others(tmp_path: Path) -> None:
    """For a wrong name, the error lists the existing checkpoints."""
    with pytest.raises(UserError, match=r"no such checkpoint.*train first"):
        checkpoint.read(tmp_path / "latest_model.pt")
    (tmp_path / "best_model.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"lates\.pt: no such checkpoint.*best_model\.pt"):
        checkpoint.read(tmp_path / "lates.pt")


def test_a_checkpoint_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without read permission is not reported as damaged; after following the advice, it loads."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "a.pt"
    save(path, state, settings)
    path.chmod(0)
    with monkeypatch.context() as patch:
        if os.access(path, os.R_OK):  # the superuser may read all

            def refuse(*_: Any, **__: Any) -> None:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

            patch.setattr(torch, "load", refuse)
        line = refusal(path, state, settings)
    assert "Permission denied" in line and "make it readable" in line and "truncated" not in line
    path.chmod(0o600)
    checkpoint.load(path, state, settings)


def test_a_damaged_checkpoint_names_the_others(tmp_path: Path) -> None:
    """The error for a damaged checkpoint lists the other ones, not itself, and one of them loads."""
    state, settings = make_state(tmp_path, steps=1)
    best = tmp_path / "best_model.pt"
    best.write_bytes(b"odd")
    assert "--resume False" in refusal(best, state, settings)
    save(tmp_path / "latest_model.pt", state, settings)
    line = refusal(best, state, settings)
    advised = line.rpartition("use another one: ")[2]
    assert advised == "latest_model.pt"
    checkpoint.load(tmp_path / advised, state, settings)


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.linear.weight", "linear.weight"),
        ("_orig_mod.linear.weight", "linear.weight"),
        ("module._orig_mod.linear.weight", "linear.weight"),
        ("_orig_mod.module.linear.weight", "linear.weight"),
        ("backbone._orig_mod.conv1.weight", "backbone.conv1.weight"),
        ("backbone.module.weight", "backbone.module.weight"),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(key: str, plain: str) -> None:
    """Names in distributed and compiled models become those of the plain network; a part that the network itself calls
    `module` keeps its name."""
    assert checkpoint.plain_name(key) == plain


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_authors_checkpoints_load(tmp_path: Path, prefix: str, zipped: bool) -> None:
    """A checkpoint as written by the authors' code, with numpy scalars and a prefix, gives its weights, and training
    resumes from it."""
    state, settings = make_state(tmp_path, PLANS[0], steps=2)
    path = tmp_path / "authors.pt"
    result = {
        "test": {
            "clean": {"loss": np.float64(0.25), "acc": 0.93},
            "poison": OrderedDict(loss=np.float32(2), acc=np.float64(0.01)),
        }
    }
    adam = copy.deepcopy(state.optimizer.state_dict())
    for slot in adam["state"].values():
        slot["step"] = int(slot["step"])  # a plain number in torch 1.8
    for group in adam["param_groups"]:
        for new in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params", "initial_lr"}:
            del group[new]
    saved = {
        "epoch": 3,
        "result": result | {"count": np.int64(3), "better": np.bool_(True)},
        "model_state_dict": OrderedDict((prefix + k, t) for k, t in state.model.state_dict().items()),
        "optimizer_state_dict": adam,
        "scheduler_state_dict": state.scheduler.state_dict() if state.scheduler else None,
        "best_acc": np.float64(0.75),
        "best_epoch": np.int64(2),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    model = make_state(tmp_path, PLANS[0])[0].model
    checkpoint.load_weights(model, checkpoint.read(path), path)
    assert same(dict(model.state_dict()), dict(state.model.state_dict()))
    fresh, _ = make_state(tmp_path, PLANS[0])
    checkpoint.load(path, fresh, settings)
    assert (fresh.epoch, fresh.best_acc, fresh.best_epoch) == (4, 0.75, 2)
    train(state, 2)
    train(fresh, 2)
    assert same(dict(fresh.model.state_dict()), dict(state.model.state_dict()))
    fresh.history.append({"epoch": fresh.epoch})  # what a run adds to it is a checkpoint to go on from, too
    fresh.epoch += 1
    save(tmp_path / "next.pt", fresh, settings)
    again, _ = make_state(tmp_path, PLANS[0])
    checkpoint.load(tmp_path / "next.pt", again, settings)
    assert again.epoch == 5 and [row["epoch"] for row in again.history] == [4]


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (("optimizer={Adam: {lr: 0.0001}}",), "lr 0.002, but the configuration gives 0.0001"),
        (("optimizer={Adam: {weight_decay: 0.5}}",), "weight_decay 0.0, but the configuration gives 0.5"),
        (("optimizer={SGD: {lr: 0.002}}",), "betas (0.9, 0.999), but the configuration gives None"),
        (("lr_scheduler={multi_step: {milestones: [1], gamma: 0.5}}", "optimizer={Adam: {lr: 0.001}}"), "lr 0.002"),
    ],
)
def test_the_authors_checkpoints_are_not_resumed_with_another_optimizer(
    tmp_path: Path, plan: tuple[str, ...], complaint: str
) -> None:
    """They have no settings to compare, and loading an optimizer's state replaces its options: another one is refused."""
    state, _ = make_state(tmp_path, steps=1)
    saved = {key: value for key, value in checkpoint.contents(state, {}).items() if key not in ("config", "history", "data")}
    checkpoint.write(tmp_path / "a.pt", saved)
    other, settings = make_state(tmp_path, plan)
    assert complaint in refusal(tmp_path / "a.pt", other, settings)
    checkpoint.load(tmp_path / "a.pt", *make_state(tmp_path))


@pytest.mark.parametrize("defense", plugins.names("defenses"))
def test_the_authors_checkpoints_are_of_asd(tmp_path: Path, defense: str) -> None:
    """Other defenses keep more than weights and an optimizer, so a checkpoint without settings is refused in one line."""
    allowed, state = defense in ("asd", "none"), make_state(tmp_path, steps=1)[0]
    settings = as_dict(config.load(tmp_path / "tiny.yaml", [f"defense={{{defense}: {{}}}}"]))
    if allowed:
        refuse_other_settings(tmp_path / "a.pt", {"epoch": 0}, settings)
        return
    checkpoint.write(
        tmp_path / "a.pt", {key: value for key, value in checkpoint.contents(state, {}).items() if key != "config"}
    )
    assert f"`defense: {defense}` cannot be resumed from it" in refusal(tmp_path / "a.pt", state, settings)


def test_another_network_is_refused(tmp_path: Path) -> None:
    """Weights of another width, depth or number of classes are refused with the first key that does not fit."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "a.pt"
    save(path, state, settings)
    saved = checkpoint.read(path)
    cases = {
        "network.resnet18_cifar.width=3": "backbone.conv1.weight is (2, 3, 3, 3), the YAML's network has (3, 3, 3, 3)",
        "network.resnet18_cifar.blocks=2": "lacks backbone.layer1.1",
        "num_classes=11": "linear.weight is (10, 16), the YAML's network has (11, 16)",
    }
    for override, expected in cases.items():
        other, _ = make_state(tmp_path, (override,))
        before = copy.deepcopy(other.model.state_dict())
        with pytest.raises(UserError) as caught:
            checkpoint.load_weights(other.model, saved, path)
        assert str(caught.value).startswith(f"{path}: is a checkpoint of another network (") and "\n" not in str(caught.value)
        assert expected in str(caught.value)
        assert same(dict(other.model.state_dict()), dict(before))
    deep, deep_settings = make_state(tmp_path, ("network.resnet18_cifar.blocks=2",), steps=1)
    save(path, deep, deep_settings)
    with pytest.raises(UserError, match=r"another network \(has backbone\.layer1\.1"):
        checkpoint.load_weights(state.model, checkpoint.read(path), path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["linear.bias", "backbone.bn1.running_var"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float, name: str) -> None:
    """A single NaN or infinity in the weights or the BN statistics is found, and its tensor is named."""
    state, settings = make_state(tmp_path, steps=1)
    state.model.state_dict()[name][1] = bad
    save(tmp_path / "nan.pt", state, settings)
    fresh, _ = make_state(tmp_path)
    assert name in refusal(tmp_path / "nan.pt", fresh, settings)


@pytest.mark.parametrize(
    ("override", "key", "then", "now"),
    [
        ("seed.seed=8", "seed.seed", "7", "8"),
        ("global.epsilon=0.4", "global.epsilon", "0.5", "0.4"),
        ("optimizer.Adam.lr=0.5", "optimizer.Adam.lr", "0.002", "0.5"),
        ("backdoor.poison_ratio=0.2", "backdoor.poison_ratio", "0.1", "0.2"),
        ("backdoor.badnets.pattern=corner3x3", "backdoor.badnets.pattern", "None", "'corner3x3'"),
        ("network.resnet18_cifar.width=3", "network.resnet18_cifar.width", "2", "3"),
        ("semi.loader.batch_size=4", "semi.loader.batch_size", "8", "4"),
        ("loader.batch_size=4", "loader.batch_size", "64", "4"),
        ("lr_scheduler=cosine_annealing", "lr_scheduler", "None", ""),
        ("transform.train.primary.random_crop.padding=2", "transform.train.primary.random_crop.padding", "4", "2"),
        ("defense=none", "defense", "'asd'", "'none'"),
        ("optimizer=SGD", "optimizer", "'Adam'", "'SGD'"),
        ("data.train_limit=100", "data.train_limit", "None", "100"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, override: str, key: str, then: str, now: str) -> None:
    """A checkpoint cannot be resumed with settings that change the results: the error has the key and both values."""
    state, settings = make_state(tmp_path, steps=1)
    save(tmp_path / "a.pt", state, settings)
    other = make_state(tmp_path, (override,))[1]
    line = refusal(tmp_path / "a.pt", state, other)
    assert key in line and then in line and now in line and "--resume False" in line


@pytest.mark.parametrize(
    "override",
    [
        "run=other",
        "saved_dir=elsewhere",
        "storage_dir=elsewhere",
        "dataset_dir=/other/cifar-10-batches-py",
        "download=true",
        "prefetch=false",
        "runtime.amp=true",
        "sync_bn=true",
        "seed.deterministic=true",
        "seed.benchmark=false",
        "loader.num_workers=7",
        "semi.loader.pin_memory=false",
        "num_epochs=4",
    ],
)
def test_settings_of_place_and_speed_may_change(tmp_path: Path, override: str) -> None:
    """A run may be moved, made faster or extended, and its checkpoint still loads."""
    state, settings = make_state(tmp_path, steps=1)
    save(tmp_path / "a.pt", state, settings)
    fresh, other = make_state(tmp_path, (override,))
    assert other != settings
    checkpoint.load(tmp_path / "a.pt", fresh, other)
    assert same(snapshot(fresh), snapshot(state))


def test_all_other_settings_are_compared(tmp_path: Path) -> None:
    """Settings outside this list must be the same on resuming: each of them, changed alone, is refused."""
    may_change = (
        "run", "saved_dir", "storage_dir", "dataset_dir", "download", "prefetch", "evidence", "num_epochs", "runtime",
        "sync_bn", "criterion", "undefended", "global.epoch_third", "seed.deterministic", "seed.benchmark", "data.placement",
        "data.cache_dir", *(f"{part}loader.{key}" for part in ("", "semi.") for key in ("num_workers", "pin_memory")),
    )  # fmt: skip
    settings = make_state(tmp_path)[1]
    refused = set()
    for key in flatten(settings):
        changed = copy.deepcopy(settings)
        place, name = changed, key.rpartition(".")[2]
        for part in key.split(".")[:-1]:
            place = place[part]
        place[name] = "something else"
        try:
            refuse_other_settings(tmp_path, {"config": changed, "epoch": 0}, settings)
        except UserError as error:
            assert "was written with" in str(error)
            refused.add(key)
    free = flatten(settings).keys() - refused
    assert free == {key for key in flatten(settings) if key.startswith(may_change)}
    assert {name for name in may_change if not any(key.startswith(name) for key in free)} == set()
    assert {"meta.epoch", "split.criterion.sce.alpha", "global.seed_num", "semi.mixmatch.temperature"} < refused


def test_stages_end_where_their_epochs_do() -> None:
    """The stages of finished epochs are compared without a list of all epochs, so that a run may be planned without an end."""
    plan = ["num_epochs=1000000000", "global.epoch_third=1000000000"]
    endless = config.load(REPOSITORY / "config/baseline_asd.yaml", plan)
    assert stage_ends(endless, 100) == [("class-aware", 60), ("class-agnostic", 90), ("meta-split", 100)]
    assert stage_ends(endless, 60) == [("class-aware", 60)] and stage_ends(endless, 0) == []


def test_other_test_images_than_in_training_are_named(tmp_path: Path) -> None:
    """Another attack, target, seed or transform decides what is tested; other settings do not."""
    trained = make_state(tmp_path)[1]

    def lines(*overrides: str) -> list[str]:
        return other_tests({"config": trained}, make_state(tmp_path, overrides)[1])

    assert lines() == lines("run=other", "num_epochs=5", "runtime.amp=true", "optimizer={Adam: {lr: 0.1}}") == []
    assert lines("backdoor={blend: {}}") == ["backdoor: blend, in training badnets"]
    found = lines("backdoor.target_label=1", "seed.seed=8")
    assert sorted(found) == ["backdoor.target_label: 1, in training 3", "seed.seed: 8, in training 7"]
    assert len(lines("transform.test.primary={resize: {size: 16}}")) == 1
    assert other_tests({}, trained) == other_tests({"config": {"seed": 3}}, trained) == []
    named, path = make_state(tmp_path, ("backdoor={badnets: {trigger_path: a.png}}",))[1], "backdoor.badnets.trigger_path"
    assert len(other_tests({"config": trained}, named)) == 1
    assert other_tests({"config": trained, "data": "a manifest"}, named, {path}) == []  # their contents are compared instead


@pytest.mark.parametrize(
    ("schedule", "free"),
    [
        ("{multi_step: {milestones: [2, 5]}}", True),
        ("{multi_step: {milestones: [2, 0.5]}}", False),
        ("{cosine_annealing: {T_max: 6}}", True),
        ("{cosine_annealing: {}}", False),
    ],
)
def test_a_run_may_be_extended_unless_its_rates_would_change(tmp_path: Path, schedule: str, free: bool) -> None:
    """num_epochs may change if the learning rates of the finished epochs do not depend on it."""
    state, settings = make_state(tmp_path, (f"lr_scheduler={schedule}",), steps=1)
    save(tmp_path / "a.pt", state, settings)
    other = make_state(tmp_path, (f"lr_scheduler={schedule}", "num_epochs=5"))
    if free:
        checkpoint.load(tmp_path / "a.pt", *other)
        assert same(snapshot(other[0]), snapshot(state))
    else:
        line = refusal(tmp_path / "a.pt", state, other[1])
        assert (
            "num_epochs" in line
            and f"has 5, and the learning rate schedule {schedule[1:].split(':')[0]} depends on it: set it back" in line
        )


def test_the_undefended_run_keeps_its_length(tmp_path: Path) -> None:
    """Without ASD the learning rate falls at fractions of `num_epochs`, so this setting must not change."""
    state, settings = make_state(tmp_path, ("defense=none",), steps=1)
    save(tmp_path / "a.pt", state, settings)
    line = refusal(tmp_path / "a.pt", state, make_state(tmp_path, ("defense=none", "num_epochs=9"))[1])
    assert "num_epochs" in line and "6" in line and "9" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", None),
        ("epoch", "three"),
        ("epoch", [3]),
        ("best_acc", "high"),
        ("optimizer_state_dict", None),
        ("optimizer_state_dict", {}),
        ("optimizer_state_dict", {"state": {}, "param_groups": []}),
        ("optimizer_state_dict", [1]),
        ("history", 3),
        ("history", [3]),
    ],
)
def test_a_training_state_that_does_not_fit(tmp_path: Path, key: str, value: Any) -> None:
    """Intact weights with a damaged training state are refused in one line with the name of the file."""
    state, settings = make_state(tmp_path, steps=1)
    path = tmp_path / "a.pt"
    save(path, state, settings)
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {key: value}, path)
    assert "does not fit" in refusal(path, state, settings)
    del saved[key]
    torch.save(saved, path)
    if key in ("epoch", "optimizer_state_dict"):
        assert "does not fit" in refusal(path, state, settings)


@pytest.mark.parametrize(
    "damage",
    [
        {"clean_pool": torch.tensor([3, 20])},
        {"clean_pool": torch.tensor([0.5])},
        {"sets": {"isolated": torch.tensor([3, 20])}},
        {"sets": {"isolated": torch.tensor([0.5])}},
        {"clean_pool": [1, 2]},
        {"epochs_in_clean_pool": torch.zeros(19, dtype=torch.int32)},
        {"epoch": 4},
        {"epoch": -2},
        {"history": [{"epoch": 1}]},
        {"history": [1]},
        {"best_acc": "high"},
        {"optimizer_state_dict": {}},
    ],
    ids=str,
)
def test_a_training_state_that_does_not_fit_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    """A checkpoint with an unusable training state fails in one line on loading, not later with a traceback."""
    state, settings = make_state(tmp_path, steps=3)
    path = tmp_path / "a.pt"
    save(path, state, settings)
    torch.save(torch.load(path, weights_only=True) | damage, path)
    with pytest.raises(UserError, match=r"a\.pt: its training state does not fit") as error:
        checkpoint.load(path, make_state(tmp_path)[0], settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["{Adam: {}}", "{SGD: {lr: 0.1, momentum: 0.9}}"])
@pytest.mark.parametrize("kept", [torch.channels_last, torch.contiguous_format])
def test_moments_take_the_memory_layout_of_their_weights(tmp_path: Path, kept: torch.memory_format, optimizer: str) -> None:
    """A run may be resumed in another memory format (`--amp` switched, another device): the moments keep their values, take
    the strides of the weights, and training continues."""
    settings = ("network={resnet18_cifar: {width: 8, blocks: 1}}", f"optimizer={optimizer}")
    state, as_saved = make_state(tmp_path, settings)
    state.model.to(memory_format=kept)
    train(state, 2)
    state.epoch = 2
    save(tmp_path / "a.pt", state, as_saved)
    fresh, _ = make_state(tmp_path, settings)
    fresh.model.to(memory_format=torch.contiguous_format if kept == torch.channels_last else torch.channels_last)
    checkpoint.load(tmp_path / "a.pt", fresh, as_saved)
    assert same(fresh.optimizer.state_dict(), state.optimizer.state_dict())
    pairs = zip(fresh.optimizer.param_groups[0]["params"], state.optimizer.param_groups[0]["params"], strict=True)
    assert any(ours.stride() != theirs.stride() for ours, theirs in pairs)
    for weight, moments in fresh.optimizer.state.items():
        assert all(m.stride() == weight.stride() for m in moments.values() if m.shape == weight.shape)
    train(fresh, 1)


def test_an_optimizer_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Moments whose shape differs from that of the weights are found when the checkpoint is loaded."""
    state, settings = make_state(tmp_path, steps=3)
    path = tmp_path / "a.pt"
    save(path, state, settings)
    saved = torch.load(path, weights_only=True)
    saved["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    torch.save(saved, path)
    with pytest.raises(UserError, match="exp_avg is"):
        checkpoint.load(path, make_state(tmp_path)[0], settings)
