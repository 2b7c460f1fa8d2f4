"""Every defense on a simulated CUDA device, on two processes, and after kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import REPOSITORY, run_script
from fake_cuda import Graph, pretended_cuda
from test_cuda_programs import program, refuse
from test_distributed import TORCHRUN, environment
from training import SMALL, last, same, small, train_here

OTHERS = [name for name in SMALL if name != "asd"]  # ASD has tests of its own
# Steps with fewer channels are slower for no gain; the batches can be shared by two processes.
SETTINGS = ("network.resnet18_cifar.width=8",)
every_other_defense = pytest.mark.parametrize("name", OTHERS)
pytestmark = pytest.mark.slow


def rows_of(folder: Path, run: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    text = (folder / "saved" / run / "log" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@every_other_defense
def test_captured_steps_equal_eager_steps_on_a_simulated_device(tmp_path: Path, name: str) -> None:
    """With captured steps, none of which is refused, and with eager ones, weights, optimizer, networks, sets and rows are equal
    bit for bit; the first epoch has the loss of the CPU up to rounding."""
    settings, path = small(tmp_path, name, *SETTINGS, "run=cpu")
    train_here(settings, path)
    printed = {}
    for run in ("captured", "eager"):
        words = [word for setting in (*SETTINGS, f"run={run}") for word in ("--set", setting)]
        captures = Graph.capture_begin if run == "captured" else refuse
        with pretended_cuda() as device, mock.patch.object(Graph, "capture_begin", captures):
            code, printed[run] = program("ASD.py", "--config", path, "--gpu", 0, "--resume", "False", *words)
        assert code == 0, printed[run]
        assert bool(device.graphs) == (run == "captured"), printed[run]
    assert "eagerly" not in printed["captured"]
    captured, eager = last(tmp_path, "captured"), last(tmp_path, "eager")
    for key in captured.keys() - {"config"}:
        assert same(on_cpu(captured[key]), on_cpu(eager[key])), key
    assert captured["history"][0]["loss"] == pytest.approx(last(tmp_path, "cpu")["history"][0]["loss"], rel=2e-2)


def on_cpu(value: Any) -> Any:
    """Return a nested value on the CPU, without the flag that the optimizer of a captured step has."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items() if key != "capturable"}
    if isinstance(value, (list, tuple)):
        return [on_cpu(part) for part in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


@every_other_defense
def test_two_processes_train_what_one_does(tmp_path: Path, name: str) -> None:
    """The first epoch has the losses of one process up to rounding, and the first one of each later stage has similar ones: a
    lost or doubled part would be a factor of 2."""
    _, path = small(tmp_path, name)
    sets = [word for setting in ("sync_bn=true", "run=two") for word in ("--set", setting)]
    command = [*TORCHRUN, str(REPOSITORY / "ASD.py"), "--config", str(path), "--gpu", "cpu", *sets]
    both = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert both.returncode == 0, both.stderr[-3000:]
    settings, _ = small(tmp_path, name, "run=one", "sync_bn=true")
    train_here(settings, path)
    one, two = rows_of(tmp_path, "one"), rows_of(tmp_path, "two")
    assert len(one) == len(two) == settings.epochs
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=2e-2)
    for e in (e for e in range(1, settings.epochs) if settings.stage(e) != settings.stage(e - 1)):
        assert 0.7 < two[e]["loss"] / one[e]["loss"] < 1.4, settings.stage(e)
    sets_of = [{key: row[key] for row in rows for key in row if key.endswith("_size")} for rows in (one, two)]
    assert sets_of[0] == sets_of[1]
    tested = run_script("test.py", "--config", path, "--gpu", "cpu", "--set", "run=two")
    assert tested.returncode == 0 and f"{100 * two[-1]['clean_accuracy']:.2f} %" in tested.stdout, tested.stderr


@every_other_defense
def test_killed_in_every_stage_and_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    """After kill -9 in the first epoch of each stage, the same command resumes; the end equals that of an uninterrupted run."""
    settings, path = small(tmp_path, name, "run=whole")
    train_here(settings, path)
    ends, done = [], 0
    for stage in settings.stages:
        ends.append(done)
        done += stage.epochs
    command = [sys.executable, str(REPOSITORY / "ASD.py"), "--config", str(path), "--gpu", "cpu", "--set", "run=cut"]
    log = tmp_path / "saved" / "cut" / "log" / "metrics.jsonl"
    for end in ends:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            ready = log.exists() and len(log.read_text().splitlines()) >= end if end else (log.parent / "asd.log").exists()
            if ready:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"not killed before the end of stage {end}"
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    whole, resumed = last(tmp_path, "whole"), last(tmp_path, "cut")
    for key in whole.keys() - {"config"}:
        assert same(whole[key], resumed[key]), key
    assert (tmp_path / "saved" / "cut" / "log" / "report.html").exists()
