"""The table and the picture that put runs side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from utils import compare
from utils.errors import UserError


def make_run(folder: Path, seed: int, defense: str, acc: float, asr: float, **changes: Any) -> Path:
    """A run's folder with two epochs, the last with the figures given."""
    rows = [
        {
            "epoch": epoch,
            "defense": defense,
            "clean_accuracy": acc * (epoch + 1) / 2,
            "attack_success_rate": asr,
            "clean_pool_size": 40 if defense == "asd" else None,
            "poisoned_in_clean_pool": seed if defense == "asd" else None,
            "seconds": 10.0 + seed,
        }
        for epoch in range(2)
    ]
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"seed": {"seed": seed}, "run": folder.name, "defense": defense} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    """Call the command with these arguments."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, argv)])
    compare.main()


def test_seeds_of_one_setting_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that differ in their seed alone are one row: mean, deviation, least and most of the last epoch's figures."""
    folders = [make_run(tmp_path / f"a{s}", s, "asd", acc, 0.01 * s) for s, acc in ((1, 0.9), (2, 0.92), (3, 0.94))]
    folders.insert(1, make_run(tmp_path / "none", 1, "none", 0.95, 1.0))
    run_main(monkeypatch, *folders, "--markdown", "--picture", tmp_path / "c.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "| 3 seeds (1, 2, 3) | asd | 92.00 ± 2.00 (90.00 to 94.00) % | 2.00 ± 1.00 (1.00 to 3.00) % "
        "| 1 of 40, 2 of 40, 3 of 40 | 24 ± 2 (22 to 26) |"
    )
    assert lines[3] == "| none | none | 95.00 % | 100.00 % | no split | 22 |"
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height


def test_other_settings_are_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of different settings are never averaged, and the text table is aligned."""
    one, two = make_run(tmp_path / "one", 1, "asd", 0.5, 0.5), make_run(tmp_path / "two", 1, "asd", 0.5, 0.5, num_epochs=3)
    run_main(monkeypatch, one, two)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "---", "one", "two"]
    assert lines[2].index("50.00") == lines[0].index("ACC")


@pytest.mark.parametrize(
    ("found", "cell"),
    [({"cover_in_clean_pool": 0}, "1 of 40 (and 0 cover)"), ({"poisoned_in_clean_pool": None}, "unknown of 40")],
)
def test_the_table_tells_kinds_of_images_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: dict[str, Any], cell: str
) -> None:
    """Cover images of the clean pool are counted apart from poisoned ones; where nobody knows, the table says so."""
    folder = make_run(tmp_path / "run", 1, "asd", 0.5, 0.5)
    metrics = folder / "log" / "metrics.jsonl"
    lines = [json.dumps(json.loads(line) | found) + "\n" for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(lines))
    run_main(monkeypatch, folder, "--markdown")
    assert f"| {cell} |" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "no settings"])
def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """A folder that is no finished run is one line with the folder and the remedy."""
    folder = make_run(tmp_path / "run", 1, "asd", 0.5, 0.5)
    metrics = folder / "log" / "metrics.jsonl"
    if damage == "missing":
        metrics.unlink()
    elif damage == "no settings":
        (folder / "config.yaml").unlink()
    else:
        metrics.write_text({"empty": "", "text": "hello\n"}[damage])
    with pytest.raises(UserError, match=str(folder)) as error:
        run_main(monkeypatch, folder)
    assert "\n" not in str(error.value)
