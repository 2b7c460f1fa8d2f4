"""Sweeps: the runs that follow from a sweep file, what is skipped and resumed, failures, and the report."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, logged
from PIL import Image
from training import train_here

from utils import config
from utils.config.schema import describe
from utils.errors import UserError
from utils.metrics import SHARES
from utils.run import Run, locate, lock_run
from utils.sweep import report, status, table, workers
from utils.sweep.plan import Plan, read
from utils.sweep.progress import Progress, duration
from utils.sweep.status import Status, status_of
from utils.sweep.sweep_file import SweepFile

SHORT = TINY | {"defense": "none", "num_epochs": 2, "undefended": {"batch_size": 64}}
SWEEP: dict[str, Any] = {
    "config": "tiny.yaml",
    "axes": {
        "attack": {"patch": {}, "mix": {"backdoor": {"blend": {"alpha": 0.3}}}},
        "backdoor.poison_ratio": [0, 0.1],
        "defense": ["none", "asd"],
        "seed.seed": [1, 2, 3],
    },
    "repeats": "seed",
    "columns": ["defense"],
    "x": "poison_ratio",
}


def write(folder: Path, sweep: dict[str, Any], tiny: dict[str, Any] = SHORT, name: str = "grid") -> Path:
    """Write a sweep file and its YAML, whose runs go below the folder."""
    places = {"saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny | places, sort_keys=False))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def start(path: Path, *options: object, **how: Any) -> subprocess.Popen[str]:
    """Start the command as a user does, on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "utils.sweep", str(path), "--gpu", "cpu", *map(str, options)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


def call(path: Path, *options: object) -> tuple[int, str, str]:
    """Run the command to its end; return exit code, standard output and standard error."""
    process = start(path, *options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def call_here(path: Path, *options: object) -> None:
    """Call the command in this process, which saves seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["utils.sweep", str(path), "--gpu", "cpu", *map(str, options)])
        importlib.import_module("utils.sweep.__main__").main()


def rows(run: Run) -> list[dict[str, Any]]:
    """The epochs of a run without their duration."""
    return [row | {"seconds": 0} for row in status.rows_of(run.log / "metrics.jsonl")]


def table_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- The runs that follow from a sweep file ----------------------------------------------------------------------------


def test_the_runs_are_the_product_of_the_axes(tmp_path: Path) -> None:
    """There is one run for each combination, with its settings and a name made from its values; repeats come last."""
    plan = read(write(tmp_path, SWEEP))
    expected = [
        (f"grid/{attack}/poison_ratio-{ratio}/{defense}/seed-{seed}", attack, ratio, defense, seed)
        for seed in (1, 2, 3)
        for attack in ("patch", "mix")
        for ratio in (0, 0.1)
        for defense in ("none", "asd")
    ]
    assert [job.name for job in plan.jobs] == [name for name, *_ in expected]
    for job, (name, attack, ratio, defense, seed) in zip(plan.jobs, expected, strict=True):
        c = job.config
        assert c.attack.name == {"patch": "badnets", "mix": "blend"}[attack]
        assert (c.attacker.poison_ratio, c.defense.name, c.seed.seed, c.run) == (ratio, defense, seed, name)
        assert job.run == locate(c)
    assert plan.folder == tmp_path / "saved" / "grid"
    assert (plan.rows, plan.columns, plan.repeats, plan.x) == (("attack", "poison_ratio"), ("defense",), "seed", "poison_ratio")


def test_the_commands_give_the_settings_of_the_plan(tmp_path: Path) -> None:
    """What ASD.py reads from a run's options is the configuration that was checked, whatever the values look like."""
    axes = {
        "note": {"5 %": {"backdoor.poison_ratio": 0.05}, "a: b": {"semi": {"mixmatch": {"alpha": 0.5}}}},
        "optimizer.Adam.lr": [0.001, 1.0e-05],
        "lr_scheduler": {"constant": {"lr_scheduler": None}, "cosine": {"lr_scheduler": {"cosine_annealing": {}}}},
    }
    sweep = {
        "config": "tiny.yaml",
        "set": {"num_epochs": 5, "global": {"epoch_third": 7}, "data.cache_dir": "007"},
        "axes": axes,
    }
    plan = read(write(tmp_path, sweep), ["loader.batch_size=32"])
    assert [job.name for job in plan.jobs][:2] == ["grid/note-5/lr-0.001/constant", "grid/note-5/lr-0.001/cosine"]
    for job in plan.jobs:
        options = job.arguments("cpu")
        given = [value for option, value in itertools.pairwise(options) if option == "--set"]
        assert config.load(options[1], given) == job.config
        assert (job.config.num_epochs, job.config.global_.epoch_third, job.config.loader.batch_size) == (5, 7, 32)
        assert job.config.data.cache_dir == "007"


def test_values_may_name_their_own_yaml(tmp_path: Path) -> None:
    """`config` in a named value replaces the YAML of the sweep; two axes may not both do so."""
    (tmp_path / "other.yaml").write_text("base: tiny.yaml\nnum_epochs: 4\n")
    axes: dict[str, Any] = {"length": {"short": {}, "long": {"config": "other.yaml"}}, "seed.seed": [1]}
    plan = read(write(tmp_path, {"config": "tiny.yaml", "axes": axes}))
    assert [job.config.num_epochs for job in plan.jobs] == [2, 4]
    axes["more"] = {"a": {"config": "other.yaml"}}
    with pytest.raises(UserError, match=r"grid/long/seed-1/a: config"):
        read(write(tmp_path, {"config": "tiny.yaml", "axes": axes}))


def test_combinations_are_left_out(tmp_path: Path) -> None:
    """`skip` leaves out every run that has all values of an entry, `--only` those that have another value."""
    skip = [{"attack": "mix", "poison_ratio": 0}, {"defense": "asd", "seed": [2, 3]}]
    path = write(tmp_path, SWEEP | {"skip": skip})
    every = read(write(tmp_path, SWEEP)).jobs
    kept = [
        job.labels
        for job in every
        if not (job.labels["attack"] == "mix" and job.labels["poison_ratio"] == "0")
        and not (job.labels["defense"] == "asd" and job.labels["seed"] in ("2", "3"))
    ]
    path = write(tmp_path, SWEEP | {"skip": skip})
    assert [job.labels for job in read(path).jobs] == kept
    some = read(path, (), ["seed=1,3", "attack=patch"])
    assert [job.labels for job in some.jobs] == [x for x in kept if x["seed"] in ("1", "3") and x["attack"] == "patch"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"axis": {}}, "axis"),
        ({"config": None}, "config"),
        ({"config": "missing.yaml"}, "config"),
        ({"axes": {}}, "axes"),
        ({"axes": [1]}, "axes"),
        ({"axes": {"seed.seed": []}}, "axes.seed.seed"),
        ({"axes": {"seed.seed": [[1]]}}, "axes.seed.seed[0]"),
        ({"axes": {"seed.seed": [1, 1]}}, "axes.seed.seed"),
        ({"axes": {"seed.seed": ["one"]}}, "seed.seed"),
        ({"axes": {"sed.seed": [1]}}, "sed"),
        ({"axes": {"name": {"a b": {}, "a-b": {}}}}, "axes.name"),
        ({"axes": {"name": {"%": {}}}}, "axes.name"),
        ({"axes": {"name": {"a": 3}}}, "axes.name.a"),
        ({"axes": {"name": {"a": {"config": "missing.yaml"}}}}, "axes.name.a.config"),
        ({"axes": {"seed.seed": [1], "seed": {"a": {}}}}, "axes"),
        ({"axes": {"backdoor.poison_ratio": [2]}}, "backdoor.poison_ratio"),
        ({"set": {"num_epochs": 0}}, "num_epochs"),
        ({"set": 3}, "set"),
        ({"skip": [{"attak": "mix"}]}, "skip[0]"),
        ({"skip": [{"attack": "max"}]}, "skip[0].attack"),
        ({"skip": [{}]}, "skip[0]"),
        ({"skip": [{"seed": [1, 2, 3]}]}, "skip"),
        ({"repeats": "sed"}, "repeats"),
        ({"columns": ["seed"]}, "rows"),
        ({"rows": ["attack"]}, "rows"),
        ({"rows": ["attack", "poison_ratio", "attack"]}, "rows"),
        ({"cells": ["ACC", "AUC"]}, "cells[1]"),
        ({"published": {"figures": {}}}, "published.source"),
        ({"published": {"source": "us", "figures": {"patch": {"asd": "1 / 2"}}}}, "published.figures"),  # two axes in rows
        ({"axes": {"name": {"a": {"start": 3}}}}, "axes.name.a.start"),
        ({"axes": {"name": {"a": {"start": {"nam": "b"}}}}}, "axes.name.a.start"),
        ({"axes": {"name": {"a": {"start": {"name": "b"}}}}}, "axes.name.a.start.name"),
        ({"axes": {"name": {"a": {"start": {"name": "a"}, "defense": {"fp": {}}}}}}, "start"),
        ({"axes": {"name": {"a": {"start": {"name": "b"}, "defense": "asd"}, "b": {}}}}, "defense.asd.start_run"),
        ({"x": "seed"}, "x"),
        ({"x": "ratio"}, "x"),
    ],
)
def test_a_bad_sweep_file_is_one_line(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    """Whatever is wrong is refused before anything is started, in one line with the file and the key."""
    sweep = SWEEP | changes
    if "axes" in changes:
        sweep = {"config": "tiny.yaml", **changes}
    path = write(tmp_path, {name: value for name, value in sweep.items() if value is not None})
    with pytest.raises(UserError) as error:
        read(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and f"{key}: " in line and "\n" not in line


@pytest.mark.parametrize("text", ["", "[1, 2]", "axes: {a: [1}", "axes: {a: [1]}\naxes: {}"])
def test_a_file_that_is_not_a_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """A sweep file without keys, or with a key twice, is one line."""
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"grid\.yaml") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_values_of_one_axis_add_up(tmp_path: Path) -> None:
    """`--only` may be repeated for an axis."""
    path = write(tmp_path, SWEEP)
    chosen = [job.name for job in read(path, (), ["seed=1", "seed=2"]).jobs]
    assert chosen == [job.name for job in read(path, (), ["seed=1,2"]).jobs] and len(chosen) == 16


@pytest.mark.parametrize("only", ["seed", "sed=1", "seed=4", "seed="])
def test_a_wrong_choice_is_refused(tmp_path: Path, only: str) -> None:
    """`--only` names axes and values of the sweep file."""
    with pytest.raises(UserError, match="--only") as error:
        read(write(tmp_path, SWEEP), (), [only])
    assert "\n" not in str(error.value)


SHIPPED = sorted((REPOSITORY / "config" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_sweeps_compare_like_with_like(path: Path) -> None:
    """Every run is a configuration that ASD.py takes, and each with a defense has its undefended baseline."""
    plan = read(path)
    assert len({job.name for job in plan.jobs}) == len(plan.jobs)
    for job in plan.jobs:
        if job.config.defense.name == "asd":
            baseline = table.baseline_of(plan, job)
            assert baseline is not None and baseline.labels == job.labels | {"defense": "none"}
        if job.start:
            assert job.start == job.name.replace(f"/{job.labels['defense']}", "/none") and job.config.num_epochs > 0


def test_the_guide_lists_every_key() -> None:
    """docs/sweeps.md has the keys of a sweep file with type, default and meaning, and the example there is a sweep file."""
    guide = (REPOSITORY / "docs" / "sweeps.md").read_text()
    for key, kind, default, text in describe(SweepFile):
        assert f"| `{key}` | {kind} | {default} | {text} |\n" in guide


# -- How far a run is --------------------------------------------------------------------------------------------------


def fake(plan: Plan, name: str, figures: dict[str, float | None], epochs: int | None = None, tested: bool = True) -> Path:
    """Write the files of a run as ASD.py and test.py leave them; return its folder."""
    (job,) = (job for job in plan.jobs if job.name == name)
    epochs = job.config.num_epochs if epochs is None else epochs
    figures = dict.fromkeys(SHARES) | figures
    (job.run.log).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"epoch": epoch, "seconds": 10.0 + epoch} | figures) + "\n" for epoch in range(epochs)]
    (job.run.log / "metrics.jsonl").write_text("".join(lines))
    (job.run.saved / "config.yaml").write_text(config.to_yaml(job.config))
    if tested:
        (job.run.log / "test.json").write_text(json.dumps({"epoch": epochs - 1} | figures))
    return job.run.saved


def state_of(plan: Plan, name: str) -> str:
    """The state of one run."""
    return next(status_of(job).text for job in plan.jobs if job.name == name)


NAME = "grid/patch/poison_ratio-0.1/none/seed-1"


def test_states_of_a_run(tmp_path: Path) -> None:
    """A run is finished when its last epoch is tested; before, it has some epochs, or none; a failure is remembered."""
    plan = read(write(tmp_path, SWEEP))
    assert state_of(plan, NAME) == "not started"
    fake(plan, NAME, {"clean_accuracy": 0.5}, 1, tested=False)
    assert state_of(plan, NAME) == "epoch 1 of 2"
    saved = fake(plan, NAME, {"clean_accuracy": 0.5}, tested=False)
    assert state_of(plan, NAME) == "epoch 2 of 2"
    (job,) = (job for job in plan.jobs if job.name == NAME)
    status.mark_failed(job, "disk full", 2, "python ASD.py")
    assert (status_of(job).state, status_of(job).error) == ("failed", "disk full")
    fake(plan, NAME, {"clean_accuracy": 0.5})
    assert state_of(plan, NAME) == "finished" and (saved / "failed.json").is_file()
    status.forget_failure(job)
    (saved / "log" / "metrics.jsonl").write_text("half a li")
    assert state_of(plan, NAME) == "not started"


def test_figures_of_other_weights_or_settings_do_not_count(tmp_path: Path) -> None:
    """A run is trained or tested again where test.json is of an earlier state, or the sweep's settings have changed."""
    plan = read(write(tmp_path, SWEEP))
    saved = fake(plan, NAME, {"clean_accuracy": 0.5})
    metrics, tested = saved / "log" / "metrics.jsonl", saved / "log" / "test.json"
    tested.write_text(json.dumps({"epoch": 0, "clean_accuracy": 0.5}))
    assert state_of(plan, NAME) != "finished"
    tested.write_text(json.dumps({"epoch": 1, "clean_accuracy": 0.501}))
    os.utime(metrics, (1000, 1000))
    assert state_of(plan, NAME) == "finished", "tested later: rounding on another device"
    os.utime(tested, (999, 999))
    assert state_of(plan, NAME) != "finished"
    fake(plan, NAME, {"clean_accuracy": 0.5})
    os.utime(tested, (999, 999))
    assert state_of(plan, NAME) == "finished", "copied without its times"
    for changed in (["undefended.batch_size=32"], ["num_epochs=1"], ["num_epochs=3"]):
        assert state_of(read(tmp_path / "grid.yaml", changed), NAME) != "finished"
    for changed in (["dataset.shapes.noise=90"], ["dataset=folder", f"dataset_dir={tmp_path}"]):
        assert state_of(read(tmp_path / "grid.yaml", changed), NAME) != "finished", "other data"
    assert state_of(read(tmp_path / "grid.yaml", ["data.placement=host"]), NAME) == "finished"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("test.json", '{"epoch": 1, "clean_accuracy": "x"}'),
        ("test.json", '{"epoch": 1, "clean_accuracy": [1]}'),
        ("metrics.jsonl", '{"epoch": 0, "seconds": null, "clean_accuracy": 0.5}\n'),
        ("metrics.jsonl", '{"epoch": "a", "seconds": 1.0, "clean_accuracy": 0.5}\n'),
    ],
)
def test_a_damaged_file_of_one_run_does_not_end_the_sweep(tmp_path: Path, file: str, text: str) -> None:
    """A file whose values are no numbers counts as missing."""
    plan = read(write(tmp_path, SWEEP))
    saved = fake(plan, NAME, {"clean_accuracy": 0.5})
    (saved / "log" / file).write_text(text)
    assert state_of(plan, NAME) in ("epoch 2 of 2", "not started")
    assert table.to_markdown(plan, table.records_of(plan, states_of(plan)))


def test_a_value_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """0.1 and 0.10 would be one run, counted twice."""
    with pytest.raises(UserError, match=r"poison_ratio: 0\.1: is given twice"):
        read(write(tmp_path, SWEEP | {"axes": {"backdoor.poison_ratio": [0.1, 0.10]}, "repeats": None, "x": None}))


def test_a_test_of_something_else_does_not_count(tmp_path: Path) -> None:
    """Figures of a later test with another trigger or on other images are not those of the run."""
    plan = read(write(tmp_path, SWEEP))
    saved = fake(plan, NAME, {"clean_accuracy": 0.5, "attack_success_rate": 0.9})
    for other in ({"clean_accuracy": 0.5, "attack_success_rate": 0.88}, {"clean_accuracy": 0.5}):
        (saved / "log" / "test.json").write_text(json.dumps({"epoch": 1} | other))
        assert state_of(plan, NAME) != "finished"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("backdoor.poison_ratio=0.3", ["poison_ratio: 0: is overridden"]),
        ("backdoor={blend: {}}", ["attack: patch: is overridden"]),
        ("seed={seed: 7}", ["seed: 1: is overridden"]),
        ("run=mine", ["run=mine", "named after their values"]),
    ],
)
def test_a_setting_that_overrides_an_axis_is_refused(tmp_path: Path, setting: str, words: list[str]) -> None:
    """No run has a name that its settings contradict."""
    with pytest.raises(UserError) as error:
        read(write(tmp_path, SWEEP), [setting])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_setting_that_replaces_what_a_yaml_stands_for_is_refused(tmp_path: Path) -> None:
    """Values that name YAMLs of several defenses cannot all be given one; other settings may be given to all."""
    (tmp_path / "plain.yaml").write_text("base: tiny.yaml\nnum_epochs: 3\n")
    tiny = SHORT | {"defense": "asd"}
    (tmp_path / "none.yaml").write_text("base: tiny.yaml\ndefense: none\nnum_epochs: 3\n")
    axes = {"method": {"none": {"config": "none.yaml"}, "asd": {}}, "seed.seed": [1, 2]}
    path = write(tmp_path, {"config": "tiny.yaml", "axes": axes}, tiny)
    with pytest.raises(UserError, match=r"method: .*overridden"):
        read(path, ["defense=abl"])
    assert len(read(path, ["num_epochs=2"]).jobs) == len(read(path, ["network={resnet18_cifar: {width: 4}}"]).jobs) == 4


def test_what_a_value_stands_for_cannot_be_overridden(tmp_path: Path) -> None:
    """A run named `none`, `patch` or `usual` is that: where `set` or another axis says otherwise, the sweep is refused."""
    (tmp_path / "none.yaml").write_text("base: tiny.yaml\ndefense: none\n")
    method = {"method": {"none": {"config": "none.yaml"}, "asd": {}}}
    attack = {"attack": {"patch": {}, "mix": {"backdoor": {"blend": {}}}}}
    strength = {"strength": {"usual": {}, "strong": {"backdoor": {"blend": {"alpha": 0.3}}}}}
    amounts = {"share": {"usual": {}, "low": {"global.epsilon": 0.3}}, "more": {"a": {}, "b": {"global.epsilon": 0.7}}}
    for axes, common, name in (
        (method, {"defense": "asd"}, "none: method: none"),
        (method | {"plan": {"p": {"defense": "asd"}, "q": {}}}, {}, "none/p: method: none"),
        (attack | strength, {}, "patch/strong: attack: patch"),
        (amounts, {}, "usual/b: share: usual"),
    ):
        with pytest.raises(UserError, match=f"grid/{name}: is overridden"):
            read(write(tmp_path, {"config": "tiny.yaml", "axes": axes, "set": common}, SHORT | {"defense": "asd"}))
    fine = attack | {"ratio": {"usual": {}, "low": {"backdoor": {"poison_ratio": 0.05}}}}
    assert len(read(write(tmp_path, {"config": "tiny.yaml", "axes": method | fine, "set": {"num_epochs": 3}})).jobs) == 8


def test_numbers_in_sections_are_read_as_written(tmp_path: Path) -> None:
    """A number that YAML reads differently from how it looks is refused in a section as it is elsewhere, and a text of digits
    keeps its zeros."""
    for key, section, text in (("seed.seed", "{seed: {seed: 010}}", "010"), ("global.t", "{global: {t: 1_0}}", "1_0")):
        path = write(tmp_path, {"config": "tiny.yaml", "axes": {"num_epochs": [2]}})
        path.write_text(path.read_text() + f"set: {section}\n")
        with pytest.raises(UserError, match=rf"{re.escape(key)}: {text} \(read as"):
            read(path)
    path.write_text("config: tiny.yaml\naxes: {seed.seed: [1], cache: {a: {data: {cache_dir: 001}}}}\n")
    assert read(path).jobs[0].config.data.cache_dir == "001"


def test_a_yaml_that_is_a_link_stays_that_link(tmp_path: Path) -> None:
    """The base of a YAML lies beside the link: the commands of a sweep name the file that was checked."""
    for folder, count in (("real", 3), ("linked", 4)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, {}, SHORT | {"num_epochs": count})
    (tmp_path / "real/x.yaml").write_text("base: tiny.yaml\n")
    (tmp_path / "linked/x.yaml").symlink_to(tmp_path / "real/x.yaml")
    (tmp_path / "linked/grid.yaml").write_text("config: x.yaml\naxes: {seed.seed: [1]}\n")
    (job,) = read(tmp_path / "linked/grid.yaml").jobs
    assert job.config.num_epochs == 4 and job.arguments("cpu")[1] == str(tmp_path / "linked/x.yaml")
    assert config.run_name(tmp_path / "linked/x.yaml") == "x"


def test_a_value_cannot_name_the_run(tmp_path: Path) -> None:
    """The runs are named after their values, so `run` is refused wherever it is given."""
    with pytest.raises(UserError, match="run=other"):
        read(write(tmp_path, SWEEP | {"axes": {"a": {"b": {"run": "other"}}}, "repeats": None, "columns": [], "x": None}))


def test_an_axis_that_overrides_another_is_refused(tmp_path: Path) -> None:
    """Settings of one axis may add to those of another, but not change them."""
    attack = {"patch": {}, "mix": {"backdoor": {"poison_ratio": 0.25, "blend": {"alpha": 0.3}}}}
    axes = {"backdoor.poison_ratio": [0.01, 0.1], "attack": attack}
    with pytest.raises(UserError, match=r"poison_ratio-0\.01/patch: attack: patch: is overridden"):
        read(write(tmp_path, {"config": "tiny.yaml", "axes": axes}))
    axes["attack"]["patch"] = {"backdoor": {"poison_ratio": 0.25, "badnets": {}}}
    with pytest.raises(UserError, match=r"poison_ratio-0\.01/patch: poison_ratio: 0\.01: is overridden"):
        read(write(tmp_path, {"config": "tiny.yaml", "axes": axes}))
    assert len(read(write(tmp_path, SWEEP), ["backdoor.poison_mode=exact"]).jobs) == 24


def test_the_line_of_a_failure() -> None:
    """The last line with an error counts, a progress bar does not; without one the last line."""
    assert status.last_line("a\nASD.py: error: no such file\nbye\n") == "ASD.py: error: no such file"
    assert status.last_line("Traceback\n  x\nZeroDivisionError: division by zero\n") == "ZeroDivisionError: division by zero"
    assert status.last_line("first\nMixMatch: 10%\rMixMatch: 20%\rKilled\n\n") == "Killed"
    assert status.last_line("") == "no output"


# -- Tables ------------------------------------------------------------------------------------------------------------


def filled(tmp_path: Path, seed: int = 0) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """A plan whose runs are finished with random figures, which are returned by name; without an attack there is no ASR."""
    plan, draw, known = read(write(tmp_path, SWEEP)), random.Random(seed), {}
    for job in plan.jobs:
        attack = job.labels["poison_ratio"] != "0"
        known[job.name] = {key: draw.random() if attack or key == "clean_accuracy" else None for key in SHARES}
        fake(plan, job.name, known[job.name])
    return plan, known


def states_of(plan: Plan) -> dict[str, Status]:
    """The states of all runs."""
    return {job.name: status_of(job) for job in plan.jobs}


def mean_and_spread(values: list[float]) -> str:
    """Mean and sample standard deviation, the slow way."""
    mean = sum(values) / len(values)
    return f"{mean:.2f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.2f}"


def cells(text: str) -> list[list[str]]:
    """The rows of all Markdown tables of a text."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]


def test_shares_may_be_means_of_the_last_epochs(tmp_path: Path) -> None:
    """With `last: 2` shares and DER are computed from the mean of the two last epochs; those of another stage do not count."""
    stages = {"num_epochs": 3, "global.epoch_first": 1, "global.epoch_second": 2, "global.epoch_third": 3}
    axes = {"defense": ["none", "asd"], "seed.seed": [1]}
    sweep = {"config": "tiny.yaml", "axes": axes, "set": stages, "last": 2}
    plan = read(write(tmp_path, sweep))
    for job, values in zip(plan.jobs, ([0.1, 0.8, 0.6], [0.9, 0.4, 0.2]), strict=True):
        saved = fake(plan, job.name, {"clean_accuracy": 0.5, "attack_success_rate": values[-1]})
        lines = [json.loads(line) for line in (saved / "log/metrics.jsonl").read_text().splitlines()]
        rows = [row | {"stage": "s", "attack_success_rate": value} for row, value in zip(lines, values, strict=True)]
        (saved / "log/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = table.records_of(plan, states_of(plan))
    assert [record.value("ASR") for record in records] == pytest.approx([70, 30])
    assert records[1].der == pytest.approx((1 + 0.7 - 0.3) / 2)
    assert "Means of the last 2 epochs of each run" in table.to_markdown(plan, records)
    rows[1]["stage"] = "another"
    (saved / "log/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table.records_of(plan, states_of(plan))[1].value("ASR") == pytest.approx(20)


def test_the_der_does_not_depend_on_what_is_shown(tmp_path: Path) -> None:
    """A run that `--only` leaves out is still the undefended baseline of others."""
    plan, _ = filled(tmp_path)
    everything = {record.job.name: record.der for record in table.records_of(plan, states_of(plan))}
    some = read(plan.path, (), ["defense=asd"])
    found = {record.job.name: record.der for record in table.records_of(some, states_of(some))}
    assert len(found) == 12 and found.items() <= everything.items() and any(found.values())


def test_the_baseline_has_the_same_data(tmp_path: Path) -> None:
    """The undefended run of another folder of images is not the baseline, even if there is no other one."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    data = {name: {"dataset": "folder", "dataset_dir": str(tmp_path / name)} for name in ("here", "there")}
    axes = {"data": data, "defense": ["none", "asd"]}
    for skip, expected in (([], "grid/there/none"), ([{"data": "there", "defense": "none"}], None)):
        plan = read(write(tmp_path, {"config": "tiny.yaml", "axes": axes, "skip": skip}))
        found = table.baseline_of(plan, next(job for job in plan.jobs if job.name == "grid/there/asd"))
        assert (found and found.name) == expected


def test_a_figure_of_some_runs_says_of_how_many(tmp_path: Path) -> None:
    """If the undefended run of a seed has failed, the DER is that of the other seeds, and is marked."""
    plan, _ = filled(tmp_path)
    (job,) = (job for job in plan.jobs if job.name == "grid/patch/poison_ratio-0.1/none/seed-2")
    (job.run.log / "test.json").unlink()
    text = table.to_markdown(plan, table.records_of(plan, states_of(plan)))
    marked = [row for row in cells(text) if any("(of 2)" in cell for cell in row)]
    assert [row[:2] for row in marked[:1]] == [["patch", "0.1"]] and not any("(of" in cell for cell in cells(text)[2])


def test_a_table_without_rows(tmp_path: Path) -> None:
    """If every axis is a column or the repeats, the figures of a column stand in one row."""
    axes = {"defense": ["none", "asd"], "seed.seed": [1, 2]}
    roles = {"columns": ["defense"], "repeats": "seed", "cells": ["ACC", "ASR"]}
    plan = read(write(tmp_path, {"config": "tiny.yaml", "axes": axes, **roles}))
    for job in plan.jobs:
        fake(plan, job.name, {"clean_accuracy": 0.5, "attack_success_rate": 0.25})
    found = cells(table.to_markdown(plan, table.records_of(plan, states_of(plan))))
    assert found[0] == ["", "none", "asd"] and found[3] == ["ACC / ASR", *["50.00 ± 0.00 / 25.00 ± 0.00"] * 2]
    assert found[4] == ["mean seconds", "21", "21"]


def test_means_and_deviations_are_those_of_the_repeats(tmp_path: Path) -> None:
    """Each cell has mean and sample standard deviation over the seeds, and the DER against the baseline of the same seed."""
    plan, known = filled(tmp_path)
    text = table.to_markdown(plan, table.records_of(plan, states_of(plan)))
    found = cells(text)
    assert found[0] == ["attack", "poison_ratio", "none: ACC", "none: ASR", "asd: ACC", "asd: ASR", "asd: DER"]
    for row, (attack, ratio) in zip(found[2:6], itertools.product(("patch", "mix"), ("0", "0.1")), strict=True):
        runs = {
            (defense, seed): known[f"grid/{attack}/poison_ratio-{ratio}/{defense}/seed-{seed}"]
            for defense in ("none", "asd")
            for seed in (1, 2, 3)
        }
        expected = [attack, ratio]
        for defense in ("none", "asd"):
            expected.append(mean_and_spread([100 * runs[defense, seed]["clean_accuracy"] for seed in (1, 2, 3)]))
            asr = [runs[defense, seed]["attack_success_rate"] for seed in (1, 2, 3)]
            expected.append("-" if ratio == "0" else mean_and_spread([100 * value for value in asr]))
        ders = []
        for seed in (1, 2, 3):
            own, baseline = runs["asd", seed], runs["none", seed]
            if ratio != "0":
                gain = max(0, baseline["attack_success_rate"] - own["attack_success_rate"])
                ders.append((gain - max(0, baseline["clean_accuracy"] - own["clean_accuracy"]) + 1) / 2)
        expected.append(f"{statistics.fmean(ders):.3f} ± {statistics.stdev(ders):.3f}" if ders else "-")
        assert row == expected
    full = found[6:]
    assert full[0] == ["attack", "poison_ratio", "defense", "runs", *table.MEASURES] and len(full) == 2 + 8
    assert all(row[3] == "3" and row[-1] == "21 ± 0" for row in full[2:])
    assert "not finished" not in text and "failed" not in text


def test_the_csv_has_each_run(tmp_path: Path) -> None:
    """sweep.csv has one row for each run with its values, state and exact figures; empty where there is none."""
    plan, known = filled(tmp_path, 1)
    (job,) = (job for job in plan.jobs if job.name == NAME)
    (job.run.log / "test.json").unlink()
    status.mark_failed(job, 'a "bad", | line', 1, "python ASD.py")
    report.write_report(plan, states_of(plan))
    found = {row["run"]: row for row in table_of(plan.folder / "sweep.csv")}
    assert list(found) == [job.name for job in plan.jobs]
    for name, figures in known.items():
        row = found[name]
        if name == NAME:
            assert (row["state"], row["error"], row["clean_accuracy"]) == ("failed", 'a "bad", | line', "")
            continue
        assert row["state"] == "finished" and row["epochs"] == "2" and float(row["seconds"]) == 21
        for key, value in figures.items():
            assert row[key] == ("" if value is None else repr(value))
        assert (row["der"] != "") == (
            row["defense"] == "asd" and row["poison_ratio"] != "0" and name != NAME.replace("none", "asd")
        )
    assert cells((plan.folder / "sweep.md").read_text())[-1][1:3] == ["failed", 'a "bad", \\| line']


def test_a_report_of_an_unfinished_sweep(tmp_path: Path) -> None:
    """Cells with missing runs are marked, those runs are listed with their state, and the means are of the others."""
    plan = read(write(tmp_path, SWEEP))
    report.write_report(plan, states_of(plan))
    for seed, acc in ((1, 0.5), (2, 0.7)):
        fake(plan, f"grid/mix/poison_ratio-0/asd/seed-{seed}", {"clean_accuracy": acc})
    fake(plan, "grid/mix/poison_ratio-0/asd/seed-3", {"clean_accuracy": 0.1}, 1, tested=False)
    for job in plan.jobs:
        if job.name.startswith("grid/patch/poison_ratio-0.1/none"):
            job.run.saved.mkdir(parents=True)
            (job.run.saved / "output.log").write_text("$ python\nASD.py: error: x\n")
            status.mark_failed(job, "ASD.py: error: x", 2, "python")
    report.write_report(plan, states_of(plan))
    text = (plan.folder / "sweep.md").read_text()
    found = cells(text)
    assert found[4] == ["mix", "0", *["not finished"] * 2, f"{mean_and_spread([50.0, 70.0])} (2 of 3 runs)", "- (2 of 3 runs)"]
    assert found[3][2:4] == ["failed"] * 2
    assert ["mix", "0", "asd", "2 of 3 (1 not finished)"] in [row[:4] for row in found]
    listed = {row[0]: row[1:] for row in found if row[0].startswith("grid/")}
    assert len(listed) == 22 and listed["grid/mix/poison_ratio-0/asd/seed-3"][0] == "epoch 1 of 2"
    assert listed[NAME][:2] == ["failed", "ASD.py: error: x"] and Path(listed[NAME][2]).is_file()
    with Image.open(plan.folder / "sweep.png") as image:
        assert image.format == "PNG"


TABLE: dict[str, Any] = {
    "config": "tiny.yaml",
    "axes": {
        "attack": {"patch": {}, "mix": {"backdoor": {"blend": {"alpha": 0.3}}}},
        "defense": {
            "fp": {"defense": {"fp": {"finetune_epochs": 1}}, "start": {"defense": "none"}, "global.seed_num": 4},
            "none": {},
            "perfect": {"defense": {"reference_filter": {}}},
        },
        "seed.seed": [1, 2],
    },
    "repeats": "seed",
    "columns": ["defense"],
    "cells": ["ACC", "ASR", "RA", "DER"],
    "published": {"source": "Somebody, 2021", "figures": {"patch": {"none": "95 / 100"}}},
}


def test_a_compact_table_has_all_figures_in_a_cell(tmp_path: Path) -> None:
    """With `cells` there is one column for each defense, with the clean images that it is given and its seconds; published
    figures follow in a table of their own."""
    plan, draw, known = read(write(tmp_path, TABLE)), random.Random(3), {}
    for job in plan.jobs:
        known[job.name] = {key: draw.random() for key in SHARES}
        if job.labels["attack"] == "patch" or job.name == "grid/mix/fp/seed-1":
            epochs = job.config.epochs
            fake(plan, job.name, known[job.name], epochs)
    text = table.to_markdown(plan, table.records_of(plan, states_of(plan)))
    found = cells(text)
    assert found[0] == ["attack", "fp", "none", "perfect"]
    assert found[2] == ["clean images given", "4 a class", "none", "ground truth"]
    runs = {name: [known[f"grid/patch/{name}/seed-{seed}"] for seed in (1, 2)] for name in ("fp", "none")}
    keys = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
    shares = [mean_and_spread([100 * run[key] for run in runs["fp"]]) for key in keys]
    ders = []
    for own, baseline in zip(runs["fp"], runs["none"], strict=True):
        gain = max(0, baseline["attack_success_rate"] - own["attack_success_rate"])
        ders.append((gain - max(0, baseline["clean_accuracy"] - own["clean_accuracy"]) + 1) / 2)
    der = f"{statistics.fmean(ders):.3f} ± {statistics.stdev(ders):.3f}"
    assert found[3][:2] == ["patch", " / ".join([*shares, der])] and found[3][2].endswith(" / -")
    assert found[4][1].endswith(" (1 of 2 runs)") and found[4][2:] == ["not finished"] * 2
    assert found[5][0] == "mean seconds" and "Each cell: ACC / ASR / RA / DER." in text
    assert "Somebody, 2021." in text and ["patch", "-", "95 / 100", "-"] in found and ["mix", "-", "-", "-"] in found


def test_a_run_that_starts_from_another_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` names the run with another value, whose weights the defense takes; it is made first, whatever their order, and
    also if it is left out by `--only`."""
    plan = read(write(tmp_path, TABLE))
    starts = {job.name: job.start for job in plan.jobs}
    assert starts["grid/mix/fp/seed-2"] == "grid/mix/none/seed-2" and starts["grid/mix/none/seed-2"] is None
    (job,) = (job for job in plan.jobs if job.name == "grid/mix/fp/seed-2")
    assert job.config.defense.settings.start_run == "grid/mix/none/seed-2" and job.config.epochs == 2
    only = read(plan.path, (), ["defense=fp"]).jobs
    assert [job.start for job in only] == [name.replace("fp", "none") for name in starts if "/fp/" in name]

    class Instant:
        """A worker whose runs take two looks."""

        def __init__(self, number: int) -> None:
            self.number, self.job, self.started, self.looks = number, None, 0.0, 0

        def begin(self, job: Any) -> None:
            self.job, self.looks = job, 0
            assert job.start is None or job.start in ended or not any(j.name == job.start for j in jobs)

        def poll(self) -> bool:
            assert self.job is not None
            self.looks += 1
            if self.looks == 2:
                ended.append(self.job.name)  # type: ignore[attr-defined]
            return self.looks == 2

        def stop(self) -> None: ...
        def wait(self, deadline: float) -> None: ...

    monkeypatch.setattr(workers, "POLL", 0.0)
    silent: Any = SimpleNamespace(**dict.fromkeys(("began", "ended", "show", "close"), lambda *_: None))
    for jobs in (plan.jobs, only):
        ended: list[str] = []
        run_all: Any = workers.run_all
        run_all(jobs, [Instant(n) for n in range(3)], silent)
        assert sorted(ended) == sorted(job.name for job in jobs)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "roles",
    [
        {}, {"x": None}, {"x": None, "columns": []}, {"columns": []}, {"columns": ["poison_ratio"]}, {"repeats": None},
        {"columns": ["attack", "defense"]}, {"rows": ["poison_ratio", "attack"], "x": "attack"},
    ],
)  # fmt: skip
def test_every_choice_of_roles_has_its_report(tmp_path: Path, roles: dict[str, Any]) -> None:
    """Whatever the axes are for, each mean is in the table and the plot is drawn without a warning."""
    _, known = filled(tmp_path)
    sweep = {key: value for key, value in (SWEEP | roles).items() if value is not None}
    plan = read(write(tmp_path, sweep))
    with logged() as lines:
        report.write_report(plan, states_of(plan))
    assert not [line for line in lines if "warning" in line]
    seeds = ("1", "2", "3") if sweep.get("repeats") else ("1",)
    values = [100 * known[f"grid/mix/poison_ratio-0.1/asd/seed-{seed}"]["clean_accuracy"] for seed in seeds]
    text = mean_and_spread(values) if len(values) > 1 else f"{values[0]:.2f}"
    assert text in (plan.folder / "sweep.md").read_text()
    with Image.open(plan.folder / "sweep.png") as image:
        assert image.format == "PNG"


def test_the_time_left_follows_from_the_durations_seen(tmp_path: Path) -> None:
    """Runs of one defense count with the mean of that defense, and several workers share the work."""
    plan = read(write(tmp_path, SWEEP))
    progress = Progress(plan.jobs[:12], ["0", "1"], states_of(plan))
    assert progress.left() is None
    for job, seconds in zip(plan.jobs[12:16], (10, 100, 20, 300), strict=True):
        progress.learn(job, seconds)
    count = {name: sum(job.config.defense.name == name for job in plan.jobs[:12]) for name in ("none", "asd")}
    assert progress.left() == pytest.approx((15 * count["none"] + 200 * count["asd"]) / 2)
    assert [duration(s) for s in (8.4, 89, 120, 3599, 11100)] == ["8 s", "89 s", "2 min", "1 h 0 min", "3 h 5 min"]


def test_one_worker_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--gpu 0,1` gives two workers, `--workers 2` twice as many; a device named twice, or not there, is refused. Without
    CUDA the CPU is used, once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workers.devices("0,1", 1) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers.devices("0,1", 1) == ["0", "1"]
    assert workers.devices("0,1", 2) == ["0", "1", "0", "1"]
    assert workers.devices("cpu", 3) == ["cpu"] * 3
    for wrong in ("0,0", "2", "-1"):
        with pytest.raises(UserError, match="--gpu"):
            workers.devices(wrong, 1)


# -- The command -------------------------------------------------------------------------------------------------------

LISTED: dict[str, Any] = {
    "config": "tiny.yaml",
    "axes": {"trigger": {"good": {}, "missing": {"backdoor.badnets.trigger_path": "missing.png"}}, "seed.seed": [1, 2]},
    "repeats": "seed",
}


def test_a_dry_run_shows_states_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` has a line for each run, and below it the commands of those that are not finished; it writes nothing."""
    path = write(tmp_path, LISTED)
    call_here(path, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == [f"{job.name}: not started" for job in read(path).jobs]
    for job, (train, test) in zip(read(path).jobs, zip(lines[1::3], lines[2::3], strict=True), strict=True):
        words = shlex.split(train)
        assert words[-1] == f"run={job.name}" and words[words.index("ASD.py") + 1 :] == job.arguments("cpu")
        assert shlex.split(test) == [word.replace("ASD.py", "test.py") for word in words]
    assert not (tmp_path / "saved").exists()
    fake(read(path), "grid/good/seed-1", {"clean_accuracy": 0.5})
    call_here(path, "--dry-run")
    assert capsys.readouterr().out.splitlines()[:2] == ["grid/good/seed-1: finished", "grid/missing/seed-1: not started"]


def test_a_report_starts_nothing(tmp_path: Path) -> None:
    """`--report` writes table, CSV and plot of what is there."""
    path = write(tmp_path, LISTED)
    call_here(path, "--report")
    assert {p.name for p in (tmp_path / "saved" / "grid").iterdir()} == {"sweep.md", "sweep.csv", "sweep.png"}
    assert {row["state"] for row in table_of(tmp_path / "saved" / "grid" / "sweep.csv")} == {"not started"}


@pytest.mark.slow
def test_a_failed_run_is_a_row_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    """Two workers finish what can be finished; what fails has its last line in the table, and the exit code is 1. The same
    command then starts the failed runs alone. The figures are those of runs by themselves."""
    path = write(tmp_path, LISTED)
    code, out, err = call(path, "--workers", 2)
    assert code == 1 and "2 of 4 runs failed" in err and "Traceback" not in err
    folder = tmp_path / "saved" / "grid"
    found = {row["run"]: row for row in table_of(folder / "sweep.csv")}
    assert [row["state"] for row in found.values()] == ["finished", "failed"] * 2
    assert all("missing.png" in row["error"] for row in found.values() if row["state"] == "failed")
    assert "missing.png" in (folder / "missing" / "seed-1" / "output.log").read_text()
    assert out.count("  finished  ") == 2 and out.count("  failed  ") == 2
    for job in read(path).jobs:
        if job.labels["trigger"] == "good":
            command = (job.run.saved / "output.log").read_text().splitlines()[0]
            assert command.startswith("$ ") and "ASD.py" in command and job.name in command
            alone = train_here(config.load(job.yaml, [*job.settings, f"run=alone/{job.name}"]), job.yaml)
            assert rows(job.run) == rows(alone)
            assert float(found[job.name]["clean_accuracy"]) == rows(alone)[-1]["clean_accuracy"]

    before = (folder / "good" / "seed-1" / "output.log").read_bytes()
    code, out, _ = call(path)
    assert code == 1 and "2 finished, 2 to do" in out and out.count("  failed  ") == 2
    assert (folder / "good" / "seed-1" / "output.log").read_bytes() == before
    call_here(path, "--only", "trigger=good")  # nothing is left to do, and nothing of it has failed
    assert [row["state"] for row in table_of(folder / "sweep.csv")] == ["finished"] * 2


LONG = {"config": "tiny.yaml", "set": {"num_epochs": 60}, "axes": {"seed.seed": [1, 2]}, "repeats": "seed"}


def begun(path: Path, *options: object) -> tuple[subprocess.Popen[str], Run]:
    """Start a sweep and wait for three epochs of its first run."""
    run = read(path).jobs[0].run
    process = start(path, *options)
    wait_for(lambda: len(rows(run)) >= 3 or process.poll() is not None)
    assert process.poll() is None
    return process, run


def free(run: Run) -> bool:
    """Whether no process writes the run."""
    try:
        with lock_run(run):
            pass
    except UserError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_children_and_goes_on(tmp_path: Path) -> None:
    """After kill -9 no run goes on unnoticed; the same command resumes it, to the epochs of a run without interruption."""
    path = write(tmp_path, LONG)
    process, run = begun(path, "--only", "seed=1")
    process.kill()
    process.communicate()
    wait_for(lambda: free(run), 30)
    done = len(rows(run))
    (job,) = read(path, (), ["seed=1"]).jobs
    assert 3 <= done < 60 and status_of(job).text == f"epoch {done} of 60"
    code, _, err = call(path, "--only", "seed=1")
    assert code == 0, err
    assert status_of(job).state == "finished" and len(list(run.saved.parent.glob("seed-1*"))) == 1
    alone = train_here(config.load(job.yaml, [*job.settings, "run=alone"]), job.yaml)
    assert rows(run) == rows(alone)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_children(tmp_path: Path, number: int, code: int) -> None:
    """While a sweep runs, a second one on its folder is refused in one line, and a report can be written. Ctrl-C and SIGTERM
    stop the runs at once; one line says what is kept, and no run counts as failed."""
    path = write(tmp_path, LONG | {"set": {"num_epochs": 100_000}})
    process, run = begun(path, "--workers", 2)
    if number == signal.SIGINT:
        second, _, err = call(path)
        assert second == 2 and str(process.pid) in err and str(run.saved.parent) in err and err.count("\n") == 1
        assert call(path, "--report")[0] == 0 and "of 100000 |" in (run.saved.parent / "sweep.md").read_text()
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code and len(err.strip().splitlines()) == 1 and "kept" in err
    assert all(free(job.run) for job in read(path).jobs)
    assert status_of(read(path).jobs[0]).state == "started" and len(rows(run)) >= 3


def test_a_run_that_cannot_be_started_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regular file in place of a run's folder costs that run; the others are trained."""
    path = write(tmp_path, {"config": "tiny.yaml", "axes": {"seed.seed": [1, 2, 3]}})
    plan = read(path)
    plan.folder.mkdir(parents=True)
    plan.jobs[1].run.saved.write_text("in the way")
    launched: list[str] = []
    monkeypatch.setattr(workers.Worker, "launch", lambda worker: launched.append(worker.job.name))
    monkeypatch.setattr(workers.Worker, "poll", lambda worker: True)
    with logged() as lines, pytest.raises(SystemExit) as ended:
        call_here(path)
    assert ended.value.code == 1 and launched == [plan.jobs[0].name, plan.jobs[2].name]
    states = {row["run"]: (row["state"], row["error"]) for row in table_of(plan.folder / "sweep.csv")}
    assert states[plan.jobs[1].name][0] == "failed" and "cannot be started" in states[plan.jobs[1].name][1]
    assert any("2/3  failed" in line for line in lines)


def test_a_run_whose_start_is_left_out_is_refused(tmp_path: Path) -> None:
    """`--only` must include what the runs start from, unless it is trained already."""
    path = write(tmp_path, TABLE)
    with pytest.raises(UserError, match="--only: leaves out grid/"):
        call_here(path, "--only", "defense=fp")


@pytest.mark.slow
def test_a_run_locked_by_another_process_is_reported_as_failed(tmp_path: Path) -> None:
    """Where ASD.py refuses a run, its own line is in the table."""
    path = write(tmp_path, LISTED)
    plan = read(path, (), ["trigger=good", "seed=1"])
    run = plan.jobs[0].run
    run.saved.mkdir(parents=True)
    run.checkpoints.mkdir(parents=True)
    with lock_run(run):
        code, _, _ = call(path, "--only", "trigger=good", "--only", "seed=1")
    (row,) = table_of(plan.folder / "sweep.csv")
    assert code == 1 and row["state"] == "failed" and str(os.getpid()) in row["error"] and "is writing this run" in row["error"]


WRONG = [["--workers", 0], ["--gpu", "gpu"], ["--set", "num_epochs"], ["--only", "x=1"], ["--report", "--dry-run"], ["--wrong"]]


@pytest.mark.parametrize("options", WRONG)
def test_a_bad_option_is_refused(tmp_path: Path, options: list[object]) -> None:
    """A wrong option, or a setting that no run takes, is one line, and nothing is written."""
    with pytest.raises(UserError) as error:
        call_here(write(tmp_path, LISTED), *options)
    assert str(options[0]) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_bad_sweep_file_ends_the_command_with_exit_code_2(tmp_path: Path) -> None:
    """The line is on standard error, without a traceback."""
    code, _, err = call(write(tmp_path, LISTED | {"axes": {"seed.seed": [-1]}}))
    assert code == 2 and err.count("\n") == 1 and err.startswith("utils.sweep: error: ")
