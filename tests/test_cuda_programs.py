"""The programs on the simulated CUDA device (`fake_cuda.py`), started by their command lines."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import runpy
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY
from fake_cuda import Device, Graph, pretended_cuda
from PIL import Image

from utils.reporting import plots
from utils.runtime.stepper import TRIAL

STEPS = 3  # of MixMatch an epoch
SMALL = TINY | {
    "dataset": {"shapes": {"train_size": 60, "test_size": 23}},
    "network": {"resnet18_cifar": {"width": 8, "blocks": 1}},  # narrower layers crash torch 2.14 on processors without AVX-512
    "num_epochs": 3,
    "loader": {"batch_size": 24},
    "semi": {
        "loader": {"batch_size": 4},
        "criterion": {"mixmatch": {"rampup_length": 6}},
        "mixmatch": {"train_iteration": STEPS},
    },
    "global": {"epoch_first": 1, "epoch_second": 2, "epoch_third": 3, "seed_num": 2, "t": 1, "n": 1},
}
COSINE = ("lr_scheduler={cosine_annealing: {}}",)


def program(script: str, *arguments: object) -> tuple[int, str]:
    """Run a script (`ASD.py`) or a module (`data.poison`) in this process; return its exit code and its output. Plots are
    skipped, because they take most of the time and no device."""
    printed = io.StringIO()
    drawing = [name for name in vars(plots) if name.startswith("draw")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [script, *map(str, arguments)]))
        stack.enter_context(mock.patch.multiple(plots, **dict.fromkeys(drawing, lambda *_, **__: None)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            if script.endswith(".py"):
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as error:
            return int(error.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def write_yaml(folder: Path, **changes: Any) -> Path:
    """Write the small configuration with some sections changed; its run is in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = SMALL | {"saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage")} | changes
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@dataclass
class Outcome:
    """A completed run of ASD.py."""

    folder: Path
    code: int
    printed: str
    device: Device

    @property
    def checkpoint(self) -> Path:
        return self.folder / "storage/tiny/checkpoint/latest_model.pt"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl without the times."""
        lines = (self.folder / "saved/tiny/log/metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return weights, BN statistics and moments of the last checkpoint."""
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=False)
        moments = [t for state in saved["optimizer_state_dict"]["state"].values() for t in state.values()]
        return [*saved["model_state_dict"].values(), *moments]

    def same_as(self, other: Outcome) -> bool:
        pairs = zip(self.tensors, other.tensors, strict=True)
        return self.rows == other.rows and all(torch.equal(a, b) for a, b in pairs)


def refuse(graph: Graph, *_: object, **__: object) -> None:
    """Replace `Graph.capture_begin` by a failure."""
    raise RuntimeError("CUDA error: this device captures no graphs")


def train(folder: Path, settings: tuple[str, ...] = (), resume: str = "False", options: tuple[str, ...] = ()) -> Outcome:
    """Run `ASD.py --gpu 0` on the simulated device.

    Args:
        settings: for `--set`.
        resume: "" goes on from the last checkpoint.
        options: further words of the command line.
    """
    words = ["--config", write_yaml(folder), "--gpu", 0, *(["--resume", resume] if resume else []), *options]
    with pretended_cuda() as device:
        code, printed = program("ASD.py", *words, *(word for setting in settings for word in ("--set", setting)))
    return Outcome(folder, code, printed, device)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A complete run of three stages, with Adam and a cosine schedule, whose MixMatch steps are replays of one graph."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("captured"), COSINE)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same run, stopped by Ctrl-C in the middle of its third epoch."""
    torch.set_num_threads(1)
    replay = Graph.replay

    def press(graph: Graph) -> None:
        if graph.replays == TRIAL + 2 * STEPS + 1:
            raise KeyboardInterrupt
        replay(graph)

    with mock.patch.object(Graph, "replay", press):
        return train(tmp_path_factory.mktemp("interrupted"), COSINE)


@pytest.fixture
def stopped(interrupted: Outcome, tmp_path: Path) -> Outcome:
    """A copy of the interrupted run, to be resumed by a test."""
    folder = tmp_path / "run"
    shutil.copytree(interrupted.folder, folder)
    return Outcome(folder, interrupted.code, interrupted.printed, interrupted.device)


def in_the_other_layout(t: torch.Tensor) -> torch.Tensor:
    """Return the same values in the other memory format: channels_last or contiguous."""
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return t.contiguous() if last else t.contiguous(memory_format=torch.channels_last)


def turn_layouts(checkpoint: Path) -> int:
    """Store the moments of a checkpoint in the other memory format; return how many of them change."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    turned = 0
    for moments in saved["optimizer_state_dict"]["state"].values():
        for name, t in moments.items():
            if t.dim() == 4:
                moments[name] = in_the_other_layout(t)
                turned += moments[name].stride() != t.stride()
    torch.save(saved, checkpoint)
    return turned


# -- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_captured_run_equals_the_eager_run(captured: Outcome, tmp_path: Path) -> None:
    """The MixMatch steps of all stages are replays of one graph, those of the virtual model of another. All figures and
    weights equal those of eager steps bit for bit, also with a schedule that changes the learning rate between replays."""
    with mock.patch.object(Graph, "capture_begin", refuse):
        eager = train(tmp_path, COSINE)
    assert captured.code == eager.code == 0, captured.printed + eager.printed
    assert captured.same_as(eager)
    mixmatch, virtual = (graph.replays - TRIAL for graph in captured.device.graphs)
    assert (mixmatch, virtual) == (3 * STEPS, 60 // 24) and not eager.device.graphs
    assert "eagerly" not in captured.printed and "this device captures no graphs" in eager.printed
    assert [row["stage"] for row in captured.rows] == ["class-aware", "class-agnostic", "meta-split"]
    assert len({row["learning_rate"] for row in captured.rows}) > 1


@pytest.mark.slow
def test_the_host_never_waits_in_a_loop(captured: Outcome, tmp_path: Path) -> None:
    """No loop over batches or steps, in any stage, reads from the device or copies pageable memory to it."""
    more = (f"semi.mixmatch.train_iteration={STEPS + 2}", "loader.batch_size=7")  # of which scoring takes 8 times as many
    longer = train(tmp_path, (*COSINE, *more))
    assert longer.code == 0 and captured.device.reads and captured.device.uploads
    assert longer.device.reads == captured.device.reads
    assert longer.device.uploads == captured.device.uploads


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_a_new_graph(stopped: Outcome, captured: Outcome) -> None:
    """Ctrl-C between two replays keeps the finished epochs. Resuming gives the uninterrupted run bit for bit, also from
    moments in the memory format of an `--amp` run, which fused kernels would not accept."""
    assert stopped.code == 130 and len(stopped.rows) == 2
    assert turn_layouts(stopped.checkpoint) > 0
    resumed = train(stopped.folder, COSINE, resume="")
    assert resumed.code == 0, resumed.printed
    assert resumed.device.graphs and "eagerly" not in resumed.printed
    assert resumed.same_as(captured)


@pytest.mark.slow
def test_amp_may_be_switched_on_when_a_run_is_resumed(stopped: Outcome) -> None:
    """The run resumes in bf16, as a graph, with all images and weights in channels_last."""
    resumed = train(stopped.folder, COSINE, resume="", options=("--amp",))
    assert resumed.code == 0, resumed.printed
    assert len(resumed.rows) == 3 and resumed.device.graphs and "eagerly" not in resumed.printed
    assert resumed.device.channels_last[True] and not resumed.device.channels_last[False]


# -- The other programs ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_tested_as_it_was_trained(captured: Outcome) -> None:
    """`test.py --gpu 0` gives the ACC and ASR of the last epoch of the run."""
    with pretended_cuda():
        code, printed = program("test.py", "--config", captured.folder / "tiny.yaml", "--gpu", 0, "--set", *COSINE)
    assert code == 0, printed
    result = json.loads((captured.folder / "saved/tiny/log/test.json").read_text())
    for key in ("clean_accuracy", "attack_success_rate"):
        assert result[key] == captured.rows[-1][key]


def test_pictures_get_the_labels_that_the_cpu_gives(captured: Outcome, tmp_path: Path) -> None:
    """`test.py --images` works with batches from host memory."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    tables = []
    for gpu, context in (("0", pretended_cuda()), ("cpu", contextlib.nullcontext())):
        out = tmp_path / f"{gpu}.csv"
        with context:
            arguments = ("--images", tmp_path / "images", "--out", out, "--gpu", gpu, "--set", "loader.batch_size=2")
            code, printed = program("test.py", "--config", captured.folder / "tiny.yaml", *arguments)
        assert code == 0, printed
        tables.append([row[:2] for row in csv.reader(out.read_text().splitlines())])  # the image and its label
    assert tables[0] == tables[1] and len(tables[0]) == 6


SURROGATE = {"surrogate": {"resnet18_cifar": {"width": 8, "blocks": 1}}}
ATTACKS: dict[str, dict[str, Any]] = {  # those that train networks
    "iab": {"mask_epochs": 1, "generator_epochs": 1, "batch_size": 20, "width": 8, "cover_ratio": 1.0, **SURROGATE},
    "clb": {"steps": 2, "epochs": 1, "batch_size": 20, **SURROGATE},
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_poisoned_set_is_made(attack: str, tmp_path: Path) -> None:
    """`python -m data.poison --gpu 0` trains the attack's networks on the device, and writes the set."""
    backdoor = {"poison_ratio": 0.3, "poison_mode": "exact", "target_label": 3, attack: ATTACKS[attack]}
    path = write_yaml(tmp_path / "run", backdoor=backdoor)
    with pretended_cuda() as device:
        code, printed = program("data.poison", "--config", path, "--out", tmp_path / "set", "--gpu", 0)
    assert code == 0, printed
    assert (tmp_path / "set" / "train.npz").is_file()
    assert device.launches["aten::convolution_backward"] > 0
