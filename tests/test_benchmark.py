"""The benchmark: its measurements, its JSON file, and the options it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import first_look, reference, rows, run, workload
from benchmark.rows import Row, Sizes
from benchmark.workload import in_runtime, make_context
from data.pools import class_agnostic_split, pools_of
from engine.context import build_state
from model.grouped_norm import is_grouped
from utils.checkpoint import State
from utils.config.settings import Runtime
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = Sizes(120, 10, 12, 12, 1, 1, (120, 240), least=0.001)


@pytest.mark.slow
def test_a_report_has_all_that_readers_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON file has facts about the machine, every row with its ratios (median, minimum, maximum), and the growth with
    N. The table is printed."""
    monkeypatch.setattr(run, "QUICK", SMALL)
    file = tmp_path / "new" / "b.json"
    run.main(["--quick", "--width", "1", "--batch", "4", "--rounds", "1", "--workers", "0", "--json", str(file)])
    report = json.loads(file.read_text())
    assert {"processor", "cores", "torch", "threads", "device"} <= set(report["machine"])
    assert {row["row"].partition(",")[0] for row in report["rows"]} == {"feed", "step", "inference", "virtual epoch", "split"}
    printed = capsys.readouterr().out
    for row in report["rows"]:
        assert row["ms"] > 0 and row["row"] in printed
        assert (row["ratio"] is None) == (row["against"] == "")
        assert row["ratio"] is None or 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert any(row["variant"].endswith("again") for row in report["rows"])
    assert set(report["growth"]) == {"step", "inference"}
    assert all(math.isfinite(grown["exponent"]) and len(grown["ms"]) == 2 for grown in report["growth"].values())


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways are measured in each round. A ratio is the median of the ratios within the rounds, above 1 if the variant is
    faster; a time is that of one of the `count` steps of a call."""
    seconds = {"old": iter([10.0, 10.0, 20.0, 20.0, 60.0, 60.0]), "new": iter([5.0, 5.0, 20.0])}
    order: list[str] = []

    class Measured:
        def __init__(self, work: Callable[[], str], least: float) -> None:
            order.append(work())
            self.median = next(seconds[order[-1]])

    monkeypatch.setattr(rows, "timed", Measured)
    row = Row("r", {"old": lambda: lambda: "old"}, {"new": lambda: lambda: "new"}, count=10)
    lines = {line["variant"]: line for line in row.measure(3, 0.1)}
    assert order == ["old", "new", "old"] * 3
    new = lines["new"]
    assert (new["ms"], new["ratio"], new["ratio_min"], new["ratio_max"]) == (500.0, 3.0, 2.0, 4.0)
    assert lines["old, again"]["ratio"] == 1 and lines["old"]["ratio"] is None


def test_a_call_is_measured_by_torch() -> None:
    """A measurement takes at least the given time and does not change the number of threads."""
    calls: list[int] = []
    found = workload.timed(lambda: calls.append(torch.get_num_threads()), least=0.01)
    assert len(calls) >= 2 and {*calls} == {torch.get_num_threads()} and 0 < found.median < 0.01


def test_growth_is_the_exponent_of_a_power_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time proportional to N ** 1.5 has the exponent 1.5."""

    class Measured:
        def __init__(self, images: int, least: float) -> None:
            self.median = 3 * images**1.5

    monkeypatch.setattr(rows, "timed", Measured)
    monkeypatch.setattr(workload, "mixmatch", lambda pool, steps, context: len(context.train_set))
    monkeypatch.setattr(workload, "inference", lambda context: len(context.train_set))
    found = rows.growth(lambda n: make_context(n, 1, 4, CPU), SMALL)
    assert [grown["exponent"] for grown in found.values()] == pytest.approx([1.5, 1.5])


def test_the_work_of_the_full_network() -> None:
    """With ResNet-18 of width 64 a step of batch 64 costs 781 GFLOP."""
    assert workload.step_gflop(64, 64) == pytest.approx(781, abs=1)


def test_the_baseline_computes_what_runs_compute() -> None:
    """The baseline's split, also of ties, and its split losses equal those of the method, except for its own random views."""
    losses = torch.randint(0, 30, (101,), generator=torch.Generator().manual_seed(2)).double()
    data = reference.PilImages(np.zeros((101, 32, 32, 3), np.uint8), np.zeros(101, np.int64))
    clean, polluted = reference.split(data, losses.numpy(), 0.5)
    pool = class_agnostic_split(losses, 0.5)
    assert list(clean.indices) == pool.tolist() and list(polluted.indices) == pools_of(pool, 101).polluted.tolist()
    context = make_context(30, 1, 4, CPU, blocks=1)
    even = context.train_set.images[:, :1, :1, :1].expand_as(context.train_set.images)  # looks the same in every view
    context.train_set.images.copy_(even.clone())
    ours = workload.inference(context)()
    assert isinstance(ours, torch.Tensor)
    theirs = torch.from_numpy(reference.Script(context, 0).inference())
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments", ["--batch 1", "--batch 101", "--width 0", "--rounds 0", "--workers -1", "--batch x", "--first-look"]
)
def test_bad_numbers_are_refused_in_one_line(arguments: str) -> None:
    """Each number out of range is reported with its value before anything is measured."""
    with pytest.raises(UserError) as error:
        run.main(arguments.split())
    assert "\n" not in str(error.value)
    assert arguments.split()[-1] in str(error.value)


@pytest.mark.parametrize("option", ["--rounds 3", "--workers 2", "--json a.json", "--quick"])
def test_the_first_look_refuses_what_it_would_ignore(option: str) -> None:
    """An option that has no effect there is named before anything is measured."""
    with pytest.raises(UserError, match=f"{option.split()[0]}: has no effect with --first-look"):
        run.main(f"--device cuda --first-look {option}".split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
@pytest.mark.parametrize("arguments", ["--device cuda", "--device cuda --first-look"])
def test_a_missing_cuda_device_is_named(arguments: str) -> None:
    """Without CUDA, both modes that need it are refused."""
    with pytest.raises(UserError, match="--device cuda"):
        run.main(arguments.split())


@pytest.mark.parametrize("error", [None, UserError("no graph"), RuntimeError("broken\nat length"), ZeroDivisionError()])
def test_the_first_look_measures_what_does_not_fail(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Eager, graph, graph + merged + compile, inference, virtual epoch, in this order. A part that fails costs one line,
    and the others run."""
    ran: list[object] = []

    def step(context: object, ceiling: float) -> None:
        ran.append(context)
        if len(ran) == 2 and error is not None:
            raise error

    monkeypatch.setattr(workload, "make_context", lambda *_: None)
    monkeypatch.setattr(first_look, "product_tflops", lambda *_: 1.0)
    monkeypatch.setattr(first_look, "in_runtime", lambda _, runtime: (runtime.mode, runtime.merged, runtime.compile))
    monkeypatch.setattr(first_look, "step", step)
    monkeypatch.setattr(first_look, "inference", lambda *_: ran.append("inference"))
    monkeypatch.setattr(first_look, "virtual", lambda *_: ran.append("virtual"))
    failed = first_look.look(CPU, 8, 4)
    assert ran == [("eager", False, False), ("graph", False, False), ("graph", True, True), "inference", "virtual"]
    assert failed == ([] if error is None else ["step: graph"])
    assert len(said) == len(failed) and all(type(error).__name__ in line for line in said)


@pytest.mark.parametrize("failed", [[], ["step: graph"]])
def test_the_exit_code_of_a_first_look(failed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 0 if all parts ran; otherwise it is 1, and the failed parts are listed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "machine_facts", lambda device: {})
    monkeypatch.setattr(first_look, "look", lambda *_: failed)
    with pytest.raises(SystemExit) as end:
        run.main(["--device", "cuda", "--first-look"])
    assert end.value.code == (0 if not failed else "FAILED: step: graph")


def test_the_parts_of_the_first_look_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs on a CPU and prints its figures."""
    monkeypatch.setattr(first_look, "SIDE", 32)
    monkeypatch.setattr(first_look, "STEPS", 1)
    monkeypatch.setattr(workload, "step_gflop", lambda *_: 1.0)
    context = make_context(120, 1, 4, CPU, blocks=1)
    first_look.step(context, first_look.product_tflops(CPU, amp=False))
    first_look.inference(context, (60,))
    first_look.virtual(context)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("TFLOP/s", "ms per step", "images per second", "120 images: "))


@pytest.mark.parametrize("runtime", [Runtime("eager"), Runtime("eager", amp=True), Runtime("eager", merged=True)], ids=str)
def test_a_variant_is_what_its_settings_say(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision and merging depend only on the variant's own settings: bf16 does not merge, merging keeps the precision."""
    built: list[State] = []
    monkeypatch.setattr(workload, "build_state", lambda *args, build=build_state: built.append(build(*args)) or built[-1])
    context = in_runtime(make_context(40, 2, 4, CPU, blocks=1), runtime)
    workload.mixmatch(12, 1, context)()
    assert context.config.runtime == runtime and context.machine.amp == runtime.amp
    assert [is_grouped(state.model) for state in built] == [runtime.merged]
