"""The table and the plot that compare runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training import metrics_row

from utils import compare, config, manifest
from utils.config.schema import as_dict
from utils.errors import UserError


def make_run(folder: Path, seed: int, defense: str, acc: float | None, asr: float | None, **changes: Any) -> Path:
    """Make the folder of a run with two epochs; the last one has the given figures."""
    split = {"clean_pool_size": 40, "poisoned_in_clean_pool": seed}
    rows = [
        metrics_row(
            epoch, defense=defense, clean_accuracy=None if acc is None else acc * (epoch + 1) / 2, attack_success_rate=asr,
            robust_accuracy=None if asr is None else 1 - asr, seconds=10.0 + seed,
            **(split if defense == "asd" else dict.fromkeys(split)),
        )
        for epoch in range(2)
    ]  # fmt: skip
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"seed": {"seed": seed}, "run": folder.name, "defense": defense} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    """Call the command with these arguments."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, argv)])
    compare.main()


def test_seeds_of_one_setting_are_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that differ only in their seed are one row: mean, standard deviation, minimum and maximum of the last epoch."""
    folders = [make_run(tmp_path / f"a{s}", s, "asd", acc, 0.01 * s) for s, acc in ((1, 0.9), (2, 0.92), (3, 0.94))]
    folders.insert(1, make_run(tmp_path / "none", 1, "none", 0.95, 1.0))
    run_main(monkeypatch, *folders, "--markdown", "--plot", tmp_path / "c.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "| 3 seeds (1, 2, 3) | asd | 92.00 ± 2.00 (90.00 to 94.00) % | 2.00 ± 1.00 (1.00 to 3.00) % "
        "| 98.00 ± 1.00 (97.00 to 99.00) % | 0.970, of 1 of the runs | 1 of 40, 2 of 40, 3 of 40 | 24 ± 2 (22 to 26) |"
    )
    assert lines[3] == "| none | none | 95.00 % | 100.00 % | 0.00 % | - | no split | 22 |"
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG" and image.width > image.height


def test_other_settings_are_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of different settings are never averaged, and the text table is aligned."""
    one, two = make_run(tmp_path / "one", 1, "asd", 0.5, 0.5), make_run(tmp_path / "two", 1, "asd", 0.5, 0.5, num_epochs=3)
    run_main(monkeypatch, one, two)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "---", "one", "two"]
    assert lines[2].index("50.00") == lines[0].index("ACC")


def test_runs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run has its whole name, two runs of one seed are two rows, and without an attack nothing is unknown."""
    clean = {"backdoor": {"poison_ratio": 0}}
    folders = [make_run(tmp_path / name, 1, "asd", 0.5, 0.5) for name in ("a", "b")]
    folders.append(make_run(tmp_path / "c", 1, "asd", 0.5, None, **clean))
    for folder in folders:
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace(f"run: {folder.name}", f"run: sweep/{folder.name}/seed-1"))
    run_main(monkeypatch, *folders, "--markdown", "--plot", tmp_path / "c.png")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [row[0] for row in rows] == [f"| sweep/{name}/seed-1" for name in "abc"]
    assert rows[2][3:5] == ["-", "-"] and rows[0][3] == "50.00 %"
    with Image.open(tmp_path / "c.png") as image:
        width = image.width
    for folder in folders:
        path = folder / "config.yaml"
        path.write_text(re.sub("run: .*", "run: same", path.read_text()))
    run_main(monkeypatch, *folders, "--plot", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 0.9 * width, "a panel for each"
    with pytest.raises(UserError, match="is given twice"):
        run_main(monkeypatch, folders[0], f"{folders[0]}/")


def test_means_over_the_last_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --last, shares and DER are computed from means over the last epochs, without those of an earlier stage; pools and
    seconds are not."""
    folders = [make_run(tmp_path / "asd", 1, "asd", 0.8, 0.1), make_run(tmp_path / "none", 1, "none", 0.9, 1.0)]
    run_main(monkeypatch, *folders, "--last", 2, "--markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| asd | asd | 60.00 % | 10.00 % | 90.00 % | 0.913 | 1 of 40 | 22 |"
    assert lines[3].startswith("| none | none | 67.50 % | 100.00 % |")
    run_main(monkeypatch, *folders, "--last", 99, "--markdown")
    assert capsys.readouterr().out.splitlines() == lines
    path = folders[0] / "log" / "metrics.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(row | {"stage": stage}) + "\n" for row, stage in ((first, "before"), (second, "last"))))
    run_main(monkeypatch, *folders, "--last", 2, "--markdown")
    assert capsys.readouterr().out.splitlines()[2].startswith("| asd | asd | 80.00 % |")
    with pytest.raises(UserError, match="--last 0: give at least 1"):
        run_main(monkeypatch, *folders, "--last", 0)


@pytest.mark.parametrize(
    ("found", "cell"),
    [({"cover_in_clean_pool": 0}, "1 of 40 (and 0 cover)"), ({"poisoned_in_clean_pool": None}, "unknown of 40")],
)
def test_the_table_counts_kinds_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: dict[str, Any], cell: str
) -> None:
    """Cover images in the clean pool are counted separately from poisoned ones; without ground truth the table shows
    `unknown`."""
    folder = make_run(tmp_path / "run", 1, "asd", 0.5, 0.5)
    metrics = folder / "log" / "metrics.jsonl"
    lines = [json.dumps(json.loads(line) | found) + "\n" for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(lines))
    run_main(monkeypatch, folder, "--markdown")
    assert f"| {cell} |" in capsys.readouterr().out


# -- DER ---------------------------------------------------------------------------------------------------------------

SHARE = st.integers(0, 50).map(lambda n: n / 50)


@given(SHARE, SHARE, SHARE, SHARE)
def test_der_falls_with_the_accuracy_and_rises_with_the_defended_attack(
    acc: float, asr: float, acc0: float, asr0: float
) -> None:
    """The DER is (1 + fall of the ASR - fall of the ACC) / 2, where a rise counts as 0; it is in 0..1."""
    found = compare.effectiveness(
        {"clean_accuracy": acc, "attack_success_rate": asr}, {"clean_accuracy": acc0, "attack_success_rate": asr0}
    )
    expected = 0.5
    if asr < asr0:
        expected += (asr0 - asr) / 2
    if acc < acc0:
        expected -= (acc0 - acc) / 2
    assert found == pytest.approx(expected) and 0 <= found <= 1


@pytest.mark.parametrize(
    ("own", "baseline", "der"),
    [
        ((0.9, 0.0), (0.9, 1.0), "1.000"), ((0.9, 1.0), (0.9, 1.0), "0.500"), ((0.0, 1.0), (1.0, 1.0), "0.000"),
        ((0.95, 0.5), (0.9, 1.0), "0.750"), ((0.8, 0.5), (0.9, 1.0), "0.700"), ((0.9, 0.1), (0.9, 0.0), "0.500"),
        ((0.9, None), (0.9, None), "unknown"), ((None, None), (0.9, 1.0), "unknown"),
    ],
)  # fmt: skip
def test_the_table_has_the_der(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    own: tuple[float | None, float | None], baseline: tuple[float | None, float | None], der: str,
) -> None:  # fmt: skip
    """A run with a defense has a DER, an undefended one has none; order and number of epochs do not matter."""
    runs = [make_run(tmp_path / "a", 1, "asd", *own), make_run(tmp_path / "b", 1, "none", *baseline, num_epochs=3)]
    run_main(monkeypatch, *runs, "--markdown")
    there = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[5] for line in (there[0], *there[2:])] == ["DER", der, "-"]
    run_main(monkeypatch, *reversed(runs), "--markdown")
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(there)


def data_of(poison: str, seeds: str | None = None) -> str:
    """Return a data.csv with one image, the digest of the poisoned ones and that of the seed samples."""
    rows = [manifest.Row("train", "0", "cat", "1f"), manifest.Row("input", "poison_idx.npy", "", poison)]
    return manifest.to_text(rows + ([manifest.Row("input", "seed_samples", "", seeds)] if seeds else []))


@pytest.mark.parametrize(
    ("seed", "changes", "data", "der"),
    [
        (1, {}, None, "0.980"),
        (1, {}, data_of("aa"), "0.980"),
        (1, {}, data_of("bb"), "no undefended run"),
        (2, {}, data_of("aa"), "no undefended run"),
        (1, {"backdoor": {"blend": {"alpha": 0.1}}}, data_of("aa"), "no undefended run"),
        (1, {"network": "wide_resnet"}, data_of("aa"), "no undefended run"),
        (1, {"dataset": "gtsrb"}, None, "no undefended run"),
        (1, {"num_classes": 5}, None, "no undefended run"),
        (1, {"data": {"train_limit": 5}}, None, "no undefended run"),
        (1, {"data": {"test_limit": 5}}, None, "no undefended run"),
        (1, {"transform": {"pre": {"resize": {"size": 16}}}}, None, "no undefended run"),
        (1, {"transform": {"train": {"primary": {}}}}, None, "0.980"),
    ],
)
def test_a_twin_has_the_same_network_and_poisoned_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    seed: int, changes: dict[str, Any], data: str | None, der: str,
) -> None:  # fmt: skip
    """The DER compares runs with equal seed, attack, data set and network, and equal data if both runs have recorded
    theirs; the seed samples of the defense are ignored."""
    own = make_run(tmp_path / "a", 1, "asd", 0.9, 0.04)
    (own / manifest.FILE).write_text(data_of("aa", "cc"))
    baseline = make_run(tmp_path / "b", seed, "none", 0.9, 1.0, **changes)
    if data:
        (baseline / manifest.FILE).write_text(data)
    run_main(monkeypatch, own, baseline, "--markdown")
    assert capsys.readouterr().out.splitlines()[2].split(" | ")[5] == der


def test_an_unfinished_run_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not averaged with finished ones, its row says how far it is, and it is no baseline."""
    plan = as_dict(config.load(REPOSITORY / "config/demo.yaml", ["num_epochs=2", "global.epoch_third=2", "global.epoch_first=1",
                                                                "global.epoch_second=1"]))  # fmt: skip
    changes = {key: value for key, value in plan.items() if key not in ("seed", "run", "defense")}
    one, two = (make_run(tmp_path / name, seed, "asd", 0.9, 0.04, **changes) for name, seed in (("a", 1), ("b", 2)))
    bare = make_run(tmp_path / "c", 1, "none", 0.9, 1.0, **changes)
    run_main(monkeypatch, one, two, bare, "--markdown")
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 2 seeds (1, 2)", "| c"]
    for folder in (two, bare):
        path = folder / "log/metrics.jsonl"
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    run_main(monkeypatch, one, two, bare, "--markdown")
    found = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[0] for cells in found] == ["| a", "| b (epoch 1 of 2)", "| c (epoch 1 of 2)"]
    assert found[0][5] == "no undefended run"


DAMAGES = {
    "missing": ("log/metrics.jsonl", None),
    "empty": ("log/metrics.jsonl", ""),
    "text": ("log/metrics.jsonl", "hello\n"),
    "numbers": ("log/metrics.jsonl", "1\n2\n"),
    "other columns": ("log/metrics.jsonl", '{"epoch": 0}\n'),
    "no settings": ("config.yaml", None),
    "empty settings": ("config.yaml", ""),
    "a list of settings": ("config.yaml", "- run\n- seed\n"),
    "no YAML": ("config.yaml", "run: [\nseed: }\n"),
    "no seed": ("config.yaml", "run: a\n"),
    "a number for the section seed": ("config.yaml", "run: a\nseed: 1\n"),
    "an empty section seed": ("config.yaml", "run: a\nseed: {}\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """A folder that is not a finished run is refused in one line with the folder and the remedy."""
    folder = make_run(tmp_path / "run", 1, "asd", 0.5, 0.5)
    name, text = DAMAGES[damage]
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=str(folder)) as error:
        run_main(monkeypatch, folder)
    assert "\n" not in str(error.value)


def test_settings_that_were_added_later_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of an earlier version has the defaults of settings that it does not list: seeds of both versions are one row, and
    the older undefended run is the baseline."""
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(TINY | {"num_epochs": 2}, sort_keys=False))
    folders = []
    for name, seed, defense in (("none", 1, "none"), ("old", 1, "asd"), ("new", 2, "asd")):
        folder = make_run(tmp_path / name, seed, defense, 0.9, 1.0 if defense == "none" else 0.1)
        settings = as_dict(config.load(tiny, [f"seed.seed={seed}", f"defense={defense}", f"run={name}"]))
        if name != "new":
            del settings["evidence"], settings["backdoor"]["target_shift"]
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        folders.append(folder)
    run_main(monkeypatch, *folders, "--markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| 2 seeds (1, 2) | asd |") and "0.950, of 1 of the runs" in lines[3]


def test_a_run_that_began_from_the_authors_checkpoint_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no rows of the epochs before: the number of its last epoch counts."""
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(TINY | {"num_epochs": 3}, sort_keys=False))
    folder = make_run(tmp_path / "later", 1, "asd", 0.9, 0.1)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config.load(tiny, ["run=later"])), sort_keys=False))
    rows = [
        json.loads(line) | {"epoch": i + 1} for i, line in enumerate((folder / "log/metrics.jsonl").read_text().splitlines())
    ]
    (folder / "log/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(monkeypatch, folder, "--markdown")
    assert capsys.readouterr().out.splitlines()[2].startswith("| later | asd |")
