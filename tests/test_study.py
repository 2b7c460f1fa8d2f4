"""The study: the stored files of a run, the generated page and plot, and the commands of all runs."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, TINY, run_script
from PIL import Image

import ASD
from results.study import collect, plot, report, restore, stored
from utils import checkpoint, config
from utils.errors import UserError
from utils.metrics import SHARES, read_rows
from utils.sweep import plan as sweeps
from utils.sweep import status

STUDY = REPOSITORY / "results" / "study"
CIFAR10 = Path(os.environ.get("CIFAR10", REPOSITORY / "dataset" / "cifar-10-batches-py"))
WORDS = ("page.md", "run.sh", "authors_run.json", "what_decides.jsonl")
RUNS = ("badnets/asd", "badnets/undefended", "no_attack/asd")  # trained and tested in seconds
FACTS = {"commit": "0123456789abcdef", "processor": "an abacus"}
REQUIRED_CARD_KEYS = {
    "attack", "defense", "dataset", "network", "config", "seed", "commit", "clean_accuracy", "attack_success_rate",
    "clean_as_target", "sha256",
}  # fmt: skip


# -- A real run, small -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `saved` and `storage` of a finished and tested run of each kind."""
    folder = tmp_path_factory.mktemp("study")
    places = {"saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage")}
    for run in RUNS:
        raw = TINY | places | {"run": run, "defense": "none" if run == "badnets/undefended" else "asd"}
        if run == "no_attack/asd":
            raw["backdoor"] = {"poison_ratio": 0, "badnets": {}}
        path = folder / f"{run.replace('/', '_')}.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        call(ASD, "--config", path, "--gpu", "cpu")
        call(load_tester(), "--config", path, "--gpu", "cpu")
    return folder


def call(script: ModuleType, *arguments: object) -> None:
    """Run a script's main function in this process, which saves seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
        script.main()


def load_tester() -> ModuleType:
    """Return the repository's test.py, by its path: the standard library has a module of that name."""
    spec = importlib.util.spec_from_file_location("repository_test", REPOSITORY / "test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep(trained: Path, run: str, out: Path) -> Path:
    """Store one of the runs in the folder of a study; return its card."""
    return collect.collect(run, trained / "saved" / run, trained / "storage" / run / "checkpoint/latest_model.pt", FACTS, out)


def fit_their_files(folder: Path) -> int:
    """Assert that every card of a study matches its files; return the number of cards."""
    cards = sorted(folder.glob("*/*.json"))
    for path in cards:
        card, kept = json.loads(path.read_text()), path.with_suffix("")
        assert set(card) >= REQUIRED_CARD_KEYS, path
        assert card["sha256"] == sha256(path.with_suffix(".pt").read_bytes()).hexdigest(), path
        tested = json.loads((kept / "test.json").read_text())
        last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
        assert {key: tested[key] for key in SHARES} == {key: card[key] for key in SHARES}, path
        both = [(last[key], card[key]) for key in SHARES if None not in (last[key], card[key])]
        assert all(math.isclose(*pair, abs_tol=collect.ROUNDING) for pair in both), path
        assert len(both) == len(SHARES) or card["attack"] == "none", path
        settings = yaml.safe_load((kept / "config.yaml").read_text())
        assert (settings["defense"], settings["seed"]["seed"]) == (card["defense"], card["seed"]), path
        assert settings["run"] == path.relative_to(folder).with_suffix("").as_posix(), path
        assert (kept / "suspects.json").exists() == (card["defense"] == "asd"), path
    return len(cards)


def test_every_kept_card_fits_its_files(trained: Path, tmp_path: Path) -> None:
    """Hash, figures, seed and defense of a card match the weights, test.json, metrics.jsonl and config.yaml, for all
    committed runs and two new ones. Weights that were changed later are detected."""
    fit_their_files(STUDY)
    for run in RUNS:
        keep(trained, run, tmp_path)
    assert fit_their_files(tmp_path) == 3
    with open(tmp_path / "badnets/asd.pt", "ab") as weights:
        weights.write(b"x")
    with pytest.raises(AssertionError):
        fit_their_files(tmp_path)


@pytest.mark.parametrize(("run", "attack", "steps"), [*zip(RUNS, ("badnets", "badnets", "none"), (18, 12, 18), strict=True)])
def test_kept_weights_give_the_figures_of_the_card(trained: Path, tmp_path: Path, run: str, attack: str, steps: int) -> None:
    """test.py with the stored config.yaml and weights gives the same counts as after training. The card has the number of
    optimizer steps; no stored file has a path of the training machine."""
    card = json.loads(keep(trained, run, tmp_path).read_text())
    assert (card["attack"], card["dataset"], card["steps"]) == (attack, "shapes", steps)
    assert {key: card[key] for key in FACTS} == FACTS and card["config"] == f"config/{run.replace('/', '_')}.yaml"
    kept = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")]
    assert len(kept) == (5 if card["defense"] == "asd" else 4)
    assert not any(str(trained) in path.read_text() for path in kept)
    there = ("--set", f"saved_dir={tmp_path / 'saved'}", "--set", f"storage_dir={tmp_path / 'storage'}")
    call(load_tester(), "--config", tmp_path / run / "config.yaml", "--resume", tmp_path / f"{run}.pt", "--gpu", "cpu", *there)
    tested = json.loads((tmp_path / "saved" / run / "log/test.json").read_text())
    assert {key: tested[key] for key in SHARES} == {key: card[key] for key in SHARES}


def test_a_stored_run_becomes_a_run_folder_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folders that restore.py writes, test.py gives the figures of the card, and a sweep with that run's settings
    counts it as finished. An existing folder is left alone."""
    card = json.loads(keep(trained, "badnets/asd", tmp_path / "study").read_text())
    monkeypatch.setattr(restore, "HERE", tmp_path / "study")
    folder = restore.restore("badnets/asd", "table/asd", tmp_path / "saved", tmp_path / "storage")
    call(load_tester(), "--config", folder / "config.yaml", "--gpu", "cpu")
    tested = json.loads((folder / "log/test.json").read_text())
    assert {key: tested[key] for key in SHARES} == {key: card[key] for key in SHARES}
    raw = {"config": str(folder / "config.yaml"), "axes": {"defense": {"asd": {}}}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(raw))
    (job,) = sweeps.read(tmp_path / "table.yaml").jobs
    assert job.name == "table/asd" and status.status_of(job).state == status.FINISHED
    with pytest.raises(UserError, match="exists"):
        restore.restore("badnets/asd", "table/asd", tmp_path / "saved", tmp_path / "storage")


def damage(folder: Path, kind: str) -> None:
    """Damage a finished run so that it must not be stored."""
    source, log = folder / "saved/badnets/asd", folder / "saved/badnets/asd/log"
    rows = (log / "metrics.jsonl").read_text().splitlines(keepends=True)
    if kind == "unfinished":
        (log / "metrics.jsonl").write_text("".join(rows[:-1]))
    elif kind == "of another run":
        (log / "metrics.jsonl").write_text("".join(rows).replace('"loss": ', '"loss": 1'))
    elif kind == "tested earlier":
        tested = json.loads((log / "test.json").read_text())
        (log / "test.json").write_text(json.dumps(tested | {"clean_accuracy": tested["clean_accuracy"] + 0.02}))
    elif kind == "ranked earlier":
        quality = json.loads((source / "suspects.json").read_text())
        del quality["measures"]["score"]["precision_of_first_100"]
        (source / "suspects.json").write_text(json.dumps(quality))
    else:
        (source / kind).unlink()


KINDS = ("unfinished", "of another run", "tested earlier", "ranked earlier", "config.yaml", "log/test.json", "suspects.json")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finished_is_refused(trained: Path, tmp_path: Path, kind: str) -> None:
    """A run that is unfinished, untested or inconsistent is refused in one line, and nothing of it is stored."""
    shutil.copytree(trained, tmp_path / "copy")
    damage(tmp_path / "copy", kind)
    with pytest.raises(UserError, match=str(tmp_path / "copy")) as error:
        keep(tmp_path / "copy", "badnets/asd", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_unfinished_run_is_kept_to_be_resumed_elsewhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that is stored has none of the machine's paths and is resumed in other folders; its metrics and its commit
    are beside it. A finished run is refused."""
    (tmp_path / "run/badnets/asd/checkpoint").mkdir(parents=True)
    weights = tmp_path / "run/badnets/asd/checkpoint/latest_model.pt"
    saved = checkpoint.read(trained / "storage/badnets/asd/checkpoint/latest_model.pt")
    checkpoint.write(weights, saved | {"epoch": 0, "history": saved["history"][:1]})
    command = ("--saved", trained / "saved", "--storage", tmp_path / "run", "--commit", FACTS["commit"], "--out", tmp_path)
    call(collect, *command, "--run", "badnets/asd", "--unfinished")
    kept = tmp_path / "unfinished/badnets/asd.pt"
    assert str(kept) in capsys.readouterr().out
    assert kept.with_suffix(".commit").read_text() == f"{FACTS['commit']}\n"
    assert read_rows(kept.with_suffix(".jsonl")) == saved["history"][:1]
    assert str(trained) not in repr(checkpoint.read(kept)["config"])
    shutil.copy(kept, weights)
    places = ("--set", f"saved_dir={tmp_path / 'saved'}", "--set", f"storage_dir={tmp_path / 'run'}")
    call(ASD, "--config", trained / "badnets_asd.yaml", "--gpu", "cpu", *places)
    rows = read_rows(tmp_path / "saved/badnets/asd/log/metrics.jsonl")
    assert len(rows) == len(saved["history"]) and rows[0] == saved["history"][0]
    with pytest.raises(UserError, match="leave --unfinished out"):
        collect.keep_unfinished("badnets/asd", weights, FACTS["commit"], tmp_path)


def test_only_a_commit_hash_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a branch is not accepted as a commit, because it may change."""
    monkeypatch.setattr(sys, "argv", ["collect", "--saved=a", "--storage=b", "--run=badnets/asd", "--commit=main"])
    with pytest.raises(UserError, match="--commit main"):
        collect.main()


def test_a_committed_model_gives_the_figures_of_its_card(tmp_path: Path) -> None:
    """test.py on the real images with the model that ASD trained on a set poisoned by BadNets gives ACC and ASR of the page."""
    card = STUDY / "badnets/asd.json"
    if not card.exists() or not CIFAR10.is_dir():
        pytest.skip("needs a kept run badnets/asd, and CIFAR-10 in ./dataset or where the variable CIFAR10 says")
    known = json.loads(card.read_text())
    places = (f"dataset_dir={CIFAR10}", f"saved_dir={tmp_path / 'saved'}", f"storage_dir={tmp_path / 'storage'}", "run=again")
    sets = [word for place in places for word in ("--set", place)]
    done = run_script("test.py", "--config", known["config"], "--resume", STUDY / "badnets/asd.pt", "--gpu", "cpu", *sets)
    assert done.returncode == 0, done.stderr
    tested = json.loads((tmp_path / "saved/again/log/test.json").read_text())
    for key in SHARES:
        assert tested[key] == pytest.approx(known[key], abs=collect.ROUNDING), key


# -- The page ----------------------------------------------------------------------------------------------------------


def make_study(folder: Path) -> Path:
    """Make a study without runs: its template and the list of planned runs."""
    folder.mkdir(exist_ok=True)
    for name in WORDS:
        shutil.copy(STUDY / name, folder)
    return folder


def make_run(folder: Path, name: str, acc: float, asr: float = 0.03, seed: int = 100) -> None:
    """Make a stored run without weights, as long as the study's, that ends with five equal rows; shares in 0..1."""
    asd = not stored.is_undefended(name)
    kept = folder / name
    kept.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for epoch in range(21 if asd else 20):
        stage = "class-aware" if epoch < 4 else "class-agnostic" if epoch < 9 else "meta-split"
        rows.append({
            "epoch": epoch, "stage": stage if asd else "undefended", "clean_accuracy": acc * min(1, (epoch + 8) / 23),
            "attack_success_rate": asr, "robust_accuracy": 0.8, "clean_as_target": 0.02,
            "clean_pool_size": 25000 if asd else None, "poisoned_in_clean_pool": 30 * epoch + seed if asd else None,
        })  # fmt: skip
        if epoch > 15:
            rows[-1]["clean_accuracy"] = acc
    (kept / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = {"seed": seed, "steps": 21000, "minutes": 360, "processor": "an abacus", "commit": "0123456789abcdef"}
    Path(f"{kept}.json").write_text(json.dumps(card))
    if asd:
        score = {"auroc": 0.98765, "precision_at_true_count": 0.75, "precision_of_first_100": 0.99}
        quality = {"counts": {"images": 50000, "poisoned": 2262, "cover": 0}, "measures": {"score": score}}
        (kept / "suspects.json").write_text(json.dumps(quality))


def described(path: Path) -> str:
    """Return the Description of a PNG."""
    with Image.open(path) as image:
        return str(image.info["Description"])


def test_page_picture_and_status_are_the_generated_ones(tmp_path: Path) -> None:
    """The committed files are what `python -m results.study.report` would write now; the plot shows the stored figures."""
    runs = stored.Runs(STUDY)
    assert (STUDY / "README.md").read_text() == report.page(STUDY, runs), "run python -m results.study.report"
    readme = (REPOSITORY / "README.md").read_text()
    assert readme == report.insert(readme, report.status(runs)), "run python -m results.study.report"
    plot.draw(tmp_path / "now.png", plot.curves(STUDY, runs))
    assert described(STUDY / plot.PICTURE) == described(tmp_path / "now.png"), "run python -m results.study.report"


def test_real_runs_make_a_page(trained: Path, tmp_path: Path) -> None:
    """report.py reads what collect.py writes: runs with a defense, without one, and without an attack, whose ranking cannot
    be judged."""
    folder = make_study(tmp_path / "study")
    cards = {run: json.loads(keep(trained, run, folder).read_text()) for run in RUNS}
    runs = stored.Runs(folder)
    page = report.page(folder, runs)
    acc, asr = (100 * cards["badnets/undefended"][key] for key in list(SHARES)[:2])
    assert f"| BadNets | {acc:.2f} | {asr:.2f} |" in page and f"3 of {len(runs.names)} runs" in page
    assert "| `no_attack/asd` | 0 | - | - | - |" in page and "| no attack | not run | - |" in page
    plot.draw(folder / plot.PICTURE, plot.curves(folder, runs))
    assert list(plot.curves(folder, runs)) == ["authors' code, full size", "BadNets", "no attack"]


def test_meta_splits_that_differ_in_their_seed_are_one_row(tmp_path: Path) -> None:
    """The table of `what_decides.py` has one row for each setting with the values of its draws, ordered by the ACC of the
    base model."""
    row = {
        "name": "narrow", "attack": "wanet", "seed": 1, "poisoned_in_pool": 7, "by_chance": 50, "meta": {"lr": 0.015},
        "base": {"clean_accuracy": 0.8}, "network": {"resnet18_cifar": {"width": 16, "last_parts": None}},
    }  # fmt: skip
    rows = [row, row | {"base": {"clean_accuracy": 0.7}}, row | {"seed": 2, "poisoned_in_pool": 9, "by_chance": 51}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.what_decides(tmp_path / "rows.jsonl").splitlines()[2:] == [
        "| 70.00 | WaNet | narrow: width 16, lr 0.015 | 1 | 7 | 50 |",
        "| 80.00 | WaNet | narrow: width 16, lr 0.015 | 1, 2 | 7, 9 | 50, 51 |",
    ]


def test_without_runs_every_planned_one_is_not_run(tmp_path: Path) -> None:
    """The page of a study without runs lists all planned runs as not run, the status claims none, and the plot has one
    curve."""
    folder = make_study(tmp_path / "study")
    runs = stored.Runs(folder)
    page = report.page(folder, runs)
    assert len(runs.names) == 57 and "0 of 57 runs" in page and "{{" not in page
    planned = ", ".join(f"`{name}`" for name in runs.names)
    assert f"Not begun: {planned}." in " ".join(page.split()) and "Stopped" not in report.missing(runs)
    assert all(f"| `{name}` |" not in page for name in runs.names)
    assert "finished for 0 of" in " ".join(report.status(runs).split())
    assert list(plot.curves(folder, runs)) == ["authors' code, full size"]


def test_figures_of_the_files_stand_on_the_page(tmp_path: Path) -> None:
    """The tables have the stored figures: last epoch, stages with the range of the pool, mean of the last five, seeds,
    suspects, cost; unplanned runs are shown too."""
    folder = make_study(tmp_path / "study")
    make_run(folder, "badnets/undefended", 0.88, 0.9999)
    make_run(folder, "sig_flipped/undefended", 0.90, 0.97)
    for name, acc, seed in (("asd", 0.85, 100), ("asd-101", 0.86, 101), ("asd-7", 0.84, 7)):
        make_run(folder, f"badnets/{name}", acc, seed=seed)
    rows = (folder / "badnets/asd/metrics.jsonl").read_text().splitlines()
    last = json.dumps(json.loads(rows[-1]) | {"clean_accuracy": 0.90, "attack_success_rate": 0.01})
    (folder / "badnets/asd/metrics.jsonl").write_text("\n".join([*rows[:-1], last]) + "\n")
    page = report.page(folder, stored.Runs(folder))
    for line in (
        "| BadNets | 88.00 | 99.99 | 90.00 | 1.00 | 2.00 | met |",
        "| `badnets/asd` | ACC >= 83 | 90.00 | 86.00 | met |",
        "| `badnets/asd` | ASR excess <= 3 | -1.00 | 0.60 | met |",
        "| `badnets/asd` | end of class-aware, epoch 4 | 40.65 | 3.00 | 2.00 | 80.00 | 190 of 25000 |",
        "| `badnets/asd` | end of meta-split, epoch 21 | 90.00 | 1.00 | 2.00 | 80.00 | 700 of 25000 (stage: 370 to 700) |",
        "| `badnets/asd` | mean of the last 5 | 86.00 | 2.60 | 2.00 | 80.00 | - |",
        "| `badnets/undefended` | end of undefended, epoch 20 | 88.00 | 99.99 | 2.00 | 80.00 | - |",
        "For `badnets/asd-101` and `badnets/asd-7` the undefended run is that of seed 100, as theirs is not finished yet.",
        "| SIG with changed labels | 90.00 | 97.00 | 2.00 |",
        "| `badnets/asd-7` | 2262 | 0.9877 | 0.7500 | 0.9900 |",
    ):
        assert line in page, line
    assert "`badnets/asd-102`" in page and "| `badnets/asd-102`" not in page
    assert "| `badnets/asd-101` | 101 | 21,000 | 360 | an abacus | 012345678 |" in page
    assert "| BadNets, ASD | 100, 101, 7 | 86.67 ± 3.06 (84.00 to 90.00) |" in page
    make_run(folder, "badnets/undefended-101", 0.92, 0.9, seed=101)
    runs = stored.Runs(folder)
    found = [target.name for target, values in stored.judge(runs["badnets/asd-101"], runs) if not target.holds(values)]
    assert found == ["undefended ASR", "ACC drop"]  # of its own seed
    assert "For `badnets/asd-7` the undefended run" in report.page(folder, runs)
    assert "| BadNets, undefended | 100, 101 | 90.00 ± 2.83" in report.page(folder, runs)
    assert "`badnets/undefended-101`" not in report.missing(runs) and "badnets/undefended-101" not in runs.defended
    status = " ".join(report.status(runs).split())
    assert "last epoch of seed 100; over all seeds, the ASR with ASD is 2.3 ± 1.2 % against BadNets (3 seeds)." in status


@pytest.mark.parametrize(
    ("attack", "baseline", "own", "expected"),
    [
        ("blend", (0.88, 0.95), (0.83, 0.05), "met"),  # every bound just kept: 3 points above the share of 2
        ("blend", (0.88, 0.95), (0.8299, 0.05), "missed: ACC drop, ACC"),
        ("blend", (0.88, 0.9499), (0.83, 0.0501), "missed: undefended ASR, ASR excess"),
        ("wanet", (0.85, 0.90), (0.84, 0.02), "met"),
        ("no_attack", (0.80, 0.02), (0.75, 0.99), "met"),
        ("gtsrb_badnets", (0.99, 1.0), (0.93, 0.03), "met"),
        ("gtsrb_badnets", (0.99, 1.0), (0.9299, 0.0301), "missed: ACC, ASR"),
        ("sig", (0.88, 0.50), (0.83, 0.05), "met"),  # asks for no undefended ASR
        ("lookalike", (0.88, 1.0), (0.84, 0.9), "missed: ASR excess"),
    ],
)
def test_targets(tmp_path: Path, attack: str, baseline: tuple[float, float], own: tuple[float, float], expected: str) -> None:
    """A target is met up to and including its bound; each attack has its own targets."""
    folder = make_study(tmp_path / "study")
    make_run(folder, f"{attack}/undefended", *baseline)
    make_run(folder, f"{attack}/asd", *own)
    runs = stored.Runs(folder)
    assert stored.verdict(attack, runs) == expected
    assert expected in report.overview(runs, stored.TITLES)
    assert ("**missed**" in report.page(folder, runs)) == expected.startswith("missed")


def test_the_last_five_epochs_count_too(tmp_path: Path) -> None:
    """A run that satisfies a bound only in its last epoch misses the target; without the undefended run there is no verdict."""
    folder = make_study(tmp_path / "study")
    make_run(folder, "blend/asd", 0.85)
    assert stored.verdict("blend", stored.Runs(folder)) == "undefended not run"
    make_run(folder, "blend/undefended", 0.88, 1.0)
    path = folder / "blend/asd/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-3]["attack_success_rate"] = 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = stored.Runs(folder)
    assert stored.verdict("blend", runs) == "missed: ASR excess"
    status = " ".join(report.status(runs).split())
    assert "met against" not in status and "is missed against Blend." in status and "finished for 1 of" in status


def test_a_run_that_was_stopped_counts_as_missed(tmp_path: Path) -> None:
    """Until it is run in full, the figures of its last epoch stand in the table and the status."""
    folder = make_study(tmp_path / "study")
    shutil.copytree(STUDY / "trials" / "iab", folder / "trials" / "iab")
    runs = stored.Runs(folder)
    assert stored.verdict("iab", runs) == "missed: stopped after 6 epochs"
    assert "| IAB | not run | - | 72.75 | 93.33 | 3.09 | missed: stopped after 6 epochs |" in report.overview(runs, stored.MAIN)
    assert "is missed against IAB." in " ".join(report.status(runs).split())
    assert report.missing(runs).startswith("Stopped, because the attack had succeeded: `iab/asd` (epoch 6). Not begun: ")
    for defense in ("undefended", "asd"):
        make_run(folder, f"iab/{defense}", 0.88, 1.0 if defense == "undefended" else 0.02)
    assert stored.verdict("iab", stored.Runs(folder)) == "met"


def test_a_run_that_goes_on_is_shown_at_its_last_epoch(tmp_path: Path) -> None:
    """The rows beside the checkpoint of an unfinished run stand in the table, with its epoch, until its card is stored."""
    folder = make_study(tmp_path / "study")
    make_run(folder, "clb/undefended", 0.88, 1.0)
    make_run(folder, "clb_paper/asd", 0.60, 0.03)
    rows = (folder / "clb_paper/asd/metrics.jsonl").read_text().splitlines()[:7]
    shutil.rmtree(folder / "clb_paper")
    (folder / "unfinished/clb_paper").mkdir(parents=True)
    (folder / "unfinished/clb_paper/asd.jsonl").write_text("\n".join(rows) + "\n")
    runs, acc = stored.Runs(folder), 100 * json.loads(rows[-1])["clean_accuracy"]
    line = f"| CLB | 88.00 | 100.00 | {acc:.2f} | 3.00 | 2.00 | not run to the end: epoch 7 |"
    assert line in report.overview(runs, stored.PAPER) and line in report.page(folder, runs)
    sentence = "ACC / ASR of this network are {} / 3.0 % against CLB (2.0 % without trigger; {}epochs)."
    assert sentence.format(f"{acc:.1f}", "so far 7 ") in " ".join(report.status(runs).split())
    assert "Not finished yet: `clb_paper/asd` (epoch 7). Not begun: " in " ".join(report.missing(runs).split())
    make_run(folder, "clb_paper/asd", 0.84, 0.03)
    assert sentence.format("84.0", "21 ") in " ".join(report.status(stored.Runs(folder)).split())
    assert stored.verdict("clb_paper", stored.Runs(folder)) == "met"


def test_the_picture_puts_stages_side_by_side(tmp_path: Path) -> None:
    """Each stage is one unit wide for any number of epochs, and chance is 1; different figures give different plots."""
    folder = make_study(tmp_path / "study")
    make_run(folder, "badnets/asd", 0.85)
    drawn = plot.curves(folder, stored.Runs(folder))
    authors, own = drawn["authors' code, full size"], drawn["BadNets"]
    assert authors[0][0] == pytest.approx(1 / 60) and authors[0][-1] == 3.0 and own[0][-1] == 3.0
    assert own[0][3] == 1.0 and own[0][8] == 2.0 and len(own[0]) == 21
    assert authors[3][10] == pytest.approx(790 / 25000 / 0.09)
    assert own[3][-1] == pytest.approx(700 / 25000 / (2262 / 50000))
    plot.draw(tmp_path / "a.png", drawn)
    own[1][4] += 1
    plot.draw(tmp_path / "b.png", drawn)
    assert described(tmp_path / "a.png") != described(tmp_path / "b.png")


@pytest.mark.parametrize("text", ["no markers", f"{report.END} {report.BEGIN} {report.BEGIN}"])
def test_a_readme_without_a_place_is_refused(text: str) -> None:
    """If the README does not have exactly one place for the status, it is not overwritten."""
    with pytest.raises(UserError, match=r"README\.md"):
        report.insert(text, "status")
    assert report.insert(f"a\n{report.BEGIN}\nold\n{report.END}\nb", "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb"


def test_the_table_of_defenses_has_the_figures_of_the_study() -> None:
    """Its columns without a defense and with ASD are the stored runs, and its page shows the figures of its CSV."""
    folder = REPOSITORY / "results/sweeps/study_table"
    page = (folder / "README.md").read_text()
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    finished = [row for row in rows if row["state"] == "finished"]
    assert len(rows) == 24 and page.count("not run |") == len(rows) - len(finished)
    for row in finished:
        figures = [float(row[key]) for key in ("clean_accuracy", "attack_success_rate")]
        assert " / ".join(f"{100 * share:.1f}" for share in figures) in page
        if row["defense"] in ("none", "asd"):
            run = "undefended" if row["defense"] == "none" else "asd"
            card = json.loads((STUDY / row["attack"] / f"{run}.json").read_text())
            assert figures == [card["clean_accuracy"], card["attack_success_rate"]]


def test_the_table_of_defenses_is_the_report_of_its_runs(tmp_path: Path) -> None:
    """What the commands of its page restore gives the same table, and counts as finished."""
    folder, saved = REPOSITORY / "results/sweeps/study_table", tmp_path / "saved"
    for attack in ("badnets", "blend", "wanet"):
        for run, name in (("undefended", "none"), ("asd", "asd")):
            restore.restore(f"{attack}/{run}", f"study_table/{attack}/{name}", saved, tmp_path / "storage")
    shutil.copytree(folder / "runs", saved / "study_table", dirs_exist_ok=True)
    sweep = importlib.import_module("utils.sweep.__main__")
    call(sweep, REPOSITORY / "config/sweeps/study_table.yaml", "--report", "--set", f"saved_dir={saved}")
    for name in ("sweep.csv", "sweep.md"):
        assert (saved / "study_table" / name).read_text() == (folder / name).read_text()


# -- The commands ------------------------------------------------------------------------------------------------------


def planned_commands(tmp_path: Path, *runs: str, cwd: Path = REPOSITORY) -> list[list[str]]:
    """Return the commands of the run.sh in a repository, run with a fake Python that records its arguments."""
    python, written = tmp_path / "python", tmp_path / "commands"
    python.write_text(f"#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done >> '{written}'\necho >> '{written}'\n")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "SAVED": str(tmp_path / "saved"), "STORAGE": str(tmp_path / "storage")}
    environment |= {} if cwd == REPOSITORY else {"GIT_DIR": str(REPOSITORY / ".git")}
    command = ["sh", cwd / "results/study/run.sh", *runs]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [part.splitlines() for part in written.read_text().split("\n\n") if part] if written.exists() else []


def test_run_sh_makes_every_run_with_settings_that_load(tmp_path: Path) -> None:
    """Each planned run is trained, tested and stored under its name with valid settings; a run and its baseline have the same
    attack."""
    commands = [command for command in planned_commands(tmp_path) if command[0] == "ASD.py"]
    kept = {path.relative_to(STUDY).with_suffix("").as_posix() for path in STUDY.glob("*/*.json")}
    attacks: dict[str, list[Any]] = {}
    # The runs that show why attacks are not weaker.
    strengths = {"wanet_s1", "clb_eps16", "clb_half", "lookalike_all", "adaptive_patch", "adaptive_blend", *stored.PUBLISHED}
    known = strengths | {*stored.TITLES, *stored.PAPER, *stored.FORMS}
    for command in commands:
        sets = [word for before, word in pairwise(command) if before == "--set"]
        c = config.load(REPOSITORY / command[command.index("--config") + 1], sets)
        attack = str(c.run).partition("/")[0]
        assert attack in known and (c.defense.name == "none") == stored.is_undefended(str(c.run))
        attacks.setdefault(attack, []).append(c.backdoor)
        baseline = STUDY / stored.subject(attack) / "undefended/config.yaml"
        if baseline.exists():
            attacks[attack].append(config.load(baseline).backdoor)
    assert {str(name) for name in attacks} | {name.partition("/")[0] for name in kept} == known
    assert all(backdoor == found[0] for found in attacks.values() for backdoor in found)
    assert len(commands) + len(kept) >= 36


def test_unfinished_runs_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    """On a machine that has nothing of a run, run.sh starts it from the stored checkpoint, with the commit that began it."""
    names = [path.relative_to(STUDY / "unfinished").with_suffix("") for path in (STUDY / "unfinished").glob("*/*.pt")]
    planned_commands(tmp_path)
    rows = (STUDY / "unfinished").glob("*/*.jsonl")
    assert sorted(path.relative_to(STUDY / "unfinished").with_suffix("") for path in rows) == sorted(names)
    for name in names:
        assert not (STUDY / name).with_suffix(".json").exists(), f"{name} is finished: remove its checkpoint"
        for kept, copied in (
            (f"{name}.pt", f"storage/{name}/checkpoint/latest_model.pt"),
            (f"{name}.commit", f"saved/{name}.commit"),
        ):
            assert (tmp_path / copied).read_bytes() == (STUDY / "unfinished" / kept).read_bytes()
    assert len(list((tmp_path / "storage").rglob("*.pt"))) == len(names)
    assets = [path for folder in ("assets", "unfinished/assets") for path in (STUDY / folder).glob("*.npz")]
    assert assets and all((tmp_path / "saved/assets" / path.name).read_bytes() == path.read_bytes() for path in assets)
    assert len(list((tmp_path / "saved/assets").iterdir())) == len(assets)


def test_a_start_that_was_killed_is_made_again(tmp_path: Path) -> None:
    """The checkpoint comes last and whole: where it is missing, the commit that began the run is restored with it."""
    names = [path.relative_to(STUDY / "unfinished").with_suffix("") for path in (STUDY / "unfinished").glob("*/*.pt")]
    if not names:
        pytest.skip("no run is unfinished")
    place = tmp_path / "storage" / names[0] / "checkpoint"
    place.mkdir(parents=True)
    (place / "latest_model.pt.123").write_bytes(b"half")
    planned_commands(tmp_path, str(names[0]))
    assert (place / "latest_model.pt").read_bytes() == (STUDY / f"unfinished/{names[0]}.pt").read_bytes()
    text = (STUDY / "run.sh").read_text()
    assert text.index('$name.commit" "$saved') < text.index('mv "$kept.$$" "$kept"  # last')


def test_any_run_can_be_unfinished(tmp_path: Path) -> None:
    """Those of other seeds and without a defense are listed with their epochs too."""
    folder = make_study(tmp_path / "study")
    for name in ("badnets/asd-101", "sig/undefended"):
        path = folder / f"unfinished/{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"epoch": 0}) + "\n")
    text = " ".join(report.missing(stored.Runs(folder)).split())
    assert text.startswith(
        "Not finished yet: `badnets/asd-101` (epoch 1), `sig/undefended` (epoch 1). Not begun: `badnets/undefended`"
    )


def test_run_sh_makes_the_named_runs_alone(tmp_path: Path) -> None:
    """With names, only those runs are trained, tested with the same settings, and stored with the commit they started with."""
    empty = tmp_path / "nothing kept"
    (empty / "results/study").mkdir(parents=True)
    shutil.copy(STUDY / "run.sh", empty / "results/study")
    commands = planned_commands(tmp_path, "badnets/asd-101", "gtsrb_badnets/undefended", cwd=empty)
    assert [command[0] for command in commands] == ["ASD.py", "test.py", "-m"] * 2
    assert commands[0][1:] == commands[1][1:] and "run=badnets/asd-101" in commands[0]
    commit = (tmp_path / "saved/badnets/asd-101.commit").read_text().strip()
    assert len(commit) == 40 and commands[2][-4:] == ["--run", "badnets/asd-101", "--commit", commit]
