"""`poison_ratio: 0`: runs on clean data, without a success rate, from the training to the comparison of runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, logged
from PIL import Image
from training import train_here

from data.loading import load_raw
from data.poisoned_sets.export import export
from data.poisoned_sets.folder import read_set, write_set
from data.poisoned_sets.record_write import write_record
from data.poisoning import ATTACKS, build_attack, build_test_sets, poison_training_set
from data.sets import Part
from data.sources import prepare
from utils import compare, config, plugins
from utils.errors import UserError
from utils.kinds import POISONED

DEFENSES = ("asd", "none")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each defense, `saved/<defense>`, and its log lines, `<defense>.txt`."""
    folder = tmp_path_factory.mktemp("clean")
    for defense in DEFENSES:
        raw = TINY | {
            "run": defense, "defense": defense, "backdoor": {"poison_ratio": 0, "wanet": {"cover_ratio": 2.0}},
            "saved_dir": str(folder / "saved"), "storage_dir": str(folder / "storage"),
        }  # fmt: skip
        path = folder / f"{defense}.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        with logged() as said:
            train_here(config.load(path), path)
        (folder / f"{defense}.txt").write_text("\n".join(said))
    return folder


def said_by(script: str, *arguments: object) -> str:
    """Call the main function of a script in this process; return what it printed."""
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        module.main()
    return said.getvalue()


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_run_without_an_attack_reports_none(clean: Path, defense: str) -> None:
    """Every epoch has an ACC, and null for the quantities of an attack; the log says `no attack` and has no success rate; there
    are no plots of poisoned images and no warnings."""
    saved, said = clean / "saved" / defense, (clean / f"{defense}.txt").read_text()
    rows = [json.loads(line) for line in (saved / "log" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == TINY["num_epochs"]
    for row in rows:
        assert 0 <= row["clean_accuracy"] <= 1
        for key in ("attack_success_rate", "robust_accuracy", "clean_as_target", "split_tpr"):
            assert row[key] is None
        if defense == "asd":
            assert row["poisoned_in_clean_pool"] == 0
            assert row["split_fpr"] == pytest.approx(1 - row["clean_pool_size"] / 200)
    assert "no attack" in said and "0 poisoned" in said and "warning" not in said
    assert not [word for word in ("ASR", "RA ", "nan", "None", "triggered", "target class") if word in said]
    assert np.load(saved / "poison_idx.npy").sum() == 0
    plots = {path.name for path in (saved / "log").glob("*.png")}
    splits = {f"split_{stage}.png" for stage in ("class-aware", "class-agnostic", "meta-split")}
    assert plots == {"accuracy.png", "confusion.png", "features.png"} | (splits if defense == "asd" else set())


@pytest.mark.parametrize("defense", DEFENSES)
def test_its_page_has_no_attack(clean: Path, defense: str) -> None:
    """report.html has neither numbers nor a section about an attack."""
    page = (clean / "saved" / defense / "log" / "report.html").read_text()
    assert "no attack" in page and "ACC" in page and "Test images by class" in page
    assert not [word for word in ("ASR", "TPR", "Triggered", "nan", "None") if f">{word}" in page]


def test_its_suspects_are_ranked_without_a_quality(clean: Path) -> None:
    """All images are ranked; since nothing is poisoned, the quality of the ranking is null."""
    saved = clean / "saved" / "asd"
    assert len((saved / "suspects.csv").read_text().splitlines()) == 201
    found = json.loads((saved / "suspects.json").read_text())
    assert found["counts"]["poisoned"] == 0 == found["counts"]["cover"]
    assert all(measure["auroc"] is None for measure in found["measures"].values())
    with Image.open(saved / "suspects.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("defense", DEFENSES)
def test_it_is_tested_on_clean_images(clean: Path, defense: str) -> None:
    """test.py gives the ACC of the last epoch, overall and for each class, and null for the attack."""
    said = said_by("test.py", "--config", clean / f"{defense}.yaml", "--gpu", "cpu")
    log = clean / "saved" / defense / "log"
    kept, last = json.loads((log / "test.json").read_text()), json.loads((log / "metrics.jsonl").read_text().splitlines()[-1])
    assert kept["clean_accuracy"] == last["clean_accuracy"] and kept["clean_total"] == 43
    assert sum(map(sum, kept["confusion"])) == 43 and kept["backdoor_total"] is None
    assert {kept[key] for key in ("attack_success_rate", "robust_accuracy", "clean_as_target")} == {None}
    assert "ACC" in said and "ASR" not in said and "trigger" not in said


@pytest.mark.filterwarnings("error")
def test_it_is_compared_without_der(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table all quantities of an attack are left out, and the plot has the ACC only."""
    folders = [clean / "saved" / defense for defense in DEFENSES]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, folders), "--markdown", "--plot", str(tmp_path / "c.png")])
        compare.main()
    asd, none = (line.strip("| ").split(" | ") for line in said.getvalue().splitlines()[2:4])
    assert asd[3:7] == ["-", "-", "-", "0 of 100"] and none[3:7] == ["-", "-", "-", "no split"]
    assert (tmp_path / "c.png").exists()


def test_an_exported_set_without_poisoned_images_has_no_success_rate(clean: Path, tmp_path: Path) -> None:
    """`python -m data.poison` writes such a set without triggered test images, and without a warning; a run on it is tested on
    clean images only, and it can be copied. A record of BackdoorBench cannot be without poisoned images."""
    settings, cpu = config.load(clean / "none.yaml"), torch.device("cpu")
    with logged() as said:
        export(settings, tmp_path / "set", cpu)
    assert len(said) == 1 and "0 poisoned" in said[0] and "0 triggered test images" in said[0]
    with np.load(tmp_path / "set" / "backdoor_test.npz") as file:
        assert file["images"].shape == (0, 32, 32, 3) and file["labels"].shape == (0,)

    def on(folder: str) -> config.Config:
        own = ["dataset=poisoned_set", f"dataset_dir={tmp_path / folder}", "backdoor=null", "run=other", "data.test_limit=20"]
        return config.load(clean / "none.yaml", own)

    export(on("set"), tmp_path / "copy", cpu)
    for folder in ("set", "copy"):
        data = prepare(on(folder), tmp_path / f"on {folder}")
        assert data.tests.clean is not None and len(data.tests.clean) == 20 and data.tests.backdoor is None
        assert data.ground_truth is not None and not data.ground_truth.poisoned().any()
    with pytest.raises(UserError, match=r"backdoor\.poison_ratio: 0(\.0)?: no training image is poisoned, and a record"):
        export(settings, tmp_path / "record", cpu, write=lambda out, made: write_record(out, made, ("", {})))
    assert not (tmp_path / "record").exists()


def test_a_set_of_an_earlier_version_without_poisoned_images_is_read(clean: Path, tmp_path: Path) -> None:
    """Such a set has test images that are marked as triggered, which are not tested."""
    export(config.load(clean / "none.yaml"), tmp_path / "set", torch.device("cpu"))
    stored = read_set(tmp_path / "set")
    others = np.flatnonzero(stored.clean_test.labels != 3)
    marked = Part(
        stored.clean_test.images[others], np.full(len(others), 3), stored.clean_test.labels[others],
        np.full(len(others), POISONED, np.uint8), others,
    )  # fmt: skip
    parts = {"train": stored.train, "clean_test": stored.clean_test, "backdoor_test": marked}
    write_set(tmp_path / "old", parts, json.loads(stored.description), lambda path: None)
    own = ["dataset=poisoned_set", f"dataset_dir={tmp_path / 'old'}", "backdoor=null", "run=other"]
    assert prepare(config.load(clean / "none.yaml", own), tmp_path / "run").tests.backdoor is None


@pytest.mark.parametrize("name", plugins.names(ATTACKS))
def test_no_assets_are_made_for_an_attack_without_poisoned_images(tiny: Path, tmp_path: Path, name: str) -> None:
    """With `poison_ratio: 0` no attack trains a network, alters an image or has triggered test images."""
    plan = replace(config.load(tiny, [f"backdoor={{poison_ratio: 0, {name}: {{}}}}"]), saved_dir=str(tmp_path))
    raw = load_raw(plan)
    attack = build_attack(plan, raw)
    train = poison_training_set(plan, raw, attack, tmp_path)
    assert not train.flags.any() and np.array_equal(train.images, raw.train_images)
    assert build_test_sets(plan, raw, attack).backdoor is None
    assert not (tmp_path / "assets").exists()
