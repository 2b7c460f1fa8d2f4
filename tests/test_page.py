"""`report.html`: its contents, that it is self-contained, and that no text of a run can become markup."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from training import metrics_row

from utils.reporting import confusion, page

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=https://example.com/x onerror=alert(1)>', "</pre></table><h1>x", "&lt;b&gt;",
    "a\udce9b", "x\u202egnp.exe\x1b[2J", "it's; }</style>", "",
]  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n and so on"


class Reader(HTMLParser):
    """Collects tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record a tag; all but these three have an end tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that tags are closed in order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Record a text."""
        self.texts.append(data)


def make_run(folder: Path, rows: list[dict[str, Any]], names: list[str], plots: tuple[str, ...] = ()) -> Path:
    """Make a run's folder with the files that the page is generated from."""
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(f"dataset: folder\nrun: {names[0]!r}\n" if names else "run: x\n", errors="replace")
    for name in plots:
        (folder / name).write_bytes(PNG + name.encode())
    if names:
        matrix = torch.eye(len(names), dtype=torch.int64) * 8
        matrix[0, 1] = 2
        text = confusion.to_json({"epoch": 0, "class_names": names, **confusion.figures(confusion.ByClass(matrix))})
        (folder / "log" / confusion.FILE).write_text(text)
    return folder


def write_suspects(folder: Path, names: list[str]) -> None:
    """Write a suspects.csv with these names, labels and predicted labels."""
    with open(folder / "suspects.csv", "w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["rank", "name", "label", "model_label", "confidence", "split_loss", "epochs_in_clean_pool", "score"])
        rows.writerows([i, name, name, name, "0.5", "1.25", 3, "0.9"] for i, name in enumerate(names, 1))


def read_page(folder: Path, title: str = "a title") -> Reader:
    """Write the page and read it."""
    page.write_page(folder, title)
    reader = Reader((folder / "log" / "report.html").read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


PLOTS = ("log/accuracy.png", "log/purity.png", "log/split_class-aware.png", "log/triggered.png", "log/confusion.png",
         "suspects.png")  # fmt: skip


def test_the_page_has_all_parts_of_a_run(tmp_path: Path) -> None:
    """The page has the figures of the last epoch in %, every plot byte for byte, every epoch, classes, suspects and
    settings."""
    rows = [metrics_row(0, stage="class-aware", clean_accuracy=0.123456), metrics_row(1)]
    folder = make_run(tmp_path / "run", rows, ["cat", "dog", "frog"], PLOTS)
    write_suspects(folder, ["cat/1.png"])
    reader = read_page(folder)
    sources = [attributes["src"] or "" for tag, attributes in reader.tags if tag == "img"]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert sorted(embedded) == sorted(PNG + name.encode() for name in PLOTS)
    for text in ("93.41 %", "1.18 %", "90.00 %", "50, 3 of them poisoned", "25.00 %", "48.96 %", "2, 4", "0.1235", "dog (2)"):
        assert text in reader.texts, text
    assert "80.00 %" in reader.texts and "cat/1.png" in reader.texts
    assert any("dataset: folder" in text for text in reader.texts)


def test_the_page_has_the_sets_and_figures_of_a_defense(tmp_path: Path) -> None:
    """What a defense adds to the rows of its epochs is among the figures of the last one: chosen sets, its own measurements."""
    sets = {"isolated_size": 500, "poisoned_in_isolated": 480, "kept_size": 70}
    row = metrics_row(0)
    seconds = row.pop("seconds")
    own = {"flipped_labels": 12, "margin": 0.123456, "unknown": None, "kernel_size": 3}
    reader = read_page(make_run(tmp_path / "run", [row | sets | {"seconds": seconds} | own], ["cat", "dog"]))
    cells = reader.texts[: reader.texts.index("Epochs")]
    for name, value in (("images in the set isolated", "500, 480 of them poisoned"), ("images in the set kept", "70"),
                        ("flipped labels", "12"), ("margin", "0.1235")):  # fmt: skip
        assert (name, value) in pairwise(cells), name
    assert ("kernel size", "3") in pairwise(cells) and "images in the set kernel" not in cells
    assert "unknown" not in cells and not any("polluted" in cell for cell in cells)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """The page has no script, link or address, and its policy allows only embedded images and its own style."""
    folder = make_run(tmp_path / "run", [metrics_row(0)], HOSTILE, PLOTS)
    write_suspects(folder, HOSTILE)
    reader = read_page(folder, HOSTILE[1])
    used = {tag for tag, _ in reader.tags}
    plain = "html head meta title style body h1 h2 div img table thead tbody tr th td p details summary pre"
    assert used <= set(plain.split())
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert "src" not in attributes or (tag == "img" and (attributes["src"] or "").startswith("data:image/png;base64,"))
    (policy,) = [a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    (style,) = re.findall(r"<style>(.*?)</style>", (folder / "log" / "report.html").read_text(), re.S)
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("name", HOSTILE)
def test_every_text_of_a_run_is_escaped(tmp_path: Path, name: str) -> None:
    """Class, file, run and attack names are shown as text, wherever the page has them."""
    names = [name, "dog"]
    folder = make_run(tmp_path / "run", [metrics_row(0, stage=name)], names)
    (folder / "config.yaml").write_text(f"run: {name}\n", encoding="utf-8", errors="replace")
    write_suspects(folder, names)
    reader = read_page(folder, name)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if name:
        assert reader.texts.count(shown) >= 6  # title twice, class, suspect's name, label and model's label
    text = (folder / "log" / "report.html").read_text(encoding="utf-8")
    assert text.count("<h1>") == 1 and "<script" not in text and not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", text)


@pytest.mark.parametrize("defense", ["asd", "none"])
def test_what_is_unknown_is_left_out(tmp_path: Path, defense: str) -> None:
    """Without test images, ground truth, plots, suspects and confusion matrix the page has fewer sections, but no empty one."""
    unknown = dict.fromkeys(
        ("clean_accuracy", "attack_success_rate", "robust_accuracy", "clean_as_target", "poisoned_in_clean_pool", "split_tpr",
         "split_fpr", *(("clean_pool_size", "polluted_pool_size") if defense == "none" else ()))
    )  # fmt: skip
    reader = read_page(make_run(tmp_path / "run", [metrics_row(0, **unknown, defense=defense)], []))
    text = " ".join(reader.texts)
    for word in ("None", "null", "nan", "ACC", "ASR", "TPR", "Suspect", "Triggered", "by class", "Training"):
        assert word not in text, word
    assert ("clean pool" in text) == (defense == "asd") and "1, 2" in reader.texts
    assert not [tag for tag, _ in reader.tags if tag == "img"]


def test_rows_of_an_earlier_version_are_shown(tmp_path: Path) -> None:
    """For a run that is older than a key of metrics.jsonl, its cells are empty."""
    old = {key: value for key, value in metrics_row(0).items() if not key.startswith("split_")}
    reader = read_page(make_run(tmp_path / "run", [old, metrics_row(1)], []))
    assert "split tpr" in reader.texts and "0.25" in reader.texts


def test_a_matrix_with_an_empty_class(tmp_path: Path) -> None:
    """A class without test images has no accuracy, and a class that is never mistaken for another has no rival."""
    folder = make_run(tmp_path / "run", [metrics_row(0)], ["cat", "dog"])
    matrix = torch.tensor([[0, 0], [0, 5]])
    text = confusion.to_json({"epoch": 0, "class_names": [], **confusion.figures(confusion.ByClass(matrix))})
    (folder / "log" / confusion.FILE).write_text(text)
    reader = read_page(folder)
    assert "100.00 %" in reader.texts and not {"nan %", "None"} & set(reader.texts)
