"""The benchmark: its proofs hold and notice what is broken, its file has what readers look for, its parts run."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ASD
from model import grouped_norm
from model.grouped_norm import GroupedBatchNorm2d, group, rows_per_group
from utils.benchmark import cli as benchmark
from utils.benchmark import first_look as bench_first_look
from utils.benchmark import proofs as bench_proofs
from utils.benchmark import rows as bench_rows
from utils.benchmark import setup as bench_setup
from utils.benchmark.rows import Measured, Sizes, Task, Variant
from utils.benchmark.setup import Kind, Training, make_bench
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = Sizes(120, 10, 12, 12, (120, 240, 480), 1, 1, 32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a benchmark that takes a few seconds."""
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    return ["--quick", "--width", "1", "--batch", "4", "--rounds", "1", "--workers", "0"]


@pytest.mark.parametrize("name", bench_proofs.PROOFS)
def test_every_proof_holds(name: str) -> None:
    """What the benchmark compares in speed gives the same numbers."""
    assert getattr(bench_proofs, name)(CPU) is True


def test_a_report_has_all_that_readers_look_for(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` names machine, proofs, rows with ratios between their least and greatest, and growth; the table is printed."""
    benchmark.main([*small, "--json", str(tmp_path / "new" / "b.json")])
    report = json.loads((tmp_path / "new" / "b.json").read_text())
    assert {"processor", "cores", "torch", "threads"} <= set(report["machine"])
    assert report["proofs"] == dict.fromkeys(bench_proofs.PROOFS, True)
    kinds = {row["row"].partition(",")[0].partition(" of")[0] for row in report["rows"]}
    assert {"feed", "iteration", "scoring", "virtual epoch", "split"} <= kinds
    printed = capsys.readouterr().out
    for row in report["rows"]:
        assert {"row", "variant", "value", "unit", "ratio", "ratio_min", "ratio_max", "tag"} <= set(row)
        assert row["tag"] in ("exact", "precision", "algorithm")
        assert row["value"] > 0
        assert row["row"] in printed
        if row["ratio"] is not None:
            assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert any(row["variant"].endswith("again") for row in report["rows"])
    assert {"iteration", "scoring_and_split", "memory_per_image_tensors"} <= set(report["growth"])
    assert abs(report["growth"]["memory_per_image_tensors"]) < 1e-9
    assert all(math.isfinite(value) for value in report["growth"].values())


def test_a_broken_step_is_noticed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that computes something else makes its proofs false: FAIL instead of a ratio, and exit code 1."""
    right = ASD.mixmatch_loss

    def wrong(logits: Tensor, targets: Tensor, labelled: int) -> tuple[Tensor, Tensor]:
        loss_x, loss_u = right(logits, targets, labelled)
        return loss_x, 1.001 * loss_u

    monkeypatch.setattr(ASD, "mixmatch_loss", wrong)
    with pytest.raises(SystemExit) as end:
        benchmark.main([*small, "--json", str(tmp_path / "b.json")])
    assert end.value.code == 1
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["proofs"]["reference_step"] is False
    assert report["proofs"]["crop_flip_normalize"] is True
    for row in report["rows"]:
        if row["row"].startswith("iteration, clean") and ": " not in row["row"] and row["variant"].startswith("resident"):
            assert (row["ratio"], row["ratio_min"]) == ("FAIL", None)
        if row["row"] == "feed" and row["variant"] == "resident":
            assert row["ratio"] > 0
    assert "FAIL" in capsys.readouterr().out


def joint_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize over all rows: near, and another method."""
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    out = nn.functional.batch_norm(x, None, None, weight, bias, True, 0.1, eps)
    return out, mean.detach().expand(groups, -1), variance.detach().expand(groups, -1)


@pytest.mark.parametrize(
    ("target", "name", "proof"),
    [
        (bench_proofs, "fold", "folded_scoring"),
        (bench_proofs, "virtual_copy", "frozen_virtual_step"),
        (bench_proofs, "class_agnostic_split", "split"),
        (grouped_norm, "normalize_groups", "grouped_bn"),
        (bench_setup.Pipeline, "normalize", "crop_flip_normalize"),
    ],
)
def test_each_proof_notices_its_own_defect(target: Any, name: str, proof: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a proof is about, breaking it makes that proof false and leaves the benchmark running."""
    right = getattr(target, name)
    broken = {
        "fold": lambda model, example: copy.deepcopy(model).eval(),
        "virtual_copy": lambda model: (copy.deepcopy(model), list(model.parameters())),
        "class_agnostic_split": lambda losses, epsilon: right(-losses, epsilon),
        "normalize_groups": joint_statistics,
        "normalize": lambda self, images: right(self, images) * (1 + 1e-6),
    }
    monkeypatch.setattr(target, name, broken[name])
    assert bench_proofs.prove(CPU)[proof] is False


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_grouped_normalization_is_one_pass_for_several(groups: int, momentum: float | None) -> None:
    """Outputs, gradients and running statistics of one grouped pass are those of BatchNorm2d called group by group."""
    torch.manual_seed(groups)
    plain = nn.BatchNorm2d(3, momentum=momentum).double()
    plain(torch.randn(4, 3, 2, 2, dtype=torch.float64))  # statistics of its own
    nn.init.uniform_(plain.weight)
    ours = group(copy.deepcopy(plain))
    assert isinstance(ours, GroupedBatchNorm2d)
    x = torch.randn(groups * 4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weights = torch.randn_like(x)
    with rows_per_group(ours, 4):
        out = ours(x)
    expected = torch.cat([plain(part) for part in y.split(4)])
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-12)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(ours.get_buffer(name).double(), buffer.double(), rtol=0, atol=1e-12), name


def test_grouped_normalization_outside_its_block_is_the_plain_one() -> None:
    """Scoring and the virtual model see an ordinary network: the same keys, no groups, in eval mode none either."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = group(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(ours(x), plain(x))
    with rows_per_group(ours, 2):
        assert torch.equal(ours.eval()(x), plain.eval()(x))
        with pytest.raises(ValueError, match="groups of 2"):
            ours.train()(x[:5])
    assert torch.equal(ours.eval()(x), plain(x).detach())


def test_ratios_are_taken_round_by_round() -> None:
    """A ratio is the median over rounds of that round's own quotient, above 1 where the variant is faster."""
    task = Task("r", "ms", [Variant("base", lambda: lambda: 0.0)], [Variant("new", lambda: lambda: 0.0, "exact", ("p",))])
    measured = Measured({"base": [10.0, 20.0, 60.0], "base, again": [10.0, 20.0, 60.0], "new": [5.0, 5.0, 20.0]})
    new = bench_rows.rows_of(task, measured, {"p": True})[-1]
    assert (new["value"], new["ratio"], new["ratio_min"], new["ratio_max"]) == (5.0, 3.0, 2.0, 4.0)
    more = bench_rows.rows_of(Task("r", "img/s", task.baselines, task.variants), measured, {"p": True})[-1]
    assert more["ratio"] == pytest.approx(1 / 3)


def test_the_fit_of_growth() -> None:
    """The exponent of a power law is that power; what is flat has 0."""
    assert bench_setup.exponent([5, 20, 80], [3 * n**1.5 for n in (5, 20, 80)]) == pytest.approx(1.5)
    assert bench_setup.exponent([5, 20, 80], [7, 7, 7]) == pytest.approx(0)


def test_the_work_of_the_full_network() -> None:
    """ResNet-18 of width 64 costs 1.111 GFLOP forward and 3.329 with backward an image; a step of 64 costs 781."""
    assert bench_setup.gflop_per_image(64) == pytest.approx((1.111, 3.329), abs=1e-3)
    assert bench_setup.iteration_gflop(64, 64) == pytest.approx(781, abs=1)


def test_the_projected_run_counts_every_part() -> None:
    """120 x 1024 iterations, 150 scorings of 50,000 images, 120 tests of 19,000, 30 virtual epochs."""
    assert bench_setup.projected_seconds(4.0, 1e12, 0) == pytest.approx(491.52)
    assert bench_setup.projected_seconds(0, 10_000, 0) == pytest.approx(750 + 228)
    assert bench_setup.projected_seconds(0, 1e12, 2.0) == pytest.approx(60)


def test_rates_and_the_projection_use_what_was_measured() -> None:
    """A step of 800 GFLOP in 4 ms is 200 TFLOP/s, half of a ceiling of 400; unproven variants do not enter the projection."""
    base = Variant("reference", lambda: lambda: 8.0)
    fast = Variant("graph", lambda: lambda: 4.0, "precision", ("p",), gflop=800.0)
    task = Task("iteration, clean pool 100", "ms", [base], [fast])
    measured = Measured({"reference": [8.0], "reference, again": [8.0], "graph": [4.0]}, {"graph": 2.5}, {"graph": 3 * 2**20})
    more = bench_rows.ceiling_rows(task, measured, {"bf16": 400.0, "TF32": 1.0, "fp32": 1.0})
    assert [row["value"] for row in more] == [200.0, 50.0, 3.0, 2.5]
    scored = bench_rows.make_row("scoring", "folded", 1e12, "img/s") | {"ratio": 2.0}
    virtual = bench_rows.make_row("virtual epoch of 12", "frozen", 12 / 50_000, "s") | {"ratio": 2.0}
    rows = [*bench_rows.rows_of(task, measured, {"p": True}), *more, scored, virtual]
    assert benchmark.projection(rows, SMALL)["value"] == pytest.approx(491.52 + 30)
    unproven = [*bench_rows.rows_of(task, measured, {}), *more, scored, virtual]
    assert math.isnan(benchmark.projection(unproven, SMALL)["value"])


@pytest.mark.parametrize(
    "arguments",
    ["--batch 1", "--batch 101", "--width 0", "--rounds 6", "--quick --rounds 0", "--workers -1", "--batch x", "--first-look"],
)
def test_bad_numbers_are_refused_in_one_line(arguments: str) -> None:
    """Every number out of range is told with its value before anything is measured."""
    with pytest.raises(UserError) as error:
        benchmark.main(arguments.split())
    assert "\n" not in str(error.value)
    assert arguments.split()[-1] in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
@pytest.mark.parametrize("arguments", ["--device cuda", "--device cuda --first-look"])
def test_a_missing_cuda_device_is_told(arguments: str) -> None:
    """Without CUDA both modes that need it say so."""
    with pytest.raises(UserError, match="no CUDA device"):
        benchmark.main(arguments.split())


def test_the_parts_of_the_first_look_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part can be tried on a CPU, captured and compiled by nothing; each prints its figures."""
    monkeypatch.setattr("utils.machine.Machine.compiled", lambda self, function: function)
    bench, found = make_bench(120, 1, 4, CPU), {}  # type: tuple[bench_setup.Bench, dict[str, float]]
    bench_first_look.ceilings(CPU, 32, 1024, found)
    kinds = bench_first_look.variants(amp=False)
    for kind in kinds:
        bench_first_look.iteration(bench, kind, 1, found)
    bench_first_look.scoring(bench, (8, 16))
    bench_first_look.virtual(bench.first(32))
    bench_first_look.convolutions(CPU, 1, (2,), found)
    printed = capsys.readouterr().out
    assert printed.count("ms an iteration") == len(kinds)
    assert printed.count("times") == len(bench_first_look.convolution_shapes(1))
    assert "GB/s" in printed and "folded" in printed and "virtual epoch" in printed


def test_the_convolutions_are_those_of_resnet18() -> None:
    """20 convolutions: the stem, 16 of 3 x 3 in the stages, 3 projections."""
    shapes = bench_first_look.convolution_shapes(64)
    assert sum(shapes.values()) == 20
    assert shapes[3, 64, 3, 1, 32] == 1
    assert shapes[64, 64, 3, 1, 32] == 4
    assert shapes[256, 512, 1, 2, 8] == 1


PARTS = ["proofs", "ceilings", "eager", "graph", "graph + merged + compile", "scoring", "virtual", "convolutions"]


@pytest.mark.parametrize(
    "error", [None, UserError("no graph"), RuntimeError("broken\nat length"), KeyError("k"), ZeroDivisionError()]
)
def test_the_first_look_measures_what_does_not_fail(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parts run in order. One that fails, in whatever way, is one line; the others run, and the exit code tells it."""
    ran: list[str] = []

    def run(name: str) -> None:
        ran.append(name)
        if name == "graph" and error is not None:
            raise error

    monkeypatch.setattr(bench_first_look, "make_bench", lambda *_: None)
    for name in {*PARTS} & {*vars(bench_first_look)}:
        monkeypatch.setattr(bench_first_look, name, lambda *_, name=name: run(name))
    monkeypatch.setattr(bench_first_look, "iteration", lambda bench, kind, *_: run(kind.name))
    failed = bench_first_look.look(CPU, 8, 4)
    assert ran == PARTS
    assert failed == ([] if error is None else ["iteration: graph"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(lines) == len(failed) and all(type(error).__name__ in line for line in lines)
    monkeypatch.setattr(benchmark, "parse", lambda argv: argparse.Namespace(device="cpu", first_look=True, width=8, batch=4))
    with pytest.raises(SystemExit) if failed else contextlib.nullcontext() as end:
        benchmark.main([])
    assert end is None or end.value.code == 1


def test_a_late_part_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    """After `STOP` seconds no part is started: a line says so, and it is no failure."""
    begun: list[None] = []
    assert bench_first_look.guarded("late", lambda: begun.append(None), bench_first_look.time.monotonic() - 1000) is True
    assert not begun and "late: skipped" in capsys.readouterr().out


def test_the_first_look_compares_three_variants() -> None:
    """Eager, as a graph, and as a graph of the merged and compiled step, all in the same precision."""
    for amp in (False, True):
        kinds = [(kind.amp, kind.graph, kind.merged, kind.compiled) for kind in bench_first_look.variants(amp)]
        assert kinds == [(amp, False, False, False), (amp, True, False, False), (amp, True, True, True)]


def test_a_profile_names_the_operators(tmp_path: Path) -> None:
    """`--profile FILE` tells where an iteration's time goes, operator by operator, and on which machine."""
    benchmark.main(["--width", "1", "--batch", "4", "--profile", str(tmp_path / "p.txt")])
    text = (tmp_path / "p.txt").read_text()
    assert "native_batch_norm" in text and "convolution_backward" in text and "processor:" in text


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_the_losses_of_a_step_are_one_traceable_function(merged: bool, amp: bool) -> None:
    """They trace without a break, so that a graph can hold them compiled (`runtime.compile`); same numbers."""
    bench = make_bench(120, 1, 4, CPU)
    plain, traced = (Training(bench, 100, 1, Kind("m", merged=merged, amp=amp)) for _ in range(2))
    losses = torch.compile(ASD.mixmatch_losses, fullgraph=True, dynamic=False, backend="eager")
    draw = plain.draws().step(0)
    results = [
        ASD.mixmatch_step(t.context, t.state.model, t.state.optimizer, draw, function)
        for t, function in ((plain, ASD.mixmatch_losses), (traced, losses))
    ]
    assert torch.allclose(*results, rtol=1e-5)


def test_a_compiled_variant_calls_the_compiled_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runtime.compile` hands the losses of the step to the compiler and runs what it gives back."""
    called: list[str] = []

    def compiler(self: object, function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            called.append(function.__name__)
            return function(*arguments)

        return run

    monkeypatch.setattr("utils.machine.Machine.compiled", compiler)
    Training(make_bench(40, 1, 4, CPU), 12, 2, Kind("c", compiled=True))()
    assert called == ["mixmatch_losses"] * 2
    Training(make_bench(40, 1, 4, CPU), 12, 2, Kind("plain"))()
    assert len(called) == 2


@pytest.mark.parametrize(
    "kind", [Kind("plain"), Kind("amp", amp=True), Kind("merged", merged=True)], ids=lambda kind: kind.name
)
def test_a_variant_is_what_its_name_says(kind: Kind) -> None:
    """Precision and merging follow the variant's own flags alone: bf16 does not merge, merging keeps the precision."""
    training = Training(make_bench(40, 2, 4, torch.device("cpu")), 12, 1, kind)
    grouped = any(isinstance(module, GroupedBatchNorm2d) for module in training.state.model.modules())
    assert grouped == kind.merged
    assert training.config.runtime.amp == training.machine.amp == kind.amp
