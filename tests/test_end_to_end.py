"""ASD.py and test.py as processes that a user starts, kills, stops and resumes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, run_script
from PIL import Image
from training import metrics_row

EPOCHS, TRAIN, TEST, STEPS = 6, 200, 43, 40
STAGES = ["class-aware"] * 2 + ["class-agnostic"] * 2 + ["meta-split"] * 2
CHANGES = {
    "semi": TINY["semi"] | {"mixmatch": {"train_iteration": STEPS}},  # type: ignore[operator]  # long enough to be hit
    "lr_scheduler": {"cosine_annealing": {}},
    "seed": {"seed": 11, "deterministic": True},
}


class Place:
    """A folder with a YAML and its run."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.yaml = folder, folder / "tiny.yaml"
        raw = TINY | CHANGES | {"saved_dir": str(folder / "saved_data"), "storage_dir": str(folder / "storage")} | changes
        self.yaml.write_text(yaml.safe_dump(raw, sort_keys=False))
        self.saved = folder / "saved_data" / "tiny"
        self.log, self.checkpoints = self.saved / "log", folder / "storage" / "tiny" / "checkpoint"

    def train(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ASD.py on this YAML to its end."""
        return run_script("ASD.py", "--config", self.yaml, "--gpu", "cpu", *arguments)

    def test(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run test.py on this YAML."""
        return run_script("test.py", "--config", self.yaml, "--gpu", "cpu", *arguments)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; none if it does not exist yet."""
        path = self.log / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def checkpoint(self, name: str = "latest_model.pt") -> dict[str, Any]:
        """Return the contents of a checkpoint."""
        loaded: dict[str, Any] = torch.load(self.checkpoints / name, weights_only=True)
        return loaded

    def hashes(self) -> dict[str, str]:
        """Return a digest of every file below the folder."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def copy(self, folder: Path) -> Place:
        """Return a place whose run has the same files."""
        shutil.copytree(self.folder, folder)
        return Place(folder)

    def interrupt(self, number: signal.Signals, ready: Callable[[], bool], delay: float) -> tuple[int, str, str]:
        """Start ASD.py, send it a signal some seconds after `ready`; return its exit code and output."""
        command = [sys.executable, str(REPOSITORY / "ASD.py"), "--config", str(self.yaml), "--gpu", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        give_up = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
        return process.returncode, out, error


# What test.py writes.
TESTED = {f"saved_data/tiny/log/test{part}" for part in (".json", "_confusion.png", "_triggered_confusion.png")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run that was not interrupted; the tests only read it."""
    place = Place(tmp_path_factory.mktemp("finished"))
    result = place.train()
    assert result.returncode == 0, result.stderr
    (place.folder / "said.txt").write_text(result.stdout)
    before = place.hashes()
    yield place
    after = {name: digest for name, digest in place.hashes().items() if name not in TESTED}
    assert after == before


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without the seconds that they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_equal(one: Any, other: Any, at: str = "") -> None:
    """Compare nested checkpoints bit for bit, except for seconds and folder names."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert list(one) == list(other), at
        for key in one:
            if key not in ("seconds", "saved_dir", "storage_dir"):
                assert_equal(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{at}/{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, at
        assert torch.equal(one, other), at
    else:
        assert one == other, at


def assert_same_run(one: Place, other: Place) -> None:
    """Compare the results of two runs: weights, optimizer, schedule, best figures, pools, metrics."""
    for name in ("latest_model.pt", "best_model.pt"):
        assert_equal(one.checkpoint(name), other.checkpoint(name), name)
    assert without_time(one.rows()) == without_time(other.rows())
    assert np.array_equal(np.load(one.saved / "poison_idx.npy"), np.load(other.saved / "poison_idx.npy"))


# A whole run.


def test_metrics_have_a_row_an_epoch(finished: Place) -> None:
    """metrics.jsonl has one object per epoch, with the documented keys, and the pools, stages and schedules of the YAML."""
    rows = finished.rows()
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert [row["stage"] for row in rows] == STAGES
    assert all(row.keys() == metrics_row(0).keys() for row in rows), "other tests use such rows"
    assert [row["clean_pool_size"] for row in rows] == [20, 40, 100, 100, 100, 100]
    for e, row in enumerate(rows):
        assert row["defense"] == "asd"
        assert float(row["clean_accuracy"] * TEST).is_integer()
        assert 0 <= row["attack_success_rate"] <= 1
        assert 0 <= row["poisoned_in_clean_pool"] <= row["clean_pool_size"]
        assert row["polluted_pool_size"] == TRAIN - row["clean_pool_size"]
        poisoned, inside = int(np.load(finished.saved / "poison_idx.npy").sum()), row["poisoned_in_clean_pool"]
        assert row["split_tpr"] == (poisoned - inside) / poisoned
        clean = TRAIN - poisoned
        assert row["split_fpr"] == (clean - (row["clean_pool_size"] - inside)) / clean
        assert row["lambda_u"] == pytest.approx(15 * sum(min((e + i / STEPS) / 6, 1) for i in range(STEPS)) / STEPS)
        assert row["learning_rate"] == pytest.approx(0.002 * (1 + math.cos(math.pi * e / EPOCHS)) / 2, abs=1e-12)
        assert row["loss"] >= row["loss_x"] > 0
        assert row["loss_u"] > 0
        assert row["seconds"] > 0
    assert rows[0]["poisoned_in_clean_pool"] == 0  # only seed samples


def test_screen_has_a_line_an_epoch(finished: Place) -> None:
    """Standard output has one line per epoch with stage, ACC, ASR, pools, losses and seconds; asd.log has it too."""
    said = (finished.folder / "said.txt").read_text()
    lines = [line for line in said.splitlines() if re.match(r"epoch +\d+/6 ", line)]
    kept = (finished.log / "asd.log").read_text()
    for line, row in zip(lines, finished.rows(), strict=True):
        assert line in kept
        assert row["stage"] in line
        assert f"ACC {100 * row['clean_accuracy']:6.2f} %" in line
        assert f"ASR {100 * row['attack_success_rate']:6.2f} %" in line
        assert f"clean pool {row['clean_pool_size']} ({row['poisoned_in_clean_pool']} poisoned)" in line
        assert f"loss {row['loss']:.4f}" in line


def test_run_keeps_its_yaml_poison_and_pictures(finished: Place) -> None:
    """The run's folder has the given YAML, its resolved form, poison_idx.npy and the plots, which can be opened."""
    assert (finished.saved / "tiny.yaml").read_bytes() == finished.yaml.read_bytes()
    resolved = yaml.safe_load((finished.saved / "config.yaml").read_text())
    assert resolved["semi"]["mixmatch"]["train_iteration"] == STEPS
    assert resolved["meta"]["optimizer"] == {"Adam": {"lr": 0.015, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}}
    index = np.load(finished.saved / "poison_idx.npy")
    assert (index.dtype, index.shape) == (np.float64, (TRAIN,))
    assert set(np.unique(index)) == {0.0, 1.0}
    assert f"{TRAIN} ({int(index.sum())} poisoned)" in (finished.folder / "said.txt").read_text()
    splits = [f"split_{stage}.png" for stage in dict.fromkeys(STAGES)]
    for name in (
        "accuracy.png",
        "purity.png",
        "triggered.png",
        "confusion.png",
        "triggered_confusion.png",
        "features.png",
        *splits,
    ):
        with Image.open(finished.log / name) as image:
            image.load()
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 3  # not empty


def test_the_run_keeps_its_confusion_matrix_and_its_page(finished: Place) -> None:
    """confusion.json has the matrix of the last epoch, whose diagonal gives the ACC; report.html embeds every plot of the
    run."""
    row, kept = finished.rows()[-1], json.loads((finished.log / "confusion.json").read_text())
    matrix = np.array(kept["confusion"])
    assert (kept["epoch"], matrix.shape, matrix.sum(), len(kept["class_names"])) == (EPOCHS - 1, (10, 10), TEST, 10)
    assert matrix.diagonal().sum() / TEST == row["clean_accuracy"]
    for counts, own, share in zip(matrix, matrix.diagonal(), kept["per_class_accuracy"], strict=True):
        assert share == own / counts.sum()
    triggered = np.array(kept["triggered_confusion"])
    assert (triggered.shape, triggered.sum(), triggered[3].sum()) == ((10, 10), 39, 0)  # without the target class
    assert (
        triggered[:, 3].sum() / 39 == row["attack_success_rate"] and triggered.diagonal().sum() / 39 == row["robust_accuracy"]
    )
    assert kept["per_class_attack_success_rate"][3] is None
    page = (finished.log / "report.html").read_text()
    assert f"{100 * row['clean_accuracy']:.2f} %" in page and "train_iteration" in page
    for plot in [*finished.log.glob("*.png"), finished.saved / "suspects.png"]:
        assert base64.b64encode(plot.read_bytes()).decode() in page, plot.name


def read_board(folder: Path) -> Any:
    """Return TensorBoard's own reader of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    return reader.Reload()


def test_tensorboard_shows_the_metrics(finished: Place) -> None:
    """TensorBoard has every number of metrics.jsonl, loss histograms by ground truth, poisoned images, hyperparameters."""
    board = read_board(finished.log / "tensorboard")
    rows = finished.rows()
    for key, value in rows[0].items():
        if isinstance(value, (int, float)) and key != "epoch":
            events = board.Scalars(key)
            assert [e.step for e in events] == list(range(EPOCHS)), key
            assert [e.value for e in events] == pytest.approx([row[key] for row in rows], rel=1e-5, abs=1e-9), key
    for name in ("split_loss/clean", "split_loss/poisoned"):
        assert [e.step for e in board.Histograms(name)] == list(range(EPOCHS))
    poisoned = int(np.load(finished.saved / "poison_idx.npy").sum())
    assert board.Histograms("split_loss/poisoned")[0].histogram_value.num == poisoned
    assert board.Histograms("split_loss/clean")[0].histogram_value.num == TRAIN - poisoned
    assert any(tag.startswith("poisoned") for tag in board.Tags()["images"])
    assert board.summary_metadata["_hparams_/session_start_info"]
    (text,) = board.Tensors("config/text_summary")
    assert f"train_iteration: {STEPS}" in text.tensor_proto.string_val[0].decode()


def test_checkpoints_and_the_best_model(finished: Place) -> None:
    """latest_model.pt is the last epoch, best_model.pt the first one with the highest clean accuracy, both with their rows."""
    rows = finished.rows()
    accuracies = [row["clean_accuracy"] for row in rows]
    best = accuracies.index(max(accuracies))
    for name, epoch in (("latest_model.pt", EPOCHS - 1), ("best_model.pt", best)):
        saved = finished.checkpoint(name)
        assert saved["epoch"] == epoch
        assert saved["result"] == rows[epoch]
        assert saved["best_acc"] == accuracies[best]
        assert saved["best_epoch"] == best + 1
        assert {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict"} <= saved.keys()
    saved = finished.checkpoint()
    assert len(saved["clean_pool"]) == 100
    assert int(saved["epochs_in_clean_pool"].sum()) == sum(row["clean_pool_size"] for row in rows)


@pytest.mark.parametrize("which", ["latest", "best", "authors"])
def test_test_py_gives_the_figures_of_the_run(finished: Place, tmp_path: Path, which: str) -> None:
    """test.py prints and writes the figures of the checkpoint's epoch, including counts, and changes no other file; also
    for a checkpoint like the authors', with `module.` prefixes and few keys."""
    place = finished.copy(tmp_path / "copy")
    row = finished.checkpoint("best_model.pt" if which == "best" else "latest_model.pt")["result"]
    arguments = {"latest": (), "best": ("--resume", "best_model.pt"), "authors": ("--resume", tmp_path / "theirs.pt")}
    saved = finished.checkpoint()
    theirs = {
        "epoch": saved["epoch"],
        "result": {"test_acc": np.float64(0.93)},
        "model_state_dict": {f"module.{name}": tensor for name, tensor in saved["model_state_dict"].items()},
        "optimizer_state_dict": saved["optimizer_state_dict"],
        "best_acc": np.float64(0.9),
        "best_epoch": 3,
    }
    torch.save(theirs, tmp_path / "theirs.pt")
    before = place.hashes()
    result = place.test(*arguments[which])
    assert result.returncode == 0, result.stderr
    kept = json.loads((place.log / "test.json").read_text())
    assert kept["clean_accuracy"] == row["clean_accuracy"]
    assert kept["attack_success_rate"] == row["attack_success_rate"]
    assert (kept["clean_total"], kept["backdoor_total"]) == (TEST, 39)  # of 43 images in ten classes 4 are of class 3
    matrix = np.array(kept["confusion"])
    assert matrix.sum() == TEST and matrix.diagonal().sum() == kept["clean_accuracy"] * TEST
    if which != "best":
        of_the_run = json.loads((place.log / "confusion.json").read_text())
        assert all(
            kept[key] == of_the_run[key] for key in ("confusion", "triggered_confusion", "per_class_attack_success_rate")
        )
    assert f"ACC {100 * row['clean_accuracy']:.2f} %" in result.stdout
    assert f"{100 * min(kept['per_class_accuracy']):.2f} %" in result.stdout
    assert f"ASR {100 * row['attack_success_rate']:.2f} %" in result.stdout
    assert f"without the trigger, {100 * kept['clean_as_target']:.2f} %" in result.stdout
    after = place.hashes()
    assert after.keys() - before.keys() == TESTED
    assert {name: after[name] for name in before} == before


def test_without_a_trigger_the_success_rate_is_that_of_clean_images(finished: Place, tmp_path: Path) -> None:
    """If the trigger changes nothing (an image blended in with weight 0), the ASR equals `clean_as_target`."""
    place = finished.copy(tmp_path / "copy")
    result = place.test("--set", "backdoor={target_label: 3, blend: {alpha: 0.0}}")
    assert result.returncode == 0, result.stderr
    none = json.loads((place.log / "test.json").read_text())
    assert none["attack_success_rate"] == none["clean_as_target"]
    place.test()
    assert json.loads((place.log / "test.json").read_text())["clean_as_target"] == none["clean_as_target"]


def test_a_finished_run_has_nothing_to_do(finished: Place, tmp_path: Path) -> None:
    """A finished run that is started again logs that and keeps its checkpoints; a row of metrics.jsonl that a kill after
    the checkpoint prevented is restored."""
    place = finished.copy(tmp_path / "copy")
    metrics = place.log / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    result = place.train()
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stdout
    assert not re.search(r"^epoch ", result.stdout, re.M)
    assert_same_run(finished, place)


def test_resume_false_moves_the_earlier_run_aside(finished: Place, tmp_path: Path) -> None:
    """--resume False starts with epoch 1, and logs where the files of the earlier run are now; all of them are unchanged."""
    place = finished.copy(tmp_path / "copy")
    before = set(place.hashes().values())
    result = place.train("--resume", "False", "--set", "num_epochs=1", "--set", "semi.mixmatch.train_iteration=2")
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "moved to" in line)
    folders = [Path(word) for word in re.findall(r"\S*\.earlier-\S+", line)]
    assert len(folders) == 2
    for folder in folders:
        assert folder.is_dir()
    assert before <= set(place.hashes().values()) | {hashlib.sha256(b"").hexdigest()} | lock_digest(finished)
    assert len(place.rows()) == 1
    assert place.checkpoint()["epoch"] == 0


def lock_digest(place: Place) -> set[str]:
    """Return the digest of the lock file, which holds only the process number."""
    return {hashlib.sha256((place.saved / ".lock").read_bytes()).hexdigest()}


def test_undefended_twin(tiny: Path, tmp_path: Path) -> None:
    """`defense: none` trains without pools on the same poisoned images, with SGD's learning rate falling at 50 % and 75 %."""
    result = run_script("ASD.py", "--config", tiny, "--gpu", "cpu", "--set", "defense=none", "--set", "num_epochs=4")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "saved_data/tiny/log/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert (row["defense"], row["stage"]) == ("none", "undefended")
        assert row["loss"] > 0
        for key in ("clean_pool_size", "poisoned_in_clean_pool", "loss_x", "loss_u", "lambda_u"):
            assert row[key] is None
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])  # what each epoch was trained with
    saved = torch.load(tmp_path / "storage/tiny/checkpoint/latest_model.pt", weights_only=True)
    assert saved["optimizer_state_dict"]["param_groups"][0]["momentum"] == 0.9
    assert (tmp_path / "saved_data/tiny/log/accuracy.png").exists()


def test_a_run_needs_neither_pictures_nor_tensorboard(tiny: Path, tmp_path: Path) -> None:
    """If matplotlib and TensorBoard cannot be imported, each costs one line, and the run completes with all results."""
    blocked = tmp_path / "modules"
    blocked.mkdir()
    for name in ("matplotlib", "tensorboard"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    command = [sys.executable, str(REPOSITORY / "ASD.py"), "--config", str(tiny), "--gpu", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{blocked}:{REPOSITORY}"}
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    warned = [line.split(":")[1].split("/")[-1].strip() for line in result.stdout.splitlines() if line.startswith("warning: ")]
    splits = [f"split_{stage}.png" for stage in dict.fromkeys(STAGES)]
    ends = ("suspects.png", "features.png", "accuracy.png", "confusion.png", "triggered_confusion.png", "purity.png")
    assert sorted(warned) == sorted(["TensorBoard", "triggered.png", *splits, *ends])
    saved = tmp_path / "saved_data" / "tiny"
    assert len((saved / "suspects.csv").read_text().splitlines()) == TRAIN + 1
    assert len((saved / "log" / "metrics.jsonl").read_text().splitlines()) == EPOCHS
    assert (saved / "log" / "report.html").exists() and (saved / "log" / "confusion.json").exists()
    assert not list(saved.rglob("*.png")) and not list(saved.rglob("*.part"))
    assert run_script("test.py", "--config", tiny, "--gpu", "cpu").returncode == 0


# Killed, stopped, resumed.


def test_killed_in_every_stage_and_resumed_equals_uninterrupted(finished: Place, tmp_path: Path) -> None:
    """After kill -9 before the first checkpoint and in each of the three stages, the same command resumes: weights,
    optimizer, schedule, best model, pools and metrics equal those of an uninterrupted run bit for bit."""
    place, took = Place(tmp_path / "killed"), [row["seconds"] for row in finished.rows()]
    moments: list[tuple[int, Callable[[], bool]]] = [
        (0, lambda: (place.saved / "poison_idx.npy").exists()),
        (1, lambda: len(place.rows()) >= 1),
        (2, lambda: len(place.rows()) >= 3),
        (4, lambda: len(place.rows()) >= 5),
    ]
    hit = set()
    for epoch, ready in moments:
        code, _, error = place.interrupt(signal.SIGKILL, ready, 0.3 * took[epoch])
        assert code == -signal.SIGKILL, error
        done = place.checkpoint()["epoch"] + 1 if (place.checkpoints / "latest_model.pt").exists() else 0
        assert done < EPOCHS
        hit.add(STAGES[done])
    assert hit == set(STAGES)
    result = place.train()
    assert result.returncode == 0, result.stderr
    assert re.search(r"resuming after epoch [56]/6", result.stdout)
    assert_same_run(finished, place)
    events = read_board(place.log / "tensorboard").Scalars("clean_accuracy")
    assert [e.step for e in events] == list(range(EPOCHS))  # each epoch once, whatever was cut off


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_stopped_run_ends_cleanly_and_can_be_resumed(
    finished: Place, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    """Ctrl-C and SIGTERM end the run with one line on how to resume, without a traceback; the resumed run equals an
    uninterrupted one."""
    place = Place(tmp_path / "stopped")
    delay = 0.3 * finished.rows()[4]["seconds"]
    code, out, error = place.interrupt(number, lambda: len(place.rows()) >= 4, delay)
    assert code == expected
    assert "Traceback" not in out + error
    assert "--resume False" in error
    assert len(place.rows()) < EPOCHS
    result = place.train()
    assert result.returncode == 0, result.stderr
    assert_same_run(finished, place)


# Mistakes that a user can mend.


def assert_one_line(result: subprocess.CompletedProcess[str], script: str, *parts: str) -> None:
    """Check exit code 2 and a single line that names what is wrong."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}: error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--config", "nowhere.yaml"), ("nowhere.yaml", "no such file")),
        (("--set", "dataset=null"), ("dataset_dir", "missing")),
        (("--set", "dataset=null", "--set", "dataset_dir=/nowhere/cifar"), ("/nowhere/cifar", "cs.toronto.edu", "download")),
        (("--gpu", "x"), ("--gpu x", "cpu")),
        (("--resume", "other.pt"), ("other.pt", "no such checkpoint")),
        (("--color", "red"), ("--color", "--help")),
        (("--set", "semi.loader.batch_size=150"), ("clean pool", "semi.loader.batch_size: 150", "epoch 1 ")),
    ],
    ids=["config", "no dataset_dir", "dataset_dir", "gpu", "resume", "option", "pool below a batch"],
)
def test_mistakes_are_one_line(tiny: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """An error on the command line or in the YAML ends the program before training: one line, exit code 2, no traceback."""
    assert_one_line(run_script("ASD.py", "--config", tiny, "--gpu", "cpu", *arguments), "ASD.py", *parts)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [(("optimizer.Adam.lr=1.0e+9",), "of optimizer"), (("defense=none", "undefended.optimizer.SGD.lr=1.0e+20"), "undefended")],
    ids=["asd", "none"],
)
def test_divergence_is_one_line_and_keeps_no_nonsense(tiny: Path, tmp_path: Path, overrides: tuple[str, ...], key: str) -> None:
    """A run that diverges names the learning rate to lower, and leaves no checkpoint with NaN."""
    options = [word for text in overrides for word in ("--set", text)]
    result = run_script("ASD.py", "--config", tiny, "--gpu", "cpu", *options)
    assert_one_line(result, "ASD.py", "not finite", "lower the learning rate", key)
    for path in tmp_path.rglob("*.pt"):
        for name, tensor in torch.load(path, weights_only=True)["model_state_dict"].items():
            assert torch.isfinite(tensor).all(), name


def test_wrong_checkpoints_are_one_line(finished: Place, tmp_path: Path) -> None:
    """A checkpoint that is missing, invalid, of another network or of another configuration is refused by name, and the
    run's files do not change."""
    place = finished.copy(tmp_path / "copy")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 9)
    before = place.hashes()
    assert_one_line(place.test("--resume", "other.pt"), "test.py", "other.pt", "best_model.pt, latest_model.pt")
    assert_one_line(place.test("--resume", tmp_path / "noise.pt"), "test.py", "noise.pt")
    wider = place.test("--set", "network.resnet18_cifar.width=3")
    assert_one_line(wider, "test.py", "latest_model.pt", "another network", "backbone.")
    assert_one_line(place.test("--resume", "False"), "test.py", "--resume False")
    assert place.hashes() == before
    checkpoints = {name: digest for name, digest in before.items() if name.startswith("storage") and name.endswith(".pt")}
    changed = place.train("--set", "global.epsilon=0.4")
    assert_one_line(changed, "ASD.py", "latest_model.pt", "global.epsilon", "0.5", "0.4", "--resume False")
    assert checkpoints.items() <= place.hashes().items()
